"""A trained model at work: what it answers, and what an answer costs. The same code for teacher, baseline and student.

Legend: n rows, c classes. Rows come as token ids or pixels; cutting text into tokens is not part of any time measured here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from distillation import fit, models
from distillation.batches import sorted_batches
from distillation.columns import Columns
from distillation.config import (
    CausalLM,
    ImageClassification,
    MaskedLM,
    MultiLabel,
    Regression,
    TaskConfig,
    TextClassification,
    TokenClassification,
)
from distillation.errors import InputError
from distillation.models import use_bf16
from distillation.network import Network, order_head
from distillation.rows import Rows
from distillation.students import flops, parameter_ratio

Precision = Literal["auto", "bf16", "fp32"]
Inputs = Mapping[str, Tensor]

NAMED = (TextClassification, MultiLabel, TokenClassification, ImageClassification)
"""Tasks whose outputs have names."""
THROUGHPUT_ROWS = 256
"""Rows of the sample that rows_per_second is measured on."""
TURN, WARM_UP = 10, 3
"""Rows that a model answers, one at a time, before the next model does; and those it answers first without being timed."""
SECONDS = 0.5
"""That each model is run for at least, to measure its throughput."""
PIXELS, LOGITS = 1 << 24, 1 << 26
"""Of the images, and of the logits over a vocabulary, that are in memory at once: 64 and 256 MB in fp32."""


def load_trained(folder: Path, task: TaskConfig, labels: Sequence[str]) -> Any:
    """A trained model for evaluation, its classes in the order of `labels`: one that has them in another order is read by name.

    Raises InputError if the folder holds no whole model or one of other labels.
    """
    model = models.load(folder, task).eval()
    if labels and isinstance(task, NAMED):
        order_head(model, labels, str(folder))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # nothing comes after what is read here
    return model


def rows_for(folder: Path, columns: Columns, task: TaskConfig, labels: Sequence[str]) -> Rows:
    """The rows as the model in this folder reads them, each in a sequence of its own. Raises InputError if it cannot fill short ones."""
    if isinstance(task, TextClassification | MultiLabel | Regression) and models.read_config(folder).get("pad_token_id") is None:
        raise InputError(
            "DST-3323", "model has no padding token", where=str(folder), expected="pad_token_id in config.json",
            found="none", do="Set it to the tokenizer's and save the model again",
        )  # fmt: skip
    alone = task.model_copy(update={"pack": False}) if isinstance(task, CausalLM) else task
    return Rows(columns, {}, fit.reader(alone, folder, labels), models.kept_table(folder))


def batches_of(lengths: np.ndarray, task: TaskConfig, batch_tokens: int) -> list[np.ndarray]:
    """Row numbers in batches by rising length. An image counts as one token, so there its pixels set the limit too."""
    if isinstance(task, ImageClassification):
        batch_tokens = max(1, min(batch_tokens, PIXELS // (task.channels * task.size**2)))
    return sorted_batches(lengths, batch_tokens)


def predict(
    model_dir: Path, columns: Columns, task: TaskConfig, labels: Sequence[str], *, batch_tokens: int = 8192, precision: Precision = "auto",
    device: str | torch.device = "cpu",
) -> np.ndarray:  # fmt: skip
    """Logits of every row of a split, in the order of the rows, for tasks whose answer is about a row. [n, c] fp32

    Raises what `load_trained` and `rows_for` raise, and InputError if the answers are not finite.
    """
    device = torch.device(device)
    rows, network = rows_for(model_dir, columns, task, labels), Network(load_trained(model_dir, task, labels), task).eval().to(device)
    found: list[np.ndarray] = []
    batches = batches_of(rows.lengths, task, batch_tokens)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
        for chosen in batches:
            batch = rows.batch(chosen).to(device)
            logits = network(batch.inputs, batch.scored, batch.tokens, batch.lengths).logits
            assert logits is not None, "a task of whole rows"
            found.append(logits.float().cpu().numpy())
    answers = np.concatenate(found)[np.argsort(np.concatenate(batches))]
    require_finite(answers, str(model_dir))
    return answers


def require_finite(answers: np.ndarray, where: str) -> None:
    """Raise InputError where what a model said about a row [n, ...] holds inf or nan."""
    bad = ~np.isfinite(answers).all(axis=tuple(range(1, answers.ndim)))
    if bad.any():
        raise InputError(
            "DST-3322", "model answers with numbers that are not finite", where=where, expected="finite answers",
            found=f"{int(bad.sum())} of {len(answers)} rows without", do="Train it again at precision fp32",
        )  # fmt: skip


def cost(
    model_dir: Path,
    columns: Columns,
    task: TaskConfig,
    labels: Sequence[str] = (),
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
    rows drawn by `seed`; rows_per_second, and of texts tokens_per_second, over a sample in batches as `predict` cuts them; threads that
    torch used (None: as many as now). A language model says something at every token. Latency and throughput are measured at
    `precision`, like `predict`. Run it with nothing else beside it.
    """
    device = torch.device(device)
    model = load_trained(model_dir, task, labels).to(device)
    bf16 = use_bf16(precision, device)
    return costs([(model, model_dir)], columns, task, labels, batch_tokens, bf16, device, threads, repeats, seed)[0]


def costs(
    measured: Sequence[tuple[Any, Path]],
    columns: Columns | Sequence[Columns],
    task: TaskConfig,
    labels: Sequence[str],
    batch_tokens: int,
    bf16: bool,
    device: torch.device,
    threads: int | None,
    repeats: int,
    seed: int,
) -> list[dict[str, float]]:
    """As `cost`, of several loaded models that take turns: what else the machine does meanwhile falls on all of them alike.

    measured: each with the folder whose config.json says how it reads rows, and whose weights are counted in bytes. columns: the rows, or
    for each model as it reads them.
    """
    networks, before = [model for model, _ in measured], torch.get_num_threads()
    each = [columns] * len(measured) if isinstance(columns, Columns) else columns
    rows = [rows_for(folder, its, task, labels) for (_, folder), its in zip(measured, each, strict=True)]
    lengths = rows[0].lengths
    median = np.argsort(lengths, kind="stable")[len(lengths) // 2 :][:1]
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    sample = drawn[:THROUGHPUT_ROWS]
    if isinstance(task, CausalLM | MaskedLM):  # here the logits of all tokens are made
        batch_tokens = min(batch_tokens, LOGITS // networks[0].config.vocab_size)
    cut = [sample[batch] for batch in batches_of(lengths[sample], task, batch_tokens)]
    singles = [[_inputs(its, drawn[i : i + 1], device) for i in range(min(repeats, len(drawn)))] for its in rows]
    threads = threads or before
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            milliseconds = _latencies(networks, singles, device)
            seconds = [
                _seconds(model, [_inputs(its, batch, device) for batch in cut], threads, device)
                for model, its in zip(networks, rows, strict=True)
            ]
    finally:
        torch.set_num_threads(before)
    counted = () if isinstance(task, ImageClassification) else ("tokens_per_second",)
    return [
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "flops": flops(model, _inputs(rows[i], median, device)),
            "latency_ms_p50": float(np.percentile(milliseconds[i], 50)),
            "latency_ms_p95": float(np.percentile(milliseconds[i], 95)),
            "rows_per_second": len(sample) / seconds[i],
            **{name: float(rows[i].lengths[sample].sum()) / seconds[i] for name in counted},
            "threads": threads,
        }
        for i, (model, folder) in enumerate(measured)
    ]


def _inputs(rows: Rows, chosen: np.ndarray, device: torch.device) -> Inputs:
    return rows.batch(chosen).to(device).inputs


def ratios(student: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """A student's cost over its teacher's: parameter_ratio (R_p), flops_ratio, bytes_ratio; speedup is the teacher's p50 over its own."""
    return {
        "parameter_ratio": parameter_ratio(int(student["parameters"]), int(teacher["parameters"])),
        "flops_ratio": student["flops"] / teacher["flops"],
        "bytes_ratio": student["bytes"] / teacher["bytes"],
        "speedup": teacher["latency_ms_p50"] / student["latency_ms_p50"],
    }


def _latencies(models: Sequence[Any], rows: Sequence[Sequence[Inputs]], device: torch.device) -> np.ndarray:
    """Milliseconds of each row alone, rows as each model reads them. [models, rows]

    torch.utils.benchmark averages over runs, and percentiles need single ones: hence the plain clock.
    """
    times = np.zeros((len(models), len(rows[0])))
    for start in range(0, len(rows[0]), TURN):
        for i, model in enumerate(models):
            turn = rows[i][start : start + TURN]
            for row in turn[:WARM_UP]:
                model(**row)
            for j, row in enumerate(turn, start):
                wait(device)
                begin = time.perf_counter()
                model(**row)
                wait(device)
                times[i, j] = 1000 * (time.perf_counter() - begin)
    return times


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(model: Any, batches: Sequence[Inputs], threads: int, device: torch.device) -> float:
    """Seconds of one pass over all batches (median of some)."""

    def run() -> None:
        for batch in batches:
            model(**batch)
        wait(device)

    return float(Timer("run()", globals={"run": run}, num_threads=threads).blocked_autorange(min_run_time=SECONDS).median)
