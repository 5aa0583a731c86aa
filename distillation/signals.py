"""What a loss sees. It never sees a teacher: the same `TeacherSignal` comes from the target store or from a live one.

Shapes: B rows, S tokens of the longest row, N scored positions (classification: N = B), C classes, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

UNLABELLED = -100
"""Label of a position without one; torch's cross entropy ignores it."""


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher said at the scored positions. Fields the store does not hold are None."""

    logits: Tensor | None = None
    """[N, C], at temperature 1, classes in the corpus's order."""
    hidden: Tensor | None = None
    """[N, L, H], outputs of the layers `layers`."""
    layers: tuple[int, ...] = ()
    pooled: Tensor | None = None
    """[N, H], input of the classification head."""

    def to(self, device: torch.device) -> TeacherSignal:
        moved: dict[str, Any] = _moved(self, device)
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    ids: list[str]
    input_ids: Tensor
    """[B, S] int64, padded."""
    attention_mask: Tensor
    """[B, S] int64, 1 on tokens."""
    labels: Tensor
    """[N] int64, `UNLABELLED` where there is none."""
    signal: TeacherSignal

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = _moved(self, device)
        return replace(self, **moved, signal=self.signal.to(device))


@dataclass(frozen=True)
class Outputs:
    """What a model says at the scored positions."""

    logits: Tensor
    """[N, C]"""
    hidden: Tensor | None = None
    """[N, L, H] of the layers asked for."""
    pooled: Tensor | None = None
    """[N, H]"""


def _moved(record: Any, device: torch.device) -> dict[str, Tensor]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)}


class Classifier(nn.Module):
    """A transformers sequence classifier as losses want it: logits, and on request inner states at the scored position.

    The scored position is the first token; the pooled output is whatever the last linear layer reads.
    """

    def __init__(self, model: Any, *, layers: Sequence[int] = (), pooled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.layers, self.pooled = tuple(layers), pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor | None) -> Outputs:
        with _input_of(output_head(self.model), self.pooled) as seen:
            result = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=bool(self.layers))
        # hidden_states[0] is the embedding, so layer i is at i + 1.
        hidden = torch.stack([result.hidden_states[i + 1][:, 0] for i in self.layers], dim=1) if self.layers else None
        return Outputs(result.logits, hidden, seen[0] if self.pooled else None)


def output_head(model: Any) -> nn.Linear:
    """The linear layer that makes the logits: the last one with as many outputs as there are labels."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    assert heads, f"{type(model).__name__} ends in no linear layer"
    return heads[-1]


@contextmanager
def _input_of(module: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) if wanted else None
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()


_answered = 0


def rows_answered() -> int:
    """Rows that live teachers have answered in this process."""
    return _answered


def observe(teacher: Classifier, batch: Batch, bf16: bool) -> TeacherSignal:
    """Run a live teacher over a batch: no gradient, evaluation mode, results in fp32.

    The store is filled by this function, so that both ways give the same signal.
    """
    global _answered
    _answered += len(batch.input_ids)
    teacher.eval()
    with torch.no_grad(), torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16):
        outputs = teacher(batch.input_ids, batch.attention_mask)
    hidden = outputs.hidden.float() if outputs.hidden is not None else None
    pooled = outputs.pooled.float() if outputs.pooled is not None else None
    return TeacherSignal(outputs.logits.float(), hidden, teacher.layers, pooled)
