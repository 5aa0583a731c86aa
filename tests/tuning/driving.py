"""A search without Ray: students whose numbers are known beforehand, and a process that drives it with the real ledger and searchers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distillation.errors import ConfigError
from tuning.config import SearchConfig
from tuning.director import Director, Job, Proposal
from tuning.ledger import Ledger, Role, Search, Task, Trial
from tuning.searchers import Outcome, build_searcher
from tuning.space import Space

SPACE: dict[str, Any] = {"student": {"choice": ["L1", "L2", "L3"]}, "losses.soft.weight": {"choice": [0.2, 0.8]}}
"""A grid of six, in this order: L1-w0.2, L1-w0.8, L2-w0.2, ..."""
BASE = {"student": "L1", "losses": {"soft": {"weight": 0.5, "temperature": 2.0}}, "training": {"learning_rate": 1e-3}}
SIZES = {"L1": 10.0, "L2": 20.0, "L3": 30.0}
"""cost/parameters, and FLOPs in millions."""
LATENCIES = {"L1": 2.0, "L2": 4.0, "L3": 8.0}
"""Milliseconds, p95; p50 is half of it."""
SCORES = {"L1-w0.2": 0.60, "L1-w0.8": 0.66, "L2-w0.2": 0.70, "L2-w0.8": 0.64, "L3-w0.2": 0.69, "L3-w0.8": 0.65}
"""Accuracies. The front is L1-w0.8 and L2-w0.2: trials 1 and 2 of the grid. Of two, the first is the knee."""
KEEP = {"cost/latency_ms_p95": "<= 5"}
"""L1 and L2 do."""
PBT: dict[str, Any] = {
    "space": {"training.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "losses.soft.weight": {"uniform": [0.1, 1.0]}},
    "searcher": {"type": "random"}, "scheduler": {"type": "pbt"}, "trials": 4,
}  # fmt: skip
TRIALS = ["L1-w0.2", "L1-w0.8", "L2-w0.2", "L2-w0.8", "L3-w0.2", "L3-w0.8"]
MEASURED = ["latency of key-L1", "latency of key-L2", "latency of key-L3"]
CONFIRMED = [
    "L1-base", "L2-base",
    "L1-w0.8-seed0", "L1-base-seed0", "L1-w0.8-seed1", "L1-base-seed1",
    "L2-w0.2-seed0", "L2-base-seed0", "L2-w0.2-seed1", "L2-base-seed1",
]  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    return {"space": SPACE, "searcher": {"type": "grid"}, "trials": 6, "finalists": 2, "seeds": 2, **changes}


class Students:
    """Makes trainings of points. refuses: names of trials that are no valid jobs; alone: students that do not look at the teacher."""

    def __init__(self, config: SearchConfig, refuses: Sequence[str] = (), alone: Sequence[str] = ()) -> None:
        self._config, self._refuses, self._alone = config, refuses, alone

    def trial(self, point: Mapping[str, Any]) -> Proposal:
        name = name_of(point)
        if name in self._refuses or "all" in self._refuses:
            raise ConfigError("DST-2011", "teacher has no such layer", where=name, expected="0 to 5", found="9")
        return self._make("trial", name, point, None)

    def baseline(self, trial: Trial) -> Proposal | None:
        if trial.task.student in self._alone:
            return None
        return self._make("baseline", base_of(trial.task.point), trial.task.point, trial.number)

    def refits(self, trial: Trial) -> Sequence[Proposal]:
        found = []
        for seed in range(self._config.seeds):
            found.append(self._make("refit", f"{name_of(trial.task.point)}-seed{seed}", trial.task.point, trial.number, seed))
            if trial.task.student not in self._alone:
                found.append(self._make("refit-baseline", f"{base_of(trial.task.point)}-seed{seed}", trial.task.point, trial.number, seed))
        return found

    def _make(self, role: Role, name: str, point: Mapping[str, Any], of: int | None, seed: int = 0) -> Proposal:
        student = point.get("student", "L1")
        rows = 100 if point.get("losses.soft.weight", 0.5) > 0 else 60  # those with a label
        cost = {"cost/parameters": SIZES[student], "cost/flops": 1e6 * SIZES[student]}
        fingerprint = f"fp-{name.removesuffix('-seed0')}"  # as after a search in full, of which the refit is the same training
        task = Task(role, name, dict(point), student, f"key-{student}", fingerprint, cost, rows, of, seed)
        fit = {"name": name, "output": task.output, "fingerprint": task.fingerprint, "seed": seed, "knobs": dict(point)}
        return Proposal(task, {"fit": fit, "made_from": {"name": name}})


def name_of(point: Mapping[str, Any]) -> str:
    return f"{point.get('student', 'L1')}-w{point.get('losses.soft.weight', 0.5):.4g}{rate_of(point)}"


def base_of(point: Mapping[str, Any]) -> str:
    """The weight of a loss that looks at the teacher does not matter to it."""
    return f"{point.get('student', 'L1')}-base{rate_of(point)}"


def rate_of(point: Mapping[str, Any]) -> str:
    return f"-lr{point['training.learning_rate']:g}" if "training.learning_rate" in point else ""


class Notes:
    """An observer that writes down what it is told, and what is discarded in between."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def started(self, trial: Trial) -> None:
        self.calls.append(("started", trial.number))

    def exploited(self, trial: Trial) -> None:
        self.calls.append(("exploited", trial.number, trial.task.name))

    def point(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("point", trial.number, step, dict(metrics)))

    def ended(self, trial: Trial) -> None:
        self.calls.append(("ended", trial.number, trial.state))

    def discard(self, trial: Trial) -> None:
        self.calls.append(("discard", trial.number))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in kinds]


class Heard:
    """A searcher, with what it was told."""

    def __init__(self, searcher: Any) -> None:
        self.ask, self._tell = searcher.ask, searcher.tell
        self.told: list[tuple[int, dict[str, Any], Outcome]] = []

    def tell(self, draw: int, point: dict[str, Any], outcome: Outcome) -> None:
        self.told.append((draw, point, outcome))
        self._tell(draw, point, outcome)


class Driver:
    """A process that drives a search: its ledger, its director, and what Tune's loop does, one call of the director after the other.

    It asks for work while there is room, otherwise takes the next training that runs a call further. ends: how trainings end, by name,
    where they do not finish: "stopped", "failed: why", "died: why".
    """

    def __init__(
        self, path: Path, ends: Mapping[str, str] | None = None, *, room: int = 1, refuses: Sequence[str] = (), alone: Sequence[str] = (),
        **changes: Any,
    ) -> None:  # fmt: skip
        job = {"search": settings(**changes)}
        config = SearchConfig.model_validate(job["search"])
        self.ledger = Ledger(path)
        self.ledger.begin("made-up", job, "f" * 64, {})
        ended = [trial for trial in self.search.trials if trial.state in ("finished", "stopped", "failed")]
        self.before = {(trial.task.role, trial.task.fingerprint) for trial in ended}
        self.measured = set(self.search.latencies)
        """What earlier processes have done."""
        self.notes, self.searcher = Notes(), Heard(build_searcher(config, Space(config.space, BASE)))
        self.director = Director(self.ledger, self.searcher, Students(config, refuses, alone), self.notes, self.notes.discard)
        self.jobs: list[Job] = []
        """In the order in which they were started."""
        self.calls = 0
        self._ends, self._room = ends or {}, room
        self._running: deque[tuple[Job, deque[Callable[[], None]]]] = deque()
        self._asks = True

    @property
    def search(self) -> Search:
        assert self.ledger.search is not None
        return self.ledger.search

    @property
    def names(self) -> list[str]:
        """Of what was started, in order."""
        return [named(job) for job in self.jobs]

    def run(self, calls: int = 10_000) -> Driver:
        """To the end, or to so many calls in all."""
        while self.calls < calls and self._step():
            pass
        return self

    def die(self) -> None:
        self.ledger.__exit__()

    def _step(self) -> bool:
        self.calls += 1
        if not self._asks or len(self._running) == self._room:
            job, to_say = self._running.popleft()
            to_say.popleft()()
            if to_say:
                self._running.append((job, to_say))
            else:
                self._asks = True
            return True
        job = self.director.next()
        if isinstance(job, Job):
            measures = job.role == "measure" or any(other.role == "measure" for other, _ in self._running)
            assert not (measures and self._running), "something runs beside a measurement"
            self.jobs.append(job)
            self._running.append((job, deque(self._said_by(job))))
            return True
        assert job == ("wait" if self._running else "done")
        self._asks = False
        return job == "wait"

    def _said_by(self, job: Job) -> Iterator[Callable[[], None]]:
        """Calls of the director that a training, or a measurement, brings with it."""
        result, gone = self.director.result, self.director.gone
        if job.number is None:
            ms = LATENCIES[job.student_key.removeprefix("key-")]
            yield partial(result, None, said(state="finished", measured={"cost/latency_ms_p50": ms / 2, "cost/latency_ms_p95": ms}))
            yield partial(gone, None)
            return
        state, _, cause = self._ends.get(named(job), "finished").partition(": ")
        score = SCORES.get(named(job).partition("-seed")[0], 0.5)
        yield partial(result, job.number, said((10, scores(50, score / 2))))
        if state == "finished":
            yield partial(result, job.number, said((20, scores(100, score))))
        if state in ("finished", "failed"):
            yield partial(result, job.number, said(state=state, cause=cause))
        yield partial(gone, job.number, cause if state == "died" else None)


def named(job: Job) -> str:
    return str(job.work["fit"]["name"]) if job.number is not None else f"latency of {job.student_key}"


def said(*points: tuple[int, dict[str, float]], state: str = "running", cause: str = "", **more: Any) -> dict[str, Any]:
    """What a trial hands over."""
    return {"points": list(points), "node": "node-1", "state": state, "cause": cause, "seconds": 2.0, **more}


def scores(rows: float, accuracy: float) -> dict[str, float]:
    return {"train/rows": rows, "validation/accuracy": accuracy}


def states(search: Search) -> dict[str, str]:
    """State of every training by its name, refused points left out."""
    return {trial.task.name: trial.state for trial in search.trials if trial.state != "refused"}
