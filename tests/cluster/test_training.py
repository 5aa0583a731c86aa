"""Ray Train around the loop: the number of workers changes nothing, and a worker that dies costs the steps since the last checkpoint."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from cluster.config import ClusterConfig
from cluster.journal import Journal
from cluster.session import _briefly, unwrap
from cluster.training import TrainSession, run_workers, train
from distillation import fit, store
from distillation.batches import plan_epoch
from distillation.config import Balance, DenseLogits, FitConfig, TargetsConfig, TrainingConfig
from distillation.errors import ClusterError, InputError
from tests.tiny import LOSSES, rows_of, settings, world

ROOT = Path(__file__).resolve().parents[2]
# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", autouse=True)
def cluster(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests/cluster")  # workers import this file
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        ray.init(address="local", include_dashboard=False, num_cpus=4, object_store_memory=150 << 20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return world(tmp_path_factory.mktemp("world"), labelled=0.5, config=TargetsConfig(logits=DenseLogits(dtype="float32")))


BALANCED = {**LOSSES, "soft": LOSSES["soft"].model_copy(update={"balance": Balance(to="hard", every=7)})}


def plan(**changes):
    base = {"epochs": 1, "batch_tokens": 48, "learning_rate": 3e-4, "log_every": 1, "checkpoint_every": 5, "precision": "fp32"}
    return TrainingConfig(**{**base, **changes})


def workers(storage, count, **changes):
    return ClusterConfig(storage=storage.uri, workers=count, cpus_per_worker=1, **changes)


def weights(storage, name):
    return load_file(fit.model_folder(storage, f"students/{name}") / "model.safetensors")


def losses(points):
    return [(step, metrics["train/loss"]) for step, metrics in points if "train/loss" in metrics]


def trained(storage, name, count, *, config=None, **changes):
    """Result, curve and weights of a student trained by so many workers."""
    points = []
    config = config or settings(storage, name, training=plan(**changes), losses=BALANCED)
    result = train(config, {}, workers(storage, count), lambda key, metrics, step: points.append((step, metrics)), "job/s")
    return result, points, weights(storage, name)


@pytest.fixture(scope="module")
def alone(storage):
    return trained(storage, "alone", 1)


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_workers_changes_nothing(storage, alone, count):
    rows = rows_of(storage)
    batches = plan_epoch(rows.lengths, np.arange(len(rows)), 48, 0, 0)
    assert min(np.diff(batches.bounds)) < 3  # some batches have fewer rows than there are workers
    result, points, found = trained(storage, f"by-{count}", count)
    expected, expected_points, expected_weights = alone
    assert result["steps"] == expected["steps"] == batches.steps > 30
    assert [step for step, _ in losses(points)] == list(range(1, batches.steps + 1))
    assert [loss for _, loss in losses(points)] == pytest.approx([loss for _, loss in losses(expected_points)], rel=1e-5)
    pulls = [[metrics["train/weight/soft"] for _, metrics in each if "train/loss" in metrics] for each in (points, expected_points)]
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-4)
    measured = [name for name in expected if name.startswith("validation/")]
    assert len(measured) == 4
    assert [result[name] for name in measured] == pytest.approx([expected[name] for name in measured], rel=1e-4)
    for name, value in expected_weights.items():
        # A bias of attention keys has no influence on the output, so its gradient is rounding noise that Adam scales up.
        if not name.endswith("key.bias"):
            assert torch.allclose(found[name], value, atol=1e-4), name


class Dying(TrainSession):
    """Kills its process after a step, the first time it comes there."""

    def __init__(self, box, key, mark, rank, step):
        super().__init__(box, key)
        self._mark, self._end = Path(mark), (rank, step)

    def report(self, metrics, step):
        super().report(metrics, step)
        if (self.rank, step) == self._end and not self._mark.exists():
            self._mark.touch()
            time.sleep(1)  # what is being written is written
            os.kill(os.getpid(), signal.SIGKILL)


def dying_worker(payload):
    session = Dying(payload["box"], payload["key"], payload["mark"], *payload["dies"])
    return fit.train(FitConfig.model_validate(payload["fit"]), session, {})


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (2, 1)])
def test_a_worker_killed_in_mid_epoch_costs_nothing_but_time(storage, tmp_path, alone, count, rank):
    name = f"killed-{count}"
    config = settings(storage, name, training=plan(), losses=BALANCED)
    payload = {"fit": config.model_dump(mode="json"), "key": "job/s", "mark": str(tmp_path / "mark"), "dies": (rank, 7)}
    told = []
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.run("job/s", name="s")

        def record(key, metrics, step):
            told.append(step)
            journal.metrics(key, metrics, step)

        result = run_workers(dying_worker, payload, workers(storage, count, max_failures=1), "student", record)
        events = [event for event, _ in journal.events() if event["kind"] == "metrics"]
    assert (tmp_path / "mark").exists()
    assert result["resumed_at"] == 5
    assert told.count(6) > 1 or told.count(5) > 1  # reported again, recorded once
    curve = [(event["step"], event["values"]["train/loss"]) for event in events if "train/loss" in event["values"]]
    assert [step for step, _ in curve] == list(range(1, int(result["steps"]) + 1))
    if count == 1:
        assert curve == losses(alone[1])
        assert all(torch.equal(value, weights(storage, name)[key]) for key, value in alone[2].items())
    else:
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in losses(alone[1])], rel=1e-5)
    assert storage.list(f"students/{name}.checkpoints") == []


def counting_worker(payload):
    """Notes every start; then does what the test is about."""
    with open(payload["starts"], "a") as file:
        file.write("start\n")
    if payload["bug"]:
        raise ZeroDivisionError("a bug of ours")
    return fit.train(FitConfig.model_validate(payload["fit"]), TrainSession(payload["box"], "k"), {})


def count_starts(storage, tmp_path, config=None, **changes):
    starts = tmp_path / "starts"
    payload = {"starts": str(starts), "bug": config is None, "fit": config and config.model_dump(mode="json")}
    try:
        run_workers(counting_worker, payload, workers(storage, 1, **changes), "student", lambda *_: None)
    finally:
        assert starts.exists()
    raise AssertionError("no error")


def test_an_error_of_ours_comes_out_as_it_is_and_is_not_tried_again(storage, tmp_path):
    hurt = world(tmp_path / "hurt")
    part = store.find(hurt, "corpora/c").splits["train"][0].name
    path = hurt.fetch(f"corpora/c/{part}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        count_starts(hurt, tmp_path, settings(hurt, "hurt"), max_failures=2)
    assert (caught.value.code, caught.value.exit_code) == ("DST-3106", 3)
    assert part in caught.value.where
    assert type(caught.value) is InputError
    assert (tmp_path / "starts").read_text() == "start\n"


@ray.remote(num_cpus=0)
def refuse():
    raise InputError("DST-3106", "file was altered", where="here", expected="a", found="b", do="Look")


def test_what_ray_wraps_is_unwrapped():
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(refuse.remote())
    found = unwrap(caught.value)
    assert type(found) is InputError
    assert str(found) == "error[DST-3106]: file was altered: here: expected a but found b. Look"
    assert unwrap(ValueError("of another kind")) is None


def test_a_bug_in_a_worker_is_a_cluster_error_that_names_it(storage, tmp_path):
    with pytest.raises(ClusterError, match=r"DST-6003.*at most 1 restarts.*worker 0: .*a bug of ours") as caught:
        count_starts(storage, tmp_path, max_failures=1)
    assert caught.value.exit_code == 6
    assert (tmp_path / "starts").read_text() == "start\nstart\n"


def test_too_many_workers_are_refused_at_once(storage):
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"DST-6002.*expected 5 workers with 1 CPUs.*found nodes with 4 CPUs"):
        trained(storage, "many", 5)
    with pytest.raises(ClusterError, match=r"DST-6002.*1 GPUs each"):
        train(settings(storage, "gpus"), {}, workers(storage, 1, gpus_per_worker=1), lambda *_: None, "k")
    assert time.monotonic() - started < 1


def test_nothing_is_left_in_the_home_folder(storage, home, alone):
    assert [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()] == []
    assert storage.list(".ray") == []


def test_of_a_lost_node_one_line_is_shown(capsys):
    _briefly({"lines": ["Raylet is terminated\n[state-dump] 1\n[state-dump] 2"], "pid": "raylet", "is_err": False}, ignore_prefix=True)
    out = capsys.readouterr().out
    assert "Raylet is terminated" in out
    assert "state-dump" not in out
