"""What a job consists of: stages with the fingerprint of all that makes them, and where each lies. Reads files, launches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cluster.config import ROLES
from cluster.corpus import corpus_fingerprint, reading_fingerprint
from distillation import encoding, models, store
from distillation.config import (
    FitConfig,
    ImageClassification,
    LiveTeacher,
    PretrainedStudent,
    ProbeStudent,
    RelationKL,
    TaskConfig,
    TrainingConfig,
    hard_loss,
    only_labels,
)
from distillation.errors import ConfigError
from distillation.network import relation_modules
from distillation.storage import Storage
from distillation.store import Manifest
from distillation.students import outline, require_buildable
from jobs.checks import check_student, check_teacher, depth_of_student, locate, reads_its_own, with_layers, with_students_found
from jobs.config import JobConfig


def teacher_losses(task: TaskConfig) -> dict[str, Any]:
    """Of a teacher's own training: nothing of a student's settings touches it, so that one teacher serves them all."""
    return {"hard": hard_loss(task)}


@dataclass(frozen=True)
class Stage:
    """One artifact: where it lies and what it is made of."""

    folder: str
    fingerprint: str
    made_from: Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """The corpus in the tokens of a student's own tokenizer."""

    stage: Stage
    tokenizer: Path


@dataclass(frozen=True)
class Run:
    """The training of one student or baseline."""

    name: str
    role: Literal["student", "baseline"]
    student: Any
    losses: Mapping[str, Any]
    stage: Stage
    baseline: str | None
    """Name of the same student without distillation, for a student that has one."""
    training: TrainingConfig
    start: Stage | None = None
    """The finished student that is trained further."""
    reading: Reading | None = None
    """Instead of the corpus."""


@dataclass(frozen=True)
class Plan:
    job: JobConfig
    storage: Storage
    models: Mapping[str, Path]
    """Local folder of the model that each teacher starts from."""
    corpus: Stage
    teachers: Mapping[str, Stage]
    targets: Mapping[str, Stage]
    """Of the teachers that some student looks at, and whose answers are kept."""
    runs: tuple[Run, ...]

    @property
    def model(self) -> Path:
        """That the teacher starts from which students are cut from and compared with."""
        return self.models[self.lead]

    @property
    def lead(self) -> str:
        return next(iter(self.models))

    @property
    def readings(self) -> list[Reading]:
        """Each once."""
        return list({run.reading.stage.folder: run.reading for run in self.runs if run.reading}.values())

    @property
    def teacher(self) -> Stage:
        return self.teachers[self.lead]

    @cached_property
    def fingerprint(self) -> str:
        """Of everything the job's result depends on."""
        return store.fingerprint({"runs": [run.stage.fingerprint for run in self.runs], "evaluation": self.job.evaluation.model_dump()})

    @property
    def workspace(self) -> Path:
        return self.job.workspace

    @property
    def results(self) -> Path:
        """Local folder of the report and exports of this very job: a changed one has another, so what MLflow is told stays true."""
        return self.workspace / self.fingerprint[:8]

    def found(self, stage: Stage) -> Manifest | None:
        """The artifact of a stage, if it is finished."""
        manifest = store.find(self.storage, stage.folder)
        return manifest if manifest is not None and manifest.fingerprint == stage.fingerprint else None

    def labels(self) -> tuple[str, ...]:
        """Of the finished corpus."""
        manifest = self.found(self.corpus)
        assert manifest is not None, "the corpus is prepared first"
        return tuple(manifest.facts["labels"])

    def teacher_fit(self, name: str) -> FitConfig:
        """A teacher's own training: the same loop, labels only."""
        teacher = self.job.all_teachers[name]
        assert teacher.training is not None
        start = PretrainedStudent(
            type="pretrained", model=str(self.models[name]), revision=teacher.revision, pickled_weights=teacher.pickled_weights
        )  # fmt: skip
        return self._fit(name, start, teacher_losses(self.job.task), teacher.training, self.teachers[name], teacher=None)

    def vary(self, job: JobConfig) -> Plan:
        """The plan of a job with the same corpus, teacher and targets and another student, losses or training; looks at no source.

        Raises what `make_plan` raises about students.
        """
        job = with_students_found(job)
        for name, student in job.all_students.items():
            check_student(job, name, student, self.configs)
        targets = {name: stage for name, stage in self.targets.items() if name in job.asked_teachers}
        runs = tuple(_runs(job, self.configs, self.corpus, self.teachers, targets, self.model))
        if other := [run.name for run in runs if run.reading]:
            raise ConfigError(
                "DST-2041", "a search compares students of one tokenizer", where="search.space", expected="students with the teacher's tokenizer",
                found=f"{other[0]} has its own", do="Leave it out, or distil it with `distill run`",
            )  # fmt: skip
        return replace(self, job=job, runs=runs)

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """config.json of what each teacher starts from."""
        return {name: models.read_config(folder) for name, folder in self.models.items()}

    def fit(self, run: Run, steps: int | None = None) -> FitConfig:
        """A student's training. A baseline takes as many steps as its student: `steps`, or those of the finished one."""
        training = run.training
        if run.role == "baseline":
            if steps is None:
                done = self.found(next(other for other in self.runs if other.baseline == run.name).stage)
                assert done is not None, "the student is trained before its baseline"
                steps = int(done.facts["result"]["steps"])
            training = training.model_copy(update={"epochs": None, "steps": steps})
        # Also a term that counts for nothing now may tell at the evaluations how far the teacher is.
        asks = isinstance(run.student, ProbeStudent) or (run.role == "student" and run.start is None)
        targets = {name: stage.folder for name, stage in self.targets.items()} if asks else {}
        return self._fit(run.name, run.student, run.losses, training, run.stage, run.reading, teacher=self.teacher.folder, targets=targets,
                         live=self._live() if asks else {}, start=run.start and run.start.folder)  # fmt: skip

    def _live(self) -> dict[str, LiveTeacher]:
        asked, job = self.job.asked_teachers, self.job
        return {
            name: LiveTeacher(folder=self.teachers[name].folder, targets=job.targets(name), precision=teacher.precision)
            for name, teacher in job.all_teachers.items()
            if teacher.live and name in asked
        }

    def _fit(
        self, name: str, student: Any, losses: Mapping[str, Any], training: TrainingConfig, stage: Stage, reading: Reading | None = None,
        **more: Any,
    ) -> FitConfig:  # fmt: skip
        features, corpus = self.job.targets(self.lead).features, reading.stage if reading else self.corpus
        return FitConfig(
            name=name, task=self.job.task, labels=self.labels(), student=_found_from_anywhere(student), losses=dict(losses), training=training,
            storage=self.job.cluster.storage, corpus=corpus.folder, output=stage.folder, fingerprint=stage.fingerprint,
            features_at=features.at if features else "scored", lead=self.lead,
            widths={name: models.width_of(config) or 0 for name, config in self.configs.items()}, **more,
        )  # fmt: skip


def _found_from_anywhere(student: Any) -> Any:
    """A student whose folder has its whole path: a worker may stand elsewhere than the job file does."""
    if isinstance(student, PretrainedStudent) and (folder := Path(student.model).expanduser()).is_dir():
        return student.model_copy(update={"model": str(folder.resolve())})
    return student


def make_plan(job: JobConfig) -> Plan:
    """Find the model, look at the corpus's sources, derive every fingerprint. Raises what a user can mend before anything runs."""
    if not (job.cluster.storage.startswith(("/", "~")) or "://" in job.cluster.storage):
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"storage": str(Path(job.cluster.storage).resolve())})})
    job, storage = with_students_found(job), Storage(job.cluster.storage)
    folders = {name: locate(teacher, job) for name, teacher in job.all_teachers.items()}
    model = next(iter(folders.values()))
    for name, folder in folders.items():
        check_teacher(job, name, folder)
        if folder != model and not isinstance(job.task, ImageClassification):
            models.require_same_vocabulary(folder, model)
    configs = {name: models.read_config(folder) for name, folder in folders.items()}
    for name, student in job.all_students.items():
        check_student(job, name, student, configs)
    corpus = _stage("corpora", *corpus_fingerprint(job.corpus, job.task, model))
    teachers, targets = {}, {}
    for name, teacher in job.all_teachers.items():
        teacher_from = {
            "weights": models.weights_fingerprint(folders[name]), "tokenizer": _tokenizer(job.task, folders[name]),
            "corpus": corpus.fingerprint, "training": teacher.training and _training(job, teacher.training),
        }  # fmt: skip
        teachers[name] = _stage("teachers", store.fingerprint(teacher_from), teacher_from)
        targets_from = {
            "teacher": teachers[name].fingerprint, "corpus": corpus.fingerprint, "targets": job.targets(name).model_dump(mode="json"),
            "batch_tokens": teacher.batch_tokens, "precision": teacher.precision,
        }  # fmt: skip
        if name in job.asked_teachers and not teacher.live:
            targets[name] = _stage("targets", store.fingerprint(targets_from), targets_from)
    return Plan(job, storage, folders, corpus, teachers, targets, tuple(_runs(job, configs, corpus, teachers, targets, model)))


def require_possible(plan: Plan) -> None:
    """Raise what the plan does not look at as it loads transformers: whether tokenizers fit, whether students can be built. Reads no tensor."""
    if not isinstance(plan.job.task, ImageClassification):
        for folder in [*plan.models.values(), *(reading.tokenizer for reading in plan.readings)]:
            encoding.check(plan.job.task, models.require_tokenizer_fits(folder), str(folder))
    for student in plan.job.all_students.values():
        require_buildable(student, plan.model, plan.job.task)
    if any(isinstance(loss, RelationKL) for loss in plan.job.active_losses.values()):
        for folder in plan.models.values():
            network = outline(PretrainedStudent(type="pretrained", model=str(folder)), folder, plan.job.task, ())
            relation_modules(models.layers_of(network)[1][0])


def _tokenizer(task: TaskConfig, folder: Path) -> str | None:
    return None if isinstance(task, ImageClassification) else models.tokenizer_fingerprint(folder)


def _runs(
    job: JobConfig, configs: Mapping[str, Mapping[str, Any]], corpus: Stage, teachers: Mapping[str, Stage], targets: Mapping[str, Stage],
    model: Path,
) -> list[Run]:  # fmt: skip
    runs = []
    teacher = next(iter(teachers.values()))
    depth = models.depth_of(next(iter(configs.values()))) or 0
    for name, student in job.all_students.items():
        losses, reading = with_layers(job, depth_of_student(student, depth), configs), _reading(job, student, corpus, model)
        start = {
            "corpus": (reading.stage if reading else corpus).fingerprint, "teacher": teacher.fingerprint, "student": _student(student),
            "training": _training(job, job.training),
        }  # fmt: skip
        asked = {one: stage.fingerprint for one, stage in targets.items()}
        live = {
            one: [teachers[one].fingerprint, job.targets(one).model_dump(mode="json")] for one in job.asked_teachers if one not in targets
        }
        made_from = {**start, "targets": asked, "live": live, "losses": _losses(losses)}
        baseline = f"{name}-baseline" if job.baseline and job.asked_teachers else None
        stage = _stage("students", store.fingerprint(made_from), made_from)
        runs.append(Run(name, "student", student, losses, stage, baseline, job.training, reading=reading))
        if baseline:
            # A probe without the teacher's answers still reads its features. The student's losses matter for the number of steps only:
            # an epoch has fewer where they score labelled rows alone.
            reads = asked if isinstance(student, ProbeStudent) else None
            epoch = "labelled rows" if only_labels(losses) else "all rows"
            plain = {**start, "targets": reads, "losses": _losses(job.baseline_losses), "steps_of": epoch}
            its = _stage("students", store.fingerprint(plain), plain)
            runs.append(Run(baseline, "baseline", student, job.baseline_losses, its, None, job.training, reading=reading))
        if job.finetune:
            tuned_from = {"start": stage.fingerprint, "training": _training(job, job.finetune), "losses": _losses(job.baseline_losses)}
            its = _stage("students", store.fingerprint(tuned_from), tuned_from)
            runs.append(
                Run(f"{name}-tuned", "student", student, job.baseline_losses, its, None, job.finetune, start=stage, reading=reading)
            )
    return runs


def _reading(job: JobConfig, student: Any, corpus: Stage, model: Path) -> Reading | None:
    if not isinstance(student, PretrainedStudent) or not reads_its_own(job, student, own := locate(student), model):
        return None
    return Reading(_stage("corpora", *reading_fingerprint(corpus.fingerprint, corpus.made_from, own)), own)


def _stage(kind: str, fingerprint: str, made_from: Mapping[str, Any]) -> Stage:
    return Stage(f"{kind}/{fingerprint}", fingerprint, made_from)


def _training(job: JobConfig, training: TrainingConfig) -> dict[str, Any]:
    """Settings that change what is learned; how often one looks at it does not."""
    settings = training.model_dump(mode="json", exclude={"log_every", "evaluate_every", "checkpoint_every", "microbatch_tokens"})
    if isinstance(job.task, ImageClassification):  # a batch norm sees one microbatch of one worker
        workers = {role: job.cluster.group(role).most for role in ROLES}
        settings |= {"microbatch_tokens": training.microbatch_tokens, "workers": workers}
    return settings


def _losses(losses: Mapping[str, Any]) -> dict[str, Any]:
    return {name: loss.model_dump(mode="json") for name, loss in losses.items()}


def _student(student: Any) -> dict[str, Any]:
    settings: dict[str, Any] = student.model_dump(mode="json")
    if isinstance(student, PretrainedStudent):
        settings["weights"] = models.weights_fingerprint(locate(student))
    return settings
