"""What a trial runs on a node: the one training function, in a warm process of Ray Tune or on workers of Ray Train below it.

A trial tells Tune `rows`, `quality` and `state`, by which it is scheduled, and hands over what happened since the last time as `points`.
Nothing here loads the teacher.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.tune
import torch

from cluster import training
from cluster.config import ClusterConfig, Group
from cluster.elastic import Notice
from cluster.metrics import Meter, at_work
from distillation import fit, inference, models
from distillation.config import FitConfig
from distillation.errors import DistilleryError
from distillation.loop import Left, LocalSession
from distillation.rows import open_columns
from distillation.storage import Storage
from distillation.students import Probe
from tuning.config import retention

FLUSH_SECONDS = 10.0
"""How long points of a curve wait for the next evaluation before they are handed over alone."""

FAILURES = (DistilleryError, RuntimeError, ValueError, TypeError, LookupError, OSError, ArithmeticError, MemoryError)
"""What a training may raise and the search goes on after; torch's out-of-memory error is a RuntimeError."""


class TakenBack(Exception):
    """A trial made way because its node is about to go."""


def run_trial(config: dict[str, Any]) -> None:
    """The function that Tune calls. config: number, role, bucket, and the `work` that `tuning.search` describes."""
    torch.set_num_threads(_workers(config["work"]).cpus or 1)
    started = time.monotonic()
    reporter = Reporter(config["work"])
    try:
        if config["role"] == "measure":
            reporter.finish("finished", measured=measure(config["work"]))
            return
        key = f"{config['work']['job']}/{config['role']}"
        if _workers(config["work"]).most == 1:
            settings = FitConfig.model_validate(config["work"]["fit"])
            if "adopt" in config["work"]:
                fit.go_on_from(settings, **config["work"]["adopt"])
            meter = Meter(key, "student", len(settings.targets), len(settings.live))
            with at_work(key, "student"), contextlib.closing(meter):
                result = fit.train(settings, TrialSession(reporter, _device(config["work"]), meter), config["work"]["made_from"])
        else:
            result = _train_on_workers(config["work"], reporter, key)
        reporter.finish("finished", seconds=time.monotonic() - started, answered=int(result.get("teacher_rows", 0)))
    except Left:
        raise TakenBack("the node of the trial is taken back; what it did is saved") from None  # Tune tries again, on another one
    except FAILURES as error:
        if isinstance(error, ray.exceptions.RayError):  # the cluster's fault, not the trial's: Tune tries again
            raise
        reporter.finish("failed", seconds=time.monotonic() - started, cause=cause_of(error))


def cause_of(error: BaseException) -> str:
    """One line that says why, without a traceback; the same failure gives the same beginning."""
    if isinstance(error, DistilleryError):
        return str(error)
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1] if "Traceback" in lines[0] else f"{type(error).__name__}: {lines[0]}"


class Reporter:
    """Between a training and Tune: collects points, adds what follows from them, hands them over at evaluations.

    work["teacher"]: metric, the headline of the task, and value, what the teacher has of it; None where that is not known.
    """

    def __init__(self, work: Mapping[str, Any]) -> None:
        self._quality, self._sign = work["quality"], 1.0 if work["maximise"] else -1.0
        self._teacher: Mapping[str, Any] = work["teacher"]
        self._population = work["fit"]["save_rungs"]
        self._points: list[tuple[int, dict[str, float]]] = []
        self._rows, self._score = 0, 0.0
        self._last = time.monotonic()

    def point(self, metrics: Mapping[str, float], step: int) -> None:
        metrics = dict(metrics)
        headline = self._teacher["metric"]
        if headline in metrics and (kept := retention(headline, metrics[headline], self._teacher["value"])) is not None:
            metrics["validation/retention"] = kept
        self._points.append((step, metrics))
        if self._quality in metrics:
            self._rows, self._score = int(metrics["train/rows"]), self._sign * metrics[self._quality]
            self._report(state="running", scored=True)
        elif time.monotonic() - self._last > FLUSH_SECONDS:
            self._report(state="running", scored=False)

    def finish(self, state: str, **more: Any) -> None:
        self._report(state=state, scored=False, **more)

    def _report(self, **more: Any) -> None:
        points, self._points, self._last = self._points, [], time.monotonic()
        said = {"rows": self._rows, "quality": self._score, "points": points, "node": socket.gethostname(), **more}
        if not (self._population and more["scored"]):
            ray.tune.report(said)
            return
        # A population exchanges only what has a checkpoint in Tune. Ours lies in the storage, so an empty one stands for it.
        with tempfile.TemporaryDirectory() as folder:
            ray.tune.report(said, checkpoint=ray.tune.Checkpoint.from_directory(folder))


class TrialSession(LocalSession):
    """The training loop's view of a trial of one worker."""

    def __init__(self, reporter: Reporter, device: str, meter: Meter) -> None:
        super().__init__(device)
        self._reporter, self._meter, self._notice = reporter, meter, Notice()

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        self._meter.point(metrics, step)
        self._reporter.point(metrics, step)

    def leave(self, step: int) -> bool:
        return self._notice.given()


def _train_on_workers(work: Mapping[str, Any], reporter: Reporter, key: str) -> dict[str, float]:
    """Train below this trial with Ray Train. Points arrive in a thread of the mailbox and are handed to Tune from this one.

    If Tune stops the trial it ends this process, and with it goes what it started.
    """
    points: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue()
    outcome: Future[dict[str, float]] = Future()

    def record(_: str, metrics: Mapping[str, float], step: int) -> None:
        points.put((dict(metrics), step))

    def run() -> None:
        try:
            config = FitConfig.model_validate(work["fit"])
            outcome.set_result(training.train(config, work["made_from"], ClusterConfig.model_validate(work["cluster"]), record, key))
        except BaseException as error:  # noqa: BLE001 - handed to the trial's thread, which raises it
            outcome.set_exception(error)
        points.put(None)

    threading.Thread(target=run, name="trainer", daemon=True).start()
    while (point := points.get()) is not None:
        reporter.point(*point)
    return outcome.result()


def _device(work: Mapping[str, Any]) -> str:
    """A process without a GPU of its own may still see those of its node."""
    return "cuda" if _workers(work).gpus else "cpu"


def _workers(work: Mapping[str, Any]) -> Group:
    """Of a trial."""
    return ClusterConfig.model_validate(work["cluster"]).group("student")


def measure(work: Mapping[str, Any]) -> dict[str, float]:
    """Latencies of a student that is not trained, over rows of the validation split; its weights do not matter to them."""
    config = FitConfig.model_validate(work["fit"])
    storage, settings = Storage(config.storage), work["evaluation"]
    models.quiet()
    teacher = fit.model_folder(storage, config.teacher) if config.teacher else None
    assert teacher is not None
    model: Any = fit.untrained(config, storage)
    model = (model.whole_model() if isinstance(model, Probe) else model).eval()
    device = torch.device(_device(work))
    columns = open_columns(storage, config.corpus, "corpus", "validation")
    bf16 = models.use_bf16(settings["precision"], device)
    with tempfile.TemporaryDirectory(prefix="distillery-") as name:
        folder = fit.as_read(config, storage, Path(name))  # ids in the student's own vocabulary
        (found,) = inference.costs(
            [(model.to(device), folder)], columns, config.task, config.labels, settings["batch_tokens"], bf16, device, settings["threads"],
            settings["repeats"], 0,
        )  # fmt: skip
    return {f"cost/{name}": found[name] for name in ("latency_ms_p50", "latency_ms_p95")}
