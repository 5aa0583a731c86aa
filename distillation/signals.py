"""What a loss sees. It never sees a teacher: the same `TeacherSignal` comes from the target store or from a live one.

Shapes: B rows, N scored positions (a row each, or a token each; those of a row stand together, rows in the batch's order), T tokens (all
rows' together, without padding), C classes or the vocabulary, K stored classes, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from distillation import divergences

UNLABELLED = -100
"""Label of a position without one; torch's cross entropy ignores it."""

CHUNK_VALUES = 1 << 22
"""Logits that exist at once where the classes are a vocabulary: 16 MB in fp32."""


OF_CLASSES = ("logits", "ids", "log_p", "weights", "normalisers")
"""Fields of a signal that tell of the classes at a position."""


@dataclass(frozen=True)
class TeacherSignal:
    """What a teacher said. Fields that were not asked for are None."""

    logits: Tensor | None = None
    """[N, C], at temperature 1, classes in the corpus's order."""
    ids: Tensor | None = None
    """[N, K] int64: the most likely classes, or those drawn."""
    log_p: Tensor | None = None
    """[N, K] log-probabilities of `ids` at temperature 1."""
    weights: Tensor | None = None
    """[N, K] share of the draws that fell on `ids`, instead of `log_p`."""
    normalisers: Tensor | None = None
    """[N, temperatures]: log of the sum over all classes of p^(1/T)."""
    temperatures: tuple[float, ...] = ()
    """Those of `normalisers`; of the draws the only one."""
    label_log_p: Tensor | None = None
    """[N] log-probability of the label, 0 where there is none."""
    known: Tensor | None = None
    """[N] bool, where a student with another tokenizer has a position of the teacher's; its classes are not the student's. None: all, and are."""
    hidden: Tensor | None = None
    """[N or T, L, H], outputs of the layers `layers`."""
    layers: tuple[int, ...] = ()
    pooled: Tensor | None = None
    """[N, H], input of the head, or the embedding."""
    relations: tuple[Tensor, ...] = ()
    """Queries, keys and values of one layer, each [T, width]."""
    attentions: Tensor | None = None
    """[B, L, heads, S, S] of the layers `layers`; only from a live teacher."""

    def to(self, device: torch.device) -> TeacherSignal:
        moved: TeacherSignal = _moved(self, device)
        return moved

    def part(self, chosen: slice) -> TeacherSignal:
        """What was said about some of the positions, as far as it is about their classes."""
        names = (*OF_CLASSES, "label_log_p", "known")
        return replace(self, **{name: value[chosen] for name in names if (value := getattr(self, name)) is not None})

    def at(self, index: Tensor) -> TeacherSignal:
        """What was said about the classes, at the positions of a student with another tokenizer. index: of the position there, -1 for none, [N]."""
        there: dict[str, Any] = {name: value[index.clamp(min=0)] for name in OF_CLASSES if (value := getattr(self, name)) is not None}
        return TeacherSignal(**there, temperatures=self.temperatures, known=index >= 0)

    def normaliser(self, temperature: float) -> Tensor:
        """[N] for one of `temperatures`, or 0 at 1."""
        assert self.log_p is not None
        if temperature == 1:
            return torch.zeros_like(self.log_p[:, 0])
        assert self.normalisers is not None
        assert temperature in self.temperatures, "the job was checked: the store has this temperature"
        return self.normalisers[:, self.temperatures.index(temperature)]

    def pair(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Softened log-probabilities of a student with these logits and of the teacher, over the same classes.

        Over all of them [N, C]; or over the stored ones, with the rest as one more, [N, K + 1].
        """
        if self.logits is not None:
            # Embeddings of one vocabulary are padded to different sizes: what only one has is left out before any softmax.
            shared = min(logits.shape[1], self.logits.shape[1])
            return divergences.soften(logits[:, :shared], temperature), divergences.soften(self.logits[:, :shared], temperature)
        assert self.ids is not None
        assert self.log_p is not None, "the job was checked: the store has a distribution"
        unknown = self.ids >= logits.shape[1]
        ids, log_p = self.ids.masked_fill(unknown, 0), self.log_p.masked_fill(unknown, -torch.inf)
        return divergences.bucketed(logits, ids, log_p, temperature, self.normaliser(temperature))


@dataclass(frozen=True)
class Batch:
    ids: list[str]
    inputs: Mapping[str, Tensor]
    """What the model's forward takes: input_ids and so on, [sequences, S]; or pixel_values, [B, channels, size, size]."""
    scored: Tensor
    """[N] int64, place of each scored position among the flattened sequences; the number of its row for images."""
    tokens: Tensor
    """[T] int64, place of each token, row after row."""
    lengths: Tensor
    """[B] int64, tokens of each row."""
    positions: Tensor
    """[B] int64, scored positions of each row."""
    labels: Tensor
    """[N] int64 with `UNLABELLED` where there is none; [N] fp32 with NaN there (regression); [N, C] fp32 with NaN (multi-label)."""
    signals: Mapping[str, TeacherSignal] = field(default_factory=dict)
    """By teacher."""
    partner_labels: Tensor | None = None
    """As `labels`, of the row that each is mixed with."""
    share: Tensor | None = None
    """[N] how much of a mixed row is itself."""
    bytes: Tensor | None = None
    """[B] UTF-8 bytes of the scored text, of language models."""

    @property
    def signal(self) -> TeacherSignal:
        """Of the only teacher; an empty one where there is none."""
        return next(iter(self.signals.values()), TeacherSignal())

    @property
    def labelled(self) -> Tensor:
        """[N] bool."""
        if self.labels.is_floating_point():
            return ~(self.labels.isnan() if self.labels.dim() == 1 else self.labels[:, 0].isnan())
        return self.labels != UNLABELLED

    @property
    def row_of(self) -> Tensor:
        """[N] number of the row of each scored position."""
        return torch.repeat_interleave(torch.arange(len(self.ids), device=self.positions.device), self.positions)

    def to(self, device: torch.device) -> Batch:
        moved: Batch = _moved(self, device)
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(moved, inputs=inputs, signals={name: signal.to(device) for name, signal in self.signals.items()})

    def part(self, chosen: slice) -> Batch:
        """Labels and what was said about some of the positions, for terms that look at nothing else."""
        return replace(self, labels=self.labels[chosen], signals={name: signal.part(chosen) for name, signal in self.signals.items()})


@dataclass(frozen=True)
class Outputs:
    """What a model says. Where the classes are a vocabulary, the logits are made from `states` piece by piece."""

    logits: Tensor | None = None
    """[N, C]"""
    states: Tensor | None = None
    """[N, H], input of `head`."""
    head: nn.Module | None = None
    hidden: Tensor | None = None
    """[N or T, L, H] of the layers asked for."""
    pooled: Tensor | None = None
    """[N, H]"""
    relations: tuple[Tensor, ...] = ()
    attentions: Tensor | None = None
    projected: Mapping[str, Tensor] = field(default_factory=dict)
    """By loss term: hidden states of its layers, or the pooled output, in the teacher's width. [N or T, pairs, H]"""
    near: Tensor | None = None
    """[N, teacher's H]: the first projection of the pooled output, which is what was trained to be near the teacher's."""
    layers: tuple[int, ...] = ()
    """Those of `hidden` and `attentions`."""
    bf16: bool = False
    """Whether the model ran with matrix products in bf16: then so does its head."""

    @property
    def anchor(self) -> Tensor:
        """Something with the graph of the model."""
        found = next(value for value in (self.logits, self.states, self.pooled) if value is not None)
        return found

    def chunks(self) -> list[slice]:
        """Runs of positions (also one of none) whose logits fit into `CHUNK_VALUES`; one where they exist already; none without classes."""
        if self.logits is not None:
            return [slice(0, len(self.logits))]
        if self.states is None:
            return []
        assert self.head is not None
        each, count = max(1, CHUNK_VALUES // max(1, classes_of(self.head))), len(self.states)
        return [slice(start, min(start + each, count)) for start in range(0, max(count, 1), each)]

    def logits_of(self, chosen: slice) -> Tensor:
        """[positions, C] with the graph of the model."""
        if self.logits is not None:
            return self.logits[chosen]
        assert self.states is not None
        return self.head_on(self.states[chosen])

    def head_on(self, states: Tensor) -> Tensor:
        """[positions, C] of some of `states`, in the precision that the model ran in, also where its autocast is over."""
        assert self.head is not None
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=torch.is_autocast_cache_enabled()):
            logits: Tensor = self.head(states if self.bf16 else states.to(next(self.head.parameters()).dtype))
        return logits


def classes_of(head: Any) -> int:
    return int(head.weight.shape[0])


def _moved(record: Any, device: torch.device) -> Any:
    values: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, Tensor):
            values[each.name] = value.to(device, non_blocking=True)
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            values[each.name] = tuple(one.to(device, non_blocking=True) for one in value)
    return replace(record, **values)


_answered = 0


def rows_answered() -> int:
    """Rows that live teachers have answered in this process."""
    return _answered


def count_answers(rows: int) -> None:
    global _answered
    _answered += rows
