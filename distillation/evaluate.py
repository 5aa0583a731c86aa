"""What a model is worth and what it costs. Teacher, baseline and student go through the same lines, whatever the task.

Legend: n rows, m statistics of the task, c classes. Whatever needs a label leaves unlabelled rows out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from scipy.stats import spearmanr

from distillation import neighbours
from distillation.columns import Columns
from distillation.config import Embedding, ImageClassification, Regression, TaskConfig, TextClassification
from distillation.errors import InputError
from distillation.gathering import Gathered, Share, gather, share_of
from distillation.inference import Precision, batches_of, costs, load_trained, ratios, rows_for
from distillation.intervals import Better, Score, bounds, compare, redraw, scored
from distillation.models import use_bf16
from distillation.network import Network
from distillation.quality import Bin, Disagreement, against, confusion, disagreements, quality, reliability, require_labels
from distillation.rows import Rows
from distillation.tasks import Task

Role = Literal["teacher", "baseline", "student"]

BESIDE = ("agreement", "kl_to_teacher", "mse_to_teacher")
"""Metrics of a task that are about a model and its teacher."""


class Candidate(NamedTuple):
    """A model to evaluate: `folder` as save_pretrained wrote it, `baseline` the name of the same student without distillation."""

    role: Role
    name: str
    folder: Path
    baseline: str | None = None
    columns: Columns | None = None
    """The rows in the tokens of its own tokenizer; None: as all others read them."""


class Evaluation(BaseModel):
    """All that was found about one model, as JSON. A model without a teacher beside it has empty `against` and `ratios`."""

    model_config = ConfigDict(extra="forbid")

    role: Role
    name: str
    baseline: str | None = None
    task: str = "text_classification"
    """Its type."""
    headline: str = "accuracy"
    """The metric of `quality` that retention and gain are about; beside it are its `_low` and `_high`, a 95 % interval."""
    better: Better = "max"
    """Whether more or less of it is better."""
    labels: tuple[str, ...]
    rows: int
    labelled: int
    positions: int = 0
    """Scored ones: rows, words or tokens."""
    precision: Literal["bf16", "fp32"]
    device: str
    quality: dict[str, float]
    against: dict[str, float] = {}
    """agreement and distance to the teacher; retention; gain over the baseline (above 0 is better), see `intervals`."""
    cost: dict[str, float]
    ratios: dict[str, float] = {}
    confusion: list[list[int]] = []
    """[true class][predicted class], of rows or of words; empty where there are no such classes."""
    reliability: list[Bin] = []
    disagreements: list[Disagreement] = []


class Judged(NamedTuple):
    """Quality of every model, and of all but the teacher what stands against it."""

    headline: str
    better: Better
    quality: dict[str, dict[str, float]]
    against: dict[str, dict[str, float]]


class _Opened:
    """Models in memory, and the rows as each of them reads them."""

    def __init__(
        self, models: Sequence[Candidate], columns: Columns, task: TaskConfig, labels: Sequence[str], device: torch.device
    ) -> None:
        self.teacher = require_readable(models, columns, task, labels)
        self.loaded = {model.name: load_trained(model.folder, task, labels).to(device) for model in models}
        self.columns = [model.columns or columns for model in models]
        self.rows = {model.name: rows_for(model.folder, model.columns or columns, task, labels) for model in models}

    def gather(self, batches: Sequence[np.ndarray], task: TaskConfig, bf16: bool, device: torch.device) -> dict[str, Gathered]:
        networks = {name: Network(model, task).eval() for name, model in self.loaded.items()}
        return gather(networks, self.rows, self.teacher, batches, bf16, device)

    def batches(self, task: TaskConfig, batch_tokens: int) -> list[np.ndarray]:
        return batches_of(self.rows[self.teacher].lengths, task, batch_tokens)


def require_readable(models: Sequence[Candidate], columns: Columns, task: TaskConfig, labels: Sequence[str]) -> str:
    """The teacher's name. Raises InputError where a label of the rows is none of the corpus's."""
    assert len({model.name for model in models}) == len(models), "names differ"
    if isinstance(task, TextClassification | ImageClassification):
        require_labels(columns.whole("label"), len(labels))
    (teacher,) = (model.name for model in models if model.role == "teacher")
    return teacher


def answers(
    models: Sequence[Candidate], columns: Columns, task: TaskConfig, labels: Sequence[str], share: tuple[int, int], *,
    batch_tokens: int = 8192, precision: Precision = "auto", device: str | torch.device = "cpu",
) -> Share:  # fmt: skip
    """What every model says about share (i, n) of the rows: of all batches every n-th from the i-th on. `gathering.together` makes of all shares
    what `evaluate` takes: the numbers are those of one pass over all. Raises as `evaluate` does.
    """
    device, (first, step) = torch.device(device), share
    opened = _Opened(models, columns, task, labels, device)
    mine = opened.batches(task, batch_tokens)[first::step]
    return share_of(opened.gather(mine, task, use_bf16(precision, device), device), np.concatenate([np.zeros(0, np.int64), *mine]))


def evaluate(
    models: Sequence[Candidate],
    columns: Columns,
    task: TaskConfig,
    labels: Sequence[str],
    *,
    found: Mapping[str, Gathered] | None = None,
    batch_tokens: int = 8192,
    precision: Precision = "auto",
    device: str | torch.device = "cpu",
    threads: int | None = None,
    repeats: int = 100,
    seed: int = 0,
) -> list[Evaluation]:
    """Every model over the same rows: the answers, or what was `found` (see `answers`), then the cost (see `inference.cost`), for which the
    models take turns.

    Exactly one model is the teacher; a `baseline` names another of the models. `labels` are the corpus's, in its order: a model that has
    them in another order is read by name, and one with other labels raises InputError. So do answers that are not finite, a split that
    cannot be scored, and a teacher whose score leaves nothing to keep. Answers, latency and throughput share one precision.
    """
    device = torch.device(device)
    bf16, opened = use_bf16(precision, device), _Opened(models, columns, task, labels, device)
    found = opened.gather(opened.batches(task, batch_tokens), task, bf16, device) if found is None else found
    pairs = [(opened.loaded[model.name], model.folder) for model in models]
    measured = costs(pairs, opened.columns, task, labels, batch_tokens, bf16, device, threads, repeats, seed)
    cost = {model.name: each for model, each in zip(models, measured, strict=True)}
    return concluded(models, columns, task, labels, opened.rows, found, cost, bf16, device, seed)


def concluded(
    models: Sequence[Candidate], columns: Columns, task: TaskConfig, labels: Sequence[str], rows: Mapping[str, Rows],
    found: Mapping[str, Gathered], cost: Mapping[str, dict[str, float]], bf16: bool, device: torch.device, seed: int,
) -> list[Evaluation]:  # fmt: skip
    """From what models said and cost, by name, to what they are worth."""
    (teacher,) = (model.name for model in models if model.role == "teacher")
    # A perplexity is of tokens, which are others for another tokenizer; bits per byte are of the text.
    headline = "bits_per_byte" if any(its.other_places for its in rows.values()) else rows[teacher].task.headline
    judged = _judge(models, teacher, rows[teacher].task, found, columns, seed, headline)
    one_label = isinstance(task, TextClassification | ImageClassification)
    return [
        Evaluation(
            role=role,
            name=name,
            baseline=baseline,
            task=task.type,
            headline=judged.headline,
            better=judged.better,
            labels=tuple(labels),
            rows=len(columns),
            labelled=len(rows[name].labelled),
            positions=int(rows[name].scored.sum()),
            precision="bf16" if bf16 else "fp32",
            device=str(device),
            quality=judged.quality[name],
            against=judged.against.get(name, {}),
            cost=cost[name],
            ratios={} if role == "teacher" else ratios(cost[name], cost[teacher]),
            **(_by_class(found[name], found[teacher], columns, labels, seed) if one_label else _by_word(found[name])),
        )
        for role, name, _, baseline, _ in models
    ]


def _by_class(mine: Gathered, teacher: Gathered, columns: Columns, labels: Sequence[str], seed: int) -> dict[str, Any]:
    assert mine.said is not None
    assert teacher.said is not None
    truth = columns.whole("label")
    return {
        "confusion": confusion(mine.said, truth),
        "reliability": reliability(mine.said, truth),
        "disagreements": disagreements(columns, labels, mine.said, teacher.said, seed=seed),
    }


def _by_word(mine: Gathered) -> dict[str, Any]:
    return {"confusion": mine.confusion.tolist()} if mine.confusion is not None else {}


# --------------------------------------------------------------------------------------------------------------- judging


def _judge(
    models: Sequence[Candidate], teacher: str, task: Task, found: Mapping[str, Gathered], columns: Columns, seed: int, headline: str
) -> Judged:
    if isinstance(task.config, Embedding):
        return _embeddings(models, teacher, found, columns, seed)
    if not isinstance(task.config, TextClassification | ImageClassification):
        return _sums(models, teacher, task, found, columns, seed, headline)
    said, truth = {name: each.said for name, each in found.items()}, columns.whole("label")
    beside = {
        name: against(said[name], said[teacher], truth, None if baseline is None else said[baseline], seed=seed)  # type: ignore[arg-type]
        for role, name, _, baseline, _ in models
        if role != "teacher"
    }
    return Judged("accuracy", "max", {name: quality(each, truth) for name, each in said.items() if each is not None}, beside)


def _sums(
    models: Sequence[Candidate], teacher: str, task: Task, found: Mapping[str, Gathered], columns: Columns, seed: int, headline: str
) -> Judged:
    """Tasks whose score is a function of sums over rows."""
    sums = {name: each.sums for name, each in found.items()}
    known = sums[teacher][:, 0] > 0  # the first statistic counts what has a label
    if not known.any():
        raise InputError("DST-3321", "no labelled row to evaluate on", expected="a split with labels", found=f"{len(known)} rows without")
    better: Better = "min" if task.better == "min" else "max"
    judged = _compared(
        models, teacher, headline, better, {name: each[known] for name, each in sums.items()},
        lambda drawn: task.metrics(drawn)[headline], seed,
    )  # fmt: skip
    for name, each in sums.items():
        metrics = {key: value for key, value in task.scores(each.sum(0)).items() if key != headline}
        if isinstance(task.config, Regression):
            metrics["spearman"] = _spearman(found[name], columns.whole("label"), known)
        judged.quality[name].update({key: value for key, value in metrics.items() if key not in BESIDE})
        if name != teacher:
            judged.against[name].update({key: value for key, value in metrics.items() if key in BESIDE})
    return judged


def _spearman(mine: Gathered, truth: np.ndarray, known: np.ndarray) -> float:
    """Correlation of ranks; 0 where one side is constant."""
    assert mine.said is not None
    answers, numbers = mine.said[known, 0], truth[known]
    return float(spearmanr(answers, numbers).statistic) if np.ptp(answers) > 0 and np.ptp(numbers) > 0 else 0.0


def _embeddings(models: Sequence[Candidate], teacher: str, found: Mapping[str, Gathered], columns: Columns, seed: int) -> Judged:
    """recall_at_1 is the headline where rows have labels, else cosine to the teacher's vectors if all are as wide, else neighbours.

    recall_at_1: share of labelled rows whose nearest labelled other row has the same label. neighbours: share of rows whose nearest other
    row is the one that is nearest for the teacher. probe_accuracy: see `neighbours.probe`.
    """
    compared = neighbours.chosen_rows(len(columns), seed)
    vectors = {name: each.said[compared] for name, each in found.items() if each.said is not None}
    truth = columns.whole("label")[compared] if "label" in columns.schema.names else np.full(len(compared), -1)
    known = truth >= 0
    near = {name: neighbours.nearest(each) for name, each in vectors.items()}
    alike = {name: each == near[teacher] for name, each in near.items()}
    wide = vectors[teacher].shape[1]
    close = {name: neighbours.cosine(each, vectors[teacher]) for name, each in vectors.items() if each.shape[1] == wide}
    if known.sum() > 1:
        headline, hits = "recall_at_1", {name: neighbours.recall(each[known], truth[known]) for name, each in vectors.items()}
    elif len(close) == len(vectors):
        headline, hits = "cosine", close
    else:
        headline, hits = "neighbours", alike
    sums = {name: np.stack([np.ones(len(each)), each], axis=1) for name, each in hits.items()}
    judged = _compared(models, teacher, headline, "max", sums, lambda drawn: drawn[..., 1] / drawn[..., 0], seed)
    for name, each in vectors.items():
        if (accuracy := neighbours.probe(each, truth, seed)) is not None:
            judged.quality[name]["probe_accuracy"] = accuracy
        if name != teacher:
            judged.against[name]["agreement"] = float(alike[name].mean())
            if name in close:
                judged.against[name]["cosine_to_teacher"] = float(close[name].mean())
    return judged


def _compared(
    models: Sequence[Candidate], teacher: str, headline: str, better: Better, sums: Mapping[str, np.ndarray], score: Score, seed: int
) -> Judged:
    """The headline of every model with its interval, retention and gain. sums: of the rows that count, by model, [n, m]."""
    value = {name: float(scored(score, each.sum(0))) for name, each in sums.items()}
    if value[teacher] <= 0:
        raise InputError(
            "DST-3331", "teacher's score leaves nothing to keep", expected=f"{headline} above 0", found=f"{value[teacher]:.3g}",
            do="Look at the teacher and at the labels",
        )  # fmt: skip
    samples = {name: scored(score, each) for name, each in redraw(sums, seed).items()}
    beside = {name: compare(better, value, samples, name, teacher, baseline) for role, name, _, baseline, _ in models if role != "teacher"}
    return Judged(headline, better, {name: {headline: value[name], **bounds(headline, samples[name])} for name in sums}, beside)
