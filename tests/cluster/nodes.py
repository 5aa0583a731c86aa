"""A cluster of several nodes on this machine: a head and workers as `ray start` starts them, with a token, apart from any other cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "0123456789abcdef" * 4


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Nodes:
    """Start with `with`: the head takes no work. Every node has a folder of its own, as two on one machine would remove each other's code."""

    def __init__(self, *, auth: str = "token") -> None:
        # Short: the path of a socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="dn", dir="/tmp"))
        self.token_file = self.folder / "token"
        self.token_file.write_text(TOKEN)
        self.token_file.chmod(0o600)
        self.auth = auth
        self.processes: list[subprocess.Popen[bytes]] = []
        self.gcs, self.port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def environment(self, **changes: str) -> dict[str, str]:
        (self.folder / "home").mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {
            **kept, "HOME": str(self.folder / "home"), "RAY_AUTH_MODE": self.auth, "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
            "RAY_agent_register_timeout_ms": "100000",  # on a busy machine the agents of a node take longer to start than Ray waits for them
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **changes,
        }  # fmt: skip

    def __enter__(self) -> Nodes:
        try:
            self._start(
                "head", "--head", f"--port={self.gcs}", f"--dashboard-port={self.port}", "--dashboard-host=127.0.0.1", "--num-cpus=0",
                f"--ray-client-server-port={free_port()}", "--labels=role=head",
            )  # fmt: skip
            self._wait(lambda: urllib.request.urlopen(f"{self.address}/api/authentication_mode", timeout=5).close(), 240)
        except BaseException:
            self.__exit__()
            raise
        return self

    def add(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """A node with these options of `ray start`; returns before it has joined."""
        return self._start(name, f"--address=127.0.0.1:{self.gcs}", *options)

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        command = [
            RAY, "start", *options, f"--temp-dir={self.folder / name}", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0", "--block", "--disable-usage-stats",
        ]  # fmt: skip
        if "--head" not in options:
            command.remove("--disable-usage-stats")
        with open(self.folder / f"{name}.log", "wb") as log:
            # As on a node of its own, which has no copy of this code.
            environment = {key: value for key, value in self.environment().items() if key != "PYTHONPATH"}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        self.processes.append(process)
        return process

    def _wait(self, ready, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return ready()
            except OSError:
                assert time.monotonic() < deadline, "\n".join(path.read_text() for path in self.folder.glob("*.log"))
                time.sleep(0.3)

    def summary(self) -> list[dict]:
        """What the head says of its nodes."""
        request = urllib.request.Request(f"{self.address}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return [node["raylet"] for node in json.loads(answer.read())["data"]["summary"]]

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """As when a machine is lost."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
            psutil.wait_procs(family, 10)
        process.wait(10)

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            self.kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)
