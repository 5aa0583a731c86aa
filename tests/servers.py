"""Servers that tests and benchmarks start and kill: MLflow on a database, and PostgreSQL from Debian."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


class _Process:
    """A server in a process group of its own, that can be killed with all that it has started."""

    process: subprocess.Popen[bytes] | None = None

    def launch(self, command: Sequence[str], log: Path, **options: Any) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **options)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


class Server(_Process):
    """What `distill ui` starts on a database: MLflow, on a port that stays the same when it is started again."""

    def __init__(self, database: str, folder: Path) -> None:
        self.port = free_port()
        self.uri, self.database, self.folder = f"http://127.0.0.1:{self.port}", database, folder

    def start(self) -> None:
        script = "import sys; from cluster.links import ui; sys.exit(ui(sys.argv[1], sys.argv[2], int(sys.argv[3])))"
        command = [sys.executable, "-c", script, self.database, str(self.folder / "artifacts"), str(self.port)]
        self.launch(command, self.folder / "server.log", cwd=ROOT)
        until(self._healthy, 60)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it to everything in the foreground."""
        self.signal(signal.SIGINT)
        assert self.process is not None
        assert self.process.wait(20) == 0
        self.process = None

    def hang(self) -> None:
        """It accepts and never answers."""
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def _healthy(self) -> bool:
        assert self.process is None or self.process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def postgres_binaries() -> Path | None:
    """Folder of initdb and postgres; Debian leaves them out of PATH."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    return folders[-1] if folders else None


def without_postgres() -> str:
    """Why PostgreSQL cannot be used here; empty if it can."""
    if postgres_binaries() is None:
        return "no PostgreSQL: apt-get install postgresql"
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        return "no driver for PostgreSQL: pip install psycopg2-binary"
    if os.geteuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


class Postgres(_Process):
    """PostgreSQL in a folder of its own, reached by a socket that only its user and root can open. Not for data worth keeping: no fsync."""

    def __init__(self) -> None:
        self.binaries = postgres_binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path may have 107 bytes
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        command = ["-D", self.folder / "data", "-U", "distillery", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        self._run("initdb", *command)

    def start(self) -> None:
        settings = {"listen_addresses": "", "unix_socket_directories": self.folder, "fsync": "off", "max_connections": 60}
        options = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        command = [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), *options]
        self.launch(command, self.folder.with_suffix(".log"), cwd=self.folder, **self._user)
        until(lambda: self._run("pg_isready", "-q", "-h", self.folder, "-d", "postgres", check=False) == 0, 30)

    def uri(self, database: str) -> str:
        """For SQLAlchemy. The driver is named, because its default is another one from 2.1 on."""
        return f"postgresql+psycopg2:///{database}?host={self.folder}&user=distillery"

    def create(self, database: str, template: str = "template1") -> str:
        self.query("postgres", f"CREATE DATABASE {database} TEMPLATE {template}")
        return self.uri(database)

    def query(self, database: str, sql: str) -> list[tuple[Any, ...]]:
        import psycopg2

        connection = psycopg2.connect(host=str(self.folder), user="distillery", dbname=database)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_suffix(".log").unlink(missing_ok=True)

    def _run(self, program: str, *arguments: object, check: bool = True) -> int:
        command = [str(self.binaries / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, **self._user)
        assert done.returncode == 0 or not check, done.stderr
        return done.returncode
