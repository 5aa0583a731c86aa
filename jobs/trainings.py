"""From a point of a search to trainings: the job that it stands for, checked as any job is, its costs, and what a trial is given to run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
from pydantic import ValidationError

from cluster.config import ClusterConfig
from distillation import store
from distillation.config import DenseLogits, FitConfig, LayersStudent, LossConfig, TrainingConfig, only_labels
from distillation.fit import reader, tokens_in_use
from distillation.metrics import OF_TEACHER
from distillation.models import depth_of, read_config
from distillation.rows import Split, open_rows
from distillation.schedule import schedule, steps_for, together_of
from distillation.students import label, size_of
from distillation.told import statistics_of_teacher
from jobs.config import JobConfig, refusal
from jobs.plan import Plan, Run
from tuning.config import SearchConfig, reported, retention
from tuning.director import Proposal
from tuning.ledger import Role, Task, Trial
from tuning.schedulers import rungs
from tuning.space import Point, Space, trial_name

CURVE_POINTS = 50
"""Of the loss that a trial reports: thousands of trials are kept in memory and in MLflow."""

SCORED_ROWS = 256
"""Rows whose stored answers are scored at once; images are looked at, too."""

SCORED_TEXTS = 4
"""The same where an answer is a logit for every token of the vocabulary at every place."""


class Trainings:
    """Makes the trainings of a search over the corpus and targets of a plan, which must be there. See `tuning.director.Proposer`."""

    def __init__(self, plan: Plan, space: Space) -> None:
        assert plan.job.search is not None
        self._plan, self._space, self._config = plan, space, plan.job.search
        self._labels = plan.labels()
        task, targets = reader(plan.job.task, plan.model, self._labels), {name: stage.folder for name, stage in plan.targets.items()}
        self._train = Split(plan.storage, plan.corpus.folder, {}, "train", task)
        self._validation = open_rows(plan.storage, plan.corpus.folder, targets, "validation", task)
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
        job = self.job(trial.task.point, seed)
        changes = {
            "student": None, "students": {"champion": job.student}, "cluster": cluster_of_trials(job.cluster, self._config),
            "evaluation": job.evaluation.model_copy(update={"threads": threads}),
        }  # fmt: skip
        return job.model_copy(update=changes)

    @cached_property
    def _tokens(self) -> int:
        """Of a trimmed vocabulary."""
        plan = self._plan
        return len(tokens_in_use(plan.storage, plan.corpus.folder, plan.job.task, plan.model))

    @cached_property
    def rows(self) -> int:
        """That a trial of the job as it is written sees."""
        return self._total(self._plan.vary(self.job({})), self._config.budget)[1]

    @cached_property
    def teacher(self) -> dict[str, float]:
        """validation/accuracy and the like, of what the first teacher said in the store: it is not asked again.

        {} where the store does not say it: of a live teacher, or of draws.
        """
        task, rows, found = self._validation.task, self._validation, 0.0
        if next(iter(self._plan.job.all_teachers)) not in self._plan.targets:
            return {}
        dense = isinstance(self._plan.job.targets(next(iter(self._plan.targets))).logits, DenseLogits)
        step = SCORED_TEXTS if task.speaks and dense else SCORED_ROWS
        for start in range(0, len(rows), step):
            said = statistics_of_teacher(task, rows.batch(np.arange(start, min(start + step, len(rows)))), len(self._labels))
            if said is None:
                return {}
            found = found + said.sum(0).numpy()
        return {f"validation/{name}": value for name, value in task.scores(np.asarray(found)).items()}

    @property
    def headline(self) -> str:
        """validation/... of the task."""
        return reported(self._plan.job.task.type)[0]

    @cached_property
    def reported(self) -> list[str]:
        """What every trial can report."""
        job = self._plan.job
        live = any(teacher.live for name, teacher in job.all_teachers.items() if name in job.asked_teachers)
        return measurable(job.task.type, self.teacher, labelled=len(self._validation.labelled) > 0, live=live)

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
        cost, rows = self._sizes(run.student), self._extent(config.training, config.losses, 1.0)[1]
        return Task(role, config.name, point, self._label(run.student), key, config.fingerprint, cost, rows, of, seed)

    def _label(self, student: Any) -> str:
        return label(student, depth_of(read_config(self._plan.model)) or 0)

    def _size(self, student: Any) -> dict[str, float]:
        trims = isinstance(student, LayersStudent) and student.trim_vocabulary
        found = size_of(student, self._plan.model, self._plan.job.task, self._labels, self._length, self._tokens if trims else None)
        return {f"cost/{name}": value for name, value in found.items()}

    def _total(self, plan: Plan, share: float) -> tuple[int, int]:
        """Steps of a student's training, up to a share of its rows, and how many rows these are."""
        return self._extent(plan.job.training, plan.job.active_losses, share)

    def _extent(self, training: TrainingConfig, losses: Mapping[str, LossConfig], share: float) -> tuple[int, int]:
        # What decides which rows a training sees; trials that differ elsewhere have it in common.
        plain = TrainingConfig(epochs=training.epochs, steps=training.steps, batch_tokens=training.batch_tokens, seed=training.seed)
        return self._steps(plain, only_labels(losses), together_of(losses, training), share)

    def _count_steps(self, training: TrainingConfig, labelled: bool, together: int, share: float) -> tuple[int, int]:
        return steps_for(schedule(self._train, training, labelled=labelled, together=together), share)


def measurable(task: str, teacher: Mapping[str, float], *, labelled: bool, live: bool) -> list[str]:
    """What trials can report: what needs a label if the validation split has any, what needs a teacher if the store says enough of it.

    teacher: what is known of it. labelled: whether any row of the split is. live: a teacher answers the trials themselves.
    """
    headline, *others, kept = reported(task)
    told = {name for name in (headline, *others) if name.removeprefix("validation/") in OF_TEACHER}
    found = [name for name in (headline, *others) if ((live or name in teacher) if name in told else labelled)]
    return [*found, *([kept] if retention(headline, 1.0, teacher.get(headline)) is not None else [])]


def cluster_of_trials(cluster: ClusterConfig, search: SearchConfig) -> ClusterConfig:
    """The cluster as a trial sees it: students have the workers of a trial, on the nodes that students run on."""
    size = {"workers": search.workers_per_trial, "cpus_per_worker": search.cpus_per_worker, "gpus_per_worker": search.gpus_per_worker}
    return cluster.model_copy(update={"student": cluster.student.model_copy(update={**size, "shards": 1})})
