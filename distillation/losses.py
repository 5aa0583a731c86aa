"""The loss: a weighted sum of named terms, each a sum over its scored positions divided by their number in the whole optimizer step.

So a gradient does not depend on how a step is cut into microbatches or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from distillation import divergences
from distillation.config import CrossEntropy, ForwardKL, L2Distil, LogitMSE, LossConfig, PatientKD
from distillation.signals import UNLABELLED, Batch, Outputs


def _cross_entropy(config: CrossEntropy, outputs: Outputs, batch: Batch) -> Tensor:
    return F.cross_entropy(
        outputs.logits.float(), batch.labels, ignore_index=UNLABELLED, label_smoothing=config.label_smoothing, reduction="none"
    )


def _forward_kl(config: ForwardKL, outputs: Outputs, batch: Batch) -> Tensor:
    assert batch.signal.logits is not None
    return divergences.forward_kl(outputs.logits, batch.signal.logits, config.temperature)


def _l2_distil(config: L2Distil, outputs: Outputs, batch: Batch) -> Tensor:
    assert batch.signal.logits is not None
    return divergences.l2_distil(outputs.logits, batch.signal.logits, config.temperature)


def _logit_mse(config: LogitMSE, outputs: Outputs, batch: Batch) -> Tensor:
    assert batch.signal.logits is not None
    return divergences.logit_mse(outputs.logits, batch.signal.logits)


def _pkd(config: PatientKD, outputs: Outputs, batch: Batch) -> Tensor:
    assert outputs.hidden is not None
    assert batch.signal.hidden is not None
    # The student reports exactly the layers of the map, in its order; the store may hold more.
    wanted = [batch.signal.layers.index(layer) for layer in config.layers.values()]
    mine = [sorted(config.layers).index(layer) for layer in config.layers]
    return divergences.pkd(outputs.hidden[:, mine], batch.signal.hidden[:, wanted])


TERMS: Mapping[str, Callable[[Any, Outputs, Batch], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "forward_kl": _forward_kl,
    "l2_distil": _l2_distil,
    "logit_mse": _logit_mse,
    "pkd": _pkd,
}
"""From `type` in the job file to the function that gives one value per position, 0 where the position is masked. [N]"""


def student_layers(losses: Mapping[str, LossConfig]) -> tuple[int, ...]:
    """Layers whose outputs a student must report for these losses, sorted."""
    maps = [loss.layers for loss in losses.values() if isinstance(loss, PatientKD)]
    return tuple(sorted({layer for one in maps for layer in one}))


def scored(loss: LossConfig, labels: Any) -> int:
    """Number of positions a term is averaged over, of `labels` [N] (numpy or torch): the labelled ones, or all."""
    return int((labels != UNLABELLED).sum()) if "labels" in loss.needs else len(labels)


def weigh(losses: Mapping[str, LossConfig], outputs: Outputs, batch: Batch, counts: Mapping[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """This microbatch's share of the loss of the step, and the raw sum of every term (no gradient).

    `counts`: positions each term scores in the whole step over all workers. A term with none contributes a 0 that keeps the graph.
    """
    total = outputs.logits.sum() * 0.0
    sums: dict[str, Tensor] = {}
    for name, config in losses.items():
        raw = TERMS[config.type](config, outputs, batch).sum()
        sums[name] = raw.detach()
        total = total + config.weight * raw / max(counts[name], 1)
    return total, sums


def describe(losses: Mapping[str, LossConfig], sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """Points of the learning curves: each term raw (`train/loss/NAME`) and weighted (`train/weighted/NAME`), and their sum."""
    raw = {name: sums[name] / counts[name] if counts[name] else 0.0 for name in losses}
    weighted = {name: losses[name].weight * value for name, value in raw.items()}
    return {
        "train/loss": sum(weighted.values()),
        **{f"train/loss/{name}": value for name, value in raw.items()},
        **{f"train/weighted/{name}": value for name, value in weighted.items()},
    }
