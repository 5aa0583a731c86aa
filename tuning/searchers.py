"""Which point comes next: a grid, random draws, or a model of what was seen (TPE).

A searcher keeps no state of its own that has to be saved: it is built anew and told the history of the ledger, in the order of the draws.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tuning.config import METRICS, Choice, GridSearcher, KnobConfig, LogUniform, SearchConfig, TpeSearcher, Uniform
from tuning.ledger import State
from tuning.space import Point, Space, identity, sample, values

if TYPE_CHECKING:
    import optuna

REPEATS = 1000
"""Draws in a row that bring nothing new, after which a space counts as exhausted."""

ATTEMPTS = 10
"""Suggestions of a model in a row that bring nothing new, after which a random point is taken."""


class Outcome(NamedTuple):
    """What became of a point."""

    state: State
    """running: a trial that an earlier process started goes on; how it ended is told later."""
    values: Mapping[str, float] = {}
    """Objective -> value; empty where nothing was measured."""
    steps: Sequence[tuple[int, float]] = ()
    """(rows seen, the quality that trials are compared by), in the order of the rows."""


class Searcher(Protocol):
    """Draws are asked for in the order 0, 1, 2, ..., from one thread. No point comes twice."""

    def ask(self, draw: int) -> Point | None:
        """A point to try; None: there are no more."""
        ...

    def tell(self, draw: int, point: Point, outcome: Outcome) -> None:
        """What became of it. Also for points that an earlier process asked for: that is how a search resumes."""
        ...


class _Listed:
    """Points that do not depend on what was seen."""

    def __init__(self, points: Iterator[Point]) -> None:
        self._rest = points
        self._points: list[Point] = []

    def ask(self, draw: int) -> Point | None:
        self._points.extend(itertools.islice(self._rest, max(0, draw + 1 - len(self._points))))
        return copy.deepcopy(self._points[draw]) if draw < len(self._points) else None

    def tell(self, draw: int, point: Point, outcome: Outcome) -> None:
        pass


class Grid(_Listed):
    """Every combination, in order."""

    def __init__(self, config: SearchConfig, space: Space) -> None:
        assert isinstance(config.searcher, GridSearcher)
        super().__init__(space.grid(config.searcher.points))


class Random(_Listed):
    """Draw i is a function of (seed, i): the i-th of the independent draws (seed, 0), (seed, 1), ... without those that came before."""

    def __init__(self, config: SearchConfig, space: Space) -> None:
        super().__init__(_distinct((_random_point(space, config.seed, number) for number in itertools.count()), set()))


def _random_point(space: Space, *seeds: int) -> Point:
    generator = random.Random("/".join(map(str, seeds)))
    return space.draw(lambda _, knob: sample(knob, generator))


def _distinct(points: Iterator[Point], seen: set[Any]) -> Iterator[Point]:
    """Those that are not in `seen` and did not come before, until there seem to be no more."""
    known = set(seen)
    while (point := next((p for p in itertools.islice(points, REPEATS) if identity(p) not in known), None)) is not None:
        known.add(identity(point))
        yield point


class Tpe:
    """Tree-structured Parzen estimator (Bergstra et al. 2011; several objectives: Ozaki et al. 2022), by Optuna.

    Optuna is asked and told here rather than by Ray's OptunaSearch. That one cannot be told finished trials of a space with conditions,
    keeps its state as a pickle, reports a stopped trial as if its last value were final, and does not pass on intermediate results where
    there are several objectives.
    """

    def __init__(self, config: SearchConfig, space: Space) -> None:
        import optuna

        assert isinstance(config.searcher, TpeSearcher)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self.space, self.startup = config, space, config.searcher.startup
        self._sampler, self._states = optuna.samplers.TPESampler, optuna.trial.TrialState
        self._idle = optuna.samplers.RandomSampler(seed=0)
        directions = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
        self._study = optuna.create_study(directions=[directions[direction] for direction in config.objectives.values()])
        self._open: dict[int, optuna.Trial] = {}
        self._seen: set[Any] = set()

    def ask(self, draw: int) -> Point | None:
        """A function of the seed, the draw and what was asked and told before; points under way are kept away from (constant liar)."""
        for attempt in range(ATTEMPTS):
            # A sampler for each draw: the draws of a resumed search go on, where one sampler would begin its random numbers again.
            seed = random.Random(f"{self.config.seed}/{draw}/{attempt}").getrandbits(32)
            self._study.sampler = self._sampler(n_startup_trials=self.startup, seed=seed, constant_liar=True)
            trial = self._study.ask()
            point = self.space.draw(partial(_suggest, trial))
            if identity(point) not in self._seen:
                break
            self._study.tell(trial, state=self._states.FAIL)
        else:
            others = (_random_point(self.space, self.config.seed, draw, number) for number in itertools.count())
            found = next(_distinct(others, self._seen), None)
            if found is None:
                return None
            point, trial = found, self._enter(found)
        self._seen.add(identity(point))
        self._open[draw] = trial
        return point

    def tell(self, draw: int, point: Point, outcome: Outcome) -> None:
        """A stopped trial has had less than its budget, so its values do not stand beside those of finished ones. It ranks after all of
        them, and among the stopped ones by how far it came, then by its quality there; so it says where not to look. One that failed or
        was refused says nothing about the objectives.
        """
        self._seen.add(identity(point))
        trial = self._open.pop(draw, None) or self._enter(point)
        found = [outcome.values.get(name, math.nan) for name in self.config.objectives]
        if outcome.state == "running":
            self._open[draw] = trial
        elif outcome.state == "stopped":
            self._rank(trial, dict(outcome.steps))
            self._study.tell(trial, state=self._states.PRUNED)
        elif outcome.state == "finished" and all(map(math.isfinite, found)):
            self._study.tell(trial, found, state=self._states.COMPLETE)
        else:
            self._study.tell(trial, state=self._states.FAIL)

    def _rank(self, trial: optuna.Trial, steps: Mapping[int, float]) -> None:
        """Give a stopped trial its place among the stopped ones."""
        if len(self.config.objectives) == 1:
            for rows, value in steps.items():
                trial.report(value, rows)
        else:
            # Optuna has no intermediate values here, and its TPE fails on a study of several objectives that holds some. What violates a
            # constraint comes after all the others, the smallest violation first: that is the same order. `part` is between 0 and 1.
            rows = max(steps, default=0)
            quality = steps.get(rows, math.nan) * (1 if METRICS[self.config.quality] == "max" else -1)
            part = 0.5 + math.atan(quality) / math.pi if math.isfinite(quality) else 0.0
            trial.set_constraint("stopped", 1 / (1 + rows + part))

    def _enter(self, point: Point) -> optuna.Trial:
        """A trial of a point that the study did not suggest itself."""
        self._study.sampler = self._idle
        self._study.enqueue_trial({path: _encode(self.space.knobs[path], value) for path, value in point.items()})
        trial = self._study.ask()
        for path in self.space.knobs:
            if path in point:
                _suggest(trial, path, self.space.knobs[path])
        return trial


def _suggest(trial: optuna.Trial, path: str, knob: KnobConfig) -> Any:
    """A value of a knob. Finite domains by the number of the value: a student or a loss cannot be hashed."""
    if isinstance(knob, Uniform):
        return trial.suggest_float(path, *knob.uniform)
    if isinstance(knob, LogUniform):
        return trial.suggest_float(path, *knob.log_uniform, log=True)
    finite = values(knob)
    assert finite is not None
    if isinstance(knob, Choice):
        return finite.at(trial.suggest_categorical(path, range(finite.size)))
    return finite.at(trial.suggest_int(path, 0, finite.size - 1))


def _encode(knob: KnobConfig, value: Any) -> Any:
    """What `_suggest` asks Optuna for when it gives this value."""
    finite = values(knob)
    if finite is None:
        return value
    if isinstance(knob, Choice):
        return [identity(finite.at(i)) for i in range(finite.size)].index(identity(value))
    return bisect.bisect_left(range(finite.size), value, key=finite.at)


SEARCHERS: Mapping[str, Callable[[SearchConfig, Space], Searcher]] = {"grid": Grid, "random": Random, "tpe": Tpe}
"""From `type` in the job file."""


def build_searcher(config: SearchConfig, space: Space) -> Searcher:
    return SEARCHERS[config.searcher.type](config, space)
