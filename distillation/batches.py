"""The order of the data: a function of (seed, epoch), never of the machine. numpy only.

Global batches are planned first and then cut into shares for the ranks, so a run can stop anywhere and go on with any number of workers,
and every row is seen exactly once an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW_BATCHES = 64
"""Batches whose rows are sorted by length together. Larger: less padding; smaller: batches closer to a random draw."""


@dataclass(frozen=True)
class EpochPlan:
    """Global batches of one epoch."""

    rows: np.ndarray
    """Row numbers, batch after batch; within a batch by rising length. [rows] int32, or int64 where that is too small"""
    bounds: np.ndarray
    """Batch i is rows[bounds[i]:bounds[i + 1]]. [steps + 1] int64"""

    @property
    def steps(self) -> int:
        return len(self.bounds) - 1

    def batch(self, step: int) -> np.ndarray:
        return self.rows[self.bounds[step] : self.bounds[step + 1]]


def plan_epoch(lengths: np.ndarray, rows: np.ndarray, batch_tokens: int, seed: int, epoch: int) -> EpochPlan:
    """Shuffle `rows`, sort them by length inside windows, cut by padded tokens, shuffle the batches.

    lengths: tokens of every row of the split, [all rows]. rows: the row numbers to use. A batch of n rows whose longest has m tokens
    counts n * m <= batch_tokens; a single longer row is a batch of its own.
    """
    generator = np.random.default_rng([seed, epoch])
    # Row numbers of four bytes where they are enough: of a large corpus they are most of what a worker holds. The order is the same.
    shuffled = generator.permutation(rows.astype(np.int32) if len(lengths) < 2**31 else rows)
    mean = float(lengths[rows].mean()) if len(rows) else 1.0
    window = max(1, int(WINDOW_BATCHES * batch_tokens / mean))
    batches: list[np.ndarray] = []
    for start in range(0, len(shuffled), window):
        block = shuffled[start : start + window]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches.extend(cut(block, lengths[block], batch_tokens))
    order = generator.permutation(len(batches))
    chosen = [batches[i] for i in order]
    bounds = np.cumsum([0] + [len(batch) for batch in chosen])
    return EpochPlan(np.concatenate(chosen) if chosen else np.zeros(0, np.int64), bounds)


def cut(rows: np.ndarray, lengths: np.ndarray, batch_tokens: int, group: int = 1) -> list[np.ndarray]:
    """Cut rows of rising length into runs of at most batch_tokens padded tokens, a multiple of `group` rows. lengths: of these rows.

    A run of one group may have more tokens; the last one is what is left over.
    """
    pieces, start = [], 0
    while start < len(rows):
        most = max(1, int(batch_tokens // max(1, lengths[start])))
        padded = lengths[start : start + most] * np.arange(1, min(most, len(rows) - start) + 1)
        take = max(1, int(np.searchsorted(padded, batch_tokens, side="right")) // group) * group
        pieces.append(rows[start : start + take])
        start += take
    return pieces


def share(rows: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, group: int = 1) -> np.ndarray:
    """Rows of a global batch that one rank computes: consecutive ones in whole groups, about the same number of tokens for every rank.

    lengths: of these rows. The shares of all ranks are the batch, each row once; a share is empty where there are too few rows.
    """
    total = np.cumsum(lengths)
    ends = np.searchsorted(total, total[-1] * np.arange(1, world_size) / world_size, side="left") + 1
    ends = -(-ends // group) * group
    bounds = np.concatenate([[0], np.minimum(ends, len(rows)), [len(rows)]])
    return rows[bounds[rank] : bounds[rank + 1]]


def sorted_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """All rows by rising length, cut by padded tokens: for inference, where the order does not matter."""
    order = np.argsort(lengths, kind="stable")
    return cut(order, lengths[order], batch_tokens)
