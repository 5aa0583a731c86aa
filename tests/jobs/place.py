"""A user's folder: a job of seconds, and the commands that are run there."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from distillation.storage import Storage
from jobs.config import load
from jobs.plan import Plan, make_plan
from tests.tiny import model_folder, texts

ROOT = Path(__file__).resolve().parents[2]

JOB = {
    "name": "tiny",
    "task": {"type": "text_classification", "max_length": 32},
    "corpus": {
        "type": "files", "train": ["labelled.csv", "unlabelled.jsonl"], "validation": "validation.csv", "test": "test.jsonl",
        "part_rows": 64,
    },
    "teacher": {
        "model": "./model",
        "training": {"epochs": 8, "batch_tokens": 512, "learning_rate": 3e-3, "log_every": 1},
        "targets": {"features": {"layers": [1], "pooled": True}},
    },
    "students": {"cut": {"type": "layers", "layers": [0, 3]}, "probe": {"type": "probe"}},
    "losses": {"hard": {"type": "cross_entropy", "weight": 0.3}, "soft": {"type": "forward_kl", "weight": 0.7, "temperature": 2.0}},
    "training": {
        "epochs": 2, "batch_tokens": 256, "learning_rate": 3e-3, "log_every": 1, "evaluate_every": 10, "checkpoint_every": 10,
        "precision": "fp32",
    },
    "evaluation": {"repeats": 10, "threads": 1},
    "cluster": {"cpus_per_worker": 1, "storage": "storage"},
}  # fmt: skip


@dataclass
class Place:
    """A user's folder, from which jobs are run."""

    folder: Path

    @property
    def storage(self):
        return Storage(str(self.folder / "storage"))

    def environment(self, **changes):
        # As on a user's machine: Ray is not told how to authenticate.
        kept = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        return {**kept, "HOME": str(self.folder / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "120", **changes}

    def start(self, *arguments, **changes):
        command = [sys.executable, "-m", "jobs", *arguments]
        # A session of its own, so that Ctrl-C can be sent to all of it as a terminal does.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment(**changes), **pipes)

    def run(self, *arguments, **changes):
        """Output and seconds of a command that must succeed."""
        started = time.monotonic()
        process = self.start(*arguments, **changes)
        output, _ = process.communicate(timeout=560)
        assert process.returncode == 0, output
        assert "Traceback" not in output
        return output, time.monotonic() - started

    def plan(self, *overrides) -> Plan:
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            return make_plan(load("job.yaml", overrides))
        finally:
            os.chdir(before)


def furnished(folder):
    """A folder with a tiny model, rows with and without labels, and job.yaml."""
    (folder / "home").mkdir()
    model_folder(folder / "model", labels=("x", "y"))
    rows = texts(460)
    for name, some in {"labelled.csv": rows[:200], "validation.csv": rows[320:370]}.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *some])
    for name, some in {"unlabelled.jsonl": [(text, None) for text, _ in rows[200:320]], "test.jsonl": rows[370:]}.items():
        (folder / name).write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in some))
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    return Place(folder)


def killed(process):
    """SIGKILL for a command, then for all that it started, as when a machine is lost."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, 20)
