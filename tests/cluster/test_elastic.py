"""Workers that come and go: every row once, the losses of an undisturbed run, and no step lost where somebody says so in time."""

from __future__ import annotations

import pytest

from cluster import elastic
from cluster.config import ClusterConfig
from cluster.training import run_workers
from distillation import fit
from distillation.config import DenseLogits, TargetsConfig, TrainingConfig
from distillation.loop import LocalSession
from tests.cluster import growing
from tests.tiny import rows_of, settings, world

# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = [pytest.mark.nodes, pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]
BATCH, EPOCHS = 140, 3


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    for name, value in growing.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(elastic, "GROW_SECONDS", 0.0)


@pytest.fixture
def storage(tmp_path):
    return world(tmp_path, config=TargetsConfig(logits=DenseLogits(dtype="float32")))


def plan(**changes):
    values = {"epochs": EPOCHS, "batch_tokens": BATCH, "learning_rate": 3e-4, "log_every": 1, "checkpoint_every": 5, "precision": "fp32"}
    return TrainingConfig(**{**values, **changes})


@pytest.mark.slow
def test_four_workers_become_two_one_and_three(storage, tmp_path):
    alone = LocalSession()
    fit.train(settings(storage, "alone", training=plan()), alone, {})
    notes, points = tmp_path / "notes", []
    notes.mkdir()
    payload = {"fit": settings(storage, "s", training=plan()).model_dump(mode="json"), "key": "k", "notes": str(notes), "seconds": 0.05}
    with growing.nodes(4) as nodes:
        events = growing.Events((7, lambda: nodes.kill(2)), (12, nodes.notify), (17, lambda: nodes.add(2)))

        def record(key, metrics, step):
            points.append((step, metrics))
            events.record(key, metrics, step)

        events.start()
        cluster = ClusterConfig(storage=storage.uri, workers={"min": 1, "max": 4}, cpus_per_worker=1, address="auto")
        result = run_workers(growing.noting_worker, payload, cluster, "student", record)
    assert events.failed is None
    found = growing.read_notes(notes)
    steps = growing.every_row_once(found, rows_of(storage), BATCH, EPOCHS)
    print(found.sizes, found.wasted(), steps, [p for p in points if "cluster/workers" in p[1]])
    assert result["steps"] == steps
