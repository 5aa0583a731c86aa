"""What a search does next. Knows nothing of Ray: it is asked for work, told what came of it, and keeps the ledger.

In order: what an earlier process left unfinished; the trials; latencies, if the wish speaks of them, with nothing else running; then, for
every size on the front, the same student without distillation, and the finalists in full, over several seeds. Whatever is in the ledger is
never done again.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from distillation.errors import ClusterError, ConfigError, DistilleryError
from tuning.ledger import Ledger, Role, State, Task, Trial
from tuning.pareto import Decision, decide, merit
from tuning.schedulers import Buckets
from tuning.searchers import Outcome, Searcher

MAX_REFUSED = 200
"""Points refused or repeated in a row after which a space counts as exhausted."""
SAME_WAY = 4
"""Trials that fail the same way, with none that does not, after which a search ends."""


class Proposal(NamedTuple):
    """A training that could be run: what it is, and what whoever runs it is given."""

    task: Task
    work: Mapping[str, Any]
    """`fit` and `made_from` for `distillation.fit.train`."""


class Proposer(Protocol):
    """Makes trainings of points. Raises ConfigError or InputError where a point is no valid job."""

    def trial(self, point: Mapping[str, Any]) -> Proposal: ...
    def baseline(self, trial: Trial) -> Proposal | None:
        """None where a student does not look at the teacher, so is its own baseline."""

    def refits(self, trial: Trial) -> Sequence[Proposal]:
        """The trial's student in full, and its baseline, for every seed."""


class Observer(Protocol):
    """Told of everything that is recorded, in order."""

    def started(self, trial: Trial) -> None: ...
    def exploited(self, trial: Trial) -> None:
        """It goes on from another one, with other knobs."""

    def point(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> None: ...
    def ended(self, trial: Trial) -> None: ...


class Job(NamedTuple):
    """Work for one trial of Tune. number: of the trial in the ledger; None for a measurement."""

    number: int | None
    role: Role | Literal["measure"]
    bucket: int
    point: Mapping[str, Any]
    work: Mapping[str, Any]
    student_key: str
    rows: int = 0
    """It will see in all."""


class Director:
    """Called from Tune's loop, one call at a time; looked at by others under `lock`."""

    def __init__(
        self, ledger: Ledger, searcher: Searcher, proposer: Proposer, observer: Observer, discard: Callable[[Trial], None]
    ) -> None:
        assert ledger.search is not None
        self._ledger, self._searcher, self._proposer, self._observer = ledger, searcher, proposer, observer
        self._discard = discard
        self.search, self.config = ledger.search, ledger.search.config
        self.lock = threading.RLock()
        self.failure: DistilleryError | None = None
        """Why the search ended before its time."""
        self.closed = False
        self.ran = 0
        """Trainings that this process has started."""
        self._buckets = Buckets(self.config.scheduler.bucket if hasattr(self.config.scheduler, "bucket") else math.inf)
        self._running: dict[int | None, tuple[Job, float]] = {}
        self._draws: dict[int, int] = {}
        self._works: dict[int, Mapping[str, Any]] = {}
        self._phase: Literal["trials", "confirm", "done"] = "trials"
        self._exhausted = False
        self._population = self.config.scheduler.type == "pbt"
        self._deadline = time.monotonic() + self.config.time_budget_s if self.config.time_budget_s else None
        self._replay()

    # ------------------------------------------------------------------------------------------------------------- next

    def next(self) -> Job | Literal["wait", "done"]:
        with self.lock:
            while not self.closed and self.failure is None and self._phase != "done":
                if self._queue:
                    one = self._queue.popleft()
                    return self._start(one if isinstance(one, int) else self._record(one))
                if None in self._running:
                    return "wait"
                if self._phase == "trials" and self._wants_trials() and (number := self._draw()) is not None:
                    self._queue.append(number)
                    continue
                if self._running:
                    return "wait"
                if (job := self._latency()) is not None:
                    return job
                if self._phase == "trials" and self._population:
                    self._discard_all()
                # Asked for until there is nothing more: where no finalist keeps what was asked for, the next one is tried.
                self._phase = "confirm"
                self._queue.extend(self._confirmations())
                if not self._queue:
                    self._phase = "done"
            return "wait" if self._running and not self.closed else "done"

    def decision(self) -> Decision:
        return decide(self.search)

    def close(self) -> None:
        """Take no more notice of anything: what dies from now on was not the trials' fault."""
        with self.lock:
            self.closed = True

    # ------------------------------------------------------------------------------------------------------------- told

    def result(self, number: int | None, result: Mapping[str, Any]) -> None:
        """What a trial hands over: points, and in the end its state."""
        with self.lock:
            if self.closed or number not in self._running:
                return
            if number is None:
                if result["state"] == "finished":
                    self._ledger.latency(self._running[None][0].student_key, result["measured"])
                else:
                    self._cannot_measure(result["cause"])
                return
            trial = self.search.trials[number]
            trial.node = result["node"]
            for step, metrics in result["points"]:
                finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
                if self._ledger.point(number, step, finite) or len(finite) < len(metrics):
                    self._observer.point(trial, step, metrics)
            if result["state"] != "running":
                self._end(
                    trial, result["state"], cause=result.get("cause", ""), seconds=result["seconds"], answered=result.get("answered", 0)
                )

    def gone(self, number: int | None, error: str | None = None) -> None:
        """A trial of Tune is over. One that has not said how it ended was stopped by the scheduler, or its process died."""
        with self.lock:
            if self.closed:
                return
            running = self._running.pop(number, None)
            if number is None:
                if error is not None and running is not None and running[0].student_key not in self.search.latencies:
                    self._cannot_measure(error)
                return
            trial = self.search.trials[number]
            if running is not None and trial.state == "running":
                seconds = time.monotonic() - running[1]
                self._end(trial, "failed" if error is not None else "stopped", cause=error or "", seconds=seconds)

    def exploit(self, config: dict[str, Any]) -> dict[str, Any]:
        """A trial of a population goes on from another one: its config, where `point` and `source` are new, with the work that follows.

        Raises ConfigError or InputError where the point is no valid job, or one that sees other rows than the source did.
        """
        with self.lock:
            if self.closed:
                return config
            trial, source = self.search.trials[config["number"]], self.search.trials[config["source"]]
            proposal = self._proposer.trial(config["point"])
            if proposal.task.rows != source.task.rows:
                raise ConfigError(
                    "DST-2020", "knobs change which rows are seen", where=f"trial {trial.number}", expected=f"{source.task.rows} rows",
                    found=str(proposal.task.rows), do="Keep the weights of losses above 0",
                )  # fmt: skip
            step = next(step for step, metrics in reversed(source.curve) if self.config.quality in metrics)
            self._ledger.exploit(trial.number, source.number, step, config["point"], proposal.task.name)
            self._observer.exploited(trial)
            return {**config, "work": {**config["work"], **self._going_on(trial, proposal)}}

    # ---------------------------------------------------------------------------------------------------------- private

    def _going_on(self, trial: Trial, proposal: Proposal) -> Mapping[str, Any]:
        """Work of a trial whose knobs have changed: it keeps its place, and takes the weights of its source."""
        source, step, _ = trial.exploits[-1]
        mine = {"name": trial.task.name, "output": trial.task.output, "fingerprint": trial.task.fingerprint}
        adopt = {"output": self.search.trials[source].task.output, "step": step}
        return {**proposal.work, "fit": {**proposal.work["fit"], **mine}, "adopt": adopt}

    def _replay(self) -> None:
        """Take up what the ledger holds: buckets, what the searcher would know, and trials to go on with."""
        self._queue: deque[int | Proposal] = deque()
        for draw, trial in enumerate(self.search.of_role("trial")):
            self._draws[trial.number] = draw
        for trial in self.search.trials:
            if trial.state != "refused":
                self._buckets.of(trial.task.cost["cost/flops"])
            if trial.state == "running" or (trial.state == "failed" and self.config.retry_failed):
                if (work := self._again(trial)) is not None:
                    self._works[trial.number] = work
                    self._queue.append(trial.number)
                elif trial.state == "running":
                    self._ledger.end(trial.number, "stopped", cause="not asked for any more")
                    self._observer.ended(trial)
            if trial.task.role == "trial":
                self._tell(trial)

    def _again(self, trial: Trial) -> Mapping[str, Any] | None:
        """The work of a trial that an earlier process left unfinished, or that failed; None for a seed that is not asked for any more."""
        task = trial.task
        if trial.exploits:
            return self._going_on(trial, self._proposer.trial(task.point))
        if task.role == "trial":
            proposals = [self._proposer.trial(task.point)]
        else:
            of = self.search.trials[task.of or 0]
            found = self._proposer.baseline(of) if task.role == "baseline" else None
            proposals = [found] if found else list(self._proposer.refits(of))
        return next((p.work for p in proposals if (p.task.fingerprint, p.task.role) == (task.fingerprint, task.role)), None)

    def _wants_trials(self) -> bool:
        run = [trial for trial in self.search.of_role("trial") if trial.state != "refused"]
        in_time = self._deadline is None or time.monotonic() < self._deadline
        return len(run) < self.config.trials and in_time and not self._exhausted

    def _draw(self) -> int | None:
        """Number of a new trial; None where the space has no more."""
        known = {trial.task.fingerprint: trial.number for trial in self.search.of_role("trial") if trial.state != "refused"}
        for _ in range(MAX_REFUSED):
            draw = len(self._draws)
            point = self._searcher.ask(draw)
            if point is None:
                break
            try:
                proposal = self._proposer.trial(point)
            except DistilleryError as error:
                self._refuse(draw, point, str(error))
                continue
            if (twin := known.get(proposal.task.fingerprint)) is not None:
                self._refuse(draw, point, f"the same job as trial {twin}")
                continue
            return self._record(proposal, draw)
        self._exhausted = True
        if not known:
            refused = self.search.of_role("trial")
            self.failure = ConfigError(
                "DST-2017", "every point of the search is refused", where="search.space", expected="points that make valid jobs",
                found=refused[-1].cause if refused else "none", do="Narrow the space, or add `when` to knobs that exist only under one choice",
            )  # fmt: skip
        return None

    def _refuse(self, draw: int, point: Mapping[str, Any], cause: str) -> None:
        number = self._ledger.trial(Task("trial", "refused", point, "", "", "", {}, 0), refused=cause)
        self._draws[number] = draw
        self._tell(self.search.trials[number])
        self._observer.ended(self.search.trials[number])

    def _record(self, proposal: Proposal, draw: int | None = None) -> int:
        number = self._ledger.trial(proposal.task)
        self._works[number] = proposal.work
        if draw is not None:
            self._draws[number] = draw
        return number

    def _start(self, number: int) -> Job:
        trial = self.search.trials[number]
        if trial.state != "running" or trial.curve:
            self._ledger.start(number)
        task = trial.task
        self.ran += 1
        job = Job(
            number, task.role, self._buckets.of(task.cost["cost/flops"]), task.point, self._works.pop(number), task.student_key, task.rows
        )
        self._running[number] = (job, time.monotonic())
        self._observer.started(trial)
        return job

    def _latency(self) -> Job | None:
        """A measurement that is still missing, for a student that some trial brought to its end."""
        if not self.config.needs_latency:
            return None
        for trial in self.search.of_role("trial"):
            key = trial.task.student_key
            if trial.state == "finished" and key not in self.search.latencies:
                work = self._proposer.trial(trial.task.point).work
                job = Job(None, "measure", 0, {}, work, key)
                self._running[None] = (job, time.monotonic())
                return job
        return None

    def _confirmations(self) -> list[int | Proposal]:
        """Baselines for the front and refits of the finalists: those that the ledger does not have, and those that were given up."""
        decision, have = self.decision(), {(t.task.role, t.task.fingerprint): t for t in self.search.trials}
        proposals: list[Proposal] = []
        best: dict[str, Trial] = {}
        for number in decision.front:
            trial = self.search.trials[number]
            other = best.setdefault(trial.task.student_key, trial)
            if merit(self.config, trial.metrics) > merit(self.config, other.metrics):
                best[trial.task.student_key] = trial
        for trial in best.values():
            if (proposal := self._proposer.baseline(trial)) is not None:
                proposals.append(proposal)
        for number in decision.finalists:
            proposals += self._proposer.refits(self.search.trials[number])
        missing: dict[tuple[Role, str], int | Proposal] = {}
        for proposal in proposals:
            key = proposal.task.role, proposal.task.fingerprint
            if (there := have.get(key)) is None:
                missing.setdefault(key, proposal)
                continue
            if proposal.task.of is not None and not there.confirms(proposal.task.of):
                self._ledger.shared(there.number, proposal.task.of)
            if there.state == "stopped":
                self._works[there.number] = proposal.work
                missing[key] = there.number
        return list(missing.values())

    def _end(self, trial: Trial, state: State, *, cause: str = "", seconds: float = 0.0, answered: int = 0) -> None:
        self._ledger.end(trial.number, state, cause=cause, node=trial.node, seconds=seconds, answered=answered)
        if trial.task.role == "trial":
            self._tell(trial)
        self._observer.ended(trial)
        if not (self._population and trial.task.role == "trial"):  # another one may go on from it
            self._discard(trial)
        if state == "failed":
            self._same_way()

    def _discard_all(self) -> None:
        for trial in self.search.of_role("trial"):
            if trial.state != "refused":
                self._discard(trial)

    def _tell(self, trial: Trial) -> None:
        values = self.search.values(trial)
        objectives = {name: values[name] for name in self.config.objectives if name in values}
        complete = objectives if len(objectives) == len(self.config.objectives) else {}
        quality = self.config.quality
        steps = [(int(metrics["train/rows"]), metrics[quality]) for _, metrics in trial.curve if quality in metrics]
        self._searcher.tell(self._draws[trial.number], dict(trial.task.point), Outcome(trial.state, complete, steps))

    def _same_way(self) -> None:
        """End a search in which nothing works, with the cause."""
        ended = [trial for trial in self.search.trials if trial.state in ("finished", "stopped", "failed")]
        alike = {kind_of(trial.cause) for trial in ended if trial.state == "failed"}
        if len(ended) >= SAME_WAY and len(alike) == 1 and all(trial.state == "failed" for trial in ended):
            self.failure = ClusterError(
                "DST-6005", "every trial fails the same way", where=f"{len(ended)} trials", expected="trials that end well",
                found=ended[-1].cause, do="Mend the cause, then search again with search.retry_failed=true",
            )  # fmt: skip

    def _cannot_measure(self, cause: str) -> None:
        self.failure = ClusterError("DST-6006", "latency could not be measured", where="search.keep", found=cause, do="Search again")


def kind_of(cause: str) -> str:
    """A cause without its numbers, of errors of ours code and title: two trials that run out of memory fail the same way."""
    if cause.startswith("error["):
        return ": ".join(cause.split(": ")[:2])
    return re.sub(r"[\d.]+", "#", cause)[:80]
