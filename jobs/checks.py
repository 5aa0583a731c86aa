"""Whether models and job fit: held against config.json alone, before anything is loaded, made or asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillation import models
from distillation.config import (
    HARD,
    NAME,
    AttentionKL,
    CausalLM,
    ConvolutionalStudent,
    ImageClassification,
    LayersStudent,
    MaskedLM,
    MaskTokens,
    Mixup,
    NewModel,
    PretrainedStudent,
    RelationKL,
    ScratchStudent,
    TaskConfig,
    TeacherConfig,
    TopKLogits,
    needs_of,
)
from distillation.encoding import READ_AGAIN
from distillation.errors import ConfigError, InputError
from distillation.features import layer_map
from distillation.storage import Storage
from distillation.students import chosen_layers, cut_config
from jobs import beginnings
from jobs.config import JobConfig, asked

PADDED_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "longformer"})
"""Architectures that count positions from behind the padding token's id, and so have fewer than they say."""

PACKS = frozenset({
    "cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gptj", "granite", "llama", "mistral", "olmo", "olmo2", "phi",
    "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
})  # fmt: skip
"""Architectures whose packed rows were seen to give the logits of rows that stand alone; others let a row see the one before it."""

SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")
"""Settings by which logits become more than what the output layer gives."""

STUDENT = "student:"
"""Before JOB/STUDENT: a finished student of another job, as a teacher or to start from."""


def with_layers(job: JobConfig, depth: int | None, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The terms that count, with every layer map written out. depth: of the student; None where it is not known. configs: of teachers."""
    found = {}
    for name, loss in job.active_losses.items():
        kind = getattr(loss, "layers", None)
        if isinstance(kind, str):
            teacher_depth = models.depth_of(configs[asked(loss, job)[0]]) or 0
            try:
                found[name] = loss.model_copy(update={"layers": layer_map(kind, depth or 1, teacher_depth)})  # type: ignore[arg-type]
            except ValueError as error:
                raise ConfigError("DST-2031", "layer map does not fit", where=f"losses.{name}.layers", found=str(error)) from error
        else:
            found[name] = loss
    return found


def depth_of_student(student: Any, teacher_depth: int) -> int | None:
    if isinstance(student, LayersStudent):
        return len(chosen_layers(student, teacher_depth))
    if isinstance(student, ScratchStudent):
        return student.layers
    if isinstance(student, ConvolutionalStudent):
        return len(student.depths)
    return models.depth_of(models.read_config(locate(student))) if isinstance(student, PretrainedStudent) else None


def locate(model: TeacherConfig | PretrainedStudent, job: JobConfig | None = None) -> Path:
    if isinstance(model.model, NewModel):
        assert job is not None
        return beginnings.folder_of(model.model, job)
    address = (
        _student_of_job(model.model.removeprefix(STUDENT), job) if model.model.startswith(STUDENT) and job is not None else model.model
    )
    return models.locate(address, revision=model.revision, pickled_weights=model.pickled_weights)


def _student_of_job(name: str, job: JobConfig) -> str:
    """Folder or address of the newest export of JOB/STUDENT in this job's storage. Raises InputError where there is none."""
    owner, _, student = name.partition("/")
    storage, root = Storage(job.cluster.storage), f"runs/{owner}"
    exports = [f"{root}/{run}/students" for run in storage.list(root)] if re.match(NAME, owner) else []
    there = {f"{folder}/{one}" for folder in exports for one in storage.list(folder) if storage.exists(f"{folder}/{one}/config.json")}
    found = [path for path in there if path.endswith(f"/{student}")]
    if not found:
        raise InputError(
            "DST-3231", "no finished student of that name", where=f"{STUDENT}{name}", expected=f"{storage.path('runs')}/JOB/*/students/STUDENT",
            found=", ".join(sorted({path.rpartition("/")[2] for path in there})) or "none", do="Run that job first",
        )  # fmt: skip
    newest = max(found, key=lambda path: storage.arrow.get_file_info(f"{storage.path(path)}/config.json").mtime_ns)
    place, mark, settings = storage.uri.partition("?")
    return f"{place.rstrip('/')}/{newest}{mark}{settings}"


def with_students_found(job: JobConfig) -> JobConfig:
    """The job, with the addresses of students of other jobs that one of its own starts from. Raises InputError where there is none."""
    found = {
        name: student.model_copy(update={"model": _student_of_job(student.model.removeprefix(STUDENT), job)})
        for name, student in job.all_students.items()
        if isinstance(student, PretrainedStudent) and student.model.startswith(STUDENT)
    }
    if not found:
        return job
    return job.model_copy(update={"student": found.get("student", job.student)} if job.student else {"students": {**job.students, **found}})


def require_rungs(jobs: Sequence[JobConfig]) -> None:
    """Raise InputError if a job of a ladder needs a student that neither lies in the storage nor comes of a job before it."""
    made: set[str] = set()
    for job in jobs:
        starts = [student for student in job.all_students.values() if isinstance(student, PretrainedStudent)]
        for one in [*job.all_teachers.values(), *starts]:
            if isinstance(one.model, str) and one.model.startswith(STUDENT) and one.model not in made:
                locate(one, job)
        made |= {f"{STUDENT}{job.name}/{name}{tuned}" for name in job.all_students for tuned in ("", "-tuned")}


def check_teacher(job: JobConfig, name: str, folder: Path) -> None:
    """Whatever of the job can be held against a teacher's config.json alone."""
    config, teacher = models.read_config(folder), job.all_teachers[name]
    depth = models.depth_of(config)
    if depth is None:
        raise InputError(
            "DST-3211", "architecture cannot be cut into layers", where=str(folder), expected="num_hidden_layers in config.json"
        )
    if job.cluster.group("teacher").shards != 1 and "depths" in config:
        raise InputError(
            "DST-3241", "architecture cannot be sharded", where=str(folder), expected="a transformer", found=str(config["model_type"]),
            do="Leave cluster.teacher.shards out",
        )  # fmt: skip
    _check_length(job.task, config, folder)
    features, logits = teacher.targets.features, job.targets(name).logits
    wanted = [*features.layers, *([features.relations] if features.relations is not None else [])] if features else []
    if absent := [layer for layer in wanted if not 0 <= layer < depth]:
        raise ConfigError(
            "DST-2011", "teacher has no such layer", where=f"{name}.targets.features", expected=f"layers 0 to {depth - 1}",
            found=str(absent), do="Name other layers",
        )  # fmt: skip
    if (
        isinstance(logits, TopKLogits)
        and isinstance(job.task, CausalLM | MaskedLM)
        and logits.k > (size := int(config.get("vocab_size", 1 << 30)))
    ):
        raise ConfigError(
            "DST-2032", "k is larger than the vocabulary", where=f"{name}.targets.logits.k", expected=f"at most {size}", found=str(logits.k),
            do="Lower k, or keep dense logits",
        )  # fmt: skip
    _check_architecture(job, config, folder)
    if not teacher.training and HARD.get(job.task.type) and getattr(job.task, "labels", None) is not None:
        count = len(config.get("id2label") or {}) or config.get("num_labels") or 2
        models.label_order(models.label_names(config), count, job.task.labels, str(folder))  # type: ignore[union-attr, arg-type]


def _check_architecture(job: JobConfig, config: Mapping[str, Any], folder: Path) -> None:
    """What holds for teachers and for pretrained students."""
    task, kind = job.task, config["model_type"]
    scaled = [name for name in SCALES if config.get(name) not in (None, 1, 1.0)]
    if scaled and task.type in ("causal_lm", "masked_lm"):
        raise InputError(
            "DST-3232", "logits are made by more than a linear layer", where=str(folder), expected="a linear output layer",
            found=", ".join(scaled), do="Take another architecture",
        )  # fmt: skip
    if isinstance(task, CausalLM) and task.pack and kind not in PACKS:
        raise ConfigError(
            "DST-2036", "architecture is not known to keep packed rows apart", where="task.pack", expected=", ".join(sorted(PACKS)),
            found=kind, do="Set task.pack: false",
        )  # fmt: skip
    if isinstance(task, ImageClassification):
        wanted = {"channels": (config.get("num_channels"), task.channels), "size": (config.get("image_size"), task.size)}
        for name, (its, ours) in wanted.items():
            if isinstance(its, int) and its != ours:
                raise ConfigError(
                    "DST-2033", "images and model do not fit", where=f"task.{name}", expected=f"{its}, as {folder} reads", found=str(ours)
                )
    elif isinstance(job.training.augment, MaskTokens) and models.token_id(folder, ("mask_token", "unk_token")) < 0:
        raise ConfigError(
            "DST-2037", "tokenizer has no token that hides others", where="training.augment", expected="a mask or an unknown token",
            found=f"none in {folder}", do="Leave augment out",
        )  # fmt: skip
    elif isinstance(job.training.augment, Mixup) and models.reads_last(config):
        raise ConfigError(
            "DST-2038", "mixed texts have no last token", where="training.augment", expected="a model that answers at the first token",
            found=kind, do="Use mask_tokens, or another architecture",
        )  # fmt: skip


def check_student(job: JobConfig, name: str, student: Any, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """A student, with what the losses ask of it, against the config.json of every teacher; the first is the one that it is cut from."""
    config = next(iter(configs.values()))
    own_depth, own_width, own = depth_of_student(student, models.depth_of(config) or 0), models.width_of(config), config
    if isinstance(student, ScratchStudent):
        own_width = student.hidden_size
    if isinstance(student, ConvolutionalStudent):
        own_width = student.hidden_sizes[-1]
    if isinstance(student, LayersStudent):
        if config.get("depths"):
            raise ConfigError(
                "DST-2039", "a convolutional teacher cannot be cut into layers", where=f"{name}: type", expected="convolutional or pretrained",
                found="layers", do="Name the sizes of the student",
            )  # fmt: skip
        if student.cuts_width:  # of some architectures the width follows the heads
            own = cut_config(student, config)
            own_width = models.width_of(own)
    if isinstance(student, PretrainedStudent):
        folder = locate(student)
        own = models.read_config(folder)
        own_width = models.width_of(own)
        _check_length(job.task, own, folder)
        _check_architecture(job, own, folder)
    for key, loss in with_layers(job, own_depth, configs).items():
        for teacher in asked(loss, job):
            _check_term(job, f"losses.{key}", loss, name, student, (own_depth, own_width, own), teacher, configs[teacher])


def reads_its_own(job: JobConfig, student: Any, own: Path, model: Path) -> bool:
    """Whether a pretrained student has another tokenizer than the teacher in `model`, and so a reading of the corpus of its own.

    Raises InputError where it has, and the task or a loss compares the two token by token.
    """
    if isinstance(job.task, ImageClassification) or models.same_vocabulary(own, model):
        return False
    language, losses = isinstance(job.task, CausalLM), {n: loss for n, loss in job.active_losses.items() if needs_of(loss) != {"labels"}}
    features = [job.targets(name).features for name in job.all_teachers]
    by_token = {"relations", "attentions"} | ({"hidden"} if any(each and each.at == "tokens" for each in features) else set())
    bound = [n for n, loss in losses.items() if (loss.type != "universal_logit" if language else needs_of(loss) & by_token)]
    if job.task.type not in READ_AGAIN:
        models.require_same_vocabulary(own, model)
    if bound:
        what = (
            "let universal_logit be the only loss that asks the teacher"
            if language
            else f"leave out losses.{bound[0]}, which goes by token"
        )
        models.require_same_vocabulary(own, model, what)
    if any(job.all_teachers[name].live for name in job.asked_teachers):
        models.require_same_vocabulary(own, model, "let no teacher be live: it would read the student's tokens")
    return True


def _check_term(
    job: JobConfig, where: str, loss: Any, name: str, student: Any, its_own: tuple[int | None, int | None, Mapping[str, Any]], teacher: str,
    config: Mapping[str, Any],
) -> None:  # fmt: skip
    own_depth, own_width, own = its_own
    width, depth = models.width_of(config), models.depth_of(config) or 0
    needs, layers, features = needs_of(loss), getattr(loss, "layers", None), job.targets(teacher).features
    if needs & {"hidden", "pooled"} and loss.type in SAME_WIDTH and own_width != width and not loss.projection:
        raise ConfigError(
            "DST-2013", f"{loss.type} compares states of one width", where=f"{name}: hidden_size", expected=str(width),
            found=str(own_width), do=f"Use the teacher's width, set {where}.projection: true, or use another loss",
        )  # fmt: skip
    if isinstance(loss, RelationKL):
        if own_depth is not None and not -own_depth <= loss.layer < own_depth:
            raise _no_layer(name, own_depth, [loss.layer])
        mine = _relation_widths(own) if isinstance(student, PretrainedStudent | LayersStudent) else {own_width or 0}
        if odd := sorted(width for width in {*_relation_widths(config), *mine} if width % loss.heads):
            raise ConfigError(
                "DST-2025", "relation heads do not divide the width", where=f"{where}.heads", expected=f"a divisor of {odd}",
                found=f"{loss.heads} for {name}", do="Choose a number that divides the widths of teacher and student",
            )  # fmt: skip
    if isinstance(layers, dict) and own_depth is not None and (absent := [layer for layer in layers if not 0 <= layer < own_depth]):
        raise _no_layer(name, own_depth, absent)
    if isinstance(layers, dict) and (absent := [layer for layer in layers.values() if not 0 <= layer < depth]):
        raise ConfigError(
            "DST-2011", "teacher has no such layer", where=f"{where}.layers", expected=f"layers 0 to {depth - 1}", found=str(absent),
            do="Name other layers",
        )  # fmt: skip
    if isinstance(layers, dict) and "hidden" in needs and features and (missing := sorted(set(layers.values()) - set(features.layers))):
        raise ConfigError(
            "DST-2011", "teacher has no such layer in its targets", where=f"{where}.layers", expected=f"some of {list(features.layers)}",
            found=f"{missing} for {name}", do="Add them to teacher.targets.features.layers",
        )  # fmt: skip
    if isinstance(loss, AttentionKL):
        heads = [_heads(one) for one in (config, own)]
        heads[1] = getattr(student, "heads", None) or heads[1]
        if heads[0] != heads[1]:
            raise ConfigError(
                "DST-2040", "attention maps of different numbers of heads do not compare", where=where, expected=f"{heads[0]} heads, as the teacher",
                found=f"{heads[1]} of {name}", do="Use relation_kl, which regroups them",
            )  # fmt: skip


def _no_layer(name: str, depth: int, absent: list[int]) -> ConfigError:
    return ConfigError(
        "DST-2012", "student has no such layer", where=f"{name}: losses", expected=f"layers 0 to {depth - 1}", found=str(absent),
        do="Change the layer map of the loss",
    )  # fmt: skip


def _heads(config: Mapping[str, Any]) -> int:
    return int(next((config[key] for key in ("num_attention_heads", "n_heads", "n_head") if key in config), 1))


def _relation_widths(config: Mapping[str, Any]) -> set[int]:
    """Of queries, and of keys and values where several heads share them."""
    width, heads = models.width_of(config) or 0, _heads(config)
    each = config.get("head_dim") or width // heads
    return {heads * each, (config.get("num_key_value_heads") or heads) * each}


SAME_WIDTH = frozenset({"hidden_mse", "cosine", "pkd", "contrastive"})
"""Losses that compare state with state, not relations with relations."""


def _check_length(task: TaskConfig, config: Mapping[str, Any], folder: Path) -> None:
    """Positions beyond those a model was made for end in an index error on a worker, after everything else was computed."""
    max_length = task.max_length
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
