"""What a job consists of: stages with the fingerprint of all that makes them, and where each lies. Reads files, launches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cluster.corpus import corpus_fingerprint
from distillation import models, store
from distillation.config import (
    CrossEntropy,
    FitConfig,
    LayersStudent,
    PatientKD,
    PretrainedStudent,
    ProbeStudent,
    ScratchStudent,
    TeacherConfig,
    TrainingConfig,
    only_labels,
)
from distillation.errors import ConfigError, InputError
from distillation.storage import Storage
from distillation.store import Manifest
from distillation.students import chosen_layers
from jobs.config import JobConfig

PADDED_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "longformer"})
"""Architectures that count positions from behind the padding token's id, and so have fewer than they say."""


TEACHER_LOSSES = {"hard": CrossEntropy(type="cross_entropy")}
"""Of the teacher's own training: nothing of a student's settings touches it, so that one teacher serves them all."""


@dataclass(frozen=True)
class Stage:
    """One artifact: where it lies and what it is made of."""

    folder: str
    fingerprint: str
    made_from: Mapping[str, Any]


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


@dataclass(frozen=True)
class Plan:
    job: JobConfig
    storage: Storage
    model: Path
    """Local folder of the model that the teacher starts from."""
    corpus: Stage
    teacher: Stage
    targets: Stage | None
    """None where no student looks at what the teacher says."""
    runs: tuple[Run, ...]

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

    def teacher_fit(self) -> FitConfig:
        """The teacher's own training: the same loop, labels only."""
        teacher = self.job.teacher
        assert teacher.training is not None
        start = PretrainedStudent(
            type="pretrained", model=teacher.model, revision=teacher.revision,
            pickled_weights=teacher.pickled_weights,
        )  # fmt: skip
        return self._fit("teacher", start, TEACHER_LOSSES, teacher.training, self.teacher, targets=None, teacher=None)

    def vary(self, job: JobConfig) -> Plan:
        """The plan of a job with the same corpus, teacher and targets and another student, losses or training; looks at no source.

        Raises what `make_plan` raises about students.
        """
        config = models.read_config(self.model)
        for name, student in job.all_students.items():
            _check_student(job, name, student, config, depth_of(config) or 0)
        targets = self.targets if job.needs_teacher else None
        return replace(self, job=job, runs=tuple(_runs(job, self.corpus, self.teacher, targets)))

    def fit(self, run: Run, steps: int | None = None) -> FitConfig:
        """A student's training. A baseline takes as many steps as its student: `steps`, or those of the finished one."""
        training = self.job.training
        asks = run.role == "student" or isinstance(run.student, ProbeStudent)
        targets = self.targets.folder if self.targets and asks else None
        if run.role == "baseline":
            if steps is None:
                done = self.found(next(other for other in self.runs if other.baseline == run.name).stage)
                assert done is not None, "the student is trained before its baseline"
                steps = int(done.facts["result"]["steps"])
            training = training.model_copy(update={"epochs": None, "steps": steps})
        return self._fit(run.name, run.student, run.losses, training, run.stage, targets=targets, teacher=self.teacher.folder)

    def _fit(
        self, name: str, student: Any, losses: Mapping[str, Any], training: TrainingConfig, stage: Stage, *, targets: str | None,
        teacher: str | None,
    ) -> FitConfig:  # fmt: skip
        return FitConfig(
            name=name, task=self.job.task, labels=self.labels(), student=student, losses=dict(losses), training=training,
            storage=self.job.cluster.storage, corpus=self.corpus.folder, targets=targets, teacher=teacher, output=stage.folder,
            fingerprint=stage.fingerprint,
        )  # fmt: skip


def make_plan(job: JobConfig) -> Plan:
    """Find the model, look at the corpus's sources, derive every fingerprint. Raises what a user can mend before anything runs."""
    if not (job.cluster.storage.startswith(("/", "~")) or "://" in job.cluster.storage):
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"storage": str(Path(job.cluster.storage).resolve())})})
    storage = Storage(job.cluster.storage)
    model = _locate(job.teacher)
    _check_model(job, model)
    corpus = _stage("corpora", *corpus_fingerprint(job.corpus, job.task, model))
    training = job.teacher.training
    teacher_from = {
        "weights": models.weights_fingerprint(model),
        "tokenizer": models.tokenizer_fingerprint(model),
        "corpus": corpus.fingerprint,
        "training": training and _training(training),
    }
    teacher = _stage("teachers", store.fingerprint(teacher_from), teacher_from)
    targets_from = {
        "teacher": teacher.fingerprint, "corpus": corpus.fingerprint, "targets": job.teacher.targets.model_dump(mode="json"),
        "batch_tokens": job.teacher.batch_tokens, "precision": job.teacher.precision,
    }  # fmt: skip
    targets = _stage("targets", store.fingerprint(targets_from), targets_from) if job.needs_teacher else None
    return Plan(job, storage, model, corpus, teacher, targets, tuple(_runs(job, corpus, teacher, targets)))


def _runs(job: JobConfig, corpus: Stage, teacher: Stage, targets: Stage | None) -> list[Run]:
    runs = []
    for name, student in job.all_students.items():
        start = {
            "corpus": corpus.fingerprint, "teacher": teacher.fingerprint, "student": _student(student), "training": _training(job.training)
        }  # fmt: skip
        made_from = {**start, "targets": targets and targets.fingerprint, "losses": _losses(job.active_losses)}
        baseline = f"{name}-baseline" if job.baseline and targets is not None else None
        stage = _stage("students", store.fingerprint(made_from), made_from)
        runs.append(Run(name, "student", student, job.active_losses, stage, baseline))
        if baseline and targets is not None:
            # A probe without the teacher's answers still reads its features. The student's losses matter for the number of steps only:
            # an epoch has fewer where they score labelled rows alone.
            reads = targets.fingerprint if isinstance(student, ProbeStudent) else None
            epoch = "labelled rows" if only_labels(job.active_losses) else "all rows"
            plain = {**start, "targets": reads, "losses": _losses(job.baseline_losses), "steps_of": epoch}
            runs.append(Run(baseline, "baseline", student, job.baseline_losses, _stage("students", store.fingerprint(plain), plain), None))
    return runs


def _stage(kind: str, fingerprint: str, made_from: Mapping[str, Any]) -> Stage:
    return Stage(f"{kind}/{fingerprint}", fingerprint, made_from)


def _training(training: TrainingConfig) -> dict[str, Any]:
    """Settings that change what is learned; how often one looks at it does not."""
    return training.model_dump(mode="json", exclude={"log_every", "evaluate_every", "checkpoint_every", "microbatch_tokens"})


def _losses(losses: Mapping[str, Any]) -> dict[str, Any]:
    return {name: loss.model_dump(mode="json") for name, loss in losses.items()}


def _student(student: Any) -> dict[str, Any]:
    settings: dict[str, Any] = student.model_dump(mode="json")
    if isinstance(student, PretrainedStudent):
        settings["weights"] = models.weights_fingerprint(_locate(student))
    return settings


def _locate(model: TeacherConfig | PretrainedStudent) -> Path:
    return models.locate(model.model, revision=model.revision, pickled_weights=model.pickled_weights)


def depth_of(config: Mapping[str, Any]) -> int | None:
    """Layers of a model by its config.json; None where it does not say."""
    found = next((config[key] for key in ("num_hidden_layers", "n_layers", "n_layer") if key in config), None)
    return found if isinstance(found, int) else None


def width_of(config: Mapping[str, Any]) -> int | None:
    """Width of the hidden states by config.json."""
    found = next((config[key] for key in ("hidden_size", "dim", "n_embd") if key in config), None)
    return found if isinstance(found, int) else None


def _check_model(job: JobConfig, folder: Path) -> None:
    """Whatever of the job can be held against config.json alone."""
    config = models.read_config(folder)
    depth = depth_of(config)
    if depth is None:
        raise InputError(
            "DST-3211", "architecture cannot be cut into layers", where=str(folder), expected="num_hidden_layers in config.json"
        )
    _check_length(job.task.max_length, config, folder)
    for name, student in job.all_students.items():
        _check_student(job, name, student, config, depth)
    features = job.teacher.targets.features
    if features and (absent := [layer for layer in features.layers if not 0 <= layer < depth]):
        raise ConfigError(
            "DST-2011", "teacher has no such layer", where="teacher.targets.features.layers", expected=f"layers 0 to {depth - 1}",
            found=str(absent), do="Name other layers",
        )  # fmt: skip
    if not job.teacher.training:
        names = models.label_names(config)
        if job.task.labels is not None:
            count = len(config.get("id2label") or {}) or config.get("num_labels") or 2
            models.label_order(names, count, job.task.labels, str(folder))


def _check_student(job: JobConfig, name: str, student: Any, config: Mapping[str, Any], depth: int) -> None:
    own_depth, own_width = None, width_of(config)
    if isinstance(student, LayersStudent):
        own_depth = len(chosen_layers(student, depth))
    if isinstance(student, ScratchStudent):
        own_depth, own_width = student.layers, student.hidden_size
    if isinstance(student, PretrainedStudent):
        folder = _locate(student)
        own = models.read_config(folder)
        own_depth, own_width = depth_of(own), width_of(own)
        _check_length(job.task.max_length, own, folder)
    for loss in job.active_losses.values():
        if not isinstance(loss, PatientKD):
            continue
        if own_width != width_of(config):
            raise ConfigError(
                "DST-2013", "pkd compares hidden states of one width", where=f"{name}: hidden_size", expected=str(width_of(config)),
                found=str(own_width), do="Use the teacher's width, or another loss",
            )  # fmt: skip
        if own_depth is not None and (absent := [layer for layer in loss.layers if not 0 <= layer < own_depth]):
            raise ConfigError(
                "DST-2012", "student has no such layer", where=f"{name}: losses", expected=f"layers 0 to {own_depth - 1}",
                found=str(absent), do="Change the layer map of the loss",
            )  # fmt: skip


def _check_length(max_length: int, config: Mapping[str, Any], folder: Path) -> None:
    """Positions beyond those a model was made for end in an index error on a worker, after everything else was computed."""
    positions = next((config[key] for key in ("max_position_embeddings", "n_positions") if key in config), None)
    if not isinstance(positions, int) or positions < 1:
        return
    if config["model_type"] in PADDED_POSITIONS:
        positions -= int(config.get("pad_token_id") or 0) + 1
    if max_length > positions:
        raise ConfigError(
            "DST-2014", "rows are longer than the model can read", where="task.max_length", expected=f"at most {positions} for {folder}",
            found=str(max_length), do="Lower task.max_length, or use a model with more positions",
        )  # fmt: skip
