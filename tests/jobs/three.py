"""One job and one search, on one node and on a cluster of three: what the test compares and the benchmark times."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jobs.config import load
from jobs.plan import make_plan
from jobs.search import folder_of
from tests.cluster.nodes import Nodes
from tests.jobs.place import JOB, Place
from tests.servers import ROOT, until
from tuning.ledger import Search, read_search

ONE, TWO = {"type": "layers", "layers": [0]}, {"type": "layers", "layers": [0, 3]}
GROUPS = {"teacher": {"labels": {"role": "teacher"}}, "data": {"labels": {"role": "teacher"}}}
"""The student's workers and the trials run anywhere."""


def job_of(place: Place, storage: str, trials: int, uri: str | None, groups: dict[str, Any]) -> dict[str, Any]:
    """Absolute paths, because nothing but code travels to a cluster."""
    corpus = {**JOB["corpus"], "train": [str(place.folder / name) for name in JOB["corpus"]["train"]]}
    corpus |= {split: str(place.folder / JOB["corpus"][split]) for split in ("validation", "test")}
    search = {
        "space": {
            "student": {"choice": [ONE, TWO]},
            "losses.soft.weight": {"uniform": [0.1, 1.0]},
            "training.learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
        },
        "trials": trials, "keep": {"validation/accuracy": 0.5}, "finalists": 1, "seeds": 1,
    }  # fmt: skip
    return {
        **{name: value for name, value in JOB.items() if name != "students"},
        "name": "three", "corpus": corpus, "teacher": {**JOB["teacher"], "model": str(place.folder / "model")},
        "student": TWO, "search": search, "tracking": {"uri": uri, "log_model": False},
        "cluster": {"workers": 2, "cpus_per_worker": 1, "storage": str(place.folder / storage), **groups},
    }  # fmt: skip


@dataclass
class Outcome:
    """What a job and a search left in a storage."""

    file: Path
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    @property
    def job(self) -> Any:
        return load(str(self.file))

    @property
    def search(self) -> Search:
        return read_search(folder_of(self.job) / "ledger.jsonl")

    @property
    def journals(self) -> list[Path]:
        """Of the job and of the search."""
        return [self.job.workspace / "journal.jsonl", folder_of(self.job) / "journal.jsonl"]

    def files(self) -> dict[str, str]:
        """SHA-256 of every part of the corpora and target stores, by its path."""
        root = Path(self.job.cluster.storage)
        paths = [path for kind in ("corpora", "targets") for path in (root / kind).rglob("*.arrow")]
        assert paths
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def numbers(self) -> dict[str, float]:
        """Everything that was measured and is not a time, of the job and of the search."""
        found = {}
        for e in [*json.loads((make_plan(self.job).results / "evaluation.json").read_text()), *self.search.evaluations]:
            found |= {f"{e['name']}/{name}": value for name, value in {**e["quality"], **e["against"]}.items()}
        for trial in self.search.trials:
            if trial.task.role != "measure":
                name = f"{trial.task.role}/{trial.task.fingerprint}"
                found |= {f"{name}/{metric}": value for metric, value in trial.metrics.items() if not _timed(metric)}
        return {name: value for name, value in found.items() if isinstance(value, float | int)}

    def choice(self) -> tuple[Any, ...]:
        """The champion, why it was chosen, and the front."""
        search = self.search
        made = [search.trials[number].task.fingerprint for number in (search.choice["trial"], search.choice["refit"])]
        return (search.choice["reason"], made, sorted(search.trials[number].task.fingerprint for number in search.choice["front"]))


def _timed(metric: str) -> bool:
    return metric.startswith(("perf/", "cost/latency"))


def differences(one: Outcome, other: Outcome) -> list[str]:
    """What is not the same: bytes of the stores, numbers beyond 1e-6, the choice."""
    found = [f"file {name}" for name, _ in set(one.files().items()) ^ set(other.files().items())]
    mine, theirs = one.numbers(), other.numbers()
    found += [f"number {name} is there once" for name in mine.keys() ^ theirs.keys()]
    both = mine.keys() & theirs.keys()
    found += [
        f"{name}: {mine[name]} and {theirs[name]}"
        for name in both
        if not math.isclose(mine[name], theirs[name], rel_tol=1e-6, abs_tol=1e-6)
    ]
    choices = [one.choice(), other.choice()]
    return found + ([f"choice: {choices}"] if choices[0] != choices[1] else [])


def on_one_node(place: Place, trials: int) -> Outcome:
    """As on a laptop: no cluster, MLflow on SQLite."""
    file = place.folder / "one.yaml"
    file.write_text(yaml.safe_dump(job_of(place, "one", trials, None, {})))
    outcome, started = Outcome(file), time.monotonic()
    for verb in ("run", "search"):
        process = place.start(verb, str(file))
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
        outcome.said.append(said)
    outcome.seconds = time.monotonic() - started
    return outcome


@contextlib.contextmanager
def three_nodes() -> Iterator[Nodes]:
    """A head that takes no work, and two nodes that do."""
    with Nodes() as nodes:
        for role in ("teacher", "student"):
            join(nodes, role, role)
        yield nodes


def join(nodes: Nodes, name: str, role: str) -> subprocess.Popen[bytes]:
    """Add a node and wait until it belongs to the cluster."""
    process, log = nodes.add(name, "--num-cpus=2", f"--labels=role={role}"), nodes.folder / f"{name}.log"
    until(lambda: process.poll() is not None or "Ray runtime started" in log.read_text(), 120)
    assert process.poll() is None, log.read_text()
    return process


def on_three_nodes(
    place: Place, nodes: Nodes, trials: int, uri: str, meanwhile: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """Submitted from outside, both followed to their end. meanwhile: called when the search was handed in."""
    file = place.folder / "three.yaml"
    file.write_text(yaml.safe_dump(job_of(place, "three", trials, uri, GROUPS)))
    outcome, started = Outcome(file), time.monotonic()
    for options in ([], ["--search"]):
        command = [sys.executable, "-m", "jobs", "submit", *options, "-f", "--address", nodes.address, str(file)]
        environment = nodes.environment(PYTHONPATH=str(ROOT), COLUMNS="120")
        process = subprocess.Popen(command, cwd=place.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        helper = threading.Thread(target=meanwhile, args=(outcome,), daemon=True)
        if options:
            helper.start()
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
        outcome.said.append(said)
    outcome.seconds = time.monotonic() - started
    helper.join(60)
    return outcome


def ended(outcome: Outcome, trials: int) -> None:
    """Wait until so many trials of the search have ended."""
    ledger = folder_of(outcome.job) / "ledger.jsonl"
    until(lambda: ledger.is_file() and ledger.read_text().count('"kind": "end"') >= trials, 300)
