"""A job file: what to distil, into what, where. Loading is pydantic only, so a wrong file is refused in under a second on a laptop."""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
import itertools
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from cluster.config import ROLES, ClusterConfig, CorpusConfig, TrackingConfig
from distillation.config import (
    HARD,
    NAME,
    ONLY,
    AttentionKL,
    CausalLM,
    Config,
    ConvolutionalStudent,
    CrossEntropy,
    DenseLogits,
    DrawMasks,
    ImageClassification,
    LayersStudent,
    LossConfig,
    MaskedLM,
    MaskTokens,
    Mixup,
    ProbeStudent,
    RelationKL,
    SampledLogits,
    StudentConfig,
    TargetsConfig,
    TaskConfig,
    TeacherConfig,
    TextClassification,
    TopKLogits,
    TrainingConfig,
    default_logits,
    hard_loss,
    needs_of,
    weighs,
)
from distillation.errors import ConfigError
from jobs.settings import MAX_BYTES, read_settings
from tuning.config import QUALITY, Choice, KnobConfig, SearchConfig, reported
from tuning.space import Space, nearest, paths

MAX_PROBLEMS = 20
"""Of a file that are told at once."""

TURNED = ("student", "losses", "training")
"""Parts of a job that a search may vary."""

Name = Annotated[str, StringConstraints(pattern=NAME)]


class EvaluationConfig(Config):
    """How teacher, baseline and student are measured on the test split."""

    threads: int | None = Field(None, ge=1)
    """For latency and throughput. None: those of a worker."""
    repeats: int = Field(100, ge=10)
    """Rows timed one at a time for p50 and p95."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    batch_tokens: int = Field(8192, ge=16)


class StoreConfig(Config):
    """Limits of the target store."""

    budget: float | None = Field(None, gt=0)
    """Most bytes that the answers of all teachers may take. A job that needs more is refused before a teacher is asked."""


class JobConfig(Config):
    """The whole job file."""

    name: Name
    task: TaskConfig
    corpus: CorpusConfig
    teacher: TeacherConfig | None = None
    """One teacher; or several by name in `teachers`."""
    teachers: dict[Name, TeacherConfig] = Field({})
    """The first one is what students are cut from and compared with."""
    student: StudentConfig | None = None
    """One student; or several by name in `students`."""
    students: dict[Name, StudentConfig] = Field({})
    losses: dict[Name, LossConfig] = Field(min_length=1)
    """Terms of the loss by name; every knob has a dotted path."""
    training: TrainingConfig
    finetune: TrainingConfig | None = None
    """Train every student further, on labels alone, after its distillation: another student, NAME-tuned."""
    baseline: bool = True
    """Also train every student without the teacher: same start, same number of steps, labels only."""
    evaluation: EvaluationConfig = EvaluationConfig()
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig | None = None
    """What `distill search` varies; the other verbs leave it aside."""

    @model_validator(mode="after")
    def _fits_together(self) -> JobConfig:
        problems = [*self._part_problems(), *self._task_problems()]
        if not problems:
            problems = [*self._loss_problems(), *self._size_problems()]
        if not problems:
            problems = [*self._search_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _part_problems(self) -> Iterable[str]:
        if (self.student is None) == (not self.students):
            yield "set one of student and students"
        if (self.teacher is None) == (not self.teachers):
            yield "set one of teacher and teachers"
        students = set(self.all_students)
        taken = {f"{name}-{ending}" for name in students for ending in ("baseline", "tuned")} | {"teacher", *self.teachers}
        if clash := sorted(taken & students):
            yield f"students: the names {clash} are taken by a teacher, a baseline or a fine-tuned student"

    def _task_problems(self) -> Iterable[str]:
        """What does not suit the task."""
        task, hard = self.task, HARD.get(self.task.type)
        suits = suited(task)
        for name, loss in self.losses.items():
            if loss.type not in suits:
                yield f"losses.{name}: {loss.type} is no loss of {task.type}; it has {', '.join(sorted(suits))}"
        if hard is None and self.baseline and self.needs_teacher:
            yield f"baseline: {task.type} has no labels to train on without a teacher; set baseline: false"
        if hard is None and (self.finetune or any(teacher.training for teacher in self.all_teachers.values())):
            yield f"{task.type} has no labels to train on: leave teacher.training and finetune out"
        if isinstance(task, CausalLM | MaskedLM) and self.corpus.labelled < 1:
            yield f"corpus.labelled: every text of {task.type} is its own label; leave it at 1"
        yield from self._augment_problems()
        packed = isinstance(task, CausalLM) and task.pack
        for name, loss in self.losses.items():
            if packed and loss.type in ("relation_kl", "attention_kl"):
                yield f"losses.{name}: {loss.type} looks at whole rows; set task.pack: false"
        for name, student in self.all_students.items():
            if isinstance(student, ProbeStudent) and (task.type not in ROWWISE or hard is None):
                yield f"students.{name}: a probe answers once a row; {task.type} does not"
            trims = isinstance(student, LayersStudent) and student.trim_vocabulary
            if trims and any(teacher.live for teacher in self.all_teachers.values()):
                yield f"students.{name}.trim_vocabulary: a live teacher reads the batches of the student, in its ids; leave one of the two out"
            if isinstance(student, ConvolutionalStudent) and not isinstance(task, ImageClassification):
                yield f"students.{name}: a convolutional student reads images; the task is {task.type}"
        for path, targets in {f"{path}.targets": teacher.targets for path, teacher in self._by_path().items()}.items():
            if isinstance(targets.logits, TopKLogits | SampledLogits) and hard is not CrossEntropy:
                yield f"{path}.logits: {targets.logits.type} needs one label out of several; {task.type} has dense logits only"
            inner = targets.features
            if isinstance(task, ImageClassification) and inner and (inner.at == "tokens" or inner.relations is not None):
                yield f"{path}.features: images have no tokens; leave `at` and `relations` out"

    def _augment_problems(self) -> Iterable[str]:
        task, augment = self.task, self.training.augment
        for path, training in {"finetune": self.finetune, **{p: t.training for p, t in self._by_path().items()}}.items():
            if training and isinstance(training.augment, DrawMasks) and not isinstance(task, MaskedLM):
                yield f"{path}.augment: draw_masks is for masked_lm, the task is {task.type}"
            elif training and training.augment and not isinstance(training.augment, DrawMasks):
                yield f"{path}.augment: only students are trained on mixed or masked rows; leave it out"
        if augment is None:
            return
        if isinstance(augment, Mixup) and isinstance(task, TextClassification) and task.pair:
            yield "training.augment: mixup does not mix pairs of texts"
        if stored := [name for name in self.asked_teachers if not self.all_teachers[name].live]:
            yield f"training.augment: {', '.join(stored)} said nothing about mixed or masked rows; set live: true there"
        if isinstance(augment, DrawMasks) and not isinstance(task, MaskedLM):
            yield f"training.augment: draw_masks is for masked_lm, the task is {task.type}"
        if isinstance(augment, MaskTokens | DrawMasks):
            for name, student in self.all_students.items():
                if isinstance(student, LayersStudent) and student.trim_vocabulary:
                    yield f"students.{name}.trim_vocabulary: {augment.type} hides tokens by the ids of the corpus; leave one of the two out"
        mixes = ("text_classification", "image_classification")
        if isinstance(augment, Mixup) and task.type not in mixes:
            yield f"training.augment: mixup is for {' and '.join(mixes)}, the task is {task.type}"
        if isinstance(augment, MaskTokens) and (isinstance(task, ImageClassification | CausalLM | MaskedLM)):
            yield f"training.augment: mask_tokens is for labels of texts and words, the task is {task.type}"

    def _loss_problems(self) -> Iterable[str]:
        held = {name: held_by(self, name) for name in self.all_teachers}
        users: dict[str, Any] = {f"losses.{name}": loss for name, loss in self.losses.items()}
        users |= {f"students.{name}": s for name, s in self.all_students.items() if isinstance(s, ProbeStudent)}
        for path, user in users.items():
            needs = needs_of(user) - {"labels"}
            if unknown := sorted(set(asked(user, self)) - set(held)):
                yield f"{path}: there is no teacher {', '.join(unknown)}; there are {', '.join(held)}"
                continue
            if needs and getattr(user, "teacher", None) is None and len(held) > 1 and not isinstance(user, ProbeStudent):
                yield f"{path}.teacher: say which of {', '.join(held)}"
            mixes = needs & {"distribution", "distribution or draws"} and user.type != "universal_logit"
            if isinstance(getattr(user, "teacher", None), dict) and not mixes:
                yield f"{path}.teacher: {user.type} looks at one teacher; name it"
            for name in asked(user, self) if needs else ():
                for need in sorted(needs - held[name]):
                    yield f"{path}: {user.type} needs {need} of the teacher; {REMEDIES[need]}"
                yield from self._temperature_problems(path, user, name)
        yield from self._layer_problems()
        yield from self._balance_problems()
        if len({loss.layer for loss in self.losses.values() if isinstance(loss, RelationKL)}) > 1:
            yield "losses: terms of type relation_kl must name the same layer of the student"
        if not any(weighs(loss) for loss in self.losses.values()):
            yield "losses: all weights are 0, nothing would be learned"
        trained = any(teacher.training for teacher in self.all_teachers.values())
        if self.corpus.labelled == 0 and (trained or not self.needs_teacher):
            yield "corpus.labelled is 0, but a loss needs labels to train on"

    def _balance_problems(self) -> Iterable[str]:
        for name, loss in self.losses.items():
            if loss.balance is None:
                continue
            other = self.losses.get(loss.balance.to)
            if other is None or other is loss or not weighs(other):
                others = ", ".join(key for key, each in self.losses.items() if each is not loss and weighs(each)) or "none"
                yield f"losses.{name}.balance.to: there is no other term {loss.balance.to} that counts; there are {others}"
            elif other.balance is not None:
                yield f"losses.{name}.balance.to: {loss.balance.to} is balanced itself; name the one that it is balanced to"
            elif needs_of(loss) == {"labels"} != needs_of(other):
                yield f"losses.{name}.balance: without a teacher there is no {loss.balance.to}; balance {loss.balance.to} to {name} instead"

    def _temperature_problems(self, path: str, loss: Any, teacher: str) -> Iterable[str]:
        """Of targets that are not whole, only some temperatures are known."""
        logits, temperature = self.targets(teacher).logits, getattr(loss, "temperature", None)
        if temperature is None or not needs_of(loss) & {"distribution", "distribution or draws"}:
            return
        known = {1.0, *logits.temperatures} if isinstance(logits, TopKLogits) else {getattr(logits, "temperature", None)}
        if isinstance(logits, TopKLogits | SampledLogits) and temperature not in known:
            what = f"{temperature:g}" if isinstance(temperature, float) else "a ramp"
            knob = "temperatures" if isinstance(logits, TopKLogits) else "temperature"
            yield (
                f"{path}.temperature is {what}, but the teacher's {logits.type} targets are exact at {', '.join(f'{t:g}' for t in sorted(known))} "  # type: ignore[type-var]
                f"only; add it to teacher.targets.logits.{knob}, or keep dense logits"
            )
        mixed = isinstance(getattr(loss, "teacher", None), dict) and getattr(loss, "route", None) is None
        if isinstance(logits, SampledLogits) and getattr(loss, "route", None):
            yield f"{path}.route: how sure a teacher is cannot be told from draws; keep dense or top-k logits"
        if isinstance(logits, TopKLogits | SampledLogits) and mixed:
            yield (
                f"{path}.teacher: {logits.type} targets of several teachers are of different classes and cannot be mixed; give each a term of "
                "its own, or keep dense logits"
            )

    def _layer_problems(self) -> Iterable[str]:
        for name, loss in self.losses.items():
            layers = getattr(loss, "layers", None)
            if not set(asked(loss, self)) <= set(self.all_teachers):
                continue  # said already
            features = self.targets(asked(loss, self)[0]).features
            named = set(layers.values()) if isinstance(layers, dict) and not isinstance(loss, AttentionKL) else set()
            if features and (missing := sorted(named - set(features.layers))):
                yield f"losses.{name}.layers: teacher layers {missing} are not in teacher.targets.features.layers {list(features.layers)}"
            if layers and any(isinstance(s, ProbeStudent) for s in self.all_students.values()):
                yield f"losses.{name}: a probe has no layers to match"
        places = {self.targets(name).features.at for name in self.all_teachers if self.targets(name).features}  # type: ignore[union-attr]
        if len(places) > 1:
            yield "teachers: targets.features.at must be the same for all"

    def _size_problems(self) -> Iterable[str]:
        sizes = {"training.batch_tokens": self.training.batch_tokens, "training.microbatch_tokens": self.training.microbatch_tokens}
        if self.finetune:
            sizes["finetune.batch_tokens"] = self.finetune.batch_tokens
        for path, teacher in self._by_path().items():
            if teacher.training:
                sizes[f"{path}.training.batch_tokens"] = teacher.training.batch_tokens
            sizes[f"{path}.batch_tokens"] = teacher.batch_tokens
        for path, tokens in sizes.items():
            if tokens < self.task.max_length:
                yield f"{path} is {tokens}, less than one row of task.max_length {self.task.max_length}"
        for name, student in self.all_students.items() if self.cluster.group("student").shards != 1 else ():
            if isinstance(student, ProbeStudent | ConvolutionalStudent):
                yield f"cluster.student.shards: student {name} is of type {student.type}, which cannot be cut among workers; leave shards out"
        if self.tracking.uri is None and "://" in self.cluster.storage:
            yield "tracking.uri: name an MLflow server; SQLite cannot lie in an object store"
        yield from self._worker_problems()

    def _worker_problems(self) -> Iterable[str]:
        """Groups that may change their size while they learn something that depends on it."""
        trainings = {"training": self.training, "finetune": self.finetune}
        of_teachers = {f"{path}.training": teacher.training for path, teacher in self._by_path().items()}
        for role, some in zip(ROLES, (of_teachers, trainings), strict=True):
            for path, training in some.items() if self.cluster.group(role).elastic else ():
                fixed = f"set cluster.{role}.workers to a number"
                if training and isinstance(self.task, ImageClassification):
                    yield f"{path}: batch norms learn something else with every number of workers; {fixed}"
                elif training and training.dropout != 0:
                    yield f"{path}.dropout: every number of workers drops something else; {fixed}, or dropout to 0"

    def _search_problems(self) -> Iterable[str]:
        if self.search is None:
            return
        if not self.needs_teacher:
            yield "search: no loss asks the teacher, so there is nothing to search for; give one of them a weight above 0"
        known = self._paths_of_search()
        for path in self.search.space:
            if path.split(".")[0] not in TURNED:
                yield f"search.space: {path} cannot be turned; trials share corpus, task and teacher, so knobs lie under {', '.join(TURNED)}"
            elif path not in known:
                yield f"search.space: there is no setting {path}; the nearest is {nearest(path, {p for p in known if p.split('.')[0] in TURNED})}"

        for path, knob in self.search.space.items():
            for seen in knob.when:
                if seen not in known:
                    yield f"search.space.{path}.when: there is no setting {seen}; the nearest is {nearest(seen, known)}"
        yield from self._comparison_problems(self.search)

        yield from self._metric_problems(self.search)

    def _metric_problems(self, search: SearchConfig) -> Iterable[str]:
        """What no trial of this task would report."""
        task = self.task.type
        headline, *others = reported(task)
        if "objectives" not in search.model_fields_set and search.quality not in (headline, *others):
            yield (
                f"search.objectives: {task} reports no accuracy, by which trials are compared where nothing is said; "
                f"set objectives: {{{headline}: {QUALITY[headline]}, cost/parameters: min}}"
            )
        for section in ("objectives", "keep") if "objectives" in search.model_fields_set else ("keep",):
            for name in getattr(search, section):
                if name in QUALITY and name not in (headline, *others):
                    yield f"search.{section}: {name} is not reported by {task}, which reports {', '.join((headline, *others))}"

    def _comparison_problems(self, search: SearchConfig) -> Iterable[str]:
        """What would quietly make another search of it."""
        scheduler, knobs = search.scheduler.type, self.space().knobs
        if scheduler == "pbt" and any(path.split(".")[0] == "student" for path in knobs):
            yield "search: scheduler pbt needs one student: a student cannot go on from the weights of another one"
        lengths = {"training", "training.epochs", "training.steps", *(["training.batch_tokens"] if self.training.steps else [])}
        if scheduler != "none" and (found := sorted(lengths & knobs.keys())):
            yield f"search: scheduler {scheduler} compares trials of one length, but {', '.join(found)} change it; use scheduler {{type: none}}"
        if self.cluster.group("student").gpus and "gpus_per_worker" not in search.model_fields_set:
            yield "search.gpus_per_worker: the workers of the job have GPUs; say which share of one a trial gets (0: none)"
        if search.searcher.type == "grid":
            points = sum(1 for _ in itertools.islice(self.space().grid(search.searcher.points), search.trials + 1))
            if points > search.trials:
                yield f"search.trials is {search.trials}, but the grid has more points: raise it, or use searcher {{type: random}}"

    def _paths_of_search(self) -> set[str]:
        """Every setting that some point of the space has: the job's own, and those of each sub-object that a knob may put in."""
        space = self.space()
        known = paths(space.base)
        for path, knob in space.knobs.items():
            for option in knob.choice if isinstance(knob, Choice) else ():
                if isinstance(option, dict):
                    settings = space.apply({path: option}) if path in known else {}
                    with contextlib.suppress(ValidationError):  # refused when it is drawn
                        settings = JobConfig.model_validate(settings).model_dump(mode="json")
                    known |= paths(settings)
        return known

    def space(self) -> Space:
        """What the search turns, over the job without its search. Several students, and no knob for them: a choice among them."""
        assert self.search is not None
        students = [student.model_dump(mode="json") for student in self.all_students.values()]
        base = self.model_dump(mode="json", exclude={"search", "finetune"}) | {"students": {}, "student": students[0]}
        knobs: dict[str, KnobConfig] = dict(self.search.space)
        if len(students) > 1 and not any(path.split(".")[0] == "student" for path in knobs):
            knobs = {"student": Choice(choice=tuple(students)), **knobs}
        return Space(knobs, base)

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        return dict(self.teachers) or ({ONLY: self.teacher} if self.teacher else {})

    @property
    def lead(self) -> TeacherConfig:
        """The teacher that students are cut from and compared with: the only one, or the first."""
        return next(iter(self.all_teachers.values()))

    def targets(self, teacher: str) -> TargetsConfig:
        """What a teacher is asked for, with what the task decides where the file says nothing."""
        config = self.all_teachers[teacher]
        if config.targets.logits is not None:
            return config.targets
        logits = default_logits(self.task)
        # A live teacher's answers about a few classes are not kept: they may be whole.
        dense = isinstance(logits, DenseLogits)
        return config.targets.model_copy(update={"logits": DenseLogits(dtype="float32") if config.live and dense else logits})

    def _by_path(self) -> dict[str, TeacherConfig]:
        return {"teacher": self.teacher} if self.teacher else {f"teachers.{name}": one for name, one in self.teachers.items()}

    @property
    def asked_teachers(self) -> list[str]:
        """Those that a term of the loss or a student looks at."""
        # A search may wake a term whose weight is 0 in the file.
        losses = self.losses if self.search is not None else self.active_losses
        users = [*losses.values(), *(s for s in self.all_students.values() if isinstance(s, ProbeStudent))]
        found = {name for user in users if needs_of(user) - {"labels"} for name in asked(user, self)}
        return [name for name in self.all_teachers if name in found]

    @property
    def all_students(self) -> dict[str, Any]:
        return dict(self.students) or ({"student": self.student} if self.student else {})

    @property
    def workspace(self) -> Path:
        """Local folder of everything that goes by this job's name; its journals lie there.

        Of a remote storage not in the current folder: that of a job on a cluster is another one each time.
        """
        remote = "://" in self.cluster.storage
        storage = (os.environ.get("DISTILLERY_STATE") or "~/.distillery") if remote else self.cluster.storage
        return Path(os.path.abspath(os.path.expanduser(storage))) / "runs" / self.name

    @property
    def needs_teacher(self) -> bool:
        """Whether any student looks at what the teacher says."""
        asks = any(weighs(loss) and needs_of(loss) - {"labels"} for loss in self.losses.values())
        return asks or any(isinstance(s, ProbeStudent) for s in self.all_students.values())

    @property
    def active_losses(self) -> dict[str, Any]:
        """Terms that count: those of weight 0 are neither computed nor do they need a teacher."""
        return {name: loss for name, loss in self.losses.items() if weighs(loss)}

    @property
    def baseline_losses(self) -> dict[str, Any]:
        """The terms that need labels only, a single one at weight 1; the task's own if there is none."""
        hard = {name: loss for name, loss in self.active_losses.items() if needs_of(loss) == {"labels"}}
        if len(hard) == 1:
            hard = {name: loss.model_copy(update={"weight": 1.0}) for name, loss in hard.items()}
        return hard or {"hard": hard_loss(self.task)}


ROWWISE = frozenset({"text_classification", "multi_label", "regression", "image_classification", "embedding"})
"""Tasks with one scored position a row."""

_STATES = frozenset({"hidden_mse", "cosine", "pkd", "attention_kl", "relation_kl"})
_GROUPS = frozenset({"rkd_distance", "rkd_angle", "similarity_preserving", "similarity_kl", "contrastive"})
_CLASSES = frozenset({
    "cross_entropy", "forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "adaptive_kl", "total_variation",
    "universal_logit", "l2_distil", "logit_mse", "standardised_kl", "decoupled_kd",
})  # fmt: skip

REMEDIES = {
    "logits": "set teacher.targets.logits to {type: dense}",
    "distribution": "set teacher.targets.logits to {type: dense} or {type: topk}",
    "distribution or draws": "set teacher.targets.logits",
    "hidden": "add teacher.targets.features with layers",
    "pooled": "add teacher.targets.features with pooled",
    "relations": "add teacher.targets.features with relations: the layer",
    "attentions": "set teacher.live: true, as attention maps are not stored",
}


def suited(task: TaskConfig) -> frozenset[str]:
    """Types of losses that a task can have."""
    own = {
        "multi_label": frozenset({"binary_cross_entropy", "binary_kl", "logit_mse", "teacher_mse"}),
        "regression": frozenset({"label_mse", "teacher_mse"}),
        "embedding": frozenset(),
    }
    found = own.get(task.type, _CLASSES) | (_STATES - {"relation_kl", "attention_kl"} if isinstance(task, ImageClassification) else _STATES)
    found |= _GROUPS if task.type in ROWWISE else frozenset()
    return found | ({"dist"} if task.type in ("text_classification", "image_classification") else frozenset())


def asked(user: Any, job: JobConfig) -> list[str]:
    """Names of the teachers that a loss (or a probe) looks at."""
    teacher = getattr(user, "teacher", None)
    if teacher is None:
        return list(job.all_teachers)[:1]
    return [teacher] if isinstance(teacher, str) else list(teacher)


def held_by(job: JobConfig, teacher: str) -> frozenset[str]:
    """What losses and students may need of the answers of a teacher."""
    targets, live = job.targets(teacher), job.all_teachers[teacher].live
    features, logits = targets.features, targets.logits
    there = {
        "logits": isinstance(logits, DenseLogits), "distribution": isinstance(logits, DenseLogits | TopKLogits),
        "distribution or draws": logits is not None, "hidden": bool(features and features.layers),
        "pooled": bool(features and features.pooled), "relations": bool(features and features.relations is not None), "attentions": live,
    }  # fmt: skip
    return frozenset(name for name, held in there.items() if held)


# ----------------------------------------------------------------------------------------------------------------- load


def load(source: str, overrides: Sequence[str] = ()) -> JobConfig:
    """A job from a file or the name of a recipe, with `a.b=c` overrides. Raises ConfigError with every problem found."""
    return parse(read(source), overrides, source)


def recipes() -> dict[str, str]:
    """Shipped job files: name -> text."""
    folder = importlib.resources.files("jobs.recipes")
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in folder.iterdir() if f.name.endswith(".yaml")}


def parse(text: str, overrides: Sequence[str], source: str) -> JobConfig:
    """A job from YAML text."""
    content = read_settings(text, overrides, source)
    try:
        return JobConfig.model_validate(content)
    except ValidationError as error:
        raise refusal(error, source) from error


def dump(job: JobConfig) -> str:
    """The job as YAML, every setting written out; loads back to an equal job."""
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(job.model_dump(mode="json"))
    return text


def read(source: str) -> str:
    """Text of a job file or a recipe. Raises ConfigError."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml") and "/" not in source and source in recipes():
        return recipes()[source]
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            "DST-2001", "no such job", where=source, expected=f"a YAML file or a recipe ({', '.join(sorted(recipes()))})", found=str(error)
        ) from error
    if len(content) > MAX_BYTES:
        raise ConfigError("DST-2002", "job file cannot be read", where=source, expected=f"at most {MAX_BYTES} bytes", found="more")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("DST-2002", "job file cannot be read", where=source, expected="UTF-8", found=str(error)) from error


def refusal(error: ValidationError, source: str) -> ConfigError:
    """All problems of a file in one error: path, what is allowed, what was found."""
    problems = []
    paths_ = [".".join(str(part) for part in _path(one["loc"])) for one in error.errors(include_url=False)]
    for one, path in zip(error.errors(include_url=False), paths_, strict=True):
        if one["type"] == "model_type" and paths_.count(path) > 1:
            continue  # a number that is refused is no ramp either
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(one["loc"][-1]), _fields_at(JobConfig, one["loc"][:-1]), n=1, cutoff=0.5)
            hint = f', did you mean "{close[0]}"?' if close else f" (allowed: {', '.join(sorted(_fields_at(JobConfig, one['loc'][:-1])))})"
            problems.append(f'unknown key "{path}"{hint}')
        elif one["type"] in ("missing", "value_error", "union_tag_not_found") or isinstance(one["input"], dict):
            problems.append(f"{path}: {message}" if path else message)
        else:
            problems.append(f"{path}: {message}, got {_shown(one['input'])}")
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more"]
    return ConfigError(
        "DST-2005", "job file is refused", where=source, found="; ".join(problems), expected="a job as `distill schema` describes"
    )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "a number too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _path(location: Sequence[Any]) -> list[Any]:
    """A pydantic location without the tags of unions, as one writes it in the file."""
    path, types_ = [], [JobConfig]
    for part in location:
        inner, is_tag = _step(types_, part)
        if not is_tag:
            path.append(part)
        types_ = inner
    return path


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    types_: list[Any] = [model]
    for part in location:
        types_, _ = _step(types_, part)
    return [name for one in types_ if isinstance(one, type) and issubclass(one, BaseModel) for name in one.model_fields]


def _step(types_: Sequence[Any], part: Any) -> tuple[list[Any], bool]:
    """Types behind one part of a location, and whether the part is the tag of a union rather than a key."""
    models = [one for one in types_ if isinstance(one, type) and issubclass(one, BaseModel)]
    if any("type" in one.model_fields for one in models):
        tagged = [one for one in models if "type" in one.model_fields and part in get_args(one.model_fields["type"].annotation)]
    else:  # a knob: its tag is the name of a field
        tagged = [one for one in models if part in one.model_fields]
    if tagged and len(models) > 1:
        return tagged, True
    plain = [one for one in types_ if one is not type(None)]
    if len(plain) > 1 and isinstance(part, str) and not any(part in one.model_fields for one in models):  # a number or a ramp
        named = [one for one in plain if getattr(one, "__name__", "") == part]
        return named or [one for one in plain if part.startswith("dict") and get_origin(one) is dict], True
    for one in models:
        if part in one.model_fields:
            return _flatten(one.model_fields[part].annotation), False
    return [inner for one in types_ if get_origin(one) is dict for inner in _flatten(get_args(one)[1])], False


def _flatten(annotation: Any) -> list[Any]:
    """Members of a union, without Annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _flatten(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _flatten(member)]
    return [annotation]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path, as one writes them on the command line."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{path}.")
        else:
            found[path] = value
    return found
