"""A balanced term pulls as hard as its weight says beside another one, however a step is cut and wherever a run was stopped."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from distillation import fit
from distillation.balance import MOST, balanced, due, measured, to_measure
from distillation.config import Balance, CrossEntropy, ForwardKL, HiddenMSE, TargetsConfig, TrainingConfig
from distillation.config import Features as Inner
from distillation.loop import LocalSession
from tests.tiny import settings, world

HARD = CrossEntropy(type="cross_entropy", weight=0.3)
SOFT = ForwardKL(type="forward_kl", weight=0.5, balance=Balance(to="hard", every=4))
INNER = HiddenMSE(type="hidden_mse", weight=2.0, layers={0: 1}, balance=Balance(to="hard", every=6))
LOSSES = {"hard": HARD, "soft": SOFT, "inner": INNER}


def test_factors_by_hand():
    assert [due(LOSSES, step) for step in (0, 4, 5, 6, 12)] == [["soft", "inner"], ["soft"], [], ["inner"], ["soft", "inner"]]
    terms = to_measure(LOSSES, ["soft"])
    assert {name: term.weight for name, term in terms.items()} == {"hard": 0.3, "soft": 1.0}
    counts = {"hard": 3, "soft": 5}
    # Norms 6 and 1.5: four times the soft term is as large as the hard one.
    assert measured(LOSSES, ["soft"], {"hard": 36.0, "soft": 2.25}, counts, {}) == {"soft": 4.0}
    assert balanced(LOSSES, {"soft": 4.0, "inner": 0.25})["soft"].weight == 2.0
    assert balanced(LOSSES, {"soft": 4.0, "inner": 0.25})["inner"].weight == 0.5
    assert balanced(LOSSES, {"soft": 4.0, "inner": 0.25})["hard"] is HARD
    # Nothing to go by: no label in the step, no gradient of its own.
    assert measured(LOSSES, ["soft"], {"hard": 0.0, "soft": 2.25}, {"hard": 0, "soft": 5}, {"soft": 7.0}) == {"soft": 7.0}
    assert measured(LOSSES, ["soft"], {"hard": 4.0, "soft": 0.0}, counts, {}) == {"soft": 1.0}
    assert measured(LOSSES, ["soft"], {"hard": 0.0, "soft": 2.25}, counts, {"soft": 7.0}) == {
        "soft": 0.0
    }  # hard itself counts for nothing now
    assert measured(LOSSES, ["soft"], {"hard": 4.0, "soft": 1e-12}, counts, {}) == {"soft": MOST}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return world(tmp_path_factory.mktemp("world"), labelled=0.6, config=TargetsConfig(features=Inner(layers=(1,), dtype="float32")))


def trained(storage, name, session=None, losses=LOSSES, **changes):
    session = session or LocalSession()
    plan = {"epochs": 2, "batch_tokens": 256, "learning_rate": 3e-3, "log_every": 1, "checkpoint_every": 0, "precision": "fp32"}
    fit.train(settings(storage, name, losses=losses, training=TrainingConfig(**{**plan, **changes})), session, {})
    points = [metrics for _, metrics in session.history if "train/loss" in metrics]
    return points, load_file(fit.model_folder(storage, f"students/{name}") / "model.safetensors")


@pytest.fixture(scope="module")
def whole(storage):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every test here, see conftest.py
    found = trained(storage, "whole", checkpoint_every=5)
    torch.set_num_threads(threads)
    return found


def test_where_it_is_measured_the_gradients_have_this_ratio(whole):
    points, _ = whole
    assert len(points) > 13
    for step, point in enumerate(points):
        ratios = {name: point[f"train/gradient/{name}"] / point["train/gradient/hard"] for name in ("soft", "inner")}
        if step % 4 == 0:
            assert ratios["soft"] == pytest.approx(0.5, rel=1e-4)
        else:
            assert point["train/weight/soft"] == points[step - 1]["train/weight/soft"]
        if step % 6 == 0:
            assert ratios["inner"] == pytest.approx(2.0, rel=1e-4)
        assert point["train/weighted/soft"] == pytest.approx(point["train/weight/soft"] * point["train/loss/soft"])
        assert "train/weight/hard" not in point
    assert len({point["train/weight/soft"] for point in points}) == math.ceil(len(points) / 4)


def test_the_cut_into_microbatches_changes_nothing(storage, whole):
    points, _ = trained(storage, "pieces", microbatch_tokens=40)
    for name in ("train/weight/soft", "train/weight/inner", "train/loss"):
        assert [point[name] for point in points] == pytest.approx([point[name] for point in whole[0]], rel=1e-3)
    assert points[0]["train/weight/soft"] == pytest.approx(whole[0][0]["train/weight/soft"], rel=1e-5)


class Stopped(Exception):
    pass


class Stopping(LocalSession):
    def report(self, metrics, step):
        super().report(metrics, step)
        if step == 6:
            raise Stopped


def test_a_run_goes_on_with_the_weights_it_had(storage, whole):
    with pytest.raises(Stopped):
        trained(storage, "cut", Stopping(), checkpoint_every=5)  # between two measurements
    points, weights = trained(storage, "cut", checkpoint_every=5)
    assert [point["train/weight/soft"] for point in points] == [point["train/weight/soft"] for point in whole[0]]
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())


def test_looking_does_not_change_what_is_drawn(storage):
    """Dropout of a step is the same with and without a measurement before it."""
    fixed = {"hard": HARD, "soft": SOFT.model_copy(update={"balance": None})}
    plain, _ = trained(storage, "fixed", losses=fixed, steps=1, epochs=None, dropout=0.1)
    looked, _ = trained(storage, "looked", losses={"hard": HARD, "soft": SOFT}, steps=1, epochs=None, dropout=0.1)
    assert looked[0]["train/loss/soft"] == plain[0]["train/loss/soft"]
