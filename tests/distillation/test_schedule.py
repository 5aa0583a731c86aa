"""Steps of a training on a split of many parts: known from its records, the same for any number of workers, stopped and resumed anywhere."""

import contextlib
import gc
import itertools
import json
import traceback
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distillation import fit, store, windows
from distillation.checkpoints import Position
from distillation.config import Balance, Mixup, RelationalDistance, TrainingConfig
from distillation.errors import InputError
from distillation.loop import LocalSession
from distillation.parts import FileRecord
from distillation.rows import Rows, Split
from distillation.schedule import WholeSchedule, WindowSchedule, schedule, steps_for, together_of
from distillation.storage import Storage
from tests.tiny import LOSSES, corpus, rows_of, settings, split_of, targets, teacher
from tests.together import PeerSession, Stopped, together


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(windows, "PARTS", 4)


# --------------------------------------------------------------------------------------------------------------- schedule


class Made(Split):
    """Known from records alone: opening it fails."""

    def __init__(self, rows, tokens, labelled=1.0):
        self.parts = [
            FileRecord(name=f"p{i}", bytes=1, checksum="0", rows=r, tokens=t) for i, (r, t) in enumerate(zip(rows, tokens, strict=True))
        ]
        self._facts, self._split = {"labelled": {"train": labelled * sum(rows)}}, "train"


def test_steps_rows_and_tokens_by_hand(four):
    # Six parts of 10 rows and 100 tokens: two windows of three parts, 300 tokens, 7.5 batches of 40 tokens, so 8.
    plan = schedule(Made([10] * 6, [100] * 6), TrainingConfig(epochs=2, batch_tokens=40), labelled=False)
    assert isinstance(plan, WindowSchedule)
    assert plan.total == 32
    assert [plan.seen(step) for step in (0, 8, 32)] == [
        {"train/rows": rows, "train/tokens": 10 * rows} for rows in (0, 30, 120)
    ]  # fmt: skip
    assert plan.seen(4) == {"train/rows": 15, "train/tokens": 150}
    assert [plan.step_of(rows) for rows in (1, 3, 4, 30, 31, 119, 120, 121)] == [1, 1, 2, 8, 9, 32, 32, 33]
    assert steps_for(plan, 0.5) == (16, 60)
    assert steps_for(plan, 0.26) == (9, 33)  # 31.2 rows, after 8 steps there are 30
    assert plan.locate(Position(15, 0, 15)) == Position(15, 0, 15)
    assert plan.locate(Position(16, 0, 16)) == Position(16, 1, 0)
    some = schedule(Made([10] * 6, [100] * 6), TrainingConfig(steps=20, batch_tokens=40), labelled=False)
    assert (some.total, some.seen(20)["train/rows"], some.step_of(76)) == (20, 75, 21)
    # Where losses need labels: a fifth of rows and tokens; no more steps than rows.
    fifth = schedule(Made([10] * 6, [100] * 6, 0.2), TrainingConfig(epochs=1, batch_tokens=40), labelled=True)
    assert (fifth.total, fifth.seen(fifth.total)) == (4, {"train/rows": 12, "train/tokens": 120})
    few = schedule(Made([5] * 6, [100] * 6), TrainingConfig(epochs=1, batch_tokens=16), labelled=False)
    assert few.total == 14  # two rows of 15 a batch at least, in both windows
    for training in (TrainingConfig(epochs=1), TrainingConfig(steps=5)):
        with pytest.raises(InputError, match="DST-3302"):
            schedule(Made([10] * 6, [100] * 6, 0.0), training, labelled=True)


def test_few_rows_with_a_label_are_not_none(four):
    one = schedule(Made([10] * 12, [100] * 12, 1 / 120), TrainingConfig(epochs=1), labelled=True)
    assert (one.total, one.seen(3)["train/rows"]) == (3, 1)
    four_of_them = schedule(Made([10] * 12, [100] * 12, 4 / 120), TrainingConfig(epochs=2), labelled=True)
    assert four_of_them.seen(four_of_them.total)["train/rows"] == 8


def test_a_billion_rows_are_planned_from_their_records():
    plan = schedule(Made([2**16] * 20_000, [22 << 16] * 20_000), TrainingConfig(epochs=1, batch_tokens=1 << 20), labelled=False)
    assert plan.seen(plan.total) == {"train/rows": 20_000 << 16, "train/tokens": 20_000 * 22 << 16}
    assert plan.total == pytest.approx(27_500, abs=40)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Twelve parts of ten rows, half of them with a label, and three parts to validate on."""
    place, threads = tmp_path_factory.mktemp("world"), torch.get_num_threads()
    torch.set_num_threads(1)
    made = Storage(str(place / "storage"))
    corpus(made, labelled=0.5, part_rows=10)
    teacher(made, place)
    targets(made)
    yield made
    torch.set_num_threads(threads)


def test_few_parts_and_rows_that_belong_together_are_planned_whole(storage, monkeypatch):
    training = TrainingConfig(epochs=1, batch_tokens=128)
    assert isinstance(schedule(split_of(storage), training, labelled=False), WholeSchedule)
    monkeypatch.setattr(windows, "PARTS", 4)
    assert isinstance(schedule(split_of(storage), training, labelled=False), WindowSchedule)
    pairs = {**LOSSES, "pairs": RelationalDistance(type="rkd_distance", group=4)}
    assert [together_of(losses, training) for losses in (LOSSES, pairs)] == [1, 4]
    assert together_of(LOSSES, training.model_copy(update={"augment": Mixup(type="mixup")})) == 2
    assert isinstance(schedule(split_of(storage), training, labelled=False, together=4), WholeSchedule)


def test_some_parts_of_a_split(storage):
    split, all_rows = split_of(storage), rows_of(storage)
    some = split.open([7, 2])
    numbers = [*range(70, 80), *range(20, 30)]
    assert some.ids(np.arange(20)) == all_rows.ids(np.array(numbers))
    assert some.offsets.tolist() == [0, 10, 20]
    mine, theirs = some.batch(np.array([3, 12])), all_rows.batch(np.array([73, 22]))
    assert torch.equal(mine.inputs["input_ids"], theirs.inputs["input_ids"])
    assert torch.equal(mine.signal.logits, theirs.signal.logits)
    assert split.labelled_share == 0.5


def test_targets_cut_into_other_parts_are_refused(storage):
    manifest = store.find(storage, "targets/t")
    first, second, *others = manifest.splits["train"]
    swapped = (first.model_copy(update={"rows": 9}), second.model_copy(update={"rows": 11}), *others)
    store.commit(storage, "targets/moved", manifest.model_copy(update={"splits": {**manifest.splits, "train": swapped}}))
    with pytest.raises(InputError, match="DST-3110"):
        Split(storage, "corpora/c", {"teacher": "targets/moved"}, "train", split_of(storage).task)


def test_two_windows_are_held_at_most_and_what_failed_in_the_thread_is_tried_again(storage, four, monkeypatch):
    plan = schedule(split_of(storage), TrainingConfig(epochs=2, batch_tokens=128), labelled=False)
    opened, alive, failures, whole = [], weakref.WeakSet(), [OSError("the disk was away for a moment")], Split.open

    def opening(self, parts=None):
        opened.append(parts)
        if len(opened) == 2 and failures:
            raise failures.pop()
        rows = whole(self, parts)
        alive.add(rows)
        return rows

    monkeypatch.setattr(Split, "open", opening)
    seen = 0
    for step in range(plan.total):
        batch = plan.batch(plan.locate(Position(step, step // (plan.total // 2), step)))
        seen += len(batch.numbers)
        gc.collect()
        assert len(alive) <= 2
    assert seen == 240
    assert not failures
    assert len(opened) == 7
    assert opened[1] == opened[2]
    plan.close()


# --------------------------------------------------------------------------------------------------------------- training


def plan(**changes):
    base = {"epochs": 2, "batch_tokens": 128, "learning_rate": 3e-4, "log_every": 1, "checkpoint_every": 4, "precision": "fp32"}
    return TrainingConfig(**{**base, **changes})


def noted(parts, folder, config, shards, stop):
    """In a process of a group: train with windows of so many parts, and note the rows read in every step and the parts opened."""
    from distillation.config import FitConfig

    windows.PARTS = parts
    session, notes, batch, opened = PeerSession(shards, stop), {"rows": {}, "parts": []}, Rows.batch, Split.open

    def noting(self, rows):
        if not any(frame.name == "evaluate" for frame in traceback.extract_stack()):
            notes["rows"].setdefault(len([m for _, m in session.history if "train/loss" in m]), []).extend(self.ids(rows))
        return batch(self, rows)

    def opening(self, its=None):
        notes["parts"].append([self._split, None if its is None else list(its)])
        return opened(self, its)

    Rows.batch, Split.open = noting, opening
    result = None
    with contextlib.suppress(Stopped):
        result = fit.train(FitConfig.model_validate_json(config), session, {})
    told = {"result": result, "history": session.history, **notes}
    (folder / f"told-{session.rank}.json").write_text(json.dumps(told))


def trained(storage, folder, name, count, *, shards=1, stop=None, parts=4, **changes):
    """What each process told, and the weights."""
    config = settings(storage, name, **{"training": plan(), "losses": BALANCED, **changes})
    together(folder, count, noted, parts, folder, config.model_dump_json(), shards, stop)
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(count)]


BALANCED = {**LOSSES, "soft": LOSSES["soft"].model_copy(update={"balance": Balance(to="hard", every=7)})}


def losses(told):
    return [(step, metrics["train/loss"]) for step, metrics in told["history"] if "train/loss" in metrics]


def weights(storage, name):
    return load_file(fit.model_folder(storage, f"students/{name}") / "model.safetensors")


def read_in(told, epoch_steps):
    """Ids of the rows that all processes read in each step."""
    return [sorted(set(joined(each["rows"].get(str(step), []) for each in told))) for step in range(epoch_steps)]


@pytest.fixture(scope="module")
def alone(storage, tmp_path_factory):
    return trained(storage, tmp_path_factory.mktemp("runs") / "alone", "alone", 1)[0]


def test_one_process_sees_every_row_once_an_epoch(storage, alone):
    total = alone["result"]["steps"]
    counts = [m["train/rows"] for _, m in alone["history"] if "train/loss" in m]
    assert counts[total // 2 - 1 : total : total // 2] == [120, 240]
    steps = read_in([alone], total)
    ids = rows_of(storage).ids(np.arange(120))
    assert sorted(joined(steps[: total // 2])) == sorted(joined(steps[total // 2 :])) == sorted(ids)
    opened = [parts for split, parts in alone["parts"] if split == "train"]
    assert len(opened) == 6
    assert sorted(joined(opened[:3])) == list(range(12))
    lengths = dict(zip(ids, rows_of(storage).lengths.tolist(), strict=True))
    tokens = [m["train/tokens"] for _, m in alone["history"] if "train/loss" in m]
    assert tokens[-1] == 2 * sum(lengths.values())


@pytest.mark.parametrize(("count", "shards"), [(3, 1), (2, None), (4, 2)])
def test_the_number_of_workers_changes_nothing(storage, tmp_path, alone, count, shards):
    name = f"by-{count}"
    told = trained(storage, tmp_path / "run", name, count, shards=shards)
    assert [loss for _, loss in losses(told[0])] == pytest.approx([loss for _, loss in losses(alone)], rel=1e-5)
    for metric in ("train/rows", "train/tokens", "train/weight/soft"):
        mine, its = ([m[metric] for _, m in each["history"] if "train/loss" in m] for each in (told[0], alone))
        assert mine == pytest.approx(its, rel=1e-4)
    names = [key for key in alone["result"] if key.startswith("validation/")]
    assert [told[0]["result"][key] for key in names] == pytest.approx([alone["result"][key] for key in names], rel=1e-4)
    for key, value in weights(storage, "alone").items():
        if not key.endswith("key.bias"):  # has no influence, so its gradient is rounding noise that Adam scales up
            assert torch.allclose(weights(storage, name)[key], value, atol=1e-4), key
    # Each reads its own parts, and those at a border with a neighbour.
    total = alone["result"]["steps"]
    if shards == 1:
        assert read_in(told, total) == read_in([alone], total)
    for each in told:
        opened = [set(parts) for split, parts in each["parts"] if split == "train"]
        assert max(map(len, opened)) <= 4 // count + 2
        assert len(set().union(*opened)) < 12


def test_a_run_goes_on_in_the_middle_of_a_window_with_other_workers(storage, tmp_path, alone):
    trained(storage, tmp_path / "1", "moved", 2, stop=14)
    told = trained(storage, tmp_path / "2", "moved", 3)
    assert told[0]["result"]["resumed_at"] == 12
    assert [loss for _, loss in losses(told[0])] == pytest.approx([loss for _, loss in losses(alone)], rel=1e-5)


def test_losses_that_need_labels_see_those_rows_alone(storage, tmp_path):
    hard = {"hard": LOSSES["hard"]}
    one, two = (trained(storage, tmp_path / f"{n}", f"hard-{n}", n, losses=hard, training=plan(epochs=1)) for n in (1, 2))
    labelled = rows_of(storage).ids(rows_of(storage).labelled)
    total = one[0]["result"]["steps"]
    assert sorted(joined(read_in(one, total))) == sorted(labelled)
    assert [loss for _, loss in losses(two[0])] == pytest.approx([loss for _, loss in losses(one[0])], rel=1e-5)


def test_more_workers_that_hold_one_model_than_parts_to_validate_on(storage, tmp_path, alone):
    told = trained(storage, tmp_path / "run", "crowd", 4, shards=2, parts=2, training=plan(epochs=1))
    assert {parts is None for split, parts in told[3]["parts"] if split == "validation"} == {True}


def test_of_many_parts_to_validate_on_each_worker_scores_its_own(storage, tmp_path, alone):
    told = trained(storage, tmp_path / "run", "scored", 2, parts=2)
    assert [[parts for split, parts in each["parts"] if split == "validation"] for each in told] == [[[0, 2]], [[1]]]
    fresh = LocalSession()
    scored = fit.train(settings(storage, "scored", training=plan()), fresh, {})  # it is there: what was told is told again
    whole = trained(storage, tmp_path / "whole", "scored-whole", 1, parts=2)[0]["result"]
    names = [key for key in whole if key.startswith("validation/")]
    assert [scored[key] for key in names] == pytest.approx([whole[key] for key in names], rel=1e-4)
