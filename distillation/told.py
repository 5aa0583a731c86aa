"""How good a teacher is, from what the store holds of it: it is not asked again."""

from __future__ import annotations

import torch
from torch import Tensor

from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal
from distillation.tasks import Task


def statistics_of_teacher(task: Task, batch: Batch, classes: int) -> Tensor | None:
    """`Task.statistics` of what the first teacher said, [B, m] fp64; None where that is not known of it: draws of a few classes, or nothing.

    classes: of the task, where they are not the vocabulary. The most likely classes alone say as much: with them lies the probability of the
    label, and what is left over belongs to none of both.
    """
    signal = batch.signal
    if signal.logits is not None:
        return task.statistics(Outputs(signal.logits), batch)
    if signal.log_p is not None:
        return _of_words(task, batch) if task.speaks else task.statistics(Outputs(_dense(signal, batch.labels, classes)), batch)
    if signal.weights is not None and task.speaks:
        return _of_words(task, batch)
    return task.statistics(Outputs(pooled=signal.pooled), batch) if signal.pooled is not None and task.headline == "cosine" else None


def _of_words(task: Task, batch: Batch) -> Tensor:
    """Of a vocabulary, without an array as wide as it. The answer of draws is the token that was drawn most often."""
    signal, labelled = batch.signal, batch.labelled
    assert signal.ids is not None
    assert signal.label_log_p is not None
    one = torch.ones(len(labelled), dtype=torch.float64)
    answers = signal.ids[:, 0] if signal.weights is None else signal.ids.gather(1, signal.weights.argmax(-1, keepdim=True))[:, 0]
    each = {
        "labelled": labelled, "right": (answers == batch.labels) & labelled,
        "nll": torch.where(labelled, -signal.label_log_p, 0.0), "answered": one, "agree": one,
    }  # fmt: skip
    found = torch.zeros(len(batch.ids), len(task.names), dtype=torch.float64)
    for name, values in each.items():
        found[:, task.names.index(name)].index_add_(0, batch.row_of, values.double())
    if batch.bytes is not None and "bytes" in task.names:
        found[:, task.names.index("bytes")] = batch.bytes.double()
    return found


def _dense(signal: TeacherSignal, labels: Tensor, classes: int) -> Tensor:
    """Log-probabilities of all classes, [N, classes]: the rest is dealt out evenly, which makes none of it likelier than a stored one."""
    assert signal.log_p is not None
    assert signal.ids is not None
    assert signal.label_log_p is not None
    known = torch.full((len(labels), classes), -torch.inf)
    labelled = torch.nonzero(labels != UNLABELLED)[:, 0]
    known[labelled, labels[labelled]] = signal.label_log_p[labelled]
    known.scatter_(1, signal.ids, signal.log_p)
    unknown = known.isinf()
    rest = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=1e-9) / unknown.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(unknown, rest.log(), known)
