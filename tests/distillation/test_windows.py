"""The order of a split of many parts: every row once, and the same batches however many workers plan them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from distillation import windows


def dealt(count, seed=0, epoch=0):
    return [window.tolist() for window in windows.deal(count, seed, epoch)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(windows, "PARTS", 4)


# ------------------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("count", [1, 4, 5, 9, 11, 12])
def test_every_part_is_dealt_once_and_keeps_its_seat(four, count):
    first, second = dealt(count), dealt(count, epoch=1)
    for found in (first, second, dealt(count, seed=1)):
        assert sorted(part for window in found for part in window) == list(range(count))
        assert len(found) == -(-count // 4)
        assert max(map(len, found)) <= 4
        for window in found:  # seat i has parts i * windows and so on
            assert [part // len(found) for part in window] == list(range(len(window)))
    if count > 8:
        assert first != second != dealt(count, seed=1) != first


def test_who_holds_what_by_hand():
    # 40, 20, 20 and 80 tokens: of two ranks each has 80, of three 53.3.
    window, tokens = np.array([7, 2, 9, 4]), np.array([40, 20, 20, 80])
    assert windows.held(window, tokens, 0, 1) == [(0, 7, 0, 1), (1, 2, 0, 1), (2, 9, 0, 1), (3, 4, 0, 1)]
    assert windows.held(window, tokens, 0, 2) == [(0, 7, 0, 1), (1, 2, 0, 1), (2, 9, 0, 1)]
    assert windows.held(window, tokens, 1, 2) == [(3, 4, 0, 1)]
    thirds = [windows.held(window, tokens, rank, 3) for rank in range(3)]
    assert [[part for _, part, _, _ in its] for its in thirds] == [[7, 2], [2, 9, 4], [4]]
    assert thirds[0][1][3] == thirds[1][0][2] == pytest.approx(2 / 3)  # 13.3 of 20
    assert thirds[1][2][3] == thirds[2][0][2] == pytest.approx(1 / 3)  # 26.7 of 80


def test_a_worker_reads_the_same_parts_in_every_epoch_but_for_borders():
    parts, tokens = 5000, np.random.default_rng(0).integers(175_000, 185_000, 5000)
    for world_size in (1, 8, 64):
        read = [
            {
                each.part
                for window in windows.deal(parts, 0, epoch)
                for each in windows.held(window, tokens[window], world_size // 2, world_size)
            }
            for epoch in range(3)
        ]
        assert len(read[0]) <= parts / world_size + 2 * 10  # at most two more in each of ten windows
        assert len(read[0] | read[1] | read[2]) <= parts / world_size + 4 * 10
        assert len(read[0] & read[1] & read[2]) >= parts / world_size - 2 * 10


@examples(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(1, 90))
def test_ranks_hold_every_part_once_and_the_same_number_of_tokens(tokens, world_size):
    tokens = np.array(tokens)
    ends = dict.fromkeys(range(len(tokens)), 0.0)
    for rank in range(world_size):
        mine = 0.0
        for seat, part, low, high in windows.held(np.arange(len(tokens)) * 3, tokens, rank, world_size):
            assert part == 3 * seat
            assert low == ends[seat] < high
            ends[seat] = high
            mine += (high - low) * tokens[seat]
        assert mine == pytest.approx(tokens.sum() / world_size, rel=1e-6)
    assert set(ends.values()) == {1.0}


# ------------------------------------------------------------------------------------------------------------------- rows


def planned(parts, steps, rank, world_size, used=None, seed=0, epoch=0, number=0, blocks=None, typical=None):
    """Batches of one rank, as (part, row of the part). parts: lengths of the rows of each."""
    its = windows.held(np.arange(len(parts)), np.array([part.sum() for part in parts]), rank, world_size)
    lengths = np.concatenate([parts[each.part] for each in its])
    offsets = np.cumsum([0] + [len(parts[each.part]) for each in its])
    names = [(each.part, row) for each in its for row in range(len(parts[each.part]))]
    typical = parts[0] if typical is None else typical
    rows = np.array([i for i, name in enumerate(names) if used is None or name in used], np.int64)
    plan = windows.plan_window(
        lengths, rows, offsets, its, typical, steps=steps, blocks=blocks or max(1, steps // 7), seed=seed, epoch=epoch, number=number
    )
    assert plan.steps == steps
    for step in range(steps):
        assert (np.diff(lengths[plan.batch(step)]) >= 0).all()
    return [[names[i] for i in plan.batch(step)] for step in range(steps)]


def whole(parts, steps, world_size, **changes):
    """Batches over all ranks, sorted."""
    each = [planned(parts, steps, rank, world_size, **changes) for rank in range(world_size)]
    return [sorted(joined(its[step] for its in each)) for step in range(steps)]


parts_of_rows = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40).map(lambda x: np.array(x, np.int32)), min_size=1, max_size=8)


@examples(max_examples=60, deadline=None, derandomize=True)
@given(parts_of_rows, st.integers(1, 200), st.integers(2, 11), st.integers(0, 3))
def test_the_batches_are_the_same_for_any_number_of_workers(parts, steps, world_size, seed):
    one = whole(parts, steps, 1, seed=seed)
    assert whole(parts, steps, world_size, seed=seed) == one
    assert sorted(joined(one)) == [(part, row) for part in range(len(parts)) for row in range(len(parts[part]))]


def test_rows_that_are_not_used_are_in_no_batch():
    parts = [np.full(10, 4)] * 3
    used = {(0, 3), (2, 0), (2, 9)}
    for world_size in (1, 2, 5):
        assert set(joined(whole(parts, 2, world_size, used=used))) == used


def test_blocks_by_hand():
    assert [windows.blocks_of(steps, rows) for steps, rows in ((22_500, 8192), (90, 8192), (22_500, 500), (1, 1))] == [4, 1, 1, 1]
    assert windows.blocks_of(640, 10**6) == 10


def test_order_follows_seed_epoch_and_window():
    parts = [np.random.default_rng(i).integers(4, 40, 50) for i in range(3)]
    first = whole(parts, 6, 1)
    assert first == whole(parts, 6, 1)
    assert len({str(each) for each in (first, *(whole(parts, 6, 1, **{name: 1}) for name in ("seed", "epoch", "number")))}) == 4


def sentences(generator, count):
    return np.clip(np.exp(generator.normal(2.75, 0.75, count)), 6, 128).astype(np.int32)


def pieces(generator, count):
    """Of a language model: most of them full."""
    return np.where(generator.random(count) < 0.8, 512, generator.integers(16, 512, count)).astype(np.int32)


@pytest.mark.parametrize(
    ("made", "batch_tokens", "spread", "slowest", "full"),
    [
        (sentences, 4096, 0.03, 1.08, 0.92),
        (sentences, 65536, 0.03, 1.02, 0.92),
        (pieces, 4096, 0.12, 2.0, 0.95),  # 8 rows a batch: two for a worker, or one, or three
        (pieces, 32768, 0.03, 1.15, 0.95),
    ],
)
def test_batches_are_even_over_steps_and_workers_and_little_is_padded(made, batch_tokens, spread, slowest, full):
    """100 parts of 2,048 rows on 4 workers; a batch takes from 0.1 to 30 rows of each part."""
    generator = np.random.default_rng(0)
    parts = [made(generator, 2048) for _ in range(100)]
    steps = -(-sum(int(part.sum()) for part in parts) // batch_tokens)
    tokens, padded = np.zeros((4, steps)), np.zeros((4, steps))
    for rank in range(4):
        for step, batch in enumerate(planned(parts, steps, rank, 4, blocks=windows.blocks_of(steps, 2048))):
            lengths = [int(parts[part][row]) for part, row in batch]
            tokens[rank, step], padded[rank, step] = sum(lengths), max(lengths, default=0) * len(lengths)
    assert tokens.sum(0).min() > 0
    assert tokens.sum(0).std() / tokens.sum(0).mean() < spread
    assert (tokens.max(0) / tokens.mean(0)).mean() < slowest  # a step takes as long as its slowest worker
    assert tokens.sum() / padded.sum() > full
