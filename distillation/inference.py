"""A trained model at work: what it answers, and what an answer costs. The same code for teacher, baseline and student.

Legend: n rows, c classes. Rows come as token ids; cutting text into tokens is not part of any time measured here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.benchmark import Timer

from distillation.batches import sorted_batches
from distillation.errors import InputError
from distillation.models import load_classifier, use_bf16
from distillation.store import Columns
from distillation.students import flops, parameter_ratio

Precision = Literal["auto", "bf16", "fp32"]

THROUGHPUT_ROWS = 256
"""Rows of the sample that rows_per_second is measured on."""
TURN, WARM_UP = 10, 3
"""Rows that a model answers, one at a time, before the next model does; and those it answers first without being timed."""


def pad(ids: Sequence[np.ndarray], token: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids of some rows as input_ids and attention_mask. [rows, longest]"""
    width = max(len(row) for row in ids)
    padded, mask = np.full((len(ids), width), token, dtype=np.int64), np.zeros((len(ids), width), dtype=np.int64)
    for i, row in enumerate(ids):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": torch.from_numpy(padded).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def padding_token(model: Any) -> int:
    """Id that fills short rows. Raises InputError if the model has none: a batch of it would mean nothing."""
    token = model.config.pad_token_id
    if token is None:
        raise InputError(
            "DST-3323", "model has no padding token", where=str(model.config.name_or_path), expected="pad_token_id in config.json",
            found="none", do="Set it to the tokenizer's and save the model again",
        )  # fmt: skip
    return int(token)


def predict(
    model_dir: Path, columns: Columns, *, batch_tokens: int = 8192, precision: Precision = "auto", device: str | torch.device = "cpu"
) -> np.ndarray:
    """Logits of every row of a split, in the order of the rows. [n, c] fp32

    Raises InputError if the folder holds no whole classifier or its answers are not finite.
    """
    device = torch.device(device)
    model = load_classifier(model_dir).eval().to(device)
    return answers(model, columns, batch_tokens, use_bf16(precision, device), device)


def answers(model: Any, columns: Columns, batch_tokens: int, bf16: bool, device: torch.device) -> np.ndarray:
    """As `predict`, of a model that is loaded already."""
    logits = np.zeros((len(columns), model.config.num_labels), dtype=np.float32)
    token = padding_token(model)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for rows in sorted_batches(columns.whole("length"), batch_tokens):
            logits[rows] = model(**pad(columns.ragged("input_ids", rows), token, device)).logits.float().cpu().numpy()
    if not np.isfinite(logits).all():
        raise InputError(
            "DST-3322", "model answers with numbers that are not finite", where=str(model.config.name_or_path), expected="finite logits",
            found=f"{int((~np.isfinite(logits)).any(axis=1).sum())} of {len(logits)} rows without", do="Train it again at precision fp32",
        )  # fmt: skip
    return logits


def cost(
    model_dir: Path,
    columns: Columns,
    *,
    batch_tokens: int = 8192,
    precision: Precision = "auto",
    device: str | torch.device = "cpu",
    threads: int | None = None,
    repeats: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """What a model costs to keep and to run on these rows.

    parameters; bytes of its safetensors files; flops of one forward pass over the row of median length (matrix products and
    attention, a multiply-add counted as two, the same on any device); latency_ms_p50 and _p95 of one row at a time over `repeats` real
    rows drawn by `seed`; rows_per_second over a sample in batches as `predict` cuts them; threads that torch used (None: as many as now).
    Latency and throughput are measured at `precision`, like `predict`. Run it with nothing else beside it.
    """
    device = torch.device(device)
    model = load_classifier(model_dir).eval().to(device)
    return costs([(model, model_dir)], columns, batch_tokens, use_bf16(precision, device), device, threads, repeats, seed)[0]


def costs(
    models: Sequence[tuple[Any, Path]],
    columns: Columns,
    batch_tokens: int,
    bf16: bool,
    device: torch.device,
    threads: int | None,
    repeats: int,
    seed: int,
) -> list[dict[str, float]]:
    """As `cost`, of several loaded models that take turns: what else the machine does meanwhile falls on all of them alike."""
    lengths, token = columns.whole("length"), padding_token(models[0][0])
    median = np.argsort(lengths, kind="stable")[len(lengths) // 2 :][:1]
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    singles = [pad(columns.ragged("input_ids", drawn[i : i + 1]), token, device) for i in range(min(repeats, len(drawn)))]
    sample = drawn[:THROUGHPUT_ROWS]
    batches = [pad(columns.ragged("input_ids", sample[rows]), token, device) for rows in sorted_batches(lengths[sample], batch_tokens)]
    networks, before = [model for model, _ in models], torch.get_num_threads()
    threads = threads or before
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            milliseconds = _latencies(networks, singles, device)
            seconds = [_seconds(network, batches, threads) for network in networks]
    finally:
        torch.set_num_threads(before)
    row = pad(columns.ragged("input_ids", median), token, device)
    return [
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "flops": flops(model, row),
            "latency_ms_p50": float(np.percentile(milliseconds[i], 50)),
            "latency_ms_p95": float(np.percentile(milliseconds[i], 95)),
            "rows_per_second": len(sample) / seconds[i],
            "threads": threads,
        }
        for i, (model, folder) in enumerate(models)
    ]


def ratios(student: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """A student's cost over its teacher's: parameter_ratio (R_p), flops_ratio, bytes_ratio; speedup is the teacher's p50 over its own."""
    return {
        "parameter_ratio": parameter_ratio(int(student["parameters"]), int(teacher["parameters"])),
        "flops_ratio": student["flops"] / teacher["flops"],
        "bytes_ratio": student["bytes"] / teacher["bytes"],
        "speedup": teacher["latency_ms_p50"] / student["latency_ms_p50"],
    }


def _latencies(models: Sequence[Any], rows: Sequence[dict[str, torch.Tensor]], device: torch.device) -> np.ndarray:
    """Milliseconds of each row alone. [models, rows]

    torch.utils.benchmark averages over runs, and percentiles need single ones: hence the plain clock.
    """
    times = np.zeros((len(models), len(rows)))
    for start in range(0, len(rows), TURN):
        for i, model in enumerate(models):
            turn = rows[start : start + TURN]
            for row in turn[:WARM_UP]:
                model(**row)
            for j, row in enumerate(turn, start):
                _wait(device)
                begin = time.perf_counter()
                model(**row)
                _wait(device)
                times[i, j] = 1000 * (time.perf_counter() - begin)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(model: Any, batches: Sequence[dict[str, torch.Tensor]], threads: int) -> float:
    """Seconds of one pass over all batches (median of some)."""

    def run() -> None:
        for batch in batches:
            model(**batch)

    return float(Timer("run()", globals={"run": run}, num_threads=threads).blocked_autorange(min_run_time=0.5).median)
