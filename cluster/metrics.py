"""What a cluster is busy with, as numbers that Prometheus reads from every Ray node (`ray_distillery_...`); what a run reaches is in MLflow.

Labels: job_name, run (a student, the teacher; the trials of a search are one) and role. Ray adds the node and the process.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

from cluster.config import Role

LABELS = ("job_name", "run", "role")
"""Not `job`: Prometheus has one of its own."""

NOW = {
    "perf/rows_per_second": ("distillery_rows_per_second", "Rows that a training sees in a second, over all of its workers."),
    "teacher/rows_per_second": ("distillery_rows_per_second", "Rows that a teacher answers in a second, over all of its workers."),
    "perf/tokens_per_second": ("distillery_tokens_per_second", "Tokens without padding that a training sees in a second."),
    "train/step": ("distillery_step", "Optimizer steps that are done."),
}
"""Gauges: what a point of a run says about the time since the one before."""

SO_FAR = {
    "train/rows": ("distillery_rows", "Rows that trainings saw. What is done again after a failure counts once."),
    "perf/stored_answers": ("distillery_stored_answers", "Rows for which a loss took the teacher's answer from the store."),
    "perf/live_answers": ("distillery_live_answers", "Rows that a teacher itself answered: once into the store, or beside a training."),
    "cluster/restarts": ("distillery_restarts", "How often a group of workers began again."),
    "cluster/wasted_steps": ("distillery_wasted_steps", "Steps that were done and, after a failure, done again."),
}
"""Counters: what a point of a run says about all of the run. In Prometheus their names end with _total."""

WORKERS = ("distillery_workers", "1 for each process that works now.")


REFRESH_SECONDS = 5.0
"""A node forgets a gauge that was not set for 20 seconds, and a long step takes longer."""


RATE_SECONDS = 1.0
"""Between two points that tell how fast a teacher is: points arrive in bundles."""


@cache
def _counter(name: str, told: str) -> Counter:
    return Counter(name, told, LABELS)


class Gauges:
    """Gauges of this process, set again and again until they are taken away."""

    def __init__(self) -> None:
        self._made: dict[str, Gauge] = {}
        self._shown: dict[tuple[str, ...], tuple[Gauge, float, dict[str, str]]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._refresh, name="gauges", daemon=True).start()

    def set(self, name: str, told: str, value: float, labels: dict[str, str]) -> None:
        with self._lock:
            gauge = self._made.setdefault(name, Gauge(name, told, LABELS))
            self._shown[name, *labels.values()] = gauge, value, labels
            gauge.set(value, labels)

    def drop(self, labels: dict[str, str], *names: str) -> None:
        with self._lock:
            for name in names:
                self._shown.pop((name, *labels.values()), None)

    def _refresh(self) -> None:
        while True:
            time.sleep(REFRESH_SECONDS)
            with self._lock:
                for gauge, value, labels in self._shown.values():
                    gauge.set(value, labels)


_gauges = cache(Gauges)
"""One for a process, from the first use on."""


class Meter:
    """Turns the points of a run into metrics of this process.

    key: of the run, JOB/.../RUN. stored, live: teachers whose answers a training takes from the store, and that answer beside it.
    """

    def __init__(self, key: str, role: Role, stored: int = 0, live: int = 0) -> None:
        self._labels = labels(key, role)
        self._stored, self._live = stored, live
        self._seen: dict[str, float] = {}
        self._answered: tuple[float, float] | None = None

    def point(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """Takes a point. Returns it with what follows from it: answers from the store and from live teachers so far, rows a second."""
        full = {**metrics, **self._answers(metrics)}
        for metric, value in ({**full, "train/step": float(step)} if "train/loss" in full else full).items():
            if metric in NOW:
                _gauges().set(*NOW[metric], value, self._labels)
            elif metric in SO_FAR and value > self._seen.get(metric, 0.0):
                _counter(*SO_FAR[metric]).inc(value - self._seen.get(metric, 0.0), self._labels)
                self._seen[metric] = value
        return full

    def _answers(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if "teacher/rows" in metrics:
            rows, now = metrics["teacher/rows"], time.monotonic()
            before = self._answered or (rows, now)
            waited = now - before[1]
            if self._answered is None or waited >= RATE_SECONDS:
                self._answered = rows, now
            rate = {"teacher/rows_per_second": max(0.0, rows - before[0]) / waited} if waited >= RATE_SECONDS else {}
            return {"perf/live_answers": rows, **rate}
        rows = metrics.get("train/rows", 0.0) if "train/loss" in metrics else 0.0
        each = {"perf/stored_answers": self._stored, "perf/live_answers": self._live}
        return {metric: rows * teachers for metric, teachers in each.items() if rows and teachers}

    def close(self) -> None:
        """Nothing is done any more; what was done so far stays."""
        _gauges().drop(self._labels, *(name for name, _ in NOW.values()))


@contextlib.contextmanager
def metered(record: Callable[[str, Mapping[str, float], int], None], payload: Mapping[str, Any], role: Role) -> Iterator[Any]:
    """`record` for the points of a group of workers, which are measured on their way. payload: what the workers are given."""
    fit = payload.get("fit") or {}
    meter = Meter(payload.get("key", ""), role, len(fit.get("targets", ())), len(fit.get("live", ())))
    try:
        yield lambda key, metrics, step: record(key, meter.point(metrics, step), step)
    finally:
        meter.close()


def labels(key: str, role: Role) -> dict[str, str]:
    parts = key.split("/")
    return {"job_name": parts[0], "run": parts[-1], "role": role}


@contextlib.contextmanager
def at_work(key: str, role: Role) -> Iterator[None]:
    """Count this process among those that work, with its node, as long as the block lasts."""
    _gauges().set(*WORKERS, 1.0, labels(key, role))
    try:
        yield
    finally:
        _gauges().drop(labels(key, role), WORKERS[0])
