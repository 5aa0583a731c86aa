"""How sure a score of a split is, and how it compares: rows drawn again with replacement, the same ones for all models.

Legend: n rows, m statistics, k draws. A score is a function of sums over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

Better = Literal["max", "min"]
Score = Callable[[np.ndarray], np.ndarray]
"""From sums [..., m] to the score, [...]."""

DRAWS = 2000
VALUES = 1 << 23
"""Counts of drawn rows that exist at once: 64 MB."""


def redraw(sums: Mapping[str, np.ndarray], seed: int, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Sums over rows drawn with replacement, from each model's [n, m]: the same rows for all, n of them in each draw. [k, m]"""
    sides = list(sums.values())
    joined, rows, generator = np.concatenate(sides, axis=1), len(sides[0]), np.random.default_rng(seed)
    found, some = [], max(1, VALUES // rows)
    for start in range(0, draws, some):
        now = min(some, draws - start)
        # How often each row comes: a multinomial draw, counted instead of drawn row by row because rows are many.
        places = generator.integers(0, rows, (now, rows)) + rows * np.arange(now)[:, None]
        counts = np.bincount(places.ravel(), minlength=now * rows).reshape(now, rows)
        found.append(counts.astype(np.float64) @ joined)
    ends = np.cumsum([side.shape[1] for side in sides])[:-1]
    return dict(zip(sums, np.split(np.concatenate(found), ends, axis=1), strict=True))


def scored(score: Score, sums: np.ndarray) -> np.ndarray:
    """`score`, where nothing to count (0 / 0) is a score of 0. [...]"""
    with np.errstate(all="ignore"):
        return np.asarray(np.nan_to_num(score(sums), nan=0.0, posinf=np.inf, neginf=-np.inf))


def bounds(name: str, samples: np.ndarray) -> dict[str, float]:
    """`name_low` and `name_high`: the 95 % interval by percentiles."""
    method: Any = "linear" if np.isfinite(samples).all() else "nearest"  # there is nothing between a number and infinity
    low, high = np.percentile(samples, [2.5, 97.5], method=method)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def retention(better: Better, model: Any, teacher: Any) -> Any:
    """What a model keeps of its teacher's score (numbers or arrays): its own over that, or that over its own where less is better."""
    return model / teacher if better == "max" else teacher / model


def gain(better: Better, model: Any, baseline: Any) -> Any:
    """Of scores, numbers or arrays: what a model has over its baseline; above 0 is better.

    In points (0.01 of the score); where less is better (perplexity) in percent of the baseline's: 100 * (1 - model / baseline).
    """
    return 100 * (model - baseline) if better == "max" else 100 * (1 - model / baseline)


def compare(
    better: Better, value: Mapping[str, float], samples: Mapping[str, np.ndarray], name: str, teacher: str, baseline: str | None
) -> dict[str, float]:
    """retention and, with a baseline, gain of the model called `name`, each with its paired bootstrap interval.

    value, samples: by model, the score of the split and of the drawn ones [k]. Draws in which the teacher scores nothing are left out.
    """
    kept = samples[teacher] > 0
    result = {"retention": float(retention(better, value[name], value[teacher]))}
    result |= bounds("retention", retention(better, samples[name][kept], samples[teacher][kept]))
    if baseline is not None:
        result["gain"] = float(gain(better, value[name], value[baseline]))
        result |= bounds("gain", gain(better, samples[name], samples[baseline]))
    return result
