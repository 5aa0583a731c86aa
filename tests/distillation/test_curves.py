"""What a point of a learning curve carries, when there is one, and the budget of a trial."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distillation import curves, fit, store
from distillation.batches import plan_epoch
from distillation.config import Features, JensenShannon, PatientKD, TargetsConfig, TrainingConfig, only_labels
from distillation.errors import InputError
from distillation.loop import LocalSession
from distillation.schedule import WholeSchedule, schedule, steps_for
from tests.tiny import LOSSES, rows_of, settings, split_of, world


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield world(tmp_path_factory.mktemp("world"), labelled=0.5, config=TargetsConfig(features=Features(layers=(1, 3))))
    torch.set_num_threads(threads)


def plan(**changes):
    base = {"epochs": 3, "batch_tokens": 256, "learning_rate": 3e-3, "log_every": 1, "checkpoint_every": 0, "precision": "fp32"}
    return TrainingConfig(**{**base, **changes})


class Stopped(Exception):
    pass


class StoppingSession(LocalSession):
    """Dies right after it reported a step, as a killed process would."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def report(self, metrics, step):
        super().report(metrics, step)
        if step == self._step:
            raise Stopped


def history(storage, name, session=None, **changes):
    session = session or LocalSession()
    fit.train(settings(storage, name, **changes), session, {})
    return session.history


def column(points, name):
    return [(step, metrics[name]) for step, metrics in points if name in metrics]


def scores(points):
    return [step for step, metrics in points if "validation/accuracy" in metrics]


# --------------------------------------------------------------------------------------------------------- rows and tokens


def test_points_say_rows_and_tokens_seen_since_the_start(storage):
    lengths = rows_of(storage).lengths
    points = history(storage, "seen", training=plan(evaluate_every=5))
    rows, tokens = 0, 0
    expected = []
    for epoch in range(3):
        epoch_plan = plan_epoch(lengths, np.arange(120), 256, 0, epoch)
        for i in range(epoch_plan.steps):
            rows, tokens = rows + len(epoch_plan.batch(i)), tokens + int(lengths[epoch_plan.batch(i)].sum())
            expected.append((len(expected) + 1, (rows, tokens)))
    train = [(step, (m["train/rows"], m["train/tokens"])) for step, m in points if "train/loss" in m]
    assert train == expected
    assert train[-1][1] == (3 * 120, 3 * lengths.sum())
    scored = [(step, (m["train/rows"], m["train/tokens"])) for step, m in points if "validation/accuracy" in m]
    assert scored == [(step, seen) for step, seen in expected if step % 5 == 0 or step == len(expected)]


def test_rows_go_on_where_a_run_was_stopped_in_mid_epoch(storage):
    whole = history(storage, "rows-whole", training=plan(checkpoint_every=4, log_every=3))
    with pytest.raises(Stopped):
        history(storage, "rows-cut", StoppingSession(12), training=plan(checkpoint_every=4, log_every=3))
    resumed = history(storage, "rows-cut", training=plan(checkpoint_every=4, log_every=3))
    for name in ("train/rows", "train/tokens", "train/gradient/soft"):
        assert column(resumed, name) == column(whole, name)


# ------------------------------------------------------------------------------------------------------ gradients of terms


def test_gradients_of_terms_are_those_of_the_step_however_it_is_cut(storage):
    losses = {**LOSSES, "mixed": JensenShannon(type="jsd", beta=0.3), "inner": PatientKD(type="pkd", layers={0: 1})}
    whole = history(storage, "pull", losses=losses, training=plan(steps=5, epochs=None))
    pieces = history(storage, "pull-cut", losses=losses, training=plan(steps=5, epochs=None, microbatch_tokens=40))
    for name in losses:
        mine, its = column(pieces, f"train/gradient/{name}"), column(whole, f"train/gradient/{name}")
        assert [step for step, _ in mine] == [1, 2, 3, 4, 5]
        assert [value for _, value in mine] == pytest.approx([value for _, value in its], rel=1e-4)
        assert min(value for _, value in mine) > 0
    # The first step, from the start again: a term's weight and nothing else scales its gradient.
    twice = {**losses, "soft": LOSSES["soft"].model_copy(update={"weight": 1.4})}
    other = history(storage, "pull-twice", losses=twice, training=plan(steps=1, epochs=None))[0][1]
    assert other["train/gradient/soft"] == pytest.approx(2 * whole[0][1]["train/gradient/soft"])
    assert other["train/gradient/hard"] == whole[0][1]["train/gradient/hard"]


def test_looking_changes_nothing(storage):
    often, seldom = (history(storage, f"look-{every}", training=plan(log_every=every, dropout=0.1)) for every in (1, 1000))
    assert len(column(often, "train/gradient/soft")) > len(column(seldom, "train/gradient/soft")) == 1
    assert [m for _, m in often if "validation/nll" in m] == [m for _, m in seldom if "validation/nll" in m]
    one, other = (load_file(fit.model_folder(storage, f"students/look-{every}") / "model.safetensors") for every in (1, 1000))
    assert all(torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------------------------------------------- rungs and trials


def test_rungs_are_scored_at_the_first_step_that_reaches_them(storage):
    rows = dict(column(history(storage, "every"), "train/rows"))
    last, total = max(rows), 360
    rungs = (rows[4], rows[4] + 1, rows[9] - 1, rows[9], total + 1)
    points = history(storage, "rungs", training=plan(log_every=1000), rungs=rungs)
    assert scores(points) == [4, 5, 9, last]
    assert [step for step, _ in column(points, "train/loss")] == [4, 5, 9, last]
    for step in (4, 5, 9, last):  # first what was trained, then how good it is
        train, score = [metrics for at, metrics in points if at == step]
        assert "train/loss" in train
        assert train["train/rows"] == score["train/rows"] == rows[step]
    both = history(storage, "rungs-and-every", training=plan(evaluate_every=9), rungs=(rows[9], total))
    assert scores(both) == [*range(9, last, 9), last]


def test_rungs_are_the_same_after_a_resume(storage):
    rungs = (50, 100, 150, 300)
    steps = scores(history(storage, "rungs-whole", rungs=rungs, training=plan(checkpoint_every=5)))
    assert len(steps) == 5
    with pytest.raises(Stopped):
        history(storage, "rungs-cut", StoppingSession(8), rungs=rungs, training=plan(checkpoint_every=5))
    assert scores(history(storage, "rungs-cut", rungs=rungs, training=plan(checkpoint_every=5))) == steps


def test_a_trial_gives_its_numbers_and_keeps_its_checkpoints_only(storage):
    training = plan(checkpoint_every=7)
    kept = fit.train(settings(storage, "kept", training=training), LocalSession(), {})
    trial = settings(storage, "trial", training=training, keep_model=False)
    found = fit.train(trial, LocalSession(), {})
    assert {**found, "seconds": 0} == {**kept, "seconds": 0}
    assert store.find(storage, "students/trial") is None
    assert storage.list("students/trial.checkpoints") == ["step-00000007", "step-00000014"]
    again = LocalSession()
    assert fit.train(trial, again, {})["resumed_at"] == 14
    assert again.history[-1][1]["validation/nll"] == kept["validation/nll"]
    fit.discard_checkpoints(storage, trial.output)
    assert storage.list("students/trial.checkpoints") == []
    fit.discard_checkpoints(storage, trial.output)


def test_a_trial_does_not_look_for_a_model(storage):
    config = settings(storage, "there")
    fit.train(config, LocalSession(), {})
    session = LocalSession()
    fit.train(config.model_copy(update={"keep_model": False}), session, {})
    assert session.history


# ------------------------------------------------------------------------------------------------------------ the budget


def test_steps_for_a_share_by_hand():
    # Ten rows of 8 tokens, 16 tokens a batch: two rows a step, five steps an epoch, twenty rows in two epochs.
    rows, two = SimpleNamespace(lengths=np.full(10, 8)), TrainingConfig(epochs=2, batch_tokens=16)

    def found(share, used=range(10), training=two):
        return steps_for(WholeSchedule(rows, np.array(used, np.int64), training), share)

    assert found(1.0) == (10, 20)
    assert found(0.5) == (5, 10)
    assert found(0.51) == (6, 12)
    assert found(0.3) == (3, 6)
    assert found(1e-9) == (1, 2)
    # Losses that need labels see the labelled rows only: three of them, two steps an epoch.
    assert found(1.0, used=(0, 4, 7)) == (4, 6)
    seven = two.model_copy(update={"epochs": None, "steps": 7})
    assert found(1.0, training=seven) == (7, 14)
    assert found(0.75, training=seven) == (6, 12)
    many = two.model_copy(update={"epochs": None, "steps": 25})
    assert found(0.28, training=many) == (7, 14)  # in floating point 0.28 * 50 is more than 14
    with pytest.raises(InputError, match="DST-3302"):
        found(1.0, used=())
    with pytest.raises(InputError, match="DST-3302"):
        found(1.0, used=(), training=seven)


@pytest.mark.parametrize("losses", [LOSSES, {"hard": LOSSES["hard"]}])
def test_a_training_of_so_many_steps_sees_so_many_rows(storage, losses):
    split = split_of(storage)
    whole = 3 * (120 if len(losses) == 2 else 60)
    for share in (0.2, 0.45, 1.0):
        steps, seen = steps_for(schedule(split, plan(), labelled=only_labels(losses)), share)
        training = plan(epochs=None, steps=steps)
        found = dict(column(history(storage, f"share-{share}", losses=losses, training=training, keep_model=False), "train/rows"))
        assert max(found) == steps
        assert found[steps - 1] < share * whole <= found[steps] == seen
    assert steps_for(schedule(split, plan(), labelled=only_labels(losses)), 1.0)[0] == steps


def test_the_curve_of_a_finished_model_is_a_file_of_its_own(storage):
    points = history(storage, "kept-apart")
    manifest = store.find(storage, "students/kept-apart")
    assert "history" not in manifest.facts
    assert curves.read(storage, "students/kept-apart", manifest) == points
    assert history(storage, "kept-apart") == points, "a run that is finished reports its curve again"
    old = manifest.model_copy(update={"files": (), "facts": {"history": [[1, {"train/loss": 2.0}]]}})
    assert curves.read(storage, "students/kept-apart", old) == [[1, {"train/loss": 2.0}]]
    storage.write("students/kept-apart/history.json", b"[]")
    with pytest.raises(InputError, match=r"DST-3106.*history.json"):
        curves.read(storage, "students/kept-apart", manifest)
