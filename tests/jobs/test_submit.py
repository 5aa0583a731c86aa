"""A job on a cluster of two nodes with a token, from a machine that has only the client: handed in, followed, stopped, resumed."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.nodes import Nodes
from tests.tiny import model_folder, texts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("torch", "transformers", "mlflow", "datasets", "pyarrow", "pandas", "sklearn", "matplotlib", "optuna", "safetensors", "xxhash")
"""What a machine without them cannot import: the client must do."""

BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


class Client:
    """A user's folder on a machine that has only the client."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder, self.nodes = folder, nodes
        (folder / "absent").mkdir()
        (folder / "absent" / "sitecustomize.py").write_text(BLOCK)
        for name in (".env", "key.pem", "rows.csv"):
            (folder / name).write_text("hunter2")

    def environment(self, **changes):
        path = f"{self.folder / 'absent'}:{ROOT}"
        own = {"PYTHONPATH": path, "RAY_API_SERVER_ADDRESS": self.nodes.address, "COLUMNS": "160"}
        return self.nodes.environment(**own | changes)

    def start(self, *arguments, **changes):
        command = [sys.executable, "-m", "jobs", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment(**changes), **pipes)

    def __call__(self, *arguments, **changes):
        """(exit code, stdout, stderr)."""
        process = self.start(*arguments, **changes)
        out, err = process.communicate(timeout=590)
        assert "Traceback" not in out + err, out + err
        return process.returncode, out, err

    def states(self, name):
        code, out, err = self("status", name, "--json")
        assert code == 0, err
        return {one["id"]: one["state"] for one in json.loads(out)}


@pytest.fixture(scope="module")
def nodes():
    with Nodes() as started:
        started.add("student", "--num-cpus=2", "--labels=role=student")
        yield started


@pytest.fixture(scope="module")
def client(nodes, tmp_path_factory):
    return Client(tmp_path_factory.mktemp("client"), nodes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What every node sees: rows, a model; the storage comes to lie beside them."""
    folder = tmp_path_factory.mktemp("shared")
    model_folder(folder / "model", labels=("a", "b", "c"))
    with open(folder / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *texts(150)])
    return folder


@pytest.fixture(scope="module")
def job(client, shared):
    content = {
        "name": "tiny", "task": {"type": "text_classification", "max_length": 32},
        "corpus": {"type": "files", "train": str(shared / "rows.csv"), "validation": 0.2, "test": 0.2},
        "teacher": {"model": str(shared / "model")}, "student": {"type": "layers", "layers": [0]}, "baseline": False,
        "losses": {"soft": {"type": "forward_kl"}}, "training": {"epochs": 1, "batch_tokens": 512},
        "evaluation": {"repeats": 10, "threads": 1}, "cluster": {"cpus_per_worker": 1, "storage": str(shared / "storage")},
    }  # fmt: skip
    (client.folder / "job.yaml").write_text("# as it was written\n" + yaml.safe_dump(content))
    return "job.yaml"


def printed(out, title):
    return re.search(rf"^{title} +(.*)$", out, re.M)[1]


def until(ready, seconds=240):
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def test_a_failing_job_by_hand_and_by_us_is_the_same_and_carries_its_exit_code(client, nodes, job):
    wrong = (job, "name=wrong", "corpus.train=/nowhere/rows.csv", "task.text=a'b; $(id)")
    code, out, err = client("submit", *wrong, "--dry-run")
    assert (code, err) == (0, "")
    command = printed(out, "stands for")
    assert "wrong-run" in command
    assert client("status", "--json") == (0, "[]\n", ""), "nothing was handed in"
    assert client("status")[1].startswith(f"no jobs at {client.nodes.address} yet")
    environment = {name: value for name, value in client.environment().items() if name not in ("PYTHONPATH", "RAY_AUTH_MODE")}
    subprocess.run(command, shell=True, check=True, env=environment, capture_output=True, cwd="/")
    code, out, _ = client("logs", "wrong", "-f")
    assert code == 3
    assert "error[DST-3402]" in out
    code, out, err = client("submit", *wrong, "-f")
    assert (code, printed(out, "submits")) == (3, "wrong-run-r2, goes on from where wrong-run ended")
    assert client.states("wrong") == {"wrong-run": "FAILED", "wrong-run-r2": "FAILED"}
    by_hand, by_us = (info(nodes, one) for one in ("wrong-run", "wrong-run-r2"))
    for field in ("entrypoint", "metadata", "runtime_env"):
        assert by_hand[field] == by_us[field], field
    assert shlex.split(by_us["entrypoint"])[-2:] == ["task.text=a'b; $(id)", "cluster.address=auto"]
    assert by_us["driver_node_id"] == head_id(nodes)


def info(nodes, id_):
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {nodes.token_file.read_text()}"}
    return JobSubmissionClient(nodes.address, headers=headers).get_job_info(id_).model_dump()


def head_id(nodes):
    return next(one["nodeId"] for one in nodes.summary() if one["isHeadNode"])


def test_no_data_and_no_secret_travels(client, nodes, job):
    packages = [path for path in nodes.folder.rglob("_ray_pkg_*") if path.is_dir()]
    assert packages
    files = [path for one in packages for path in one.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} == {".py", ".yaml", ".css", ".js"}
    assert not any("hunter2" in path.read_text() for path in files)
    assert {path.name for one in packages for path in one.iterdir()} == {
        "distillation", "cluster", "tuning", "jobs", "wrong.yaml"
    }  # fmt: skip


def test_a_job_is_shown_refused_stopped_resumed_and_done(client, nodes, job):
    assert client("submit", job)[0] == 0
    code, out, _ = client("submit", job)
    assert (code, out.split()[:3]) == (0, ["runs", "already", "tiny-run,"])
    code, _, err = client("submit", job, "training.epochs=2", "losses.soft.temperature=3")
    assert code == 8
    assert "found losses.soft.temperature: 2.0 -> 3.0; training." in err
    until(lambda: "\ncorpus\n" in client("logs", "tiny")[1])
    code, out, _ = client("stop", "tiny")
    assert (code, printed(out, "stopped")) == (0, "tiny-run; its driver ended cleanly")
    assert client.states("tiny") == {"tiny-run": "STOPPED"}
    assert client("logs", "tiny", "-f")[0] == 75
    code, out, _ = client("stop", "tiny")
    assert out.startswith("ended         tiny-run, stopped since")
    code, out, err = client("resume", "tiny", "-f")
    assert code == 0, out + err
    assert printed(out, "submits") == "tiny-run-r2, goes on from where tiny-run ended"
    assert "done export and report" in out
    assert out.count("Running entrypoint") == 1, "no line is shown twice"
    code, out, _ = client("submit", job)
    assert (code, out.split()[:2]) == (0, ["succeeded", "tiny-run-r2,"])
    code, out, _ = client("resume", "tiny")
    assert (code, out.split()[:2]) == (0, ["succeeded", "tiny-run-r2,"])
    code, out, _ = client("status")
    assert re.search(r"^tiny +tiny-run +stopped .* distill resume tiny *$", out, re.M)
    assert re.search(r"^wrong +wrong-run +failed .* 3 +error\[DST-3402\]", out, re.M)


def test_plan_and_doctor_of_the_cluster(client, job):
    code, out, err = client("plan", job, "training.epochs=3", "--address", client.nodes.address)
    assert code == 0, err
    assert re.search(r"^targets +in the store ", out, re.M), "as the head sees it"
    assert re.search(r"^ok +student +1 workers of 1 CPUs and 0 GPUs ", out, re.M)
    code, out, err = client(
        "plan",
        job,
        "cluster.student={workers: 3, labels: {role: student}}",
        "cluster.cpus_per_worker=null",
        "--address",
        client.nodes.address,
    )
    assert code == 6
    assert "error[DST-6002]" in err
    code, out, err = client("doctor", job, "--address", client.nodes.address)
    assert code == 0, out + err
    assert re.search(r"^ok +nodes +2 with 2 CPUs, 0 GPUs", out, re.M)
    assert re.search(r"^ok +this machine +code \w{12} *$", out, re.M)
    assert re.search(r"^ok +storage .*every node reads what the head writes", out, re.M)
    assert re.search(r"^ok +versions +python \S+, ray 2\.60\.\d+, torch .* on every node", out, re.M)


def test_what_goes_wrong_on_the_way_is_one_line(client, job):
    for changes, exit_code, code in (
        ({"RAY_AUTH_TOKEN": "wrong"}, 6, "6021"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, 6, "6021"),
        ({"RAY_API_SERVER_ADDRESS": ""}, 2, "2060"),
    ):
        found, _, err = client("status", **changes)
        assert (found, err.count("\n")) == (exit_code, 1), err
        assert err.startswith(f"error[DST-{code}]")
    code, _, err = client("logs", "nothing")
    assert code == 2
    assert "expected tiny, wrong but found nothing" in err
    assert os.listdir(client.folder / "absent") == ["sitecustomize.py"]
