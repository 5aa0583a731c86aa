"""Evaluation where models are cut among workers (see `sharding`): all of them answer in step, each its own rows. Rank 0 knows the result.

What a cut model costs is what it costs there: latency and throughput are those of its workers together.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillation import models as trained
from distillation import sharding
from distillation.checkpoints import Ranks
from distillation.columns import Columns
from distillation.config import CausalLM, ImageClassification, MaskedLM, TaskConfig
from distillation.evaluate import Candidate, Evaluation, concluded, require_readable
from distillation.gathering import Gathered, gather
from distillation.inference import LOGITS, NAMED, THROUGHPUT_ROWS, WARM_UP, Precision, batches_of, costs, load_trained, rows_for, wait
from distillation.models import use_bf16
from distillation.network import Network, mixed
from distillation.rows import Rows
from distillation.signals import Batch
from distillation.students import size_of_trained

PASSES = 3
"""Over the sample that throughput is measured on; the one of median time counts."""


def evaluate_in_step(
    models: Sequence[Candidate], columns: Columns, task: TaskConfig, labels: Sequence[str], cut: Collection[str], session: Ranks, *,
    batch_tokens: int = 8192, precision: Precision = "auto", threads: int | None = None, repeats: int = 100, seed: int = 0,
) -> list[Evaluation]:  # fmt: skip
    """As `evaluate`, called by every worker of a mesh; all but rank 0 return []. cut: names of the models that no worker holds whole."""
    device = session.device
    bf16 = use_bf16(precision, device)
    teacher = require_readable(models, columns, task, labels)
    loaded = {model.name: load_trained(model.folder, task, labels).to(device) for model in models if model.name not in cut}
    networks = {
        model.name: _part(model.folder, task, labels, session) if model.name in cut else Network(loaded[model.name], task).eval()
        for model in models
    }
    rows = {model.name: rows_for(model.folder, model.columns or columns, task, labels) for model in models}
    found = _gathered(networks, rows, teacher, batches_of(rows[teacher].lengths, task, batch_tokens), bf16, session)
    threads, before = threads or torch.get_num_threads(), torch.get_num_threads()
    torch.set_num_threads(threads)
    timed = {
        model.name: _timed(networks[model.name], rows[model.name], task, batch_tokens, bf16, session, repeats, seed)
        for model in models if model.name in cut
    }  # fmt: skip
    torch.set_num_threads(before)
    session.all_reduce(torch.zeros(1, device=device))  # from here on rank 0 needs no other
    if session.rank != 0:
        return []
    assert session.mesh is not None
    alone = [model for model in models if model.name not in cut]
    pairs, read = [(loaded[model.name], model.folder) for model in alone], [model.columns or columns for model in alone]
    measured = costs(pairs, read, task, labels, batch_tokens, bf16, device, threads, repeats, seed) if alone else []
    cost = {model.name: each for model, each in zip(alone, measured, strict=True)}
    median = np.argsort(rows[teacher].lengths, kind="stable")[len(columns) // 2]
    for model in models:
        if model.name in cut:
            size = sum(file.stat().st_size for file in model.folder.glob("*.safetensors"))
            sizes = size_of_trained(model.folder, task, int(rows[model.name].lengths[median]))
            cost[model.name] = {**sizes, "bytes": size, **timed[model.name], "threads": threads}
    where = f"{session.mesh.size(1)} x {device.type}"
    return [
        e.model_copy(update={"device": where}) if e.name in cut else e
        for e in concluded(models, columns, task, labels, rows, found, cost, bf16, device, seed)
    ]


def _part(folder: Path, task: TaskConfig, labels: Sequence[str], session: Ranks) -> Network:
    assert session.mesh is not None
    settings = trained.read_config(folder)
    if labels and isinstance(task, NAMED):
        order = trained.label_order(trained.label_names(settings), len(labels), tuple(labels), str(folder))
        assert order == list(range(len(labels))), "a model that was committed has the corpus's order"

    def network(model: Any) -> Network:
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return Network(model, task)

    return sharding.load(folder, network, task, session.mesh, session.device)


def _gathered(
    networks: Mapping[str, Network], rows: Mapping[str, Rows], teacher: str, batches: Sequence[np.ndarray], bf16: bool, session: Ranks
) -> dict[str, Gathered]:
    """What all ranks gather, each from every n-th batch; where one has fewer than others it answers one more, which counts nothing."""
    mine = batches[session.rank :: session.world_size]
    answer: Callable[[Sequence[np.ndarray]], dict[str, Gathered]] = functools.partial(
        gather, networks, rows, teacher, bf16=bf16, device=session.device
    )
    found = answer(mine or batches[:1])
    for _ in range(-(-len(batches) // session.world_size) - max(1, len(mine))):
        answer(batches[:1])

    def over_ranks(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        own = torch.from_numpy(values if mine else np.zeros_like(values)).to(session.device)
        return session.all_reduce(own).cpu().numpy()

    return {name: Gathered(*map(over_ranks, (each.sums, each.said, each.confusion))) for name, each in found.items()}  # type: ignore[arg-type]


def _timed(
    network: Network, rows: Rows, task: TaskConfig, batch_tokens: int, bf16: bool, session: Ranks, repeats: int, seed: int
) -> dict[str, float]:
    """latency_ms_p50 and the like, as `inference.cost` measures them, of a model that the workers of a mesh hold together and ask at once:
    each answers rows, and what all that hold one model answer in a second counts.
    """
    device, mesh = session.device, session.mesh
    assert mesh is not None
    drawn = np.random.default_rng(seed).permutation(len(rows))
    sample = drawn[:THROUGHPUT_ROWS]
    if isinstance(task, CausalLM | MaskedLM):
        batch_tokens = min(batch_tokens, LOGITS // network.model.config.vocab_size)
    cut = [rows.batch(sample[batch]).to(device) for batch in batches_of(rows.lengths[sample], task, batch_tokens)]
    singles = [rows.batch(drawn[i : i + 1]).to(device) for i in range(min(repeats, len(drawn)))]

    def seconds(batches: Sequence[Batch]) -> float:
        wait(device)
        started = time.perf_counter()
        for batch in batches:
            places = batch.tokens if network.lazy else batch.scored  # a whole language model says something at every token
            outputs = network(batch.inputs, places, batch.tokens, batch.lengths)
            for piece in outputs.chunks():
                outputs.logits_of(piece)
        wait(device)
        return time.perf_counter() - started

    with torch.no_grad(), mixed([network], bf16, device):
        seconds(singles[:WARM_UP])
        milliseconds = [1000 * seconds([single]) for single in singles]
        whole = float(np.median([seconds(cut) for _ in range(PASSES)])) / mesh.size(1)
    found = {f"latency_ms_p{q}": float(np.percentile(milliseconds, q)) for q in (50, 95)} | {"rows_per_second": len(sample) / whole}
    if not isinstance(task, ImageClassification):
        found["tokens_per_second"] = float(rows.lengths[sample].sum()) / whole
    return found
