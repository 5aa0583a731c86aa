"""What embeddings are good for: which rows lie near each other, and what a linear layer reads from them.

Legend: n rows, H width (models may differ in it). Vectors are [n, H] fp32, labels [n] with -1 where a row has none.
"""

from __future__ import annotations

import warnings

import numpy as np

MOST = 10_000
"""Rows that are compared with each other; more are drawn from, by seed."""
BLOCK = 1 << 22
"""Similarities that exist at once: 16 MB."""


def chosen_rows(count: int, seed: int) -> np.ndarray:
    """Numbers of the rows that are compared, rising: all, or `MOST` of them."""
    return np.arange(count) if count <= MOST else np.sort(np.random.default_rng(seed).permutation(count)[:MOST])


def nearest(vectors: np.ndarray) -> np.ndarray:
    """The row nearest to each row by cosine, other than itself; of equally near ones the first. [n]"""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found, some = np.zeros(len(unit), np.int64), max(1, BLOCK // max(1, len(unit)))
    for start in range(0, len(unit), some):
        near = unit[start : start + some] @ unit.T
        near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf
        found[start : start + some] = near.argmax(axis=1)
    return found


def recall(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the row nearest to each one has the same label. All rows are labelled. [n] bool"""
    return np.asarray(labels[nearest(vectors)] == labels)


def cosine(vectors: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Of each row's two vectors, which are equally wide. [n] fp64"""
    mine, its = vectors.astype(np.float64), teacher.astype(np.float64)
    return np.asarray((mine * its).sum(1) / np.maximum(np.linalg.norm(mine, axis=1) * np.linalg.norm(its, axis=1), 1e-12))


def probe(vectors: np.ndarray, labels: np.ndarray, seed: int) -> float | None:
    """Accuracy of a logistic regression, fitted on one half of the labelled rows and scored on the other. None where a half has one label."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    if len(np.unique(labels[train])) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that could still be a little better compares all the same
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(vectors[train], labels[train])
    return float(fitted.score(vectors[test], labels[test]))
