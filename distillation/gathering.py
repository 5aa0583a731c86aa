"""One pass of several models over a split, the teacher beside each: what they said, as far as scores need it.

Legend: n rows, m statistics of the task, N scored positions of a batch, c classes. Logits over a vocabulary exist piece by piece only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distillation.config import ONLY, CausalLM, Embedding, MaskedLM, TokenClassification
from distillation.inference import require_finite
from distillation.network import Network, mixed
from distillation.rows import Rows
from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal
from distillation.tasks import Task


@dataclass
class Gathered:
    """What one model said about a split. Fields that the task has no use for are None."""

    sums: np.ndarray
    """Of each row, `Task.names`. [n, m] fp64"""
    said: np.ndarray | None = None
    """Logits of each row [n, c], or its embedding [n, H]; fp32. None where a row has several scored positions."""
    confusion: np.ndarray | None = None
    """Labelled positions by [label][answer], of token classification."""


class Share(NamedTuple):
    """What models said about some rows of a split."""

    rows: np.ndarray
    """Their numbers. [s]"""
    said: dict[str, Gathered]
    """By model; n is s."""


def share_of(found: Mapping[str, Gathered], rows: np.ndarray) -> Share:
    """The part of what was gathered that is about these rows."""
    return Share(
        rows, {name: Gathered(g.sums[rows], g.said[rows] if g.said is not None else None, g.confusion) for name, g in found.items()}
    )


def together(shares: Sequence[Share]) -> dict[str, Gathered]:
    """Of shares that make a split: what one pass over it would have gathered."""
    place, found = np.argsort(np.concatenate([share.rows for share in shares])), {}
    for name in shares[0].said:
        each = [share.said[name] for share in shares if len(share.rows)]
        sums = np.concatenate([g.sums for g in each])[place]
        said = [g.said for g in each if g.said is not None]
        confusion = [g.confusion for g in each if g.confusion is not None]
        found[name] = Gathered(sums, np.concatenate(said)[place] if said else None, np.sum(confusion, axis=0) if confusion else None)
    return found


def gather(
    networks: Mapping[str, Network], rows: Mapping[str, Rows], teacher: str, batches: Sequence[np.ndarray], bf16: bool, device: torch.device
) -> dict[str, Gathered]:
    """By model. rows: the split as each model reads it. batches: of row numbers, each row once.

    Raises InputError where an answer is not finite.
    """
    task, count = rows[teacher].task, len(rows[teacher])
    found = {name: Gathered(np.zeros((count, len(task.names)))) for name in networks}
    if isinstance(task.config, TokenClassification):
        for gathered in found.values():
            gathered.confusion = np.zeros((len(task.labels), len(task.labels)), np.int64)
    with torch.no_grad(), mixed(networks.values(), bf16, device):
        for chosen in batches:
            for name in (name for name in networks if rows[name].other_places):
                _gather_alone(found[name], networks[name], rows[name], chosen, device)
            read = {name: rows[name].batch(chosen).to(device) for name in networks if not rows[name].other_places}
            if task.speaks:
                read = _judged_alike(read)
            said = {name: networks[name](its.inputs, its.scored, its.tokens, its.lengths) for name, its in read.items()}
            if isinstance(task.config, Embedding):
                for name, outputs in said.items():
                    _keep(found[name], chosen, outputs.pooled)
                continue
            for piece in _pieces(task, said[teacher]):
                theirs = said[teacher].logits_of(piece).float()
                for name, outputs in said.items():
                    mine = theirs if name == teacher else outputs.logits_of(piece).float()
                    _add(found[name], task, chosen, mine, _part(read[name], piece, _as_wide(rows[name].known(theirs), mine.shape[1])))
    for name, gathered in found.items():
        require_finite(gathered.sums if gathered.said is None else gathered.said, name)
    return found


def _gather_alone(gathered: Gathered, network: Network, rows: Rows, chosen: np.ndarray, device: torch.device) -> None:
    """A model that reads the rows in tokens of its own: nothing of what it says stands beside the teacher's."""
    batch = rows.batch(chosen).to(device)
    gathered.sums[chosen] += rows.task.statistics(network(batch.inputs, batch.scored, batch.tokens, batch.lengths), batch).numpy()


def _judged_alike(read: Mapping[str, Batch]) -> dict[str, Batch]:
    """Labels only where every model has one: a trimmed vocabulary must not be spared what it cannot say."""
    known = torch.stack([batch.labels >= 0 for batch in read.values()]).all(0)
    return {name: replace(batch, labels=torch.where(known, batch.labels, UNLABELLED)) for name, batch in read.items()}


def _pieces(task: Task, teacher: Outputs) -> list[slice]:
    return teacher.chunks() if isinstance(task.config, CausalLM | MaskedLM) else [slice(0, len(teacher.anchor))]


def _add(gathered: Gathered, task: Task, chosen: np.ndarray, logits: Tensor, part: Batch) -> None:
    gathered.sums[chosen] += task.statistics(Outputs(logits), part).numpy()
    if gathered.confusion is not None:
        classes, known = logits.shape[1], part.labels >= 0
        pairs = (part.labels[known] * classes + logits.argmax(-1)[known]).cpu().numpy()
        gathered.confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    elif not isinstance(task.config, CausalLM | MaskedLM):
        _keep(gathered, chosen, logits)


def _keep(gathered: Gathered, chosen: np.ndarray, values: Tensor | None) -> None:
    assert values is not None
    if gathered.said is None:
        gathered.said = np.zeros((len(gathered.sums), values.shape[1]), np.float32)
    gathered.said[chosen] = values.float().cpu().numpy()


def _part(batch: Batch, piece: slice, theirs: Tensor) -> Batch:
    """Some of a batch's scored positions, with what the teacher said about them. What belongs to rows goes with the first piece."""
    ends = batch.positions.cumsum(0)
    positions = (ends.clamp(max=piece.stop) - (ends - batch.positions).clamp(min=piece.start)).clamp(min=0)
    written = batch.bytes if piece.start == 0 else None
    return replace(batch, labels=batch.labels[piece], positions=positions, signals={ONLY: TeacherSignal(logits=theirs)}, bytes=written)


def _as_wide(logits: Tensor, classes: int) -> Tensor:
    """The teacher's logits over as many classes as the student has: embeddings of one vocabulary are padded to different sizes."""
    if logits.shape[1] >= classes:
        return logits[:, :classes]
    return torch.nn.functional.pad(logits, (0, classes - logits.shape[1]), value=-torch.inf)
