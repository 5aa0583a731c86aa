"""What a model of each task is scored by, as names: whoever checks settings or writes a page needs them, and neither loads torch."""

from __future__ import annotations

from collections.abc import Mapping

_CLASSES = ("accuracy", "nll", "agreement", "kl_to_teacher")

REPORTED: Mapping[str, tuple[str, ...]] = {
    "text_classification": _CLASSES,
    "multi_label": ("f1", "exact_match", "nll", "agreement", "kl_to_teacher"),
    "regression": ("pearson", "mse", "mae", "mse_to_teacher"),
    "token_classification": ("f1", *_CLASSES),
    "causal_lm": ("perplexity", "bits_per_byte", *_CLASSES),
    "masked_lm": ("perplexity", *_CLASSES),
    "image_classification": _CLASSES,
    "embedding": ("cosine", "mse_to_teacher"),
}
"""By task what `Task.metrics` gives, its headline first."""

OF_TEACHER = frozenset({"agreement", "kl_to_teacher", "cosine", "mse_to_teacher"})
"""Those that need what a teacher said about a row; the others need its label."""


def headline(task: str) -> str:
    """The metric of a task that retention is about."""
    return REPORTED[task][0]
