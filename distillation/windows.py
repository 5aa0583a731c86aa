"""The order of a split of many parts: windows of whole parts, so that what a worker reads, plans and holds does not grow with the rows.

`batches.plan_epoch` looks at every row before the first step. A split of more than `PARTS` parts is planned window by window instead. Every
part has a seat; in each window a seat gives one of its parts, in an order that follows from (seed, epoch). A batch takes its share of the
tokens of every part of the window, rows of about one length. So a worker that has some of the seats knows its rows of every batch from
these parts alone, and reads the same parts in every epoch. The batches are the same for any number of workers. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distillation.batches import WINDOW_BATCHES, EpochPlan

PARTS = 512
"""Most parts of a window, of 4 M rows at least. More: more workers that read parts of their own; fewer: less that one worker holds."""

BLOCK_ROWS = 2048
"""Rows of a part that are sorted by length together, at least, if it has them: of fewer the batches would take too unlike ones."""

PHASES = (0.7548776662466927, 0.5698402909980532)
"""Multiples of these, modulo 1, are spread evenly over a square however many there are (Roberts' R2): parts take turns at giving a row."""


class Held(NamedTuple):
    """What a rank has of a part of a window: all of it, or at the border to another rank's the rows at `low` up to `high`, in [0, 1]."""

    seat: int
    part: int
    low: float
    high: float


def deal(parts: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Numbers of the parts of each window of an epoch, by seat. Windows are of equal size, but for the parts that the last seat lacks."""
    windows = -(-parts // PARTS)
    seats = -(-parts // windows)
    order = np.random.default_rng([seed, epoch]).permuted(np.tile(np.arange(windows), (seats, 1)), axis=1)
    dealt = order + windows * np.arange(seats)[:, None]
    return [window[window < parts] for window in dealt.T]


def held(window: np.ndarray, tokens: np.ndarray, rank: int, world_size: int) -> list[Held]:
    """Parts of a window that a rank reads; over all ranks each is held once, and every rank has about the same number of tokens.

    tokens: of each part of the window, [parts].
    """
    bounds = np.concatenate([[0.0], np.cumsum(tokens) / tokens.sum() * world_size])
    bounds[-1] = world_size
    found = []
    for seat in np.flatnonzero((bounds[:-1] < rank + 1) & (bounds[1:] > rank)):
        start, width = bounds[seat], bounds[seat + 1] - bounds[seat]
        low, high = max(0.0, (rank - start) / width), min(1.0, (rank + 1 - start) / width)
        found.append(Held(int(seat), int(window[seat]), float(low), float(high)))
    return found


def blocks_of(steps: int, rows: float) -> int:
    """Into how many blocks the batches of a window are divided; the rows of a block are sorted by length. rows: of a part, on average."""
    return max(1, min(round(steps / WINDOW_BATCHES), int(rows // BLOCK_ROWS)))


def plan_window(
    lengths: np.ndarray, used: np.ndarray, offsets: np.ndarray, its: Sequence[Held], typical: np.ndarray,
    *, steps: int, blocks: int, seed: int, epoch: int, number: int,
) -> EpochPlan:  # fmt: skip
    """One rank's rows in each of the `steps` batches of a window, within a batch by rising length; some batches may have none of them.

    lengths: tokens of every row of the parts that it holds, one part after the other, [rows]. used: numbers of the rows to use, rising.
    offsets: first row of each part, and the end, [parts + 1]. typical: tokens of a sample of the split's rows, the same for all ranks,
    [any number from 1 on]. blocks: see `blocks_of`. number: of the window in the epoch.
    """
    edges = np.linspace(0, steps, blocks + 1).round().astype(np.int64)
    widths = np.diff(edges)
    # What share of the tokens is in the shortest share of the rows: all parts are cut by one curve, or else chance would fill the batches.
    shares = np.concatenate([[0.0], np.cumsum(np.sort(typical), dtype=np.float64)])
    shares, ranks = shares / shares[-1], np.linspace(0, 1, len(shares))
    rows, batches = [np.zeros(0, used.dtype)], [np.zeros(0, np.int64)]
    for part, (start, end) in zip(its, np.searchsorted(used, np.stack([offsets[:-1], offsets[1:]], axis=1)), strict=True):
        count, (early, late) = int(end - start), [(part.seat * each) % 1 for each in PHASES]
        if count == 0:
            continue
        shuffled = np.random.default_rng([seed, epoch, part.part]).permutation(used[start:end])
        block = np.minimum(((np.arange(count) + early) * blocks / count).astype(np.int64), blocks - 1)
        shuffled = shuffled[np.lexsort((lengths[shuffled], block))]
        sizes = np.bincount(block, minlength=blocks)
        rank = (np.arange(count) - (np.cumsum(sizes) - sizes)[block] + late) / sizes[block]
        place = np.interp(rank, ranks, shares)
        batch = edges[block] + np.minimum((place * widths[block]).astype(np.int64), widths[block] - 1)
        turn = np.arange(count) * PHASES[0] % 1
        mine = (turn >= part.low) & (turn < part.high)
        rows.append(shuffled[mine])
        batches.append(batch[mine])
    found, batch = np.concatenate(rows), np.random.default_rng([seed, epoch, number, 1]).permutation(steps)[np.concatenate(batches)]
    order = np.lexsort((lengths[found], batch))
    return EpochPlan(found[order], np.searchsorted(batch[order], np.arange(steps + 1)))
