"""What a search varies, how it chooses and what it has to keep. Settings only; imports nothing but pydantic."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from distillation.config import Config
from distillation.metrics import REPORTED

# -------------------------------------------------------------------------------------------------------------- the space


class Domain(Config):
    """What one knob may be."""

    when: dict[str, Any] = Field({})
    """Settings (by dotted path) that must have these values for the knob to exist; a list stands for any of them."""


class Choice(Domain):
    """One of these values; also whole sub-objects: a student, a loss."""

    choice: tuple[Any, ...] = Field(min_length=1)


class Uniform(Domain):
    """Any number from low to high."""

    uniform: tuple[float, float]

    @model_validator(mode="after")
    def _rises(self) -> Uniform:
        _require_rising(self.uniform)
        return self


class LogUniform(Domain):
    """Any number from low to high, each factor equally likely."""

    log_uniform: tuple[float, float]

    @model_validator(mode="after")
    def _rises(self) -> LogUniform:
        _require_rising(self.log_uniform)
        if self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform starts above 0, got {list(self.log_uniform)}")
        return self


class Integer(Domain):
    """A whole number from low to high, both included."""

    integer: tuple[int, int]

    @model_validator(mode="after")
    def _rises(self) -> Integer:
        _require_rising(self.integer)
        return self


class Quantized(Domain):
    """low, low + step, low + 2 step, ... up to high."""

    quantized: tuple[float, float, float]
    """low, high, step"""

    @model_validator(mode="after")
    def _steps(self) -> Quantized:
        low, high, step = self.quantized
        _require_rising((low, high))
        if not 0 < step <= (high - low) * (1 + 1e-9):  # 0.3 - 0.2 is less than 0.1
            raise ValueError(f"the step must be above 0 and at most high - low, got {list(self.quantized)}")
        return self


def _require_rising(bounds: tuple[float, float]) -> None:
    if not bounds[0] < bounds[1]:
        raise ValueError(f"the first bound must be below the second, got {list(bounds)}")


KINDS = ("choice", "uniform", "log_uniform", "integer", "quantized")


def _kind(value: Any) -> str | None:
    """Which domain settings or an object of this file are: the key names it."""
    if isinstance(value, Domain):
        return next(kind for kind in KINDS if kind in type(value).model_fields)
    named = [kind for kind in KINDS if isinstance(value, dict) and kind in value]
    return named[0] if len(named) == 1 else None


def _flattened(space: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Knobs by their whole path; of two that are written for one, the later changes the earlier: that is what an override comes as."""
    found: dict[str, Any] = {}
    for key, value in space.items():
        path = f"{prefix}{key}"
        nested = isinstance(value, dict) and _kind(value) is None and value and all(isinstance(inner, dict) for inner in value.values())
        for name, knob in _flattened(value, f"{path}.").items() if nested else [(path, value)]:
            before = found.get(name)
            found[name] = {**before, **knob} if before and _kind(before) and _kind(before) == _kind(knob) else knob
    return found


KnobConfig = Annotated[
    Annotated[Choice, Tag("choice")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("log_uniform")]
    | Annotated[Integer, Tag("integer")]
    | Annotated[Quantized, Tag("quantized")],
    Discriminator(
        _kind,
        custom_error_type="knob",
        custom_error_message="a knob is one of choice: [...], uniform: [low, high], log_uniform: [low, high], integer: [low, high], "
        "quantized: [low, high, step], each with an optional when",
    ),
]


# ------------------------------------------------------------------------------------------------------------- searchers


class GridSearcher(Config):
    """Every combination, in order."""

    type: Literal["grid"]
    points: int = Field(5, ge=2)
    """Values that a uniform or log_uniform knob is cut into, ends included."""


class RandomSearcher(Config):
    """Draws that do not depend on each other, on concurrency or on interruptions."""

    type: Literal["random"]


class TpeSearcher(Config):
    """Tree-structured Parzen estimator (Optuna), with as many objectives as the search has. Learns from trials that were stopped, too."""

    type: Literal["tpe"]
    startup: int = Field(10, ge=1)
    """Random points before it begins to model."""


SearcherConfig = Annotated[GridSearcher | RandomSearcher | TpeSearcher, Field(discriminator="type")]


# ------------------------------------------------------------------------------------------------------------ schedulers


class NoScheduler(Config):
    """Every trial runs to its end."""

    type: Literal["none"]


class AshaScheduler(Config):
    """Asynchronous successive halving (Li et al. 2020) among students of about the same cost; the budget is rows seen."""

    type: Literal["asha"]
    grace: float = Field(0.25, gt=0, lt=1)
    """Share of a trial's rows before the first decision."""
    reduction: float = Field(2.0, gt=1)
    """One in so many goes on at each decision; decisions lie this factor apart."""
    bucket: float = Field(1.25, gt=1)
    """Students whose FLOPs differ by less than about this factor are compared with each other."""


class MedianScheduler(Config):
    """Stops a trial that is below the median of those of about its cost at the same number of rows (Golovin et al. 2017)."""

    type: Literal["median"]
    grace: float = Field(0.25, gt=0, lt=1)
    every: float = Field(0.25, gt=0, lt=1)
    """Share of a trial's rows between decisions."""
    least: int = Field(3, ge=2)
    """Trials to compare with before anything is stopped."""
    bucket: float = Field(1.25, gt=1)


class PbtScheduler(Config):
    """Population based training (Jaderberg et al. 2017): from time to time the worst go on from the weights of the best, with other knobs."""

    type: Literal["pbt"]
    every: float = Field(0.25, gt=0, lt=1)
    """Share of a trial's rows between exchanges."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of the population that is replaced, and that it is replaced from."""


SchedulerConfig = Annotated[NoScheduler | AshaScheduler | MedianScheduler | PbtScheduler, Field(discriminator="type")]

PBT_KNOBS = re.compile(r"^training\.(learning_rate|weight_decay)$|^losses\.[^.]+\.(weight|temperature|beta)$")
"""What may change while a student is trained."""


# --------------------------------------------------------------------------------------------------------------- metrics

QUALITY: dict[str, Literal["max", "min"]] = {
    "validation/accuracy": "max",
    "validation/f1": "max",
    "validation/exact_match": "max",
    "validation/perplexity": "min",
    "validation/bits_per_byte": "min",
    "validation/pearson": "max",
    "validation/mse": "min",
    "validation/mae": "min",
    "validation/cosine": "max",
    "validation/nll": "min",
    "validation/agreement": "max",
    "validation/kl_to_teacher": "min",
    "validation/mse_to_teacher": "min",
    "validation/retention": "max",
}
"""What trials report, each task its own part of it, and which direction is better. See `retention` for the last one."""

SHARES = frozenset({
    "validation/accuracy", "validation/f1", "validation/exact_match", "validation/agreement", "validation/retention",
})  # fmt: skip
"""Shares of something: people read them in percent, and differences of them in points."""

RATIOS = frozenset({"validation/perplexity"})
"""Of which a quotient says something where a difference does not: 60 instead of 50 is as much worse as 12 instead of 10."""


def reported(task: str) -> tuple[str, ...]:
    """Names of what the trials of a task report; the headline first."""
    return *(f"validation/{name}" for name in REPORTED[task]), "validation/retention"


def retention(headline: str, value: float, teacher: float | None) -> float | None:
    """A student's headline over the teacher's on the same rows; the teacher's over the student's where less is better. At most about 1.

    None where the teacher's is not known, or where a quotient means nothing: of a teacher that is no better than none.
    """
    if teacher is None or teacher <= 0 or (QUALITY[headline] == "min" and value <= 0):
        return None
    return value / teacher if QUALITY[headline] == "max" else teacher / value


COSTS: dict[str, Literal["max", "min"]] = {
    "cost/parameters": "min",
    "cost/bytes": "min",
    "cost/flops": "min",
    "cost/latency_ms_p50": "min",
    "cost/latency_ms_p95": "min",
}
"""What a student costs. Latencies are measured, once for each student and with nothing beside it; the others are known before it is trained."""

METRICS = {**QUALITY, **COSTS}


class Constraint(NamedTuple):
    """What a student must keep."""

    metric: str
    at_least: bool
    bound: float

    def missing(self, value: float) -> float:
        """By how much a value fails, as a share of the bound; 0 where it holds."""
        short = self.bound - value if self.at_least else value - self.bound
        return max(0.0, short) / (abs(self.bound) or 1.0)

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.bound:g}"


def read_constraint(metric: str, wish: float | str) -> Constraint:
    """`0.97` is a bound on the worse side of the metric; `">= 0.97"` and `"<= 5"` say it. Raises ValueError."""
    if isinstance(wish, str):
        found = re.fullmatch(r"\s*(<=|>=)\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*", wish)
        if found is None:
            raise ValueError(f'keep.{metric}: write a number, "<= number" or ">= number", got {wish!r}')
        return Constraint(metric, found[1] == ">=", float(found[2]))
    return Constraint(metric, METRICS[metric] == "max", float(wish))


# ---------------------------------------------------------------------------------------------------------------- search


class SearchConfig(Config):
    """A search over students, losses and training, on what the target store holds."""

    space: dict[str, KnobConfig] = Field(min_length=1)
    """Knobs by the dotted path of the setting they turn, or nested as the settings are."""
    objectives: dict[str, Literal["max", "min"]] = Field({"validation/accuracy": "max", "cost/parameters": "min"}, min_length=1)
    """What the front is made of; the first `validation/` one decides which trials are stopped."""
    keep: dict[str, float | str] = Field({})
    """What the chosen student must keep, such as {validation/retention: 0.97, cost/latency_ms_p95: "<= 5"}; the smallest one that does is
    chosen. Empty: the knee of the front."""
    trials: int = Field(16, ge=1)
    """Points that are trained, without those that the job refuses, baselines and refits."""
    searcher: SearcherConfig = RandomSearcher(type="random")
    scheduler: SchedulerConfig = NoScheduler(type="none")
    seed: int = Field(0, ge=0, lt=2**31)
    budget: float = Field(1.0, gt=0, le=1)
    """Share of `training`'s rows that a trial sees; the finalists see all of them."""
    workers_per_trial: int = Field(1, ge=1)
    """One: a warm process that goes from trial to trial. More: Ray Train inside the trial."""
    cpus_per_worker: int = Field(1, ge=1)
    """Threads of a worker of a trial."""
    gpus_per_worker: float = Field(0, ge=0)
    """A share, so that several small students train on one GPU; whole with more workers."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at once. None: as many as the cluster has room for."""
    time_budget_s: float | None = Field(None, gt=0)
    """Seconds after which no further trial is started."""
    retry_failed: bool = False
    """When a search goes on, run again what had failed."""
    finalists: int = Field(2, ge=1)
    """Sizes that are trained again in full before one is chosen."""
    seeds: int = Field(3, ge=1)
    """Trainings of each finalist and of its baseline."""

    @field_validator("space", mode="before")
    @classmethod
    def _by_path(cls, space: Any) -> Any:
        return _flattened(space) if isinstance(space, dict) else space

    @property
    def constraints(self) -> list[Constraint]:
        return [read_constraint(metric, wish) for metric, wish in self.keep.items()]

    @property
    def quality(self) -> str:
        """The metric by which trials are compared while they run."""
        return next(name for name in self.objectives if name in QUALITY)

    @property
    def size(self) -> str:
        """The cost by which one student is smaller than another."""
        return next((name for name in self.objectives if name in COSTS), "cost/parameters")

    @property
    def needs_latency(self) -> bool:
        return any(name.startswith("cost/latency") for name in (*self.objectives, *self.keep))

    @model_validator(mode="after")
    def _fits_together(self) -> SearchConfig:
        known = f"known are {', '.join(METRICS)}"
        for name, direction in self.objectives.items():
            if name not in METRICS:
                raise ValueError(f"objectives: no stage reports {name}; {known}")
            if direction != METRICS[name]:
                raise ValueError(f"objectives: {name} is better when it is {METRICS[name]}imal")
        for name, wish in self.keep.items():
            if name not in METRICS:
                raise ValueError(f"keep: no stage reports {name}; {known}")
            if not math.isfinite(read_constraint(name, wish).bound):
                raise ValueError(f"keep.{name}: the bound must be finite")
        if isinstance(self.searcher, TpeSearcher) and any("latency" in name for name in self.objectives):
            raise ValueError("objectives: latency is measured when the trials are done, so it cannot guide searcher tpe; use cost/flops")
        if not any(name in QUALITY for name in self.objectives):
            raise ValueError(f"objectives: one of them must be a quality: {', '.join(QUALITY)}")
        if not (self.gpus_per_worker < 1 and self.workers_per_trial == 1) and self.gpus_per_worker not in (0, 1):
            raise ValueError(f"gpus_per_worker is 0, 1, or with one worker a share of one GPU, got {self.gpus_per_worker:g}")
        if isinstance(self.scheduler, PbtScheduler):
            self._require_population()
        return self

    def _require_population(self) -> None:
        """Population based training does nothing, silently, where these do not hold."""
        if self.workers_per_trial > 1:
            raise ValueError("scheduler pbt works with workers_per_trial 1 only: it hands weights from one trial to another")
        if not isinstance(self.searcher, RandomSearcher):
            raise ValueError("scheduler pbt turns the knobs itself: use searcher {type: random}")
        if fixed := [path for path in self.space if not PBT_KNOBS.match(path)]:
            raise ValueError(
                f"scheduler pbt can only turn learning rate, weight decay, weights, temperatures and betas, not {', '.join(fixed)}: "
                "a student cannot go on from the weights of another one"
            )
        if self.concurrent is not None:
            raise ValueError(
                "scheduler pbt holds the whole population, of which as many train at once as there is room for: leave concurrent out"
            )
        if self.trials < 4:
            raise ValueError(f"scheduler pbt needs a population: at least 4 trials, got {self.trials}")
