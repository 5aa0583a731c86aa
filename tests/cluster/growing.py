"""A cluster of one-CPU nodes on this machine that come and go while a student is trained, and what every worker did in every step."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.tune
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig
from cluster.training import TrainSession, run_workers
from distillation import fit
from distillation.batches import plan_epoch
from distillation.config import FitConfig
from distillation.rows import Rows
from tuning import trials

ROOT = Path(__file__).resolve().parents[2]
PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto."""
FAST, SLOW = "0.02", "1.0"
"""Seconds a step, in general and while nodes come and go."""


def environment(home: Path) -> dict[str, str]:
    """Of the driver and of the nodes: what `cluster.session.connect` sets, and where workers find the modules of the tests."""
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_worker_niceness": "0"}
    return {"HOME": str(home), "PYTHONPATH": str(ROOT), **settings}


class Nodes:
    """Nodes of one CPU, beside a head that works for nobody."""

    def __init__(self, count: int, include_dashboard: bool = False) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ry", dir="/tmp", ignore_cleanup_errors=True)  # paths of sockets have to be short
        head = {
            "num_cpus": 0,
            "include_dashboard": include_dashboard,
            "object_store_memory": 100 << 20,
            "include_log_monitor": False,
            "temp_dir": self.folder.name,
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self.add(count)
        self.cluster.wait_for_nodes(timeout=300)

    def add(self, count: int = 1, **changes: Any) -> None:
        """They are on their way: whoever waited for all there were would wait for those that were taken back, too."""
        values = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_log_monitor": False, **changes}
        self.nodes += [self.cluster.add_node(wait=False, **values) for _ in range(count)]

    def kill(self, count: int = 1) -> None:
        """As when a machine loses its power."""
        for _ in range(count):
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def notify(self, count: int = 1, seconds: int = 120) -> None:
        """As a cloud says that it will take machines back."""
        client, deadline = ray._raylet.GcsClient(address=self.cluster.address), int((time.time() + seconds) * 1000)
        for _ in range(count):
            accepted, why = client.drain_node(self.nodes.pop(0).node_id, PREEMPTION, "taken back", deadline)
            assert accepted, why

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()
        self.folder.cleanup()


@contextmanager
def nodes(count: int, **changes: Any) -> Iterator[Nodes]:
    found = Nodes(count, **changes)
    try:
        ray.init(address=found.cluster.address, log_to_driver=False)
        yield found
    finally:
        found.close()


# -------------------------------------------------------------------------------------------------------------- workers


class Noting(TrainSession):
    """Writes down which rows this worker reads at which step, into a folder of `*.jsonl`; takes the time that the file `pace` there says."""

    def __init__(self, box: Any, key: str, folder: str) -> None:
        super().__init__(box, key)
        self._pace, self._file, self.step = Path(folder) / "pace", Path(folder) / f"{time.time_ns()}-{os.getpid()}.jsonl", 0

    def leave(self, step: int) -> bool:
        time.sleep(float(self._pace.read_text() or SLOW))
        self.step = step + 1
        return super().leave(step)

    def note(self, ids: Sequence[str]) -> None:
        line = {"step": self.step, "rank": self.rank, "workers": self.world_size, "ids": list(ids), "time": time.time()}
        with open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")


def noting_worker(payload: dict[str, Any]) -> dict[str, float]:
    session, plain = Noting(payload["box"], payload["key"], payload["notes"]), Rows.batch

    def batch(self: Rows, rows: np.ndarray) -> Any:
        if session.step:
            session.note(self.ids(rows))
            session.step = 0  # what is read after a step is the validation split
        return plain(self, rows)

    Rows.batch = batch  # type: ignore[method-assign]
    return fit.train(FitConfig.model_validate(payload["fit"]), session, {})


def trial(config: dict[str, Any], cluster: dict[str, Any], mark: Path) -> int | None:
    """A trial of a search, slowly, without Tune. The steps that it had done when it made way, into `mark` as it goes."""

    def point(self: Any, metrics: Mapping[str, float], step: int) -> None:
        mark.write_text(str(step))
        time.sleep(0.3)

    trials.Reporter.point, told = point, []  # type: ignore[method-assign]
    ray.tune.report = told.append
    teacher = {"metric": "validation/accuracy", "value": None}
    work = {
        "fit": config,
        "cluster": cluster,
        "quality": "validation/accuracy",
        "maximise": True,
        "teacher": teacher,
        "job": "j",
        "made_from": {},
    }
    try:
        trials.run_trial({"role": "trial", "work": work})
    except trials.TakenBack:
        assert not told, "it has neither finished nor failed"
        return int(mark.read_text())
    return None


# ---------------------------------------------------------------------------------------------------------------- notes


@dataclass
class Notes:
    """What all workers wrote down, in the order of time."""

    lines: list[dict[str, Any]]

    @property
    def sizes(self) -> list[int]:
        """Of the groups, one after the other."""
        found: list[int] = []
        for line in self.lines:
            if not found or found[-1] != line["workers"]:
                found.append(line["workers"])
        return found

    def wasted(self) -> int:
        """Steps that were done again."""
        done = [line["step"] for line in self.lines if line["rank"] == 0]
        return len(done) - len(set(done))

    def rows(self, step: int) -> list[str]:
        """Ids of the rows that the last group to do a step read, over all of its workers, sorted."""
        these = [line for line in self.lines if line["step"] == step]
        last: dict[int, list[str]] = {}
        for line in these:
            last[line["rank"]] = line["ids"]
        return sorted(i for rank, ids in last.items() if rank < these[-1]["workers"] for i in ids)


def read_notes(folder: Path) -> Notes:
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return Notes(sorted(lines, key=lambda line: line["time"]))


def every_row_once(notes: Notes, rows: Rows, batch_tokens: int, epochs: int) -> int:
    """Check the steps that count against the plan of the epochs. Returns how many there are."""
    step = 0
    for epoch in range(epochs):
        plan = plan_epoch(rows.lengths, np.arange(len(rows)), batch_tokens, 0, epoch)
        seen: list[str] = []
        for number in range(plan.steps):
            step += 1
            found = notes.rows(step)
            assert found == sorted(rows.ids(plan.batch(number))), step
            seen += found
        assert sorted(seen) == sorted(rows.ids(np.arange(len(rows))))
    return step


def losses(points: Sequence[tuple[int, Mapping[str, float]]]) -> dict[int, float]:
    """Last loss that was told of every step."""
    return dict(sorted((step, metrics["train/loss"]) for step, metrics in points if "train/loss" in metrics))


class Events:
    """Nodes that come and go during a training: each when it has come to a step, and the next when as many workers as expected go on."""

    def __init__(self, folder: Path, *events: tuple[int, Callable[[], Any], int]) -> None:
        """events: (step, what happens, workers after it)."""
        self._pace, self._events = folder / "pace", events
        self._pace.write_text(FAST)
        self._step, self._size = -1, 0
        self.points: list[tuple[int, Mapping[str, float]]] = []

    def undergo(self, payload: Mapping[str, Any], cluster: ClusterConfig) -> dict[str, float]:
        """Train meanwhile. In a thread, because Ray starts nodes in the main one only."""
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(run_workers, noting_worker, payload, cluster, "student", self._record)
            for step, event, size in self._events:
                self._wait(training, lambda step=step: self._step >= step)
                self._pace.write_text(SLOW)
                event()
                self._wait(training, lambda size=size: self._size == size)
                self._pace.write_text(FAST)
            result: dict[str, float] = training.result(120)
            return result

    def _record(self, key: str, metrics: Mapping[str, float], step: int) -> None:
        self.points.append((step, metrics))
        if "train/loss" in metrics:
            self._step = step
        self._size = int(metrics.get("cluster/workers", self._size))

    def _wait(self, training: Future[Any], ready: Callable[[], bool]) -> None:
        while not ready():
            if training.done():
                raise AssertionError(f"the training ended at step {self._step} with {self._size} workers: {training.exception()}")
            time.sleep(0.02)
