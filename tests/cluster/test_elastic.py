"""Workers that come and go: every row once, the losses of an undisturbed run, and no step lost where somebody says so in time."""

from __future__ import annotations

import pytest
import ray

from cluster import elastic
from cluster.config import ClusterConfig
from distillation import fit
from distillation.config import DenseLogits, TargetsConfig, TrainingConfig
from distillation.loop import LocalSession
from tests.cluster import growing
from tests.servers import until
from tests.tiny import rows_of, settings, world

# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]
BATCH, EPOCHS, EVERY, LOST = 140, 6, 10, 17
"""Nodes vanish 7 steps after a checkpoint."""


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    for name, value in growing.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(elastic, "GROW_SECONDS", 0.0)


@pytest.fixture
def storage(tmp_path):
    return world(tmp_path, config=TargetsConfig(logits=DenseLogits(dtype="float32")))


def plan(**changes):
    values = {
        "epochs": EPOCHS,
        "batch_tokens": BATCH,
        "learning_rate": 3e-4,
        "log_every": 1,
        "checkpoint_every": EVERY,
        "precision": "fp32",
    }
    return TrainingConfig(**{**values, **changes})


@pytest.mark.slow
def test_four_workers_become_two_three_and_one(storage, tmp_path):
    alone = LocalSession()
    fit.train(settings(storage, "alone", training=plan()), alone, {})
    notes = tmp_path / "notes"
    notes.mkdir()
    payload = {"fit": settings(storage, "s", training=plan()).model_dump(mode="json"), "key": "k", "notes": str(notes)}
    with growing.nodes(4) as nodes:
        events = growing.Events(notes, (LOST, lambda: nodes.kill(2), 2), (25, nodes.add, 3), (40, lambda: nodes.notify(2), 1))
        cluster = ClusterConfig(storage=storage.uri, workers={"min": 1, "max": 4}, cpus_per_worker=1, address="auto")
        result = events.undergo(payload, cluster)
    found = growing.read_notes(notes)
    steps = growing.every_row_once(found, rows_of(storage), BATCH, EPOCHS)
    assert result["steps"] == steps
    assert found.sizes == [4, 2, 3, 1]
    expected, curve = growing.losses(alone.history), growing.losses(events.points)
    assert list(curve) == list(range(1, steps + 1))
    assert curve == pytest.approx(expected, abs=1e-6, rel=0)
    # Two nodes without power cost what was done since the last checkpoint; one that is announced, and one that comes, cost nothing.
    last = [metrics for _, metrics in events.points if "cluster/workers" in metrics][-1]
    assert last["cluster/restarts"] == 3
    assert 0 < last["cluster/wasted_steps"] == found.wasted() <= 2 * EVERY


def test_a_trial_saves_and_makes_way_when_its_node_is_taken_back(storage, tmp_path):
    mark, config = tmp_path / "step", settings(storage, "s", training=plan(checkpoint_every=0, batch_tokens=256), keep_model=False)
    cluster = ClusterConfig(storage=storage.uri, workers=1, cpus_per_worker=1, address="auto").model_dump(mode="json")
    with growing.nodes(1) as nodes:
        running = ray.remote(num_cpus=1, max_retries=0)(growing.trial).remote(config.model_dump(mode="json"), cluster, mark)
        until(lambda: mark.exists() and int(mark.read_text() or 0) >= 2, 60)
        nodes.notify(1)
        reached = ray.get(running, timeout=60)
    assert reached is not None
    assert reached < rows_of(storage).lengths.sum() * EPOCHS / 256
    assert fit.train(config, LocalSession(), {})["resumed_at"] == reached
