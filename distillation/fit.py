"""Carry out one training run from its settings: the one function that Ray Train workers, Tune trials and plain processes call."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillation import models, store
from distillation.checkpoints import Checkpoints
from distillation.config import FitConfig, PatientKD, PretrainedStudent
from distillation.errors import InputError
from distillation.loop import Fit, Session
from distillation.losses import student_layers
from distillation.rows import Rows, open_rows
from distillation.signals import output_head, rows_answered
from distillation.storage import Storage
from distillation.students import Probe, build_student
from distillation.tasks import build_task


def train(config: FitConfig, session: Session, made_from: Mapping[str, Any]) -> dict[str, float]:
    """Train, commit the model under `config.output` and return the last metrics.

    A run that is finished is found and not repeated, its curve is reported again; one that was stopped goes on from its newest checkpoint. Without
    `config.keep_model` a model is neither looked for nor committed, and the checkpoints stay: who records the numbers calls
    `discard_checkpoints` then. Raises what `open_rows`, `build_student` and the loop raise.
    """
    models.quiet()
    storage, answered = Storage(config.storage), rows_answered()
    if config.keep_model and (found := _finished(storage, config, session)) is not None:
        return found
    teacher = model_folder(storage, config.teacher) if config.teacher else None
    source = _own_folder(config) if isinstance(config.student, PretrainedStudent) else teacher
    assert source is not None
    if teacher is not None and source != teacher:
        models.require_same_vocabulary(source, teacher)
    task = build_task(config.task, pad_id(source))
    rows = open_rows(storage, config.corpus, config.targets, "train", task)
    validation = open_rows(storage, config.corpus, config.targets, "validation", task)
    _require_signal(config, rows)
    training = config.training
    module = build_student(
        config.student, teacher, config.labels, report_layers=student_layers(config.losses), dropout=training.dropout, seed=training.seed
    )
    module.train()
    checkpoints = Checkpoints(storage, _checkpoints(config.output), config.fingerprint)
    result = Fit(module, rows, validation, config.losses, training, session, checkpoints, config.rungs, config.save_rungs).run()
    result["teacher_rows"] = rows_answered() - answered
    if not config.keep_model:
        return result
    if session.rank == 0 and store.find(storage, config.output) is None:
        # The tokenizer that cut the corpus goes with the student, also with a pretrained one.
        _commit(storage, config, module, teacher or source, {"result": result, "history": checkpoints.history}, made_from)
        discard_checkpoints(storage, config.output)
    session.all_reduce(torch.zeros(1, device=session.device))  # nobody leaves before the model is committed
    return result


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
    for step, metrics in manifest.facts["history"]:
        session.report(metrics, step)
    return dict(manifest.facts["result"])


def adopt(
    storage: Storage,
    folder: Path,
    labels: Sequence[str],
    stage: str,
    fingerprint: str,
    made_from: Mapping[str, Any],
    *,
    pickled: bool = False,
) -> None:
    """Commit a teacher that is already trained: every tensor there, classes in the corpus's order, names written down.

    Raises InputError where model and corpus do not belong together.
    """
    if (done := store.find(storage, stage)) is not None and done.fingerprint == fingerprint:
        return
    model = models.load_classifier(folder, pickled=pickled)
    order = models.label_order(models.label_names(model.config.to_dict()), model.config.num_labels, tuple(labels), str(folder))
    head = output_head(model)
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
        if head.bias is not None:
            head.bias.copy_(head.bias[order])
    facts = {"result": {}, "history": [], "label_order": order}
    commit_model(storage, stage, model, folder, labels, fingerprint, made_from, facts)


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


def _require_signal(config: FitConfig, rows: Rows) -> None:
    """What the job file promised was checked when it was loaded; here the store itself must hold the layers asked for."""
    wanted = {layer for loss in config.losses.values() if isinstance(loss, PatientKD) for layer in loss.layers.values()}
    if missing := sorted(wanted - set(rows.layers)):
        raise InputError(
            "DST-3214", "target store lacks layers", where=config.targets or "", expected=str(sorted(wanted)), found=str(list(rows.layers)),
            do=f"Add {missing} to teacher.targets.features.layers",
        )  # fmt: skip


def _commit(
    storage: Storage, config: FitConfig, module: nn.Module, source: Path, found: Mapping[str, Any], made_from: Mapping[str, Any]
) -> None:
    model: Any = module.whole_model() if isinstance(module, Probe) else module.model
    facts = {**found, "trained_parameters": sum(p.numel() for p in module.parameters()), "name": config.name}
    commit_model(storage, config.output, model, source, config.labels, config.fingerprint, made_from, facts)


def commit_model(
    storage: Storage, stage: str, model: Any, source: Path, labels: Sequence[str], fingerprint: str, made_from: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write a model as save_pretrained does, with the tokenizer of the folder `source` beside it, as one artifact."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: i for i, name in enumerate(labels)}
    with tempfile.TemporaryDirectory(prefix="distillery-") as name:
        model.save_pretrained(name)
        copy_tokenizer(source, Path(name))
        told = {**facts, "labels": list(labels), "parameters": sum(p.numel() for p in model.parameters())}
        store.commit_folder(storage, stage, Path(name), "model", fingerprint, made_from, told)


def copy_tokenizer(source: Path, destination: Path) -> None:
    for name in models.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
