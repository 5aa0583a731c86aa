"""Ray Tune: run what the director asks for, several trials at once, on processes that go from trial to trial.

Tune's own files lie in a folder that is removed afterwards, and nothing is restored from them: they are pickles, lag behind by seconds, and
know no conditions. A search resumes from its ledger.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cluster.config import ClusterConfig
from cluster.metrics import Meter
from cluster.session import cpus_per_worker, does_not_fit, nodes_with, places
from distillation.errors import ClusterError
from distillation.storage import Storage
from tuning.config import SearchConfig
from tuning.director import Director, Job
from tuning.trials import cause_of, run_trial

REFRESH_SECONDS = 0.5
STOP_SECONDS = 10.0
"""For Tune to end its processes after an interruption, before Ray goes away under it."""


def require_room(config: SearchConfig, cluster: ClusterConfig) -> int:
    """Trials that the cluster can run at once, as set or as many as fit. Raises ClusterError where there is no room for one.

    On a cluster that starts nodes when asked, search.concurrent has to be set: it counts then, whatever nodes there are.
    """
    on_demand = cluster.address is not None and config.concurrent
    labels = cluster.group("student").labels
    nodes = nodes_with(labels)
    room = places(nodes, config.cpus_per_worker, config.gpus_per_worker) // config.workers_per_trial
    if room == 0 and not on_demand:
        workers, ask = f"{config.workers_per_trial} workers a trial", "search.workers_per_trial or what each one asks for"
        do = f"Lower {ask}; set search.concurrent if nodes start on demand"
        raise does_not_fit("search", workers, config.cpus_per_worker, config.gpus_per_worker, nodes, do, labels)
    cpus_per_worker(cluster, "student")
    return on_demand or min(room, config.concurrent or room)


def run(
    director: Director,
    scheduler: TrialScheduler,
    cluster: ClusterConfig,
    concurrent: int,
    context: dict[str, Any],
    look: Callable[[], None],
    trial: Callable[[dict[str, Any]], None] = run_trial,
) -> None:
    """Run the director's work to its end; `look` is called from time to time from this thread. Raises what ended the search early.

    context: what every trial gets besides its own work. trial: what runs one, in an importable module.
    """
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a stopped trial first ends its step and its checkpoint
        "TUNE_ONLY_STORE_CHECKPOINT_SCORE_ATTRIBUTE": "1",
        "TUNE_WARN_THRESHOLD_S": "10",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # whole tracebacks of what the ledger has as a cause
    storage, name, config = Storage(cluster.storage), f"search-{uuid.uuid4().hex[:12]}", director.config
    link = Link(director, context)
    tuner = tune.Tuner(
        tune.with_resources(trial, _resources(config, cluster)),
        tune_config=tune.TuneConfig(
            search_alg=Asking(link), scheduler=scheduler, num_samples=-1,
            max_concurrent_trials=config.trials if config.scheduler.type == "pbt" else concurrent,  # a population is there as a whole
            reuse_actors=config.workers_per_trial == 1, trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=storage.path(".ray"), storage_filesystem=storage.arrow, verbose=0, callbacks=[Telling(link)],
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
        ),
    )  # fmt: skip
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(tuner.fit())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, which raises it
            outcome.set_exception(error)

    # In a thread: in the main one Tune would take Ctrl-C for itself, and the board would wait for Tune.
    thread = threading.Thread(target=fit, name="tune", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(REFRESH_SECONDS)
            look()
        outcome.result()
    except (tune.TuneError, ray.exceptions.RayError) as error:
        raise director.failure or ClusterError(
            "DST-6007", "Ray Tune stopped", where=name, found=cause_of(error), do="Search again: it goes on where it stopped"
        ) from error
    finally:
        director.close()
        thread.join(STOP_SECONDS)
        storage.delete(f".ray/{name}")
    if director.failure is not None:
        raise director.failure


def _resources(config: SearchConfig, cluster: ClusterConfig) -> Any:
    if config.workers_per_trial > 1:
        # The workers ask for theirs themselves; a hundredth of a CPU taken here would be missing there. Beside the driver: it outlives them.
        return PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    labels = cluster.group("student").labels
    selector: dict[str, Any] = {"bundle_label_selector": [labels]} if labels else {}
    return PlacementGroupFactory([{"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}], **selector)


def _last_cause(file: str | None) -> str:
    """What Ray wrote of the last failure of a trial, in one line: the end of a traceback, or how a process died."""
    try:
        text = Path(file or "").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "its process died"
    lines = [line.strip() for line in text.rpartition("Failure #")[2].splitlines()[1:] if line.strip()]
    if any("Traceback" in line for line in lines):
        return lines[-1]
    detail = [line.partition("Worker exit detail: ")[2] for line in lines if "Worker exit detail: " in line]
    return " ".join([*lines[:1], *detail[:1]])[:500] or "its process died"


class Link:
    """What Tune's objects know of the search. Tune writes those to disk when it starts; this goes along as nothing."""

    def __init__(self, director: Director, context: dict[str, Any]) -> None:
        self.director, self.context = director, context
        self.numbers: dict[str, int | None] = {}
        """Of the ledger, by Tune's trial id."""

    def config(self, job: Job) -> dict[str, Any]:
        return {
            "number": job.number, "role": job.role, "bucket": job.bucket, "rows": job.rows, "point": dict(job.point),
            "work": {**self.context, **job.work},
        }  # fmt: skip

    def __reduce__(self) -> Any:
        return (object, ())


class Asking(Searcher):
    """Tune's way to ask for the next trial."""

    def __init__(self, link: Link) -> None:
        super().__init__(metric="quality", mode="max")
        self._link = link

    def suggest(self, trial_id: str) -> Any:
        job = self._link.director.next()
        if job == "done":
            return Searcher.FINISHED
        if not isinstance(job, Job):
            return None
        self._link.numbers[trial_id] = job.number
        return self._link.config(job)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """`Telling` hears of it too, with the cause."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a search is not restored from Tune's files")


class Interrupted(Exception):
    """Ends Tune's loop: nobody listens any more."""


class Telling(tune.Callback):
    """Tune's way to say what came of a trial."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        Meter(f"{self._link.context['job']}/trial", "student").point({"cluster/restarts": 1.0}, 0)

    def on_step_begin(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        if self._link.director.closed:
            raise Interrupted

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any) -> None:
        self._link.director.result(self._link.numbers[trial.trial_id], result)
        # Tune keeps the last result of every trial for good.
        result.pop("points", None)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._link.director.gone(self._link.numbers.pop(trial.trial_id))
        trial.config = {name: trial.config[name] for name in ("number", "role", "bucket")}
        # Averages over the last results of each metric, kept for good: half of what a trial costs in memory.
        trial.run_metadata.metric_analysis, trial.run_metadata.metric_n_steps = {}, {}

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._link.director.gone(self._link.numbers.pop(trial.trial_id), _last_cause(trial.error_file))
