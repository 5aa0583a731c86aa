"""What a task is: how rows become a batch, and how answers become a score. One class a task. (`encoding` makes the rows from text.)

A score is a function of sums over rows, so that a split can be cut into batches and workers, and intervals found by drawing rows again.
Legend: B rows, N scored positions, C classes, m statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distillation.config import ImageClassification, TaskConfig
from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal

Columns = Mapping[str, Any]
"""Of some rows: a fixed-width column as an array [B], a list column as a list of B arrays."""


class Task:
    """Base of all. `labels` are the names of the classes; `pad` fills short rows; `last`: the head reads a row's last token, not its first.

    mask: id of the token that hides another, unknown: of the one that stands for all that have none; -1: there is no such token.
    """

    auto: ClassVar[str]
    """Class of transformers that loads its models."""
    lazy: ClassVar[bool] = False
    """Logits are made piece by piece from the input of the head."""
    ordinary: np.ndarray | None = None
    """Ids of the tokens that can be hidden, where others than those of the corpus are."""
    speaks: ClassVar[bool] = False
    """Its classes are the vocabulary."""
    names: ClassVar[tuple[str, ...]]
    """Of the statistics."""
    headline: ClassVar[str]
    """The metric that retention is about."""
    better: ClassVar[str] = "max"

    def __init__(
        self, config: Any, pad: int = 0, labels: Sequence[str] = (), *, last: bool = False, mask: int = -1, unknown: int = -1
    ) -> None:
        self.config, self.pad, self.labels, self.last, self.mask, self.unknown = config, pad, tuple(labels), last, mask, unknown

    # ------------------------------------------------------------------------------------------------------------- batches

    def collate(self, ids: list[str], columns: Columns, signals: Mapping[str, TeacherSignal]) -> Batch:
        lengths = torch.from_numpy(columns["length"].astype(np.int64))
        inputs, starts = self._inputs(columns, lengths)
        tokens = _runs(starts, lengths)
        scored, positions = self._scored(columns, starts, lengths)
        return Batch(ids, inputs, scored, tokens, lengths, positions, self._labels(columns), signals, bytes=self._bytes(columns))

    def _inputs(self, columns: Columns, lengths: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the model, and the place of each row's first token in the flattened sequences. [B]"""
        width = int(lengths.max())
        mask = torch.arange(width) < lengths[:, None]
        inputs = {"input_ids": _padded(columns["input_ids"], mask, self.pad), "attention_mask": mask.long()}
        if "token_type_ids" in columns:
            inputs["token_type_ids"] = _padded(columns["token_type_ids"], mask, 0)
        return inputs, torch.arange(len(lengths)) * width

    def _scored(self, columns: Columns, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the scored positions in the flattened sequences, and how many each row has. [N], [B]"""
        return (starts + lengths - 1 if self.last else starts), torch.ones_like(lengths)

    def _labels(self, columns: Columns) -> Tensor:
        label = columns["label"].astype(np.int64)
        return torch.from_numpy(np.where(label < 0, UNLABELLED, label))

    def _bytes(self, columns: Columns) -> Tensor | None:
        return torch.from_numpy(columns["bytes"].astype(np.int64)) if "bytes" in columns else None

    def translate(self, batch: Batch, table: np.ndarray) -> Batch:
        """The batch in the ids of a trimmed vocabulary. table: new id of every old one, -1 for those that are gone, [old vocabulary].

        A token that is gone is read as the unknown one, and is nobody's label; what a teacher said about it joins what is not stored.
        """
        new = torch.from_numpy(table).to(batch.scored.device)
        ids, other = new[batch.inputs["input_ids"]], max(0, int(table[self.unknown])) if self.unknown >= 0 else 0
        batch = replace(batch, inputs={**batch.inputs, "input_ids": torch.where(ids < 0, other, ids)})
        if not self.speaks:
            return batch
        labels = torch.where(batch.labels >= 0, new[batch.labels.clamp(min=0)], -1)
        signals = {name: _translated(signal, new) for name, signal in batch.signals.items()}
        return replace(batch, labels=torch.where(labels < 0, UNLABELLED, labels), signals=signals)

    # -------------------------------------------------------------------------------------------------------------- scores

    def statistics(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Sums over each row's positions of `names`. [B, m] fp64"""
        row_of, found = batch.row_of, torch.zeros(len(batch.ids), len(self.names), dtype=torch.float64)
        for chosen in outputs.chunks():
            each = self._each(outputs.logits_of(chosen).float(), batch.part(chosen))
            found.index_add_(0, row_of[chosen].cpu(), torch.stack([value.double().cpu() for value in each], dim=1))
        return found

    def _each(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        """`names` at every position of a chunk, each [n]."""
        raise NotImplementedError

    def metrics(self, sums: Any) -> dict[str, Any]:
        """From sums over rows, [..., m] (numpy), whatever can be said, each [...]; the headline first. 0 / 0 is left out or NaN."""
        raise NotImplementedError

    def scores(self, sums: np.ndarray) -> dict[str, float]:
        """`metrics` of one split, without those that nothing was counted for."""
        with np.errstate(all="ignore"):
            found = {name: float(value) for name, value in self.metrics(sums).items()}
        return {name: value for name, value in found.items() if not np.isnan(value) or not np.isfinite(sums).all()}


class _Classes(Task):
    """One class out of several at each scored position."""

    names: ClassVar[tuple[str, ...]] = ("labelled", "right", "nll", "answered", "agree", "kl")
    headline = "accuracy"

    def _each(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        answers, labelled, zero = logits.argmax(-1), batch.labels != UNLABELLED, torch.zeros(len(logits), device=logits.device)
        picked = logits.gather(1, batch.labels.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(-1)
        found = [labelled, (answers == batch.labels) & labelled, torch.where(labelled, -picked, 0.0)]
        signal = batch.signal
        if (signal.logits is None and signal.log_p is None) or signal.known is not None:
            return [*found, zero, zero, zero]
        log_q, log_p = signal.pair(logits, 1.0)
        if signal.logits is not None:
            teachers = signal.logits.argmax(-1)
        else:  # the likeliest may be one that a trimmed vocabulary has not
            assert signal.ids is not None
            assert signal.log_p is not None
            teachers = torch.where(signal.log_p[:, 0].isinf(), -1, signal.ids[:, 0])
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        return [*found, torch.ones_like(zero), answers == teachers, kl]

    def metrics(self, sums: Any) -> dict[str, Any]:
        labelled, right, nll, answered, agree, kl = np.moveaxis(sums, -1, 0)[:6]
        return {"accuracy": right / labelled, "nll": nll / labelled, "agreement": agree / answered, "kl_to_teacher": kl / answered}


class TextClassificationTask(_Classes):
    auto = "AutoModelForSequenceClassification"


class ImageClassificationTask(_Classes):
    auto = "AutoModelForImageClassification"

    def _inputs(self, columns: Columns, lengths: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        config: ImageClassification = self.config
        pixels = torch.from_numpy(np.stack(columns["pixels"])).view(-1, config.size, config.size, config.channels)
        mean, std = (torch.tensor(value) for value in (config.mean, config.std))
        return {"pixel_values": ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()}, torch.arange(len(lengths))


class TokenClassificationTask(_Classes):
    """Entities are runs of B-X I-X ...; labels that are not written so are entities of one word, all but O."""

    auto, lazy = "AutoModelForTokenClassification", True
    names = (*_Classes.names, "found", "true", "both")
    headline = "f1"

    def _scored(self, columns: Columns, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return _listed(columns["places"], starts)

    def _labels(self, columns: Columns) -> Tensor:
        labels = np.concatenate(columns["labels"]).astype(np.int64)
        return torch.from_numpy(np.where(labels < 0, UNLABELLED, labels))

    def statistics(self, outputs: Outputs, batch: Batch) -> Tensor:
        found = super().statistics(outputs, batch)
        answers = torch.cat([outputs.logits_of(chosen).argmax(-1) for chosen in outputs.chunks()]).cpu()
        start = 0
        for row, count in enumerate(batch.positions.tolist()):
            mine, its = answers[start : start + count].tolist(), batch.labels[start : start + count].tolist()
            start += count
            mine = [answer if label >= 0 else UNLABELLED for answer, label in zip(mine, its, strict=True)]  # as many as are judged
            said, true = (spans([self.labels[i] if i >= 0 else "O" for i in each]) for each in (mine, its))
            if any(label >= 0 for label in its):
                found[row, 6:] = torch.tensor([len(said), len(true), len(said & true)], dtype=torch.float64)
        return found

    def _each(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        zero = torch.zeros(len(logits), device=logits.device)
        return [*super()._each(logits, batch), zero, zero, zero]

    def metrics(self, sums: Any) -> dict[str, Any]:
        said, true, both = np.moveaxis(sums, -1, 0)[6:]
        return {"f1": 2 * both / (said + true), **super().metrics(sums)}


class CausalLMTask(_Classes):
    auto, lazy, speaks = "AutoModelForCausalLM", True, True
    names = (*_Classes.names, "bytes")
    headline, better = "perplexity", "min"

    def _inputs(self, columns: Columns, lengths: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if not self.config.pack:
            return super()._inputs(columns, lengths)
        width, places = pack(columns["length"], max(self.config.max_length, int(lengths.max())))
        starts = torch.from_numpy(places)
        tokens = _runs(starts, lengths)
        sequences = -(-int(tokens[-1] + 1) // width)
        input_ids = torch.full((sequences * width,), self.pad)
        # Positions begin anew with every row: transformers reads from that where one ends. Padding sees nothing but itself.
        position_ids = torch.zeros(sequences * width, dtype=torch.int64)
        input_ids[tokens] = torch.from_numpy(np.concatenate(columns["input_ids"]).astype(np.int64))
        position_ids[tokens] = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return {"input_ids": input_ids.view(-1, width), "position_ids": position_ids.view(-1, width)}, starts

    def _scored(self, columns: Columns, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return _runs(starts, lengths - 1), lengths - 1  # what is said at a token is about the next one

    def _labels(self, columns: Columns) -> Tensor:
        return torch.from_numpy(np.concatenate([ids[1:] for ids in columns["input_ids"]]).astype(np.int64))

    def statistics(self, outputs: Outputs, batch: Batch) -> Tensor:
        found = super().statistics(outputs, batch)
        if batch.bytes is not None:
            found[:, 6] = batch.bytes.double().cpu()
        return found

    def _each(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        return [*super()._each(logits, batch), torch.zeros(len(logits), device=logits.device)]

    def metrics(self, sums: Any) -> dict[str, Any]:
        plain, labelled, nll, written = super().metrics(sums), sums[..., 0], sums[..., 2], sums[..., 6]
        return {"perplexity": np.exp(nll / labelled), "bits_per_byte": nll / np.log(2) / written, **plain}


class MaskedLMTask(_Classes):
    auto, lazy, speaks = "AutoModelForMaskedLM", True, True
    headline, better = "perplexity", "min"

    def _scored(self, columns: Columns, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return _listed(columns["places"], starts)

    def _labels(self, columns: Columns) -> Tensor:
        return torch.from_numpy(np.concatenate(columns["labels"]).astype(np.int64))

    def metrics(self, sums: Any) -> dict[str, Any]:
        return {"perplexity": np.exp(sums[..., 2] / sums[..., 0]), **super().metrics(sums)}


class MultiLabelTask(Task):
    """Each label is there or not, decided at probability 1/2; f1 is micro-averaged."""

    auto = "AutoModelForSequenceClassification"
    names = ("labelled", "exact", "nll", "found", "true", "both", "answered", "agree", "kl")
    headline = "f1"

    def _labels(self, columns: Columns) -> Tensor:
        labels = torch.zeros(len(columns["labels"]), len(self.labels))
        for row, (present, known) in enumerate(zip(columns["labels"], columns["labelled"], strict=True)):
            labels[row, torch.from_numpy(present.astype(np.int64))] = 1.0
            if not known:
                labels[row] = torch.nan
        return labels

    def _each(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        labelled, labels = batch.labelled, batch.labels.nan_to_num()
        said, true, zero = logits > 0, labels > 0, torch.zeros(len(logits), device=logits.device)
        nll = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1)
        counts = [(said == true).all(-1), nll, said.sum(-1), true.sum(-1), (said & true).sum(-1)]
        found = [labelled, *(value * labelled for value in counts)]
        if (its := batch.signal.logits) is None:
            return [*found, zero, zero, zero]
        p, log_p, log_rest = its.sigmoid(), torch.nn.functional.logsigmoid(its), torch.nn.functional.logsigmoid(-its)
        log_q, log_other = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
        kl = (p * (log_p - log_q) + (1 - p) * (log_rest - log_other)).sum(-1)
        return [*found, torch.ones_like(zero), (said == (its > 0)).float().mean(-1), kl]

    def metrics(self, sums: Any) -> dict[str, Any]:
        labelled, exact, nll, said, true, both, answered, agree, kl = np.moveaxis(sums, -1, 0)
        return {
            "f1": 2 * both / (said + true), "exact_match": exact / labelled, "nll": nll / labelled, "agreement": agree / answered,
            "kl_to_teacher": kl / answered,
        }  # fmt: skip


class RegressionTask(Task):
    auto = "AutoModelForSequenceClassification"
    names = ("labelled", "squares", "absolute", "x", "y", "xx", "yy", "xy", "answered", "to_teacher")
    headline = "pearson"

    def _labels(self, columns: Columns) -> Tensor:
        return torch.from_numpy(columns["label"].astype(np.float32))

    def _each(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        labelled, x, zero = batch.labelled, logits[:, 0], torch.zeros(len(logits), device=logits.device)
        y = batch.labels.nan_to_num()
        products = [(x - y).square(), (x - y).abs(), x, y, x.double().square(), y.double().square(), x.double() * y.double()]
        found = [labelled, *(value * labelled for value in products)]
        if (its := batch.signal.logits) is None:
            return [*found, zero, zero]
        return [*found, torch.ones_like(zero), (x - its[:, 0]).square()]

    def metrics(self, sums: Any) -> dict[str, Any]:
        n, squares, absolute, x, y, xx, yy, xy, answered, to_teacher = np.moveaxis(sums, -1, 0)
        spread = np.sqrt(np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0))
        return {
            "pearson": (n * xy - x * y) / spread, "mse": squares / n, "mae": absolute / n, "mse_to_teacher": to_teacher / answered
        }  # fmt: skip


class EmbeddingTask(Task):
    """How near the student's vectors are to the teacher's; `evaluate` adds what they are good for."""

    auto = "AutoModel"
    names = ("answered", "cosine", "squares")
    headline = "cosine"

    def _labels(self, columns: Columns) -> Tensor:
        label = columns["label"].astype(np.int64)
        return torch.from_numpy(np.where(label < 0, UNLABELLED, label))

    def statistics(self, outputs: Outputs, batch: Batch) -> Tensor:
        mine, its = outputs.pooled, batch.signal.pooled
        assert mine is not None
        if its is None:
            return torch.zeros(len(batch.ids), 3, dtype=torch.float64)
        if outputs.near is not None and outputs.near.shape[1] == its.shape[1]:
            mine = outputs.near
        elif mine.shape[1] != its.shape[1]:
            return torch.zeros(len(batch.ids), 3, dtype=torch.float64)
        cosine = torch.nn.functional.cosine_similarity(mine.float(), its.float(), dim=-1)
        squares = (mine.float() - its.float()).square().mean(-1)
        return torch.stack([torch.ones_like(cosine), cosine, squares], dim=1).double().cpu()

    def metrics(self, sums: Any) -> dict[str, Any]:
        answered, cosine, squares = np.moveaxis(sums, -1, 0)
        return {"cosine": cosine / answered, "mse_to_teacher": squares / answered}


TASKS: Mapping[str, type[Task]] = {
    "text_classification": TextClassificationTask,
    "multi_label": MultiLabelTask,
    "regression": RegressionTask,
    "token_classification": TokenClassificationTask,
    "causal_lm": CausalLMTask,
    "masked_lm": MaskedLMTask,
    "image_classification": ImageClassificationTask,
    "embedding": EmbeddingTask,
}


def build_task(
    config: TaskConfig, pad: int = 0, labels: Sequence[str] = (), *, last: bool = False, mask: int = -1, unknown: int = -1
) -> Task:
    return TASKS[config.type](config, pad, labels, last=last, mask=mask, unknown=unknown)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities (kind, first, end) of a row of tags. I-X after anything but B-X or I-X begins one, as in the CoNLL evaluation."""
    found, start = set(), 0
    for i, tag in enumerate([*tags, "O"]):
        before = tags[i - 1] if i else "O"
        goes_on = tag.startswith("I-") and before[:2] in ("B-", "I-") and before[2:] == tag[2:]
        if before != "O" and not goes_on:
            found.add((before[2:] if before[:2] in ("B-", "I-") else before, start, i))
        if not goes_on:
            start = i
    return found


def pack(lengths: np.ndarray, width: int) -> tuple[int, np.ndarray]:
    """Rows into sequences of `width` tokens, each as soon as it fits no more beside the one before it: width, and where each begins."""
    places, used, sequence = np.zeros(len(lengths), np.int64), 0, 0
    for i, length in enumerate(lengths.tolist()):
        if used + length > width:
            sequence, used = sequence + 1, 0
        places[i] = sequence * width + used
        used += length
    return width, places


def _translated(signal: TeacherSignal, new: Tensor) -> TeacherSignal:
    """What a teacher said about a vocabulary, about a part of it. Dense logits of the others are left out before any softmax."""
    its: dict[str, Any] = {}
    if signal.logits is not None:
        its["logits"] = signal.logits[:, new >= 0]
    if signal.ids is not None:
        ids = new[signal.ids]
        its["ids"] = ids.clamp(min=0)
        for name, gone in (("log_p", -torch.inf), ("weights", 0.0)):
            if (values := getattr(signal, name)) is not None:
                its[name] = values.masked_fill(ids < 0, gone)
    return replace(signal, **its)


def _padded(rows: Sequence[np.ndarray], mask: Tensor, fill: int) -> Tensor:
    """[B, S] int64"""
    values = torch.full(mask.shape, fill)
    values[mask] = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    return values


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of each row, one after the other."""
    before = torch.cumsum(lengths, 0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


def _listed(places: Sequence[np.ndarray], starts: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(row) for row in places])
    return torch.from_numpy(np.concatenate(places).astype(np.int64)) + torch.repeat_interleave(starts, counts), counts
