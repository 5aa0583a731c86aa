"""Which rows belong to which step of a training, over all epochs, and how much of it is done after how many steps."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from distillation import windows
from distillation.batches import EpochPlan, plan_epoch
from distillation.checkpoints import Position
from distillation.config import Mixup, TrainingConfig
from distillation.errors import InputError
from distillation.losses import group_of
from distillation.parts import numbers
from distillation.rows import Rows, Split


class GlobalBatch(NamedTuple):
    """The rows of a step."""

    rows: Rows
    """They are rows of these."""
    numbers: np.ndarray
    """Their numbers. [rows of the batch] int32 or int64"""
    whole: bool
    """Whether they are those of all ranks, or this rank's share."""


class Schedule(ABC):
    """Raises InputError where no row is used."""

    def __init__(self, knots: np.ndarray, training: TrainingConfig) -> None:
        """knots: steps done, rows and tokens seen in them, from 0 on; in between they are taken to rise evenly. [knots, 3] int64"""
        if knots[-1, 1] == 0:
            raise InputError("DST-3302", "no rows to train on", expected="rows that a loss can score", found="none")
        self._knots = knots
        self.total = min(int(knots[-1, 0]), training.steps or int(knots[-1, 0]))
        """Steps of the training."""

    def seen(self, step: int) -> dict[str, float]:
        """Rows and their tokens, without padding, in the first `step` steps of the run, over all epochs and ranks."""
        (s0, *before), (s1, *after) = self._around(step, 0)
        rows, tokens = (low + (step - s0) * (high - low) // (s1 - s0) for low, high in zip(before, after, strict=True))
        return {"train/rows": rows, "train/tokens": tokens}

    def step_of(self, rows: int) -> int:
        """Steps after which at least so many rows were seen; one more than there are where that is never."""
        if rows > self.seen(self.total)["train/rows"]:
            return self.total + 1
        (s0, r0, _), (s1, r1, _) = self._around(rows, 1)
        return s0 - (r0 - rows) * (s1 - s0) // (r1 - r0)  # rounded up

    def _around(self, value: int, column: int) -> tuple[list[int], list[int]]:
        """Two neighbouring knots: below a value, and at or above it."""
        k = int(np.clip(np.searchsorted(self._knots[:, column], value), 1, len(self._knots) - 1))
        return self._knots[k - 1].tolist(), self._knots[k].tolist()

    @abstractmethod
    def locate(self, position: Position) -> Position:
        """The position, moved to the start of the next epoch if its own is done."""

    @abstractmethod
    def batch(self, position: Position) -> GlobalBatch: ...

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what was begun for later steps."""


class WholeSchedule(Schedule):
    """All rows are planned together; holds the plan of the epoch that it was last asked for."""

    def __init__(self, rows: Rows, used: np.ndarray, training: TrainingConfig) -> None:
        self._rows, self._used, self._training = rows, used, training
        self._plan = (-1, EpochPlan(used, np.zeros(1, np.int64)))
        knots = [np.zeros((1, 3), np.int64)]
        for epoch in itertools.count() if training.steps else range(training.epochs or 0):
            if len(used) == 0:
                break
            plan = self._of(epoch)
            tokens = np.cumsum(np.add.reduceat(rows.lengths[plan.rows], plan.bounds[:-1], dtype=np.int64))
            knots.append(knots[-1][-1] + np.stack([np.arange(1, plan.steps + 1), plan.bounds[1:], tokens], axis=1))
            if training.steps and knots[-1][-1, 0] >= training.steps:
                break
        super().__init__(np.concatenate(knots), training)

    def locate(self, position: Position) -> Position:
        done = position.step_in_epoch >= self._of(position.epoch).steps
        return Position(position.step, position.epoch + 1, 0) if done else position

    def batch(self, position: Position) -> GlobalBatch:
        return GlobalBatch(self._rows, self._of(position.epoch).batch(position.step_in_epoch), whole=True)

    def _of(self, epoch: int) -> EpochPlan:
        if self._plan[0] != epoch:
            self._plan = epoch, plan_epoch(self._rows.lengths, self._used, self._training.batch_tokens, self._training.seed, epoch)
        return self._plan[1]


class WindowSchedule(Schedule):
    """Rows are planned window by window, from this rank's parts alone, while the next window's are fetched and opened.

    The steps of a window follow from the tokens of its parts, so batches have `batch_tokens` on average, without padding. How many rows and
    tokens were seen is exact at the ends of windows, and where losses need labels an estimate.
    """

    def __init__(self, split: Split, labelled: bool, training: TrainingConfig, rank: int, world_size: int) -> None:
        self._split, self._labelled, self._training, self._rank, self._world_size = split, labelled, training, rank, world_size
        self._tokens, self._rows = (numbers(split.parts, name) * (split.labelled_share if labelled else 1.0) for name in ("tokens", "rows"))
        knots, seen = [[0, 0, 0]], np.zeros(2)
        for epoch in itertools.count() if training.steps and self._rows.any() else range(training.epochs or 0):
            for window in self._deal(epoch):
                rows, tokens = (float(each[window].sum()) for each in (self._rows, self._tokens))
                seen += rows, tokens
                # Of two rows a batch or more, so that none is empty.
                steps = max(1, min(int(rows / 2), math.ceil(tokens / training.batch_tokens)))
                knots.append([knots[-1][0] + steps, *map(round, seen.tolist())])
            if training.steps and knots[-1][0] >= training.steps:
                break
        super().__init__(np.array(knots, np.int64), training)
        self._each = len(self._deal(0))
        self._number = -1
        self._now: tuple[Rows, EpochPlan] | None = None
        self._next: Future[tuple[Rows, EpochPlan]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="window")

    def locate(self, position: Position) -> Position:
        done = position.step >= self._knots[self._each * (position.epoch + 1), 0]
        return Position(position.step, position.epoch + 1, 0) if done else position

    def batch(self, position: Position) -> GlobalBatch:
        number = int(np.searchsorted(self._knots[:, 0], position.step, side="right")) - 1
        if number != self._number:
            ahead = self._next if number == self._number + 1 else None
            # What failed in the thread is tried once more here.
            self._now = ahead.result() if ahead is not None and ahead.exception() is None else self._open(number)
            self._number, self._next = number, None
        elif self._next is None and self._knots[number + 1, 0] < self.total:  # in the second step: the window before is gone by then
            self._next = self._thread.submit(self._open, number + 1)
        assert self._now is not None
        rows, plan = self._now
        return GlobalBatch(rows, plan.batch(position.step - int(self._knots[number, 0])), whole=False)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _open(self, number: int) -> tuple[Rows, EpochPlan]:
        """The rows of this rank's parts of a window, and which of them belong to its steps. number: of the window, over all epochs."""
        epoch, place = divmod(number, self._each)
        window = self._deal(epoch)[place]
        its = windows.held(window, self._tokens[window], self._rank, self._world_size)
        rows = self._split.open([each.part for each in its])
        used = rows.labelled if self._labelled else np.arange(len(rows), dtype=np.int32)
        steps = int(self._knots[number + 1, 0] - self._knots[number, 0])
        first, blocks = self._split.first, windows.blocks_of(steps, float(self._rows[window].mean()))
        typical = first.lengths[first.labelled] if self._labelled and len(first.labelled) else first.lengths
        plan = windows.plan_window(
            rows.lengths, used, rows.offsets, its, typical, steps=steps, blocks=blocks, seed=self._training.seed, epoch=epoch, number=place
        )  # fmt: skip
        return rows, plan

    def _deal(self, epoch: int) -> list[np.ndarray]:
        return windows.deal(len(self._split.parts), self._training.seed, epoch)


def schedule(
    split: Split, training: TrainingConfig, *, labelled: bool, together: int = 1, rank: int = 0, world_size: int = 1
) -> Schedule:  # fmt: skip
    """Of a training on a split.

    labelled: whether rows without a label are left out. together: see `together_of`; such rows are known only where all rows are planned
    together.
    """
    if len(split.parts) > windows.PARTS and together == 1:
        return WindowSchedule(split, labelled, training, rank, world_size)
    rows = split.whole
    return WholeSchedule(rows, rows.labelled if labelled else np.arange(len(rows), dtype=np.int32), training)


def together_of(losses: Mapping[str, Any], training: TrainingConfig) -> int:
    """Rows that must not be separated when a batch is cut."""
    group = group_of(losses)
    return group * (2 if isinstance(training.augment, Mixup) and group % 2 else 1)


def steps_for(plan: Schedule, share: float) -> tuple[int, int]:
    """The first step after which `share` (above 0, at most 1) of the rows of the whole training were seen, and how many these are."""
    assert 0 < share <= 1, share
    wanted = max(1, math.ceil(share * plan.seen(plan.total)["train/rows"] - 1e-6))  # 0.28 * 50 is a little above 14
    step = plan.step_of(wanted)
    return step, int(plan.seen(step)["train/rows"])
