"""What MLflow is told of a search: a run for every training below the run of the search, through the journal, off Tune's loop.

A search that goes on continues the same runs: their keys follow from the ledger's numbers, and the journal drops what it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.journal import Journal, Scalar
from tuning.ledger import Search, Trial

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow has no status for a trial that its scheduler ended: the tag distillery.state says it."""
STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}


class Recorder:
    """The observer of a director. parent: key of the search's run."""

    def __init__(self, journal: Journal, parent: str) -> None:
        self._journal, self._parent = journal, parent

    def key(self, number: int) -> str:
        return self.key_of(self._parent, number)

    @staticmethod
    def key_of(parent: str, number: int) -> str:
        return f"{parent}/{number:05d}"

    def started(self, trial: Trial) -> None:
        task, key = trial.task, self.key(trial.number)
        tags = {
            "role": task.role,
            "distillery.trial": str(trial.number),
            "distillery.fingerprint": task.fingerprint,
            "distillery.state": "running",
        }
        self._journal.run(key, name=task.name, parent=self._parent, tags=tags)
        point = trial.exploits[0].point if trial.exploits else task.point  # a parameter is written once
        self._journal.params(key, {"student": task.student, "role": task.role, "seed": task.seed, "rows": task.rows, **flat_point(point)})
        self._journal.metrics(key, task.cost, 0)

    def exploited(self, trial: Trial) -> None:
        """Knobs that change while a student is trained are metrics: `knob/PATH`, from the first change on."""
        key, (source, step, before) = self.key(trial.number), trial.exploits[-1]
        self._journal.run(key, name=trial.task.name, parent=self._parent, tags={"distillery.source": f"trial {source} at step {step}"})
        for at, point in ((step, before), (step + 1, trial.task.point)):
            self._journal.metrics(key, {f"knob/{path}": value for path, value in flat_point(point).items() if isinstance(value, float)}, at)

    def point(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> None:
        self._journal.metrics(self.key(trial.number), metrics, step)

    def ended(self, trial: Trial) -> None:
        if trial.state not in STATUS:  # a refused point was never a run
            return
        key = self.key(trial.number)
        tags = {"distillery.state": STATES[trial.state], "distillery.node": trial.node}
        tags["distillery.error"] = trial.cause
        self._journal.tags(key, tags)
        self._journal.finish(key, STATUS[trial.state])  # type: ignore[arg-type]

    def catch_up(self, search: Search) -> None:
        """Bring to the journal what the ledger has and it has not: a process was killed between the two, or the journal was moved away."""
        for trial in search.trials:
            status = self._journal.status(self.key(trial.number))
            if trial.state == "refused" or (trial.state != "running" and status == STATUS[trial.state]):
                continue
            if trial.state == "running" and not trial.curve:  # the director starts it
                continue
            self.started(trial)
            for step, metrics in trial.curve:
                self.point(trial, step, metrics)
            self.ended(trial)  # not of one that runs


def flat_point(point: Mapping[str, Any]) -> dict[str, Scalar]:
    """Values of the knobs as parameters: numbers stay numbers, so that axes are numeric; sub-objects by their dotted paths."""
    found: dict[str, Scalar] = {}
    for path, value in point.items():
        if isinstance(value, Mapping):
            found |= flat_point({f"{path}.{key}": inner for key, inner in value.items() if inner is not None})
        else:
            found[path] = str(value) if isinstance(value, list | tuple) else value
    return found
