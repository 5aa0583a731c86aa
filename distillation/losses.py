"""The loss: a weighted sum of named terms, each a sum over what it scores divided by the number of that in the whole optimizer step.

So a gradient does not depend on how a step is cut into microbatches or workers. Terms about classes are computed over runs of positions,
so that of a large vocabulary never more than a piece of the logits exists; the others see inner states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distillation import divergences, features
from distillation.config import AttentionKL, Contrastive, LossConfig, Ramp, RelationKL, Unit, needs_of
from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal

# ------------------------------------------------------------------------------------------------------- terms about classes


def _cross_entropy(config: Any, logits: Tensor, batch: Batch) -> Tensor:
    smoothing = float(config.label_smoothing)

    def to(labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, label_smoothing=smoothing, reduction="none")

    if batch.partner_labels is None or batch.share is None:
        return to(batch.labels)
    return batch.share * to(batch.labels) + (1 - batch.share) * to(batch.partner_labels)


def _binary_cross_entropy(config: Any, logits: Tensor, batch: Batch) -> Tensor:
    values = F.binary_cross_entropy_with_logits(logits.float(), batch.labels.nan_to_num(), reduction="none").sum(-1)
    return torch.where(batch.labelled, values, 0.0)


def _label_mse(config: Any, logits: Tensor, batch: Batch) -> Tensor:
    return torch.where(batch.labelled, (logits[:, 0].float() - batch.labels.nan_to_num()).square(), 0.0)


def _softened(divergence: Callable[..., Tensor], *knobs: str) -> Callable[[Any, Tensor, Batch], Tensor]:
    """A term from a divergence of two distributions; `knobs` are settings that it gets after them."""

    def term(config: Any, logits: Tensor, batch: Batch) -> Tensor:
        settings = [getattr(config, knob) for knob in knobs]
        if getattr(config, "route", None) is None:
            values = divergence(*_pair(config, logits, batch), *settings)
        else:
            pairs = [batch.signals[name].pair(logits, config.temperature) for name in config.teacher]
            surest = torch.stack([_entropy(log_p) for _, log_p in pairs]).argmin(0, keepdim=True)
            values = torch.stack([divergence(*pair, *settings) for pair in pairs]).gather(0, surest)[0]
        return values * float(config.temperature) ** divergences.POWER[divergence.__name__]

    return term


def _entropy(log_p: Tensor) -> Tensor:
    """[N] in nats."""
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)


def _forward_kl(config: Any, logits: Tensor, batch: Batch) -> Tensor:
    signal = batch.signal if config.teacher is None else batch.signals.get(config.teacher) if isinstance(config.teacher, str) else None
    if signal is not None and signal.ids is not None and signal.weights is not None:
        drawn = divergences.sampled_cross_entropy(logits, signal.ids, signal.weights, config.temperature)
        return drawn * float(config.temperature) ** divergences.POWER["sampled_cross_entropy"]
    return _softened(divergences.forward_kl)(config, logits, batch)


def _pair(config: Any, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    if not isinstance(config.teacher, dict):
        return signal_of(config, batch).pair(logits, config.temperature)
    # The mean of probabilities, not of logits.
    pairs = [batch.signals[name].pair(logits, config.temperature) for name in config.teacher]
    shares = [math.log(share) for share in config.teacher.values()]
    return pairs[0][0], torch.logsumexp(torch.stack([log_p + share for (_, log_p), share in zip(pairs, shares, strict=True)]), dim=0)


def signal_of(config: Any, batch: Batch) -> TeacherSignal:
    return batch.signal if config.teacher is None else batch.signals[config.teacher]


def _of_logits(function: Callable[..., Tensor], *knobs: str) -> Callable[[Any, Tensor, Batch], Tensor]:
    def term(config: Any, logits: Tensor, batch: Batch) -> Tensor:
        told = signal_of(config, batch).logits
        assert told is not None, "the job was checked: the store has logits"
        return function(logits, told, *(getattr(config, knob) for knob in knobs))

    return term


def _decoupled_kd(config: Any, logits: Tensor, batch: Batch) -> Tensor:
    told = signal_of(config, batch).logits
    assert told is not None
    return divergences.decoupled_kd(logits, told, batch.labels, config.temperature, config.alpha, config.beta)


def _universal_logit(config: Any, logits: Tensor, batch: Batch) -> Tensor:
    told, log_q = signal_of(config, batch), divergences.soften(logits, config.temperature)
    if told.logits is not None:
        values = divergences.universal_logit(log_q, divergences.soften(told.logits, config.temperature))
    else:
        assert told.log_p is not None, "the job was checked: the store has a distribution"
        # How many classes the teacher has does not matter: where it has no others, what is left over is rounding.
        values = divergences.universal_topk(
            log_q, divergences.with_rest(told.log_p, config.temperature, told.normaliser(config.temperature), 0)
        )
    return values if told.known is None else torch.where(told.known, values, 0.0)


def _dist(config: Any, logits: Tensor, batch: Batch) -> Tensor:
    told = signal_of(config, batch).logits
    assert told is not None
    values = divergences.dist_inter(logits, told, config.temperature)
    between = [divergences.dist_intra(mine, its, config.temperature) * mine.shape[1] for mine, its in _groups(logits, told, config.group)]
    return torch.cat([values, config.gamma * torch.cat(between)])


CLASS_TERMS: Mapping[str, Callable[[Any, Tensor, Batch], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "label_mse": _label_mse,
    "forward_kl": _forward_kl,
    "reverse_kl": _softened(divergences.reverse_kl),
    "jsd": _softened(divergences.jsd, "beta"),
    "skewed_kl": _softened(divergences.skewed_kl, "alpha"),
    "skewed_reverse_kl": _softened(divergences.skewed_reverse_kl, "alpha"),
    "adaptive_kl": _softened(divergences.adaptive_kl, "head"),
    "total_variation": _softened(divergences.total_variation),
    "l2_distil": _of_logits(divergences.l2_distil, "temperature"),
    "logit_mse": _of_logits(divergences.logit_mse),
    "teacher_mse": _of_logits(divergences.squared_error),
    "standardised_kl": _of_logits(divergences.standardised_kl, "temperature"),
    "binary_kl": _of_logits(divergences.binary_kl, "temperature"),
    "universal_logit": _universal_logit,
    "decoupled_kd": _decoupled_kd,
    "dist": _dist,
}
"""From `type` in the job file to a function of logits [n, C] whose values are summed: one per position, 0 where it is masked."""

# -------------------------------------------------------------------------------------------------- terms about inner states


def _vectors(config: Any, name: str, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Student's and teacher's states for a term: of its pairs of layers, or the pooled output. [M, pairs, H]"""
    signal = signal_of(config, batch)
    if config.layers is None:
        assert signal.pooled is not None
        teachers = signal.pooled[:, None]
    else:
        assert signal.hidden is not None
        teachers = signal.hidden[:, [signal.layers.index(layer) for layer in config.layers.values()]]
    if name in outputs.projected:
        return outputs.projected[name], teachers
    if config.layers is None:
        assert outputs.pooled is not None
        return outputs.pooled[:, None], teachers
    assert outputs.hidden is not None
    return outputs.hidden[:, [outputs.layers.index(layer) for layer in config.layers]], teachers


def _hidden_mse(config: Any, name: str, outputs: Outputs, batch: Batch) -> Tensor:
    return features.hidden_mse(*_vectors(config, name, outputs, batch), config.normalise).sum(-1)


def _cosine(config: Any, name: str, outputs: Outputs, batch: Batch) -> Tensor:
    return features.cosine(*_vectors(config, name, outputs, batch)).sum(-1)


def _pkd(config: Any, name: str, outputs: Outputs, batch: Batch) -> Tensor:
    return features.pkd(*_vectors(config, name, outputs, batch))


def _attention_kl(config: AttentionKL, name: str, outputs: Outputs, batch: Batch) -> Tensor:
    signal, mask = signal_of(config, batch), batch.inputs["attention_mask"]
    assert outputs.attentions is not None
    assert signal.attentions is not None
    assert isinstance(config.layers, dict)
    pairs = [(outputs.layers.index(mine), signal.layers.index(its)) for mine, its in config.layers.items()]
    return torch.stack([features.attention_kl(outputs.attentions[:, i], signal.attentions[:, j], mask) for i, j in pairs]).sum(0)


def _relation_kl(config: RelationKL, name: str, outputs: Outputs, batch: Batch) -> Tensor:
    mask = torch.arange(int(batch.lengths.max()), device=batch.lengths.device) < batch.lengths[:, None]
    values = []
    for mine, its in zip(outputs.relations, signal_of(config, batch).relations, strict=True):
        student, teacher = (features.relations(_rows(states, mask), config.heads, mask) for states in (mine, its))
        values.append(features.relation_kl(student, teacher, mask))
    return torch.stack(values).sum(0)


def _of_groups(function: Callable[..., Tensor], *knobs: str) -> Callable[[Any, str, Outputs, Batch], Tensor]:
    def term(config: Any, name: str, outputs: Outputs, batch: Batch) -> Tensor:
        told = signal_of(config, batch).pooled
        mine = outputs.projected[name][:, 0] if name in outputs.projected else outputs.pooled
        assert told is not None
        assert mine is not None
        values = [
            function(one, other, *(getattr(config, knob) for knob in knobs)) * one.shape[1]
            for one, other in _groups(mine, told, config.group)
        ]
        return torch.cat(values)

    return term


STATE_TERMS: Mapping[str, Callable[[Any, str, Outputs, Batch], Tensor]] = {
    "hidden_mse": _hidden_mse,
    "cosine": _cosine,
    "pkd": _pkd,
    "attention_kl": _attention_kl,
    "relation_kl": _relation_kl,
    "rkd_distance": _of_groups(features.rkd_distance),
    "rkd_angle": _of_groups(features.rkd_angle),
    "similarity_preserving": _of_groups(features.similarity_preserving),
    "similarity_kl": _of_groups(features.similarity_kl, "temperature"),
    "contrastive": _of_groups(features.contrastive, "temperature"),
}
"""From `type` in the job file to a function of inner states whose values are summed."""


def _groups(mine: Tensor, its: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Neighbours in groups: whole ones stacked, then what is left over. Batches are cut between groups, see `group_of`. [G, g, H]"""
    whole = len(mine) // size * size
    for start, stop, each in ((0, whole, size), (whole, len(mine), len(mine) - whole)):
        if stop > start:
            yield tuple(values[start:stop].reshape(-1, each, values.shape[-1]) for values in (mine, its))  # type: ignore[misc]


def _rows(states: Tensor, mask: Tensor) -> Tensor:
    """Tokens of all rows, one after the other [T, W], as rows [B, S, W]."""
    padded = states.new_zeros(*mask.shape, states.shape[-1])
    return padded.masked_scatter(mask[..., None], states)


# ----------------------------------------------------------------------------------------------------------------- settings


def at(losses: Mapping[str, Any], progress: float) -> dict[str, Any]:
    """The terms as they are at a share of the training: every `Ramp` is a number."""
    found = {}
    for name, loss in losses.items():
        ramps = {knob: value.at(progress) for knob in ("weight", "temperature") if isinstance(value := getattr(loss, knob, None), Ramp)}
        found[name] = loss.model_copy(update=ramps) if ramps else loss
    return found


def unit_of(loss: LossConfig, features_at: str) -> Unit:
    """What a term is averaged over. features_at: where hidden states were kept."""
    return "tokens" if "hidden" in needs_of(loss) and features_at == "tokens" else loss.unit


def group_of(losses: Mapping[str, Any]) -> int:
    """Rows that must not be separated when a batch is cut."""
    return math.lcm(*(getattr(loss, "group", 1) for loss in losses.values()))


def student_layers(losses: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers whose outputs a student must report for these terms, sorted."""
    maps = [layers for loss in losses.values() if isinstance(layers := getattr(loss, "layers", None), dict)]
    return tuple(sorted({layer for one in maps for layer in one}))


def projected(losses: Mapping[str, Any]) -> dict[str, list[int]]:
    """Terms that have linear layers of their own: the student's layers for each, none where it is the pooled output."""
    found = {}
    for name, loss in losses.items():
        if getattr(loss, "projection", False):
            layers = None if isinstance(loss, Contrastive) else loss.layers
            found[name] = list(layers) if isinstance(layers, dict) else []
    return found


# --------------------------------------------------------------------------------------------------------------------- sums


def weigh(losses: Mapping[str, Any], outputs: Outputs, batch: Batch, counts: Mapping[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """This microbatch's share of the loss of the step, and the raw sum of every term (no gradient).

    losses: without ramps, see `at`. counts: what each term scores in the whole step over all workers. A term with nothing to score
    contributes a 0 that keeps the graph.
    """
    classes, states = _sorted(losses)
    total, sums = _about_classes(classes, outputs, batch, counts)
    for name, config in states.items():
        raw = STATE_TERMS[config.type](config, name, outputs, batch).sum()
        sums[name] = raw.detach()
        total = total + config.weight * raw / max(counts[name], 1)
    return total, {name: sums[name] for name in losses}


def _sorted(losses: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    about_classes = {name: loss for name, loss in losses.items() if loss.type in CLASS_TERMS}
    return about_classes, {name: loss for name, loss in losses.items() if name not in about_classes}


def _about_classes(
    losses: Mapping[str, Any], outputs: Outputs, batch: Batch, counts: Mapping[str, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    if outputs.head is None:
        logits, total = outputs.logits, outputs.anchor.sum() * 0.0
        if logits is None:
            return total, {}
        share, sums = _share(losses, logits, batch, counts)
        return total + share, sums
    # Forward and backward of each piece before the next one: the logits of all positions never exist, nor do their gradients.
    assert outputs.states is not None
    parameters = [p for p in outputs.head.parameters() if p.requires_grad]
    sources = [outputs.states, *parameters]
    slopes, value = [torch.zeros_like(source) for source in sources], outputs.states.new_zeros((), dtype=torch.float32)
    sums = {name: value.clone() for name in losses}
    for chosen in outputs.chunks() if losses else []:
        states = outputs.states[chosen].detach().requires_grad_()
        share, raw = _share(losses, outputs.head_on(states), batch.part(chosen), counts)
        found = torch.autograd.grad(share, [states, *parameters])
        slopes[0][chosen] = found[0]
        for mine, new in zip(slopes[1:], found[1:], strict=True):
            mine += new
        value = value + share.detach()
        sums = {name: sums[name] + raw[name] for name in sums}
    return _Sloped.apply(value, slopes, *sources), sums  # type: ignore[no-untyped-call]


class _Sloped(torch.autograd.Function):
    """A value whose gradient with respect to some tensors is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slopes: Sequence[Tensor], *sources: Tensor) -> Tensor:
        ctx.slopes = slopes
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *(upstream.to(slope.dtype) * slope for slope in ctx.slopes)


def _share(losses: Mapping[str, Any], logits: Tensor, batch: Batch, counts: Mapping[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    total, sums = logits.sum() * 0.0, {}
    for name, config in losses.items():
        raw = CLASS_TERMS[config.type](config, logits, batch).sum()
        sums[name] = raw.detach()
        total = total + config.weight * raw / max(counts[name], 1)
    return total, sums


def gradient_squares(losses: Mapping[str, Any], outputs: Outputs, batch: Batch, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Squared norm of each weighted term's gradient with respect to what the student says: its logits and reported inner states.

    Of this microbatch's share of the step's loss, so that the squares of all microbatches and ranks add up to that of the step: how hard
    each term pulls at the outputs, at no backward pass through the model. It is not the norm of the term's gradient with respect to the
    weights, says nothing of direction (two terms that cancel are both large), and does not compare logits with hidden states.
    """
    classes, states = _sorted(losses)
    squares = {name: torch.zeros((), device=outputs.anchor.device) for name in losses}
    for chosen in outputs.chunks() if classes else []:
        with torch.no_grad():
            logits = outputs.logits_of(chosen)
        leaf, part = logits.detach().float().requires_grad_(), batch.part(chosen)
        for name, config in classes.items():
            share = config.weight * CLASS_TERMS[config.type](config, leaf, part).sum() / max(counts[name], 1)
            squares[name] = squares[name] + torch.autograd.grad(share, leaf)[0].square().sum()
    copy, leaves = _detached(outputs)
    for name, config in states.items():
        share = config.weight * STATE_TERMS[config.type](config, name, copy, batch).sum() / max(counts[name], 1)
        slopes = torch.autograd.grad(share, leaves, allow_unused=True)
        squares[name] = torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum()
    return squares


def _detached(outputs: Outputs) -> tuple[Outputs, list[Tensor]]:
    """The inner states as leaves."""

    def leaf(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().float().requires_grad_()

    hidden, pooled, attentions = (leaf(value) for value in (outputs.hidden, outputs.pooled, outputs.attentions))
    relations = tuple(value.detach().float().requires_grad_() for value in outputs.relations)
    changed = {name: value.detach().float().requires_grad_() for name, value in outputs.projected.items()}
    leaves = [v for v in (hidden, pooled, attentions, *relations, *changed.values()) if v is not None]
    return Outputs(None, None, None, hidden, pooled, relations, attentions, changed, layers=outputs.layers), leaves


def describe(losses: Mapping[str, Any], sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """Points of the learning curves: each term raw (`train/loss/NAME`) and weighted (`train/weighted/NAME`), and their sum."""
    raw = {name: sums[name] / counts[name] if counts[name] else 0.0 for name in losses}
    weighted = {name: losses[name].weight * value for name, value in raw.items()}
    return {
        "train/loss": sum(weighted.values()),
        **{f"train/loss/{name}": value for name, value in raw.items()},
        **{f"train/weighted/{name}": value for name, value in weighted.items()},
        **{f"train/weight/{name}": loss.weight for name, loss in losses.items() if loss.balance is not None},
    }
