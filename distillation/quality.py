"""How good a model is that gives every row one label, and how it compares with its teacher.

Legend: n rows, m labelled rows, c classes, k bins. Logits are [n, c] fp32, labels [n] with -1 where a row has none.
Whatever needs a label leaves unlabelled rows out; agreement and divergence use all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score

from distillation.columns import Columns
from distillation.errors import InputError

BINS = 15
"""Of confidence, equally wide; Guo et al. 2017."""
Z = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""
EXAMPLES = 8
TEXT_LENGTH = 400
"""Characters of an example text that are kept."""


class Bin(BaseModel):
    """Rows whose confidence fell into one bin; means are 0 where there are none."""

    rows: int
    confidence: float
    accuracy: float


class Disagreement(BaseModel):
    text: str
    label: str | None
    answer: str
    teacher: str


def quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How good the answers are, over the labelled rows.

    accuracy, with `accuracy_low` and `accuracy_high`, the 95 % interval of Wilson (1927); macro_f1 over the classes that occur
    among labels or answers; nll = mean -log q(label); ece = sum over bins of rows/m * |accuracy - mean confidence| (Guo et al. 2017).
    """
    logits, labels = _labelled(logits, labels)
    answers, count = logits.argmax(axis=1), len(labels)
    accuracy = float((answers == labels).mean())
    centre, width = accuracy + Z**2 / (2 * count), Z * np.sqrt(accuracy * (1 - accuracy) / count + Z**2 / (4 * count**2))
    return {
        "accuracy": accuracy,
        "accuracy_low": max(0.0, float((centre - width) / (1 + Z**2 / count))),
        "accuracy_high": min(1.0, float((centre + width) / (1 + Z**2 / count))),
        "macro_f1": float(f1_score(labels, answers, average="macro")),
        "nll": float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(count), labels].mean()),
        "ece": float(sum(b.rows * abs(b.accuracy - b.confidence) for b in reliability(logits, labels)) / count),
    }


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[Bin]:
    """Confidence (probability of the answer) against accuracy in `BINS` bins ((i-1)/k, i/k], over the labelled rows."""
    logits, labels = _labelled(logits, labels)
    confidence = np.exp(log_softmax(logits.astype(np.float64), axis=1).max(axis=1))
    right = _right(logits, labels)
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    rows = np.bincount(place, minlength=BINS)
    filled = np.maximum(rows, 1)
    means = np.bincount(place, confidence, BINS) / filled, np.bincount(place, right, BINS) / filled
    return [Bin(rows=int(r), confidence=float(q), accuracy=float(a)) for r, q, a in zip(rows, *means, strict=True)]


def against(
    logits: np.ndarray,
    teacher_logits: np.ndarray,
    labels: np.ndarray,
    baseline_logits: np.ndarray | None = None,
    *,
    seed: int = 0,
    draws: int = 2000,
) -> dict[str, float]:
    """A model beside its teacher and, if given, beside the same model trained without it.

    agreement: share of rows with the same answer; kl_to_teacher: mean KL(teacher || model) in nats at temperature 1, fp64;
    retention: accuracy / the teacher's, with a paired bootstrap 95 % interval (percentiles; the same rows are drawn for all models;
    draws in which the teacher gets nothing right are left out). With a baseline: gain over its accuracy in points (0.01 of accuracy)
    with its interval, and mcnemar_p, the exact two-sided p of "neither is better" over the rows that only one gets right.
    Raises InputError where no row is labelled or the teacher gets none right.
    """
    p, q = (log_softmax(x.astype(np.float64), axis=1) for x in (teacher_logits, logits))
    result = {
        "agreement": float((logits.argmax(axis=1) == teacher_logits.argmax(axis=1)).mean()),
        "kl_to_teacher": float((np.exp(p) * (p - q)).sum(axis=1).mean()),
    }
    right, right_teacher = _right(logits, labels), _right(teacher_logits, labels)
    right_baseline = right if baseline_logits is None else _right(baseline_logits, labels)
    if not right_teacher.any():
        raise InputError("DST-3325", "teacher gets no labelled row right", expected="a teacher worth keeping", found="accuracy 0")
    # Rows differ only in who is right about them: drawing rows with replacement is drawing counts of the 8 cases.
    cases = np.bincount(4 * right + 2 * right_teacher + right_baseline, minlength=8)
    drawn = np.random.default_rng(seed).multinomial(len(right), cases / len(right), size=draws)
    who = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    model, teacher, baseline = (drawn @ who).T
    kept = model[teacher > 0] / teacher[teacher > 0]
    result["retention"] = float(right.sum() / right_teacher.sum())
    result["retention_low"], result["retention_high"] = (float(x) for x in np.percentile(kept, [2.5, 97.5]))
    if baseline_logits is not None:
        gains = 100 * (model - baseline) / len(right)
        won, lost = int((right & ~right_baseline).sum()), int((right_baseline & ~right).sum())
        result["gain"] = 100 * (won - lost) / len(right)
        result["gain_low"], result["gain_high"] = (float(x) for x in np.percentile(gains, [2.5, 97.5]))
        result["mcnemar_p"] = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return result


def _right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits, labels = _labelled(logits, labels)
    return np.asarray(logits.argmax(axis=1) == labels)


def _labelled(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    require_labels(labels, logits.shape[1])
    return logits[labels >= 0], labels[labels >= 0]


def require_labels(labels: np.ndarray, classes: int) -> None:
    """Raise InputError where no row has a label, or one has a label that is no class."""
    if not (labels >= 0).any():
        raise InputError("DST-3321", "no labelled row to evaluate on", expected="a split with labels", found=f"{len(labels)} rows without")
    if int(labels.max()) >= classes:
        raise InputError("DST-3324", "label that the model does not know", expected=f"0 to {classes - 1}", found=str(int(labels.max())))


def confusion(logits: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Labelled rows by [true class][answer]."""
    logits, labels = _labelled(logits, labels)
    counts: list[list[int]] = confusion_matrix(labels, logits.argmax(axis=1), labels=range(logits.shape[1])).tolist()
    return counts


def disagreements(
    columns: Columns, names: Sequence[str], logits: np.ndarray, teacher_logits: np.ndarray, *, seed: int = 0
) -> list[Disagreement]:
    """Up to `EXAMPLES` rows, drawn by `seed`, to which a model and its teacher give different answers."""
    mine, teachers, labels = logits.argmax(axis=1), teacher_logits.argmax(axis=1), columns.whole("label")
    rows = np.sort(np.random.default_rng(seed).permutation(np.flatnonzero(mine != teachers))[:EXAMPLES])
    return [
        Disagreement(
            text=text[:TEXT_LENGTH],
            label=names[labels[row]] if labels[row] >= 0 else None,
            answer=names[mine[row]],
            teacher=names[teachers[row]],
        )
        for text, row in zip(columns.strings("text", rows), rows, strict=True)
    ]
