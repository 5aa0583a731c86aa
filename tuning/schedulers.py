"""Which trials go on: Ray Tune's schedulers, made to compare like with like and to remember what a ledger says.

A trial is looked at when it first reports `rows` at or beyond a rung: if its role is `trial`, its state `running`, and it has not seen all
its rows. Everything else goes on. Rungs are given to Ray by their number, so a batch that runs over a rung, or a trial that repeats itself
after an interruption, changes nothing.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler

from distillation.errors import ConfigError, InputError
from tuning import ledger
from tuning.config import QUALITY, Choice, Integer, KnobConfig, LogUniform, SearchConfig, Uniform
from tuning.space import Point, identity, sample, values

CONTINUE, PAUSE = TrialScheduler.CONTINUE, TrialScheduler.PAUSE
TIME, SCORE = "rung", "quality"
"""What Ray's schedulers are told: the number of a rung, and a quality of which more is better."""

REDRAW = 0.25
"""Chance that a knob is drawn anew when a population explores, as in Ray's own."""
FACTORS = (0.8, 1.2)

Rebuild = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes what follows from the `point` of a trial's config anew, in a copy. Raises ConfigError or InputError where it makes no valid job."""


def rungs(config: SearchConfig, rows: int) -> tuple[int, ...]:
    """Rows seen at which a trial has to report its quality for its scheduler, rising, all below `rows`, those of a whole trial."""
    match config.scheduler.type:
        case "asha":
            shares: Iterator[float] = (config.scheduler.grace * config.scheduler.reduction**k for k in itertools.count())
        case "median":
            shares = (share for share in _multiples(config.scheduler.every) if share >= config.scheduler.grace - 1e-9)
        case "pbt":
            shares = _multiples(config.scheduler.every)
        case _:
            shares = iter(())
    # Rounded first: 0.1 * 3 of 1,000 rows are 300, not 301.
    marks = (max(1, math.ceil(round(share * rows, 6))) for share in shares)
    return tuple(dict.fromkeys(itertools.takewhile(lambda mark: mark < rows, marks)))


def _multiples(share: float) -> Iterator[float]:
    return (share * k for k in itertools.count(1))


class Buckets:
    """Numbers for students of about the same cost: the first student that fits nowhere opens a bucket, others join the nearest one.

    No boundary is fixed beforehand, so none lies between two sizes of a search that are alike. What it cannot do: members of one bucket
    may differ by almost factor squared (each by less than the factor from the one that opened it); two alike that lie half-way between two
    buckets may still be parted; and buckets depend on the order of asking. The same cost always gets the same bucket, and who asks in the
    order of a ledger again gets the same numbers.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._opened: list[float] = []
        self._known: dict[float, int] = {}

    def of(self, flops: float) -> int:
        if flops not in self._known:
            apart = [max(flops, other) / min(flops, other) for other in self._opened]
            nearest = min(range(len(apart)), key=apart.__getitem__, default=None)
            if nearest is None or apart[nearest] >= self._factor:
                nearest = len(self._opened)
                self._opened.append(flops)
            self._known[flops] = nearest
        return self._known[flops]


# ----------------------------------------------------------------------------------------------------- stopping in buckets


class Member(NamedTuple):
    """What Ray's stopping rules need of a trial. Not Tune's own: those of an earlier process are gone, and a number stays."""

    trial_id: str


class PerBucket(FIFOScheduler):
    """A scheduler of Ray's for each bucket.

    It hears of a trial once a rung and of nothing else: at the end of a trial Ray would count its last result again.
    make: a scheduler over `TIME` and `SCORE`. clock: the time that stands for a rung, counted from 0.
    """

    def __init__(self, config: SearchConfig, rows: int, make: Callable[[], TrialScheduler], clock: Callable[[int], float]) -> None:
        super().__init__()
        self._make, self._clock, self._rows, self._rungs = make, clock, rows, rungs(config, rows)
        self._buckets: dict[int, TrialScheduler] = {}
        self._passed: dict[int, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if not _is_compared(trial, result, self._rows):
            return CONTINUE
        number, bucket = trial.config["number"], trial.config["bucket"]
        if (seen := self._see(number, bucket, result["rows"], result["quality"])) is None:
            return CONTINUE
        scheduler, member, point = seen
        scheduler.on_trial_add(None, member)
        return scheduler.on_trial_result(None, member, point)

    def replay(self, search: ledger.Search) -> None:
        """Know what the trials of a ledger reported at their rungs. Decides nothing: what became of them is in the ledger."""
        if not self._rungs:
            return
        sign = 1.0 if QUALITY[search.config.quality] == "max" else -1.0
        buckets = Buckets(search.config.scheduler.bucket)
        for trial in search.trials:
            bucket = buckets.of(trial.task.cost["cost/flops"]) if trial.state != "refused" else -1
            compared = trial.task.role == "trial" and trial.state != "refused" and _alike(trial.task.rows, self._rows)
            curve = _curve(trial, search.config.quality, trial.task.rows) if compared else []
            for rows, quality in curve:
                if (seen := self._see(trial.number, bucket, rows, sign * quality)) is not None:
                    scheduler, member, point = seen
                    # Of Ray's methods the one that takes a value down without judging it.
                    scheduler.on_trial_add(None, member)
                    scheduler.on_trial_complete(None, member, point)

    def _see(self, number: int, bucket: int, rows: int, quality: float) -> tuple[TrialScheduler, Member, dict[str, float]] | None:
        """What to tell whom of a point of a curve; None where it is not the first at its rung."""
        passed = bisect_right(self._rungs, rows)
        if passed <= self._passed.get(number, 0):
            return None
        self._passed[number] = passed
        if not math.isfinite(quality):
            return None
        if bucket not in self._buckets:
            self._buckets[bucket] = self._make()
        return self._buckets[bucket], Member(str(number)), {TIME: self._clock(passed - 1), SCORE: quality}


def _is_compared(trial: Trial, result: Mapping[str, Any], rows: int) -> bool:
    own = trial.config.get("rows", rows)
    return trial.config["role"] == "trial" and result.get("state") == "running" and result["rows"] < own and _alike(own, rows)


def _alike(own: int, rows: int) -> bool:
    """Whether a trial sees about as many rows as those it would be compared with: a weight of 0 may leave it the labelled ones only."""
    return abs(own - rows) <= 0.05 * rows


def _curve(trial: ledger.Trial, quality: str, rows: int) -> list[tuple[int, float]]:
    """(rows, quality) of the points that have both, but for the last of a whole trial."""
    points = [(int(metrics["train/rows"]), metrics[quality]) for _, metrics in trial.curve if {quality, "train/rows"} <= metrics.keys()]
    return [point for point in points if point[0] < rows]


# -------------------------------------------------------------------------------------------------------------- population


class Population(PopulationBasedTraining):
    """Population based training in step: at a rung all wait for each other, then the worst go on from the checkpoints of the best.

    Ray's own, changed where it would do nothing or something else: it refuses every searcher; its asynchronous form compares trials at
    different numbers of rows and skips whom it has no checkpoint of; its synchronous form waits for ever for a trial that died, and stops
    trials whose pause is still under way; both exchange once more at the very end, and give a trial the number of the one it copies.
    """

    def __init__(self, config: SearchConfig, rows: int, rebuild: Rebuild | None) -> None:
        self._rebuild = rebuild or dict
        settings: dict[str, Any] = {"time_attr": TIME, "perturbation_interval": 1, "synch": True, "log_config": False}
        super().__init__(metric=SCORE, mode="max", quantile_fraction=config.scheduler.quantile, custom_explore_fn=self._rebuild, **settings)
        self._space, self._seed, self._rows, self._rungs = config.space, config.seed, rows, rungs(config, rows)
        self._next = 1
        """Number of the rung, from 1, at which trials wait for each other."""
        self._complete = False

    def __reduce__(self) -> Any:
        """Tune writes its schedulers to disk when it starts. Nothing is restored from there, and `rebuild` may hold what cannot be written."""
        return (object, ())

    def replay(self, search: ledger.Search) -> None:
        """Find the next rung to wait at: the one after the last that some trial went beyond. The first, if none of them goes on."""
        trials = search.of_role("trial")
        for trial in trials if any(trial.state == "running" for trial in trials) else ():
            if seen := [rows for rows, _ in _curve(trial, search.config.quality, self._rows)]:
                passed = bisect_right(self._rungs, seen[-1])
                first = next(rows for rows in seen if bisect_right(self._rungs, rows) == passed)
                self._next = max(self._next, passed + (first < trial.rows))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial.config["role"] == "trial" and trial not in self._trial_state:  # one that died and is tried again keeps what it had
            assert not self._complete, "a population is asked for as a whole: max_concurrent_trials is at least its size"
            super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        rung = bisect_right(self._rungs, result.get("rows", 0))
        if not _is_compared(trial, result, self._rows) or rung < self._next:
            return CONTINUE
        self._save_trial_state(self._trial_state[trial], rung, {"rows": result["rows"], SCORE: result["quality"]}, trial)
        return PAUSE

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        trials = tune_controller.get_trials()
        members = [trial for trial in trials if trial.config["role"] == "trial" and not trial.is_finished()]
        if members and all(trial.status == Trial.PAUSED and self._waits(trial) for trial in members):
            self._exchange(tune_controller)
        ready = [trial for trial in trials if trial.status == Trial.PENDING]
        ready += [trial for trial in members if trial.status == Trial.PAUSED and not self._waits(trial)]
        return ready[0] if ready else None

    def _waits(self, trial: Trial) -> bool:
        return self._trial_state[trial].last_train_time >= self._next

    def _exchange(self, tune_controller: Any) -> None:
        """Everyone is paused and what they checkpointed is there."""
        self._complete = True
        worst, best = self._quantiles()
        for trial in best:
            state, found = self._trial_state[trial], trial.latest_checkpoint_result
            assert found is not None, "a trial reports its quality at a rung together with a checkpoint"
            assert found.metrics.get("rows", state.last_result["rows"]) == state.last_result["rows"], "the checkpoint is of another rung"
            state.last_checkpoint = found.checkpoint
        generator = random.Random(f"{self._seed} {self._next}")
        for trial in worst:
            self._exploit(tune_controller, trial, generator.choice(best))
        self._next += 1

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trial's own config with the other one's knobs, changed. Where that makes no valid job, the other one's as they are."""
        config, point = trial.config, trial_to_clone.config["point"]
        times = config.get("exploits", 0) + 1
        generator = random.Random(f"{self._seed} {config['number']} {times}")
        new = {**config, "exploits": times, "source": trial_to_clone.config["number"]}
        try:
            return self._rebuild({**new, "point": explore(point, self._space, generator)}), {}
        except (ConfigError, InputError):
            return self._rebuild({**new, "point": dict(point)}), {}


def explore(point: Mapping[str, Any], space: Mapping[str, KnobConfig], generator: random.Random) -> Point:
    """Every knob of a point that the space has, drawn anew with chance `REDRAW`, otherwise moved (Jaderberg et al. 2017, section 4.1.1).

    Moved: a number by one of `FACTORS`, as far as its domain goes, but at least to the next value where it has steps; a choice to its neighbour.
    """
    return {path: _explored(value, space[path], generator) if path in space else value for path, value in point.items()}


def _explored(value: Any, knob: KnobConfig, generator: random.Random) -> Any:
    if generator.random() < REDRAW:
        return sample(knob, generator)
    up = generator.random() < 0.5
    factor = FACTORS[up]
    if isinstance(knob, Uniform | LogUniform):
        low, high = knob.uniform if isinstance(knob, Uniform) else knob.log_uniform
        return min(max(value * factor, low), high)
    finite = values(knob)
    assert finite is not None
    if isinstance(knob, Choice):
        here = next(i for i in range(finite.size) if identity(finite.at(i)) == identity(value))
        index = here + (1 if up else -1)
    else:
        low, step = (knob.integer[0], 1) if isinstance(knob, Integer) else (knob.quantized[0], knob.quantized[2])
        here, there = round((value - low) / step), round((value * factor - low) / step)
        index = max(there, here + 1) if up else min(there, here - 1)
    return finite.at(min(max(index, 0), finite.size - 1))


# ------------------------------------------------------------------------------------------------------------------- build


def _none(config: SearchConfig, rows: int, rebuild: Rebuild | None) -> PerBucket:
    return PerBucket(config, rows, FIFOScheduler, float)  # it has no rungs


def _asha(config: SearchConfig, rows: int, rebuild: Rebuild | None) -> PerBucket:
    reduction, most = config.scheduler.reduction, len(rungs(config, rows))
    # Ray stops a trial at max_t, so that lies beyond the last rung; trials end by themselves.
    settings: dict[str, Any] = {"time_attr": TIME, "metric": SCORE, "mode": "max", "grace_period": 1, "max_t": reduction**most}
    return PerBucket(config, rows, lambda: AsyncHyperBandScheduler(**settings, reduction_factor=reduction), lambda rung: reduction**rung)


def _median(config: SearchConfig, rows: int, rebuild: Rebuild | None) -> PerBucket:
    least = config.scheduler.least
    # Without min_time_slice Ray pauses a trial that has nobody to be compared with, as soon as another one waits.
    settings: dict[str, Any] = {"grace_period": 0, "min_samples_required": least, "min_time_slice": math.inf, "hard_stop": True}
    return PerBucket(config, rows, lambda: MedianStoppingRule(time_attr=TIME, metric=SCORE, mode="max", **settings), float)


def _pbt(config: SearchConfig, rows: int, rebuild: Rebuild | None) -> Population:
    return Population(config, rows, rebuild)


SCHEDULERS: dict[str, Callable[[SearchConfig, int, Rebuild | None], PerBucket | Population]] = {
    "none": _none,
    "asha": _asha,
    "median": _median,
    "pbt": _pbt,
}
"""By `scheduler.type`."""


def build_scheduler(config: SearchConfig, rows: int, *, rebuild: Rebuild | None = None) -> PerBucket | Population:
    """The scheduler of a search whose trials see so many rows; `replay` tells it what an earlier process did. rebuild: for `pbt`."""
    return SCHEDULERS[config.scheduler.type](config, rows, rebuild)
