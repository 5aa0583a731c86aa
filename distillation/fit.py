"""Carry out one training run from its settings: the one function that Ray Train workers, Tune trials and plain processes call."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distillation import curves, models, sharding, store
from distillation.answers import make_teacher
from distillation.batches import cut
from distillation.checkpoints import Checkpoints
from distillation.config import (
    AttentionKL,
    CausalLM,
    DrawMasks,
    Embedding,
    FitConfig,
    ImageClassification,
    LayersStudent,
    PretrainedStudent,
    ProbeStudent,
    RelationKL,
    TaskConfig,
    needs_of,
)
from distillation.documents import ordinary_ids
from distillation.errors import ConfigError, InputError
from distillation.loop import Fit, Session
from distillation.losses import projected, student_layers
from distillation.network import Network, observe, order_head, output_head
from distillation.parts import numbers
from distillation.rows import Split, open_rows
from distillation.signals import rows_answered
from distillation.storage import Storage
from distillation.students import Probe, build_student
from distillation.tasks import Task, build_task
from distillation.vocabulary import kept_ids, trim_tokenizer


def train(config: FitConfig, session: Session, made_from: Mapping[str, Any]) -> dict[str, float]:
    """Train, commit the model under `config.output` and return the last metrics.

    A run that is finished is found and not repeated, its curve is reported again; one that was stopped goes on from its newest checkpoint. Without
    `config.keep_model` a model is neither looked for nor committed, and the checkpoints stay: who records the numbers calls
    `discard_checkpoints` then. Raises what `Split`, `build_student` and the loop raise.
    """
    models.quiet()
    storage, answered = Storage(config.storage), rows_answered()
    if config.keep_model and (found := _finished(storage, config, session)) is not None:
        return found
    teacher = model_folder(storage, config.teacher) if config.teacher else None
    source = _own_folder(config) if isinstance(config.student, PretrainedStudent) else teacher
    assert source is not None
    reads_its_own = _is_reading(storage, config.corpus)
    if teacher is not None and source != teacher and not reads_its_own and not isinstance(config.task, ImageClassification):
        models.require_same_vocabulary(source, teacher)
    task, training = reader(config.task, source, config.labels), config.training
    if isinstance(training.augment, DrawMasks):
        task.ordinary = ordinary_ids(models.require_tokenizer_fits(source))
    start = model_folder(storage, config.start) if config.start is not None else None
    kept = _kept(config, storage, teacher, start)
    table = table_of(kept, source) if kept is not None else None
    split, validation = (Split(storage, config.corpus, config.targets, name, task, table) for name in ("train", "validation"))
    _require_answers(config, split)
    plain = "eager" if any(isinstance(loss, AttentionKL) for loss in config.losses.values()) else None  # others keep no attention

    def whole() -> nn.Module:
        again = models.load(start, config.task, dropout=training.dropout) if start is not None else None
        model = again or _built(config, storage, teacher, kept, plain)
        return model if isinstance(model, Probe) else _network(model, config, teacher)

    checkpoints = Checkpoints(storage, _checkpoints(config.output), config.fingerprint)
    module = whole() if session.mesh is None else _part(config, teacher, session, checkpoints, whole, plain)
    module.train()
    result = Fit(
        module, split, validation, config.losses, training, session, checkpoints, config.rungs, config.save_rungs,
        _live_teachers(config, storage, session), config.features_at, config.lead,
    ).run()  # fmt: skip
    result["teacher_rows"] = rows_answered() - answered
    if not config.keep_model:
        return result
    # The tokenizer that cut the corpus goes with the student, also with a pretrained one.
    told = {"result": result, "history": checkpoints.history}
    if session.rank == 0 and store.find(storage, config.output) is None:
        its = start or (source if reads_its_own else teacher or source)
        _commit(storage, config, module, its, kept, table, told, made_from, session.mesh is not None)
        discard_checkpoints(storage, config.output)
    elif session.mesh is not None:
        assert isinstance(module, Network)
        sharding.save_model(module.model, None)
    session.all_reduce(torch.zeros(1, device=session.device))  # nobody leaves before the model is committed
    return result


def _is_reading(storage: Storage, corpus: str) -> bool:
    """Whether a corpus is another one in the tokens of a student's own tokenizer."""
    manifest = store.find(storage, corpus)
    return manifest is not None and "reads" in manifest.facts


def _part(
    config: FitConfig, teacher: Path | None, session: Session, checkpoints: Checkpoints, whole: Callable[[], nn.Module], attention: str | None
) -> nn.Module:  # fmt: skip
    """This worker's part of a student, without values: the newest checkpoint has them. Where there is none, rank 0 builds the student and
    writes the first: on one machine it has to fit, in memory, not on a device.
    """
    assert session.mesh is not None
    assert not isinstance(config.student, ProbeStudent), "the settings were checked"
    if (settings := checkpoints.settings(session)) is None:
        if session.rank == 0:
            checkpoints.begin(whole())
        session.all_reduce(torch.zeros(1, device=session.device))
        settings = checkpoints.settings(session)
    assert settings is not None
    from transformers import AutoConfig

    made = AutoConfig.for_model(**settings)
    if attention:
        made._attn_implementation = attention
    network = _network(sharding.outline(made, config.task), config, teacher)
    return sharding.split(network, session.mesh, session.device, training=True)


def _require_answers(config: FitConfig, split: Split) -> None:
    """Raise InputError where a term of the loss asks for inner states that the store of its teacher lacks."""
    for name, loss in config.losses.items():
        named = next(iter([*config.targets, *config.live]), "") if loss.teacher is None else loss.teacher
        for teacher in [named] if isinstance(named, str) else named:
            if (targets := split.said.get(teacher)) is None:
                continue
            layers, features = getattr(loss, "layers", None), targets.features
            stored = features.layers if features else ()
            wanted = sorted(set(layers.values())) if isinstance(layers, dict) and "hidden" in needs_of(loss) else []
            there = {"pooled": features and features.pooled, "relations": features and features.relations is not None}
            lacking = [need for need in sorted(needs_of(loss) & there.keys()) if not there[need]]
            if lacking or not set(wanted) <= set(stored):
                raise InputError(
                    "DST-3214", "target store lacks what a loss needs", where=f"{config.targets[teacher]}, losses.{name}",
                    expected=", ".join(lacking) or str(wanted), found=str(list(stored)),
                    do="Add it to teacher.targets.features and run `distill teach` again",
                )  # fmt: skip


def untrained(config: FitConfig, storage: Storage) -> Any:
    """The student of a run as it starts: a model, or a `Probe`."""
    teacher = model_folder(storage, config.teacher) if config.teacher else None
    return _built(config, storage, teacher, _kept(config, storage, teacher, None), None)


def as_read(config: FitConfig, storage: Storage, folder: Path) -> Path:
    """A folder that says how the student of a run reads rows, without its weights: the teacher's, or one with a trimmed vocabulary."""
    assert config.teacher is not None
    teacher = model_folder(storage, config.teacher)
    if (kept := _kept(config, storage, teacher, None)) is None:
        return teacher
    copy_tokenizer(teacher, folder)
    shutil.copyfile(teacher / "config.json", folder / "config.json")
    (folder / models.VOCABULARY).write_text(json.dumps({"tokens": len(table_of(kept, teacher)), "kept": kept.tolist()}))
    return folder


def _built(config: FitConfig, storage: Storage, teacher: Path | None, kept: np.ndarray | None, attention: str | None) -> Any:
    return build_student(
        config.student, teacher, config.task, config.labels, dropout=config.training.dropout, seed=config.training.seed,
        attention=attention, sample=functools.partial(_sample, storage, config, teacher), kept=kept,
    )  # fmt: skip


def discard_checkpoints(storage: Storage, output: str) -> None:
    """Remove those of the run with this `FitConfig.output`, which is over. None there is fine."""
    storage.delete(_checkpoints(output))


def go_on_from(config: FitConfig, output: str, step: int) -> None:
    """Give a run the checkpoint that the run with this `FitConfig.output` made at a step, in place of its own. Raises InputError."""
    Checkpoints(Storage(config.storage), _checkpoints(config.output), config.fingerprint).adopt(_checkpoints(output), step)


def _checkpoints(output: str) -> str:
    return f"{output}.checkpoints"


def _finished(storage: Storage, config: FitConfig, session: Session) -> dict[str, float] | None:
    """What this very run gave, if it was finished."""
    done = store.find(storage, config.output)
    finished = torch.tensor([float(done is not None and done.fingerprint == config.fingerprint)], device=session.device)
    if session.rank != 0:
        finished.zero_()
    if not session.all_reduce(finished).item():  # rank 0 decides for all: another job may be finishing this very run
        return None
    manifest, _ = store.open_artifact(storage, config.output, "model")
    for step, metrics in curves.read(storage, config.output, manifest):
        session.report(metrics, step)
    return dict(manifest.facts["result"])


def adopt(
    storage: Storage,
    folder: Path,
    task: TaskConfig,
    labels: Sequence[str],
    stage: str,
    fingerprint: str,
    made_from: Mapping[str, Any],
    *,
    pickled: bool = False,
    sharded: bool = False,
) -> None:
    """Commit a teacher that is already trained: every tensor there, classes in the corpus's order, names written down.

    sharded: read and write it tensor by tensor, because it may be larger than this machine.
    Raises InputError where model and corpus do not belong together.
    """
    if (done := store.find(storage, stage)) is not None and done.fingerprint == fingerprint:
        return
    model, pieces = sharding.look(folder, task) if sharded else (models.load(folder, task, pickled=pickled), None)
    order: list[int] = []
    if labels and not isinstance(task, Embedding):
        order = order_head(model, labels, str(folder))
    facts = {"result": {}, "history": [], "label_order": order}
    save = functools.partial(sharding.save_model, whole=functools.partial(_ordered, pieces, model, order)) if pieces else None
    commit_model(storage, stage, model, folder, task, labels, fingerprint, made_from, facts, save=save)


def _ordered(pieces: sharding.Pieces, model: Any, order: list[int], name: str, _: torch.Tensor) -> torch.Tensor:
    """A tensor of a model that lies in files, fp32; of its head the rows in this order."""
    found = pieces.whole(name)
    found = found.float() if found.is_floating_point() else found
    head = {id(parameter) for parameter in output_head(model).parameters()} if order else set()
    return found[order] if id(dict(model.named_parameters()).get(name)) in head else found


def model_folder(storage: Storage, folder: str) -> Path:
    """Local folder of a committed model, every file checked."""
    _, files = store.open_artifact(storage, folder, "model")
    return files["config.json"].parent


def pad_id(folder: Path) -> int:
    value = models.read_config(folder).get("pad_token_id")
    return int(value) if isinstance(value, int) else 0


def _own_folder(config: FitConfig) -> Path:
    student = config.student
    assert isinstance(student, PretrainedStudent)
    return models.locate(student.model, revision=student.revision, pickled_weights=student.pickled_weights)


def reader(task: TaskConfig, folder: Path, labels: Sequence[str]) -> Task:
    """The task as the model in this folder reads rows: its padding, and the token its head looks at."""
    if isinstance(task, ImageClassification):
        return build_task(task, 0, labels)
    last = models.reads_last(models.read_config(folder))
    mask, unknown = (models.token_id(folder, name) for name in (("mask_token", "unk_token"), ("unk_token", "pad_token")))
    return build_task(task, pad_id(folder), labels, last=last, mask=mask, unknown=unknown)


def _kept(config: FitConfig, storage: Storage, teacher: Path | None, start: Path | None) -> np.ndarray | None:
    """Tokens that the student has, of those of the corpus; None: all."""
    if start is not None:
        return models.kept_tokens(start)
    if not (isinstance(config.student, LayersStudent) and config.student.trim_vocabulary):
        return None
    assert teacher is not None
    return tokens_in_use(storage, config.corpus, config.task, teacher)


def tokens_in_use(storage: Storage, corpus: str, task: TaskConfig, teacher: Path) -> np.ndarray:
    """Ids, ascending, of the teacher's tokens that a trimmed vocabulary keeps. Raises InputError for a tokenizer that cannot be trimmed."""
    size = int(models.read_config(teacher)["vocab_size"])
    splits = [open_rows(storage, corpus, {}, split, reader(task, teacher, ())) for split in ("train", "validation")]
    return kept_ids(sum((rows.used(size) for rows in splits), np.zeros(size, np.int64)), teacher)


def table_of(kept: np.ndarray, folder: Path) -> np.ndarray:
    """New id of every token of the model in `folder`, -1 for those that are not kept. [vocabulary]"""
    table = np.full(int(models.read_config(folder)["vocab_size"]), -1, np.int64)
    table[kept] = np.arange(len(kept))
    return table


def _sample(storage: Storage, config: FitConfig, folder: Path | None, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of some training rows, each row in a sequence of its own: the first by id, which is as good as at random."""
    assert folder is not None, "what is cut is a teacher"
    task = config.task.model_copy(update={"pack": False}) if isinstance(config.task, CausalLM) else config.task
    split = Split(storage, config.corpus, {}, "train", reader(task, folder, config.labels))
    rows = split.open(range(1 + np.searchsorted(numbers(split.parts, "rows").cumsum()[:-1], count)))
    some = np.arange(min(count, len(rows)))
    for piece in cut(some[np.argsort(rows.lengths[some], kind="stable")], np.sort(rows.lengths[some]), config.training.microbatch_tokens):
        yield dict(rows.batch(piece).inputs)


def _network(model: Any, config: FitConfig, teacher: Path | None) -> Network:
    """The student with all that its losses look at. Raises ConfigError where layers or widths do not fit."""
    losses, settings = config.losses, model.config.to_dict()
    layers, depth, width = student_layers(losses), models.depth_of(settings) or 0, models.width_of(settings) or 0
    if layers and layers[-1] >= depth:
        raise ConfigError(
            "DST-2012", "student has no such layer", where="losses", expected=f"layers 0 to {depth - 1}", found=str(layers[-1]),
            do="Change the layer map of the loss",
        )  # fmt: skip
    needs = frozenset().union(*(needs_of(loss) for loss in losses.values()))
    relation = next((loss.layer for loss in losses.values() if isinstance(loss, RelationKL)), None)
    wide = models.width_of(models.read_config(teacher)) or 0 if teacher is not None else 0
    places = projected(losses)
    into = {name: config.widths.get(str(losses[name].teacher or config.lead), wide) for name in places}
    network = Network(
        model, config.task, layers=layers, at=config.features_at, pooled="pooled" in needs,
        relations=None if relation is None else relation % depth, attentions="attentions" in needs,
        projections={name: (max(1, len(its)), width, into[name]) for name, its in places.items()},
    )  # fmt: skip
    network.picks = {name: [layers.index(layer) for layer in its] for name, its in places.items()}
    return network


def _live_teachers(config: FitConfig, storage: Storage, session: Session) -> dict[str, Any]:
    """For each live teacher a function from a batch to what it says."""
    found = {}
    for name, its in config.live.items():
        maps = [loss.layers for loss in config.losses.values() if isinstance(loss, AttentionKL) and loss.teacher in (None, name)]
        layers = tuple(sorted({layer for one in maps if isinstance(one, dict) for layer in one.values()}))
        folder, attention = model_folder(storage, its.folder), "eager" if layers else None
        make = functools.partial(make_teacher, task=config.task, targets=its.targets, attention_layers=layers)
        if session.mesh is not None:
            teacher = sharding.load(folder, make, config.task, session.mesh, session.device, attention)
        else:
            teacher = make(models.load(folder, config.task, attention=attention)).to(session.device)
        bf16 = models.use_bf16(its.precision, session.device)
        found[name] = functools.partial(observe, teacher, bf16=bf16, logits=its.targets.logits, features=its.targets.features)
    return found


def _commit(
    storage: Storage, config: FitConfig, module: nn.Module, source: Path, kept: np.ndarray | None,
    table: np.ndarray | None, found: Mapping[str, Any], made_from: Mapping[str, Any], sharded: bool,
) -> None:  # fmt: skip
    model: Any = module.whole_model() if isinstance(module, Probe) else module.model
    facts = {**found, "trained_parameters": sum(p.numel() for p in module.parameters()), "name": config.name}
    save = sharding.save_model if sharded else None
    commit_model(storage, config.output, model, source, config.task, config.labels, config.fingerprint, made_from, facts, kept, table, save)


def commit_model(
    storage: Storage, stage: str, model: Any, source: Path, task: TaskConfig, labels: Sequence[str], fingerprint: str,
    made_from: Mapping[str, Any], facts: Mapping[str, Any], kept: np.ndarray | None = None, table: np.ndarray | None = None,
    save: Callable[[Any, Path], None] | None = None,
) -> None:  # fmt: skip
    """Write a model as save_pretrained does, with the tokenizer of the folder `source` beside it, as one artifact.

    kept: tokens of the corpus's tokenizer that the model has, table: its id of each of them; None: all, as they are. save: instead of
    save_pretrained.
    """
    models.set_labels(model.config, task, labels)
    with tempfile.TemporaryDirectory(prefix="distillery-") as name:
        if save is None:
            model.save_pretrained(name)
        else:
            save(model, Path(name))
        if kept is None or models.kept_tokens(source) is not None:  # as they are, or trimmed before
            copy_tokenizer(source, Path(name))
        else:
            trim_tokenizer(source, kept, Path(name))
        if kept is not None and table is not None:
            (Path(name) / models.VOCABULARY).write_text(json.dumps({"tokens": len(table), "kept": kept.tolist()}))
        told = {**facts, "labels": list(labels), "parameters": sum(p.numel() for p in model.parameters())}
        curves.write(Path(name), told.pop("history", []))
        store.commit_folder(storage, stage, Path(name), "model", fingerprint, made_from, told)


def copy_tokenizer(source: Path, destination: Path) -> None:
    for name in (*models.TOKENIZER_FILES, "preprocessor_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
