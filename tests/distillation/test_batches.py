"""The plan of an epoch: every row once, whatever the number of workers, and within the token budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillation.batches import cut, plan_epoch, share, sorted_batches

lengths_of_rows = st.lists(st.integers(1, 60), min_size=0, max_size=300).map(lambda x: np.array(x, np.int32))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths_of_rows, st.integers(60, 500), st.integers(0, 5), st.integers(0, 3))
def test_every_row_is_planned_once_and_within_the_budget(lengths, budget, seed, epoch):
    plan = plan_epoch(lengths, np.arange(len(lengths)), budget, seed, epoch)
    assert sorted(plan.rows.tolist()) == list(range(len(lengths)))
    for step in range(plan.steps):
        batch = lengths[plan.batch(step)]
        assert len(batch) * batch.max() <= budget
        assert (np.diff(batch) >= 0).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths_of_rows.filter(len), st.integers(1, 16))
def test_shares_of_all_ranks_are_the_batch(lengths, workers):
    rows = np.arange(len(lengths)) * 7
    shares = [share(rows, lengths, rank, workers) for rank in range(workers)]
    assert np.concatenate(shares).tolist() == rows.tolist()


def test_shares_carry_about_the_same_tokens():
    lengths = np.sort(np.random.default_rng(0).integers(5, 60, 128))
    tokens = [lengths[share(np.arange(128), lengths, rank, 4)].sum() for rank in range(4)]
    assert max(tokens) - min(tokens) <= 2 * 60


def test_more_workers_than_rows_leaves_some_idle():
    shares = [share(np.array([4, 9]), np.array([3, 3]), rank, 5).tolist() for rank in range(5)]
    assert sorted(row for share_ in shares for row in share_) == [4, 9]


def test_cut_by_hand():
    # 3 rows of 2 make 6; a fourth of 5 would make 4 * 5 = 20 > 10; 5 + 5 make 2 * 5 = 10; 12 alone is over the budget.
    pieces = cut(np.arange(6), np.array([2, 2, 2, 5, 5, 12]), 10)
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2], [3, 4], [5]]


def test_order_follows_seed_and_epoch_only():
    lengths = np.random.default_rng(0).integers(4, 40, 500)
    one, again = (plan_epoch(lengths, np.arange(500), 400, 3, 1) for _ in range(2))
    assert one.rows.tolist() == again.rows.tolist()
    for seed, epoch in ((3, 2), (4, 1)):
        assert one.rows.tolist() != plan_epoch(lengths, np.arange(500), 400, seed, epoch).rows.tolist()


def test_little_is_padded():
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(2.75, 0.75, 20000)), 6, 128).astype(np.int32)
    plan = plan_epoch(lengths, np.arange(20000), 4096, 0, 0)
    padded = sum(len(b) * lengths[b].max() for b in (plan.batch(i) for i in range(plan.steps)))
    assert lengths.sum() / padded > 0.9


def test_a_subset_of_rows_and_none():
    lengths = np.full(10, 4)
    assert sorted(plan_epoch(lengths, np.array([2, 5, 7]), 8, 0, 0).rows.tolist()) == [2, 5, 7]
    assert plan_epoch(lengths, np.array([], np.int64), 8, 0, 0).steps == 0


@pytest.mark.parametrize("budget", [1, 7, 50])
def test_sorted_batches_hold_every_row(budget):
    lengths = np.random.default_rng(0).integers(1, 20, 77)
    found = sorted_batches(lengths, budget)
    assert sorted(np.concatenate(found).tolist()) == list(range(77))
