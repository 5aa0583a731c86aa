"""The loss: a weighted sum of named terms, each a sum over its scored positions divided by their number in the whole optimizer step.

So a gradient does not depend on how a step is cut into microbatches or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distillation import divergences
from distillation.config import CrossEntropy, ForwardKL, JensenShannon, L2Distil, LogitMSE, LossConfig, PatientKD, ReverseKL
from distillation.signals import UNLABELLED, Batch, Outputs


def _cross_entropy(config: CrossEntropy, outputs: Outputs, batch: Batch) -> Tensor:
    return F.cross_entropy(
        outputs.logits.float(), batch.labels, ignore_index=UNLABELLED, label_smoothing=config.label_smoothing, reduction="none"
    )


def _forward_kl(config: ForwardKL, outputs: Outputs, batch: Batch) -> Tensor:
    assert batch.signal.logits is not None
    return divergences.forward_kl(outputs.logits, batch.signal.logits, config.temperature)


def _reverse_kl(config: ReverseKL, outputs: Outputs, batch: Batch) -> Tensor:
    assert batch.signal.logits is not None
    return divergences.reverse_kl(outputs.logits, batch.signal.logits, config.temperature)


def _jsd(config: JensenShannon, outputs: Outputs, batch: Batch) -> Tensor:
    assert batch.signal.logits is not None
    return divergences.jsd(outputs.logits, batch.signal.logits, config.temperature, config.beta)


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
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
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


def gradient_squares(losses: Mapping[str, LossConfig], outputs: Outputs, batch: Batch, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Squared norm of each weighted term's gradient with respect to what the student says: its logits and reported hidden states.

    Of this microbatch's share of the step's loss, so that the squares of all microbatches and ranks add up to that of the step: how hard
    each term pulls at the outputs, at no backward pass through the model. It is not the norm of the term's gradient with respect to the
    weights, says nothing of direction (two terms that cancel are both large), and does not compare logits with hidden states.
    """
    told = [values for values in (outputs.logits, outputs.hidden) if values is not None]
    leaves = [values.detach().float().requires_grad_() for values in told]
    copy = Outputs(leaves[0], leaves[1] if len(leaves) > 1 else None)
    squares = {}
    for name, config in losses.items():
        share = config.weight * TERMS[config.type](config, copy, batch).sum() / max(counts[name], 1)
        slopes = torch.autograd.grad(share, leaves, allow_unused=True)
        squares[name] = torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum()
    return squares


def describe(losses: Mapping[str, LossConfig], sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """Points of the learning curves: each term raw (`train/loss/NAME`) and weighted (`train/weighted/NAME`), and their sum."""
    raw = {name: sums[name] / counts[name] if counts[name] else 0.0 for name in losses}
    weighted = {name: losses[name].weight * value for name, value in raw.items()}
    return {
        "train/loss": sum(weighted.values()),
        **{f"train/loss/{name}": value for name, value in raw.items()},
        **{f"train/weighted/{name}": value for name, value in weighted.items()},
    }
