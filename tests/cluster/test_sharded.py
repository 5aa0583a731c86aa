"""Models cut among Ray Train's workers: the same bytes in the store and the same student."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from cluster.config import ClusterConfig, WorkersConfig
from cluster.teaching import teach
from cluster.training import run_workers, train
from distillation import fit, models, store
from distillation.answers import answer_part, make_teacher
from distillation.columns import Columns
from distillation.config import DenseLogits, Features, TargetsConfig, TrainingConfig
from distillation.loop import LocalSession
from distillation.rows import Rows
from distillation.tasks import build_task
from jobs import evaluation
from tests.tiny import LABELS, TASK, settings, world

ROOT = Path(__file__).resolve().parents[2]
# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]
TARGETS = TargetsConfig(logits=DenseLogits(dtype="float32"), features=Features(layers=(1, 3), pooled=True, dtype="float32"))


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(address="local", include_dashboard=False, num_cpus=4, object_store_memory=150 << 20, log_to_driver=False)
        yield
        ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return world(tmp_path_factory.mktemp("world"), config=TARGETS, hidden=18)


def test_a_teacher_cut_among_workers_leaves_the_same_bytes(storage):
    """3 parts of rows to train on and 1 to validate with, so the two workers have different numbers of batches."""
    cluster = ClusterConfig(
        storage=storage.uri, workers=1, cpus_per_worker=1, max_failures=0, teacher=WorkersConfig(workers=2, shards=2)
    )  # fmt: skip
    manifest = teach(
        TASK, TARGETS, "teachers/t", "corpora/c", "targets/cut", fingerprint="cut", made_from={}, batch_tokens=128, precision="fp32",
        cluster=cluster, record=lambda *_: None, key="k",
    )  # fmt: skip
    assert manifest.facts["rows_answered"] == 150
    model = make_teacher(models.load(fit.model_folder(storage, "teachers/t"), TASK), TASK, TARGETS)
    _, paths = store.open_artifact(storage, "corpora/c", "corpus")
    for part in [*manifest.splits["train"], *manifest.splits["validation"]]:
        table, _ = answer_part(model, Rows(Columns([paths[part.name]]), {}, build_task(TASK, 0)), TARGETS, 128, False, torch.device("cpu"))
        expected = store.write_part(storage, "targets/whole", part.name.removesuffix(".arrow"), table, part.tokens)
        assert expected.checksum == part.checksum


def test_a_student_cut_among_workers_is_trained_and_committed(storage):
    training = TrainingConfig(steps=8, batch_tokens=96, learning_rate=3e-4, log_every=1, checkpoint_every=4, precision="fp32")
    session, points = LocalSession(), []
    fit.train(settings(storage, "whole", training=training), session, {})
    cluster = ClusterConfig(
        storage=storage.uri, workers=1, cpus_per_worker=1, max_failures=0, student=WorkersConfig(workers=2, shards="all")
    )  # fmt: skip
    train(settings(storage, "cut", training=training), {}, cluster, lambda key, metrics, step: points.append((step, metrics)), "k")
    one, other = ([m["train/loss"] for _, m in found if "train/loss" in m] for found in (session.history, points))
    assert other == pytest.approx(one, rel=1e-5)
    weights, cut = (load_file(fit.model_folder(storage, f"students/{name}") / "model.safetensors") for name in ("whole", "cut"))
    assert weights.keys() == cut.keys()
    assert all(torch.allclose(cut[name], value, atol=1e-4) for name, value in weights.items() if not name.endswith("key.bias"))


def test_models_cut_among_workers_are_evaluated_as_whole_ones(storage):
    """The students of the test before; 30 rows in a few batches for two workers."""
    candidates = [((role, None), name, folder, None) for role, name, folder in (
        ("teacher", "teacher", "teachers/t"), ("student", "cut", "students/cut"), ("student", "whole", "students/whole"),
    )]  # fmt: skip
    settings = {"threads": 1, "repeats": 10, "precision": "fp32", "batch_tokens": 64}
    what = storage.uri, "corpora/c", candidates, TASK, LABELS, settings
    cluster = ClusterConfig(
        storage=storage.uri, workers=1, cpus_per_worker=1, max_failures=0, teacher=WorkersConfig(workers=2, shards=2)
    )  # fmt: skip
    payload = {"key": "k", "what": what, "cut": ["teacher"]}
    found = run_workers(evaluation._evaluate_worker, payload, cluster, "teacher", lambda *_: None)
    expected = evaluation.evaluate_task(*what, 1, None)
    assert [e.name for e in found] == ["teacher", "cut", "whole"]
    for mine, its in zip(found, expected, strict=True):
        assert mine.quality == pytest.approx(its.quality, rel=1e-5)
        assert mine.against == pytest.approx(its.against, abs=1e-5)
        assert mine.cost.keys() == its.cost.keys()
    assert [e.device for e in found] == ["2 x cpu", "cpu", "cpu"]
