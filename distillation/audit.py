"""Does a target store say what the teacher says? A sample of rows is answered again and compared; what belongs together must agree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from distillation.answers import columns_of
from distillation.network import Network, observe
from distillation.rows import QUANTUM, Rows
from distillation.signals import Outputs, TeacherSignal, classes_of

NATS = 0.05
"""Most difference of a stored log-probability above -10: other batches give other last bits, fp16 rounds."""
SHARE = 0.02
"""Most difference of a logit or of an inner state, of the largest value in its column."""
COARSER = 8.0
"""How much more bf16 may differ: it has 8 bits where fp16 has 11."""


class Finding(NamedTuple):
    """One comparison: the largest difference that was found, and what is allowed."""

    what: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.found <= self.allowed


def audit(teacher: Network, rows: Rows, name: str, sample: np.ndarray, bf16: bool, device: torch.device) -> list[Finding]:
    """Compare the answers of one teacher, stored for these rows, with what it says now. sample: numbers of rows.

    Of sampled targets the ids must be likely for the teacher; their draws are compared as distributions over many positions.
    """
    targets = rows.targets[name]
    batch, slack = rows.batch(sample).to(device), COARSER if bf16 else 1.0
    stored, now = batch.signals[name], observe(teacher, batch, bf16, targets.config.logits, targets.config.features)
    found: list[Finding] = []
    if stored.log_p is not None:
        found += [*_log_probabilities(stored, now, slack, getattr(targets.config.logits, "dtype", "") == "uint8")]
    elif stored.weights is not None:
        found.append(Finding("draws", _distance_of_draws(stored, now), 0.1 * slack))
    classes = classes_of(teacher.head) if teacher.head is not None else 0
    plain = targets.config.model_copy(update={"logits": targets.config.logits if stored.logits is not None else None})
    both = [columns_of(_without_classes(signal), plain, classes) for signal in (stored, now)]
    for column in both[0]:
        mine, its = (columns[column].astype(np.float64) for columns in both)
        found.append(Finding(column, float(np.abs(mine - its).max()), slack * SHARE * float(np.abs(its).max())))
    if stored.pooled is not None and teacher.head is not None:
        found += _head_agrees(teacher, stored, slack)
    return found


def _log_probabilities(stored: TeacherSignal, now: TeacherSignal, slack: float, coarse: bool) -> list[Finding]:
    """Of the ids that both name; and how much of the teacher's mass the stored ids lack that are named now."""
    assert stored.ids is not None
    assert now.ids is not None
    assert stored.log_p is not None
    assert now.log_p is not None
    order = stored.ids.argsort(-1)
    sorted_ids = stored.ids.gather(1, order)
    places = torch.searchsorted(sorted_ids, now.ids).clamp(max=sorted_ids.shape[1] - 1)
    known = sorted_ids.gather(1, places) == now.ids
    theirs = stored.log_p.gather(1, order).gather(1, places)
    gaps = torch.where(known & (now.log_p > -10), (theirs - now.log_p).abs(), 0.0)
    lost = torch.where(known, 0.0, now.log_p.exp()).sum(-1)
    return [
        Finding("log-probabilities (nats)", float(gaps.max()), slack * NATS + (0.5 / QUANTUM if coarse else 0.0)),
        Finding("mass of ids that are not stored", float(lost.max()), slack * SHARE),
    ]


def _distance_of_draws(stored: TeacherSignal, now: TeacherSignal) -> float:
    """Half the L1 distance of the mean distributions over all positions: the same draws are made for the same probabilities."""
    assert stored.ids is not None
    assert now.ids is not None
    assert stored.weights is not None
    assert now.weights is not None
    size = int(max(stored.ids.max(), now.ids.max())) + 1
    sums = [
        torch.zeros(size, dtype=torch.float64).index_add_(0, ids.flatten().cpu(), weights.flatten().double().cpu()) / len(ids)
        for ids, weights in ((stored.ids, stored.weights), (now.ids, now.weights))
    ]
    return float((sums[0] - sums[1]).abs().sum() / 2)


def _without_classes(signal: TeacherSignal) -> TeacherSignal:
    """Dense logits and inner states: what is compared number by number."""
    return TeacherSignal(signal.logits, hidden=signal.hidden, layers=signal.layers, pooled=signal.pooled, relations=signal.relations)


def _head_agrees(teacher: Network, stored: TeacherSignal, slack: float) -> list[Finding]:
    """The head on the stored input of the head must give the stored answer."""
    assert stored.pooled is not None
    gap = most = nats = 0.0
    outputs = Outputs(states=stored.pooled, head=teacher.head)
    for chosen in outputs.chunks():  # the logits of a vocabulary never exist at once
        with torch.no_grad():
            logits, part = outputs.logits_of(chosen).float(), stored.part(chosen)
        if part.logits is not None:
            gap, most = max(gap, float((logits - part.logits.float()).abs().max())), max(most, float(logits.abs().max()))
        elif part.log_p is not None and part.ids is not None:
            gaps = (logits.log_softmax(-1).gather(1, part.ids) - part.log_p).abs()
            nats = max(nats, float(torch.where(part.log_p > -10, gaps, 0.0).max()))
    if stored.logits is not None:
        return [Finding("head on the stored input of the head", gap, slack * SHARE * most)]
    if stored.log_p is not None:
        return [Finding("head on the stored input of the head (nats)", nats, slack * 2 * NATS)]
    return []
