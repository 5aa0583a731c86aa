"""What a teacher says about the rows of a part, as the columns of a part of the target store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distillation.batches import sorted_batches
from distillation.config import SampledLogits, TargetsConfig, TopKLogits
from distillation.errors import InputError
from distillation.network import Network, mixed, observe
from distillation.rows import QUANTUM, Rows
from distillation.signals import TeacherSignal, classes_of

RELATIONS = ("query", "key", "value")


def make_teacher(model: Any, task: Any, targets: TargetsConfig, *, attention_layers: tuple[int, ...] = ()) -> Network:
    """A model that reports what targets ask for. attention_layers: whose attention is reported too."""
    features = targets.features
    layers = tuple(sorted({*attention_layers, *features.layers} if features else attention_layers)) if attention_layers else None
    return Network(
        model, task, layers=layers or (features.layers if features else ()), at=features.at if features else "scored",
        pooled=bool(features and features.pooled), relations=features.relations if features else None, attentions=bool(attention_layers),
    )  # fmt: skip


def answer_part(
    teacher: Network, rows: Rows, targets: TargetsConfig, batch_tokens: int, bf16: bool, device: torch.device
) -> tuple[pa.Table, dict[str, float]]:
    """What the teacher says about every row of a part, in the part's order, and how much of it was left out (top-k).

    Columns: id; logits, or ids and log_p, label_log_p and normalisers, or ids, weights and label_log_p; pooled, hidden_I, relation_query and
    so on. Each value is one position's. Raises InputError naming the row whose answer is not finite, in the store's precision.
    """
    columns: dict[str, np.ndarray] = {}
    missing: list[np.ndarray] = []
    classes = classes_of(teacher.head) if teacher.head is not None else 0
    ends = {"positions": np.cumsum(rows.scored), "tokens": np.cumsum(rows.lengths)}
    for batch_rows in sorted_batches(rows.lengths, batch_tokens):
        signal = observe(teacher, rows.batch(batch_rows).to(device), bf16, targets.logits, targets.features)
        if signal.log_p is not None:
            missing.append((1 - signal.log_p.double().exp().sum(-1)).clamp(min=0).cpu().numpy())
        with np.errstate(over="ignore"):  # becomes inf, and is refused below
            found = columns_of(signal, targets, classes)
        for name, values in found.items():
            counts = rows.scored if _unit(name, targets) == "positions" else rows.lengths
            places = _places(ends[_unit(name, targets)][batch_rows] - counts[batch_rows], counts[batch_rows])
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any():
                row = batch_rows[np.repeat(np.arange(len(batch_rows)), counts[batch_rows])[bad][:1]]
                raise InputError(
                    "DST-3301", "teacher's answer is not finite", where=f"row {rows.ids(row)[0]}, {name}", expected=f"finite {values.dtype}",
                    found="inf or nan", do="Set the dtype of the targets to float32, or precision to fp32",
                )  # fmt: skip
            if name not in columns:
                columns[name] = np.zeros((int(ends[_unit(name, targets)][-1]), values.shape[1]), values.dtype)
            columns[name][places] = values
    arrays: dict[str, pa.Array] = {"id": pa.array(rows.ids(np.arange(len(rows))), pa.string())}
    for name in sorted(columns):
        each = pa.FixedSizeListArray.from_arrays(pa.array(columns[name].reshape(-1)), columns[name].shape[1])
        if rows.task.lazy or _unit(name, targets) == "tokens":  # by the task, not by this part: all parts have one schema
            offsets = np.concatenate([[0], ends[_unit(name, targets)]]).astype(np.int32)
            each = pa.ListArray.from_arrays(pa.array(offsets), each)
        arrays[name] = each
    left_out = np.concatenate(missing) if missing else np.zeros(0)
    told = {"teacher/missing_mass": float(left_out.mean()), "teacher/missing_mass_max": float(left_out.max())} if len(left_out) else {}
    return pa.table(arrays), told


@torch.no_grad()
def keep_company(teacher: Network, rows: Rows, times: int, bf16: bool, device: torch.device) -> None:
    """Run a sharded teacher on a row whose answer nobody needs, because other shards still have rows to answer."""
    batch = rows.batch(np.argsort(rows.lengths)[:1]).to(device)
    for _ in range(times):
        with mixed([teacher], bf16, device):
            teacher(batch.inputs, batch.scored, batch.tokens, batch.lengths)


def columns_of(signal: TeacherSignal, targets: TargetsConfig, classes: int) -> dict[str, np.ndarray]:
    """Fields of a signal in the precision of the store. Each [N or T, width]"""
    logits, features = targets.logits, targets.features
    found: dict[str, np.ndarray] = {}
    if signal.logits is not None:
        assert logits is not None
        found["logits"] = _numpy(signal.logits).astype(getattr(logits, "dtype", "float32"))
    if isinstance(logits, TopKLogits):
        assert signal.log_p is not None
        log_p = _numpy(signal.log_p)
        found["ids"] = _numbers(signal.ids, classes)
        # fp16 has no log-probability below -65504, and none that matters below -30.
        found["log_p"] = (
            np.clip(np.rint(-QUANTUM * log_p), 0, 255).astype(np.uint8) if logits.dtype == "uint8" else np.maximum(log_p, -1e4).astype(logits.dtype)
        )  # fmt: skip
        if signal.normalisers is not None:
            found["normalisers"] = _numpy(signal.normalisers)
    if isinstance(logits, SampledLogits):
        assert signal.weights is not None
        found["ids"], found["weights"] = (
            _numbers(signal.ids, classes),
            np.rint(_numpy(signal.weights) * logits.draws).astype(np.uint8 if logits.draws < 256 else np.uint16),
        )
    if signal.label_log_p is not None:
        found["label_log_p"] = np.maximum(_numpy(signal.label_log_p), -1e4)[:, None].astype(np.float16)
    if features is not None:
        if signal.pooled is not None:
            found["pooled"] = _numpy(signal.pooled).astype(features.dtype)
        for place, layer in enumerate(signal.layers if signal.hidden is not None else ()):
            assert signal.hidden is not None
            found[f"hidden_{layer}"] = _numpy(signal.hidden[:, place]).astype(features.dtype)
        for name, values in zip(RELATIONS, signal.relations, strict=False):
            found[f"relation_{name}"] = _numpy(values).astype(features.dtype)
    return found


def bytes_per_position(targets: TargetsConfig, classes: int, width: int) -> tuple[float, float]:
    """Bytes of what is kept for one scored position, and for one token. classes: or the vocabulary. width: of the hidden states."""
    logits, features, item = targets.logits, targets.features, {"float16": 2, "float32": 4, "uint8": 1}
    number = 2 if classes <= 1 << 16 else 4
    position = token = 0.0
    if isinstance(logits, TopKLogits):
        position += min(logits.k, classes) * (number + item[logits.dtype]) + 4 * len(logits.stored_temperatures) + 2
    elif isinstance(logits, SampledLogits):
        position += logits.draws * (number + (1 if logits.draws < 256 else 2)) + 2
    elif logits is not None:
        position += classes * item[logits.dtype]
    if features is not None:
        each = width * item[features.dtype]
        position += each * features.pooled + (each * len(features.layers) if features.at == "scored" else 0)
        token += (each * len(features.layers) if features.at == "tokens" else 0) + (3 * each if features.relations is not None else 0)
    return position, token


def _unit(name: str, targets: TargetsConfig) -> str:
    everywhere = targets.features is not None and targets.features.at == "tokens"
    return "tokens" if name.startswith("relation_") or (name.startswith("hidden_") and everywhere) else "positions"


def _places(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each row."""
    places: np.ndarray = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return places


def _numpy(values: Tensor | None) -> np.ndarray:
    assert values is not None
    found: np.ndarray = values.cpu().numpy()
    return found


def _numbers(ids: Tensor | None, classes: int) -> np.ndarray:
    """Class numbers, in two bytes where all classes fit."""
    return _numpy(ids).astype(np.uint16 if classes <= 1 << 16 else np.int32)
