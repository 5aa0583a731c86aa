"""What a search did, as an append-only file: every trial, every point of its curve, how it ended. The only state a search resumes from.

Nothing of it is pickled. Everything else - what the searcher knows, which rungs are filled, the front, the pages - is derived from it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.logfile import Event, LogFile, read
from distillation.errors import ConfigError, InputError
from tuning.config import SearchConfig, reported

Role = Literal["trial", "baseline", "refit", "refit-baseline"]
"""baseline: the same student and budget as a trial, without the teacher. refit: a finalist at full budget, one seed of several."""

State = Literal["running", "finished", "stopped", "failed", "refused"]
"""stopped: by the scheduler, before its end. refused: a point that makes no valid job; costs nothing."""


class Task(NamedTuple):
    """A training that a search wants, before it is run."""

    role: Role
    name: str
    """For people: L2-T2.0-w0.64."""
    point: Mapping[str, Any]
    """Values of the knobs by dotted path."""
    student: str
    """Label of the student's size: L2, L4H312, ..."""
    student_key: str
    """Fingerprint of the student's settings: same key, same cost and same start."""
    fingerprint: str
    """Of everything that makes its result."""
    cost: Mapping[str, float]
    """cost/parameters, cost/bytes, cost/flops: known before it is trained."""
    rows: int
    """It will see in all, over all epochs."""
    of: int | None = None
    """Number of the trial that this is the baseline or a refit of."""
    seed: int = 0

    @property
    def output(self) -> str:
        """Where in the storage a trial or baseline that leaves no model has its checkpoints: `FitConfig.output`."""
        return f"trials/{self.fingerprint}"


class Exploit(NamedTuple):
    """A trial of a population went on from another one, with other knobs."""

    source: int
    """Number of that one."""
    step: int
    """Of the checkpoint that was taken."""
    point: Mapping[str, Any]
    """The knobs before."""


@dataclass
class Trial:
    """A training of a search as far as it has come."""

    number: int
    task: Task
    state: State = "running"
    started: int = 0
    """Milliseconds since 1970, of the first start."""
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(step, metrics): train/... and validation/..., with train/rows the rows seen so far."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last of each validation/... metric."""
    rows: int = 0
    """Seen so far."""
    seconds: float = 0.0
    """Computed, by all drivers and workers together."""
    cause: str = ""
    """Why it failed or was refused, in one line."""
    node: str = ""
    """Where it ran last."""
    also: list[int] = field(default_factory=list)
    """Further trials that this is the baseline or a refit of."""
    exploits: list[Exploit] = field(default_factory=list)
    """In order. The task's point and name are those since the last one; its fingerprint stays that of the first."""

    def confirms(self, number: int) -> bool:
        """Whether this is a baseline or a refit of that trial."""
        return self.task.of == number or number in self.also

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        self.curve.append((step, {sys.intern(name): value for name, value in metrics.items()}))  # thousands of trials have the same names
        self.metrics.update({name: value for name, value in metrics.items() if name.startswith("validation/")})
        self.rows = int(metrics.get("train/rows", self.rows))


@dataclass
class Search:
    """All that a ledger says, for whoever looks at it: leaderboard, decision, report."""

    name: str
    job: dict[str, Any]
    """The job file as resolved, `search` included."""
    fingerprint: str
    teacher: dict[str, float]
    """validation/... metrics of what the teacher says in the store."""
    started: int
    """Milliseconds since 1970."""
    updated: int
    trials: list[Trial] = field(default_factory=list)
    latencies: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measured cost/latency_... by student_key."""
    choice: dict[str, Any] | None = None
    """What was decided, see tuning/pareto.py; None until then."""
    evaluations: list[dict[str, Any]] | None = None
    """Of the finalists on the test split, as `Evaluation` dumps."""
    ended: bool = False
    passes: int = 0
    """Times that the teacher was run over train and validation for it; 0 where the store had that already."""
    answered: int = 0
    """Rows that a teacher was asked during its trainings."""
    idle: int = 0
    """Milliseconds in which no driver worked on it."""

    def elapsed(self, until: int) -> float:
        """Seconds that drivers have worked on it until then."""
        return (until - self.started - self.idle) / 1000

    @property
    def config(self) -> SearchConfig:
        return SearchConfig.model_validate(self.job["search"])

    @property
    def headline(self) -> str:
        """validation/... that retention is about: accuracy, f1, perplexity, as the task has it."""
        return reported(self.job["task"]["type"])[0]

    def of_role(self, *roles: Role) -> list[Trial]:
        return [trial for trial in self.trials if trial.task.role in roles]

    def values(self, trial: Trial) -> dict[str, float]:
        """Every metric of a trial: quality as last seen, cost as known and measured."""
        return {**trial.metrics, **trial.task.cost, **self.latencies.get(trial.task.student_key, {})}

    def remember(self, event: Event) -> None:
        before, self.updated = self.updated, event["time"]
        match event["kind"]:
            case "trial":
                task = Task(**{name: event[name] for name in Task._fields})
                self.trials.append(Trial(event["number"], task, started=event["time"]))
                if (cause := event.get("refused")) is not None:
                    self.trials[-1].state, self.trials[-1].cause = "refused", cause
            case "start":
                self.trials[event["number"]].state = "running"
            case "point":
                self.trials[event["number"]].add(event["step"], event["metrics"])
            case "shared":
                self.trials[event["number"]].also.append(event["of"])
            case "exploit":
                trial = self.trials[event["number"]]
                trial.exploits.append(Exploit(event["source"], event["step"], trial.task.point))
                trial.task = trial.task._replace(point=event["point"], name=event["name"])
            case "end":
                trial = self.trials[event["number"]]
                trial.state, trial.cause, trial.node = event["state"], event["cause"], event["node"]
                trial.seconds += event["seconds"]
                self.answered += event.get("answered", 0)
            case "latency":
                self.latencies[event["student_key"]] = event["metrics"]
            case "choice":
                self.choice = event["choice"]
            case "test":
                self.evaluations = event["evaluations"]
            case "ended":
                self.ended = True
            case "continued":
                self.job, self.ended = event["job"], False
                self.idle += event["time"] - before
                self.passes += event["passes"]


class Ledger:
    """The writer of a search. Raises ConflictError where another driver writes it, InputError where it was altered."""

    def __init__(self, path: Path) -> None:
        self._log = LogFile(path)
        self.path = self._log.path
        self.search: Search | None = None
        try:
            for event in self._log.replay():
                self._remember(event)
        except InputError:
            self._log.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def begin(self, name: str, job: Mapping[str, Any], fingerprint: str, teacher: Mapping[str, float], passes: int = 0) -> None:
        """Start a search; or go on with it, under settings that may differ where the fingerprint does not look.

        passes: times that this driver had the teacher run over the corpus.
        """
        if self.search is None:
            self._write("search", name=name, job=dict(job), fingerprint=fingerprint, teacher=dict(teacher), passes=passes)
        else:
            assert self.search.fingerprint == fingerprint, "the caller compares them"
            self._write("continued", job=dict(job), passes=passes)

    def trial(self, task: Task, refused: str | None = None) -> int:
        """Record a training that will be run, or with the reason one that is refused. Returns its number: they count from 0."""
        assert self.search is not None
        number = len(self.search.trials)
        content = {**task._asdict(), "point": dict(task.point), "cost": dict(task.cost)}
        self._write("trial", number=number, **content, refused=refused)
        return number

    def start(self, number: int) -> None:
        """A trial that an earlier driver did not finish goes on."""
        self._write("start", number=number)

    def point(self, number: int, step: int, metrics: Mapping[str, float]) -> bool:
        """Record a point of a curve, once: a restarted worker repeats steps. Returns whether it was new."""
        assert self.search is not None
        curve = self.search.trials[number].curve
        known = {name for _, there in itertools.takewhile(lambda point: point[0] == step, reversed(curve)) for name in there}
        if curve and (step < curve[-1][0] or (step == curve[-1][0] and metrics.keys() <= known)):
            return False
        self._write("point", number=number, step=step, metrics=dict(metrics))
        return True

    def end(self, number: int, state: State, *, cause: str = "", node: str = "", seconds: float = 0.0, answered: int = 0) -> None:
        """answered: rows that a teacher was asked during the training."""
        self._write("end", number=number, state=state, cause=cause, node=node, seconds=seconds, answered=answered)

    def exploit(self, number: int, source: int, step: int, point: Mapping[str, Any], name: str) -> None:
        """A trial goes on from the checkpoint that another one made at a step, with these knobs and under this name."""
        self._write("exploit", number=number, source=source, step=step, point=dict(point), name=name)

    def shared(self, number: int, of: int) -> None:
        """A baseline or refit is that of another trial, too."""
        self._write("shared", number=number, of=of)

    def latency(self, student_key: str, metrics: Mapping[str, float]) -> None:
        self._write("latency", student_key=student_key, metrics=dict(metrics))

    def choice(self, choice: Mapping[str, Any]) -> None:
        self._write("choice", choice=dict(choice))

    def test(self, evaluations: list[dict[str, Any]]) -> None:
        self._write("test", evaluations=evaluations)

    def ended(self) -> None:
        self._write("ended")

    def _write(self, kind: str, **content: Any) -> None:
        self._remember(self._log.write(kind, **content))

    def _remember(self, event: Event) -> None:
        self.search = _after(self.search, event, self.path)


def read_search(path: Path) -> Search:
    """What a ledger says now, also while another process writes it. Raises ConfigError where there is none."""
    search: Search | None = None
    try:
        for event, _ in read(path):
            search = _after(search, event, path)
    except FileNotFoundError:
        pass
    if search is None:
        raise ConfigError(
            "DST-2006", "no runs here yet", where=str(path), expected="a search", found="none", do="Run `distill search` first"
        )
    return search


def _after(search: Search | None, event: Event, path: Path) -> Search:
    """The search with one more event, the first of which begins it. Raises InputError where it cannot follow what came before."""
    try:
        if search is None:
            content = {name: event[name] for name in ("name", "job", "fingerprint", "teacher")}
            return Search(**content, started=event["time"], updated=event["time"], passes=event.get("passes", 0))
        search.remember(event)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            "DST-3501", "tracking journal was altered", where=f"{path}, line {event['seq'] + 1}", found=f"{type(error).__name__}: {error}",
            do="Move the file away and run again: finished work is found, recording starts anew",
        ) from error  # fmt: skip
    return search
