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

from cluster.config import ClusterConfig, CorpusConfig, TrackingConfig
from distillation.config import (
    NAME,
    Config,
    CrossEntropy,
    LossConfig,
    PatientKD,
    ProbeStudent,
    StudentConfig,
    TargetsConfig,
    TaskConfig,
    TeacherConfig,
    TrainingConfig,
)
from distillation.errors import ConfigError
from jobs.settings import MAX_BYTES, read_settings
from tuning.config import Choice, KnobConfig, SearchConfig
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


class JobConfig(Config):
    """The whole job file."""

    name: Name
    task: TaskConfig
    corpus: CorpusConfig
    teacher: TeacherConfig
    student: StudentConfig | None = None
    """One student; or several by name in `students`."""
    students: dict[Name, StudentConfig] = Field({})
    losses: dict[Name, LossConfig] = Field(min_length=1)
    """Terms of the loss by name; every knob has a dotted path."""
    training: TrainingConfig
    baseline: bool = True
    """Also train every student without the teacher: same start, same number of steps, labels only."""
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig | None = None
    """What `distill search` varies; the other verbs leave it aside."""

    @model_validator(mode="after")
    def _fits_together(self) -> JobConfig:
        problems = [*self._student_problems(), *self._loss_problems(), *self._size_problems()]
        if not problems:
            problems = [*self._search_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _student_problems(self) -> Iterable[str]:
        if (self.student is None) == (not self.students):
            yield "set one of student and students"
        if clash := sorted(
            {f"{name}-baseline" for name in self.all_students} & set(self.all_students) | ({"teacher"} & set(self.all_students))
        ):
            yield f"students: the names {clash} are taken by the teacher or a baseline"

    def _loss_problems(self) -> Iterable[str]:
        held = held_by(self.teacher.targets) | {"labels"}
        users: dict[str, Any] = {f"losses.{name}": loss for name, loss in self.losses.items()}
        users |= {f"students.{name}": s for name, s in self.all_students.items() if isinstance(s, ProbeStudent)}
        for path, user in users.items():
            for need in sorted(user.needs - held):
                yield f"{path}: {user.type} needs {need} of the teacher; add teacher.targets.features with {need.replace('hidden', 'layers')}"
        features = self.teacher.targets.features
        for name, loss in self.losses.items():
            if isinstance(loss, PatientKD) and features and (missing := sorted(set(loss.layers.values()) - set(features.layers))):
                yield f"losses.{name}.layers: teacher layers {missing} are not in teacher.targets.features.layers {list(features.layers)}"
            if isinstance(loss, PatientKD) and any(isinstance(s, ProbeStudent) for s in self.all_students.values()):
                yield f"losses.{name}: a probe has no layers to match"
        if all(loss.weight == 0 for loss in self.losses.values()):
            yield "losses: all weights are 0, nothing would be learned"
        if self.corpus.labelled == 0 and (self.teacher.training or not self.needs_teacher):
            yield "corpus.labelled is 0, but a loss needs labels to train on"

    def _size_problems(self) -> Iterable[str]:
        sizes = {"training.batch_tokens": self.training.batch_tokens, "training.microbatch_tokens": self.training.microbatch_tokens}
        if self.teacher.training:
            sizes["teacher.training.batch_tokens"] = self.teacher.training.batch_tokens
        for path, tokens in {**sizes, "teacher.batch_tokens": self.teacher.batch_tokens}.items():
            if tokens < self.task.max_length:
                yield f"{path} is {tokens}, less than one row of task.max_length {self.task.max_length}"
        if self.tracking.uri is None and "://" in self.cluster.storage:
            yield f"tracking.uri: name an MLflow server; SQLite cannot lie in {self.cluster.storage}"

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

    def _comparison_problems(self, search: SearchConfig) -> Iterable[str]:
        """What would quietly make another search of it."""
        scheduler, knobs = search.scheduler.type, self.space().knobs
        if scheduler == "pbt" and any(path.split(".")[0] == "student" for path in knobs):
            yield "search: scheduler pbt needs one student: a student cannot go on from the weights of another one"
        lengths = {"training", "training.epochs", "training.steps", *(["training.batch_tokens"] if self.training.steps else [])}
        if scheduler != "none" and (found := sorted(lengths & knobs.keys())):
            yield f"search: scheduler {scheduler} compares trials of one length, but {', '.join(found)} change it; use scheduler {{type: none}}"
        if self.cluster.gpus_per_worker and "gpus_per_worker" not in search.model_fields_set:
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
        base = self.model_dump(mode="json", exclude={"search"}) | {"students": {}, "student": students[0]}
        knobs: dict[str, KnobConfig] = dict(self.search.space)
        if len(students) > 1 and not any(path.split(".")[0] == "student" for path in knobs):
            knobs = {"student": Choice(choice=tuple(students)), **knobs}
        return Space(knobs, base)

    @property
    def all_students(self) -> dict[str, Any]:
        return dict(self.students) or ({"student": self.student} if self.student else {})

    @property
    def workspace(self) -> Path:
        """Local folder of everything that goes by this job's name; its journals lie there."""
        storage = "distillery-runs" if "://" in self.cluster.storage else self.cluster.storage
        return Path(os.path.abspath(os.path.expanduser(storage))) / "runs" / self.name

    @property
    def needs_teacher(self) -> bool:
        """Whether any student looks at what the teacher says."""
        asks = any(loss.weight > 0 and loss.needs - {"labels"} for loss in self.losses.values())
        return asks or any(isinstance(s, ProbeStudent) for s in self.all_students.values())

    @property
    def active_losses(self) -> dict[str, Any]:
        """Terms that count: those of weight 0 are neither computed nor do they need a teacher."""
        return {name: loss for name, loss in self.losses.items() if loss.weight > 0}

    @property
    def baseline_losses(self) -> dict[str, Any]:
        """The terms that need labels only, a single one at weight 1; a cross entropy if there is none."""
        hard = {name: loss for name, loss in self.active_losses.items() if loss.needs <= {"labels"}}
        if len(hard) == 1:
            hard = {name: loss.model_copy(update={"weight": 1.0}) for name, loss in hard.items()}
        return hard or {"hard": CrossEntropy(type="cross_entropy")}


def held_by(targets: TargetsConfig) -> frozenset[str]:
    """What losses and students may need of a store with these targets."""
    features = targets.features
    extra = {"hidden": bool(features and features.layers), "pooled": bool(features and features.pooled)}
    return frozenset({"logits", *(name for name, there in extra.items() if there)})


# ----------------------------------------------------------------------------------------------------------------- load


def load(source: str, overrides: Sequence[str] = ()) -> JobConfig:
    """A job from a file or the name of a recipe, with `a.b=c` overrides. Raises ConfigError with every problem found."""
    return parse(_read(source), overrides, source)


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


def _read(source: str) -> str:
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
    for one in error.errors(include_url=False):
        path = ".".join(str(part) for part in _path(one["loc"]))
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
