"""From a point of a search to trainings: the job that it stands for, checked as any job is, its costs, and what a trial is given to run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
from pydantic import ValidationError

from distillation import loop, store
from distillation.config import FitConfig, TrainingConfig, only_labels
from distillation.fit import pad_id
from distillation.models import read_config
from distillation.rows import open_rows
from distillation.signals import Outputs
from distillation.students import label, size_of
from distillation.tasks import build_task
from jobs.config import JobConfig, refusal
from jobs.plan import TEACHER_LOSSES, Plan, Run, depth_of
from tuning.director import Proposal
from tuning.ledger import Role, Task, Trial
from tuning.schedulers import rungs
from tuning.space import Point, Space, trial_name

CURVE_POINTS = 50
"""Of the loss that a trial reports: thousands of trials are kept in memory and in MLflow."""

SCORED_ROWS = 4096
"""Rows whose stored answers are scored at once."""


class Trainings:
    """Makes the trainings of a search over the corpus and targets of a plan, which must be there. See `tuning.director.Proposer`."""

    def __init__(self, plan: Plan, space: Space) -> None:
        assert plan.job.search is not None
        assert plan.targets is not None
        self._plan, self._space, self._config = plan, space, plan.job.search
        self._labels = plan.labels()
        task = build_task(plan.job.task, pad_id(plan.model))
        self._train = open_rows(plan.storage, plan.corpus.folder, None, "train", task)
        self._validation = open_rows(plan.storage, plan.corpus.folder, plan.targets.folder, "validation", task)
        self._length = int(np.sort(self._validation.lengths)[len(self._validation) // 2])
        self._sizes = cache(self._size)
        self._steps = cache(self._count_steps)

    # ------------------------------------------------------------------------------------------------------- the proposer

    def trial(self, point: Mapping[str, Any]) -> Proposal:
        plan = self._plan.vary(self.job(point))
        return self._short("trial", plan, plan.runs[0], dict(point), None)

    def baseline(self, trial: Trial) -> Proposal | None:
        plan = self._plan.vary(self.job(trial.task.point))
        return self._short("baseline", plan, plan.runs[1], dict(trial.task.point), trial.number) if len(plan.runs) > 1 else None

    def refits(self, trial: Trial) -> Sequence[Proposal]:
        found = []
        for seed in self.seeds(trial):
            plan = self._plan.vary(self.job(trial.task.point, seed))
            total, _ = self._total(plan, share=1.0)
            for run in plan.runs:
                role: Role = "refit" if run.role == "student" else "refit-baseline"
                name = f"{trial.task.name}-t{trial.number}{'' if role == 'refit' else '-baseline'}-seed{seed}"  # trials may share a name
                config = plan.fit(run, total).model_copy(update={"name": name})
                task = self._task(role, config, run, dict(trial.task.point), trial.number, seed)
                found.append(Proposal(task, {"fit": config.model_dump(mode="json"), "made_from": dict(run.stage.made_from)}))
        return found

    # --------------------------------------------------------------------------------------------------------------- jobs

    def job(self, point: Mapping[str, Any], seed: int | None = None) -> JobConfig:
        """The job that a point stands for. Raises ConfigError with the reason where it is none."""
        settings = self._space.apply(dict(point))
        if seed is not None:
            settings["training"]["seed"] = seed
        try:
            return JobConfig.model_validate(settings)
        except ValidationError as error:
            raise refusal(error, "point of the search") from error

    def seeds(self, trial: Trial) -> list[int]:
        first = self.job(trial.task.point).training.seed
        # Not the first one itself: with it the trial was chosen, which makes its result too good.
        return [first + 1 + i for i in range(self._config.seeds)]

    def best(self, trial: Trial, seed: int, threads: int) -> JobConfig:
        """The chosen student's job, with the student by name and workers as trials had them: what `distill run` reproduces it from.

        threads: of its evaluation.
        """
        job, search = self.job(trial.task.point, seed), self._config
        workers = {
            "workers": search.workers_per_trial, "cpus_per_worker": search.cpus_per_worker, "gpus_per_worker": search.gpus_per_worker
        }  # fmt: skip
        changes = {
            "student": None, "students": {"champion": job.student}, "cluster": job.cluster.model_copy(update=workers),
            "evaluation": job.evaluation.model_copy(update={"threads": threads}),
        }  # fmt: skip
        return job.model_copy(update=changes)

    @cached_property
    def rows(self) -> int:
        """That a trial of the job as it is written sees."""
        return self._total(self._plan.vary(self.job({})), self._config.budget)[1]

    @cached_property
    def teacher(self) -> dict[str, float]:
        """validation/accuracy and the like, of what the teacher said in the store: it is not asked again."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for start in range(0, len(self._validation), SCORED_ROWS):
            batch = self._validation.batch(np.arange(start, min(start + SCORED_ROWS, len(self._validation))))
            assert batch.signal.logits is not None
            for name, (total, count) in self._validation.task.score(Outputs(batch.signal.logits), batch).items():
                sums[name], counts[name] = sums.get(name, 0.0) + float(total), counts.get(name, 0) + count
        return {f"validation/{name}": total / counts[name] for name, total in sums.items() if counts[name]}

    # ------------------------------------------------------------------------------------------------------------ private

    def _short(self, role: Role, plan: Plan, run: Run, point: Point, of: int | None) -> Proposal:
        """A training of the search's budget that leaves numbers and no model."""
        steps, _ = self._total(plan, self._config.budget)
        config = plan.fit(run, steps)
        made_from = dict(run.stage.made_from)
        if self._config.budget < 1:
            config = config.model_copy(update={"training": config.training.model_copy(update={"epochs": None, "steps": steps})})
            made_from["steps"] = steps
        fingerprint = store.fingerprint(made_from) if self._config.budget < 1 else run.stage.fingerprint
        name = trial_name(self._label(run.student), point, self._space.knobs) + ("-baseline" if role == "baseline" else "")
        config = config.model_copy(update={"name": name, "fingerprint": fingerprint, "keep_model": False})
        task = self._task(role, config, run, point, of, config.training.seed)
        population = role == "trial" and self._config.scheduler.type == "pbt"
        often: dict[str, Any] = {"log_every": max(config.training.log_every, math.ceil(steps / CURVE_POINTS))}
        if population:  # only at rungs, so that what another one goes on from is still kept when it does
            often["checkpoint_every"] = 0
        changes = {
            "output": task.output, "rungs": rungs(self._config, self.rows) if role == "trial" else (), "save_rungs": population,
            "training": config.training.model_copy(update=often),
        }  # fmt: skip
        config = config.model_copy(update=changes)
        return Proposal(task, {"fit": config.model_dump(mode="json"), "made_from": made_from})

    def _task(self, role: Role, config: FitConfig, run: Run, point: Point, of: int | None, seed: int) -> Task:
        key = store.fingerprint(run.student.model_dump(mode="json"))
        cost, rows = self._sizes(run.student), self._steps(_extent(config.training), only_labels(config.losses), 1.0)[1]
        return Task(role, config.name, point, self._label(run.student), key, config.fingerprint, cost, rows, of, seed)

    def _label(self, student: Any) -> str:
        return label(student, depth_of(read_config(self._plan.model)) or 0)

    def _size(self, student: Any) -> dict[str, float]:
        found = size_of(student, self._plan.model, self._labels, self._length)
        return {f"cost/{name}": value for name, value in found.items()}

    def _total(self, plan: Plan, share: float) -> tuple[int, int]:
        """Steps of a student's training, up to a share of its rows, and how many rows these are."""
        return self._steps(_extent(plan.job.training), only_labels(plan.job.active_losses), share)

    def _count_steps(self, training: TrainingConfig, labelled: bool, share: float) -> tuple[int, int]:
        losses = TEACHER_LOSSES if labelled else self._plan.job.active_losses
        return loop.steps_for(self._train.lengths, self._train.labelled, losses, training, share)


def _extent(training: TrainingConfig) -> TrainingConfig:
    """What decides which rows a training sees; trials that differ elsewhere have it in common."""
    return TrainingConfig(epochs=training.epochs, steps=training.steps, batch_tokens=training.batch_tokens, seed=training.seed)
