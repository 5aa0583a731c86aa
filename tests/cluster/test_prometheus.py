"""What Prometheus reads from a Ray node: the numbers, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from cluster import metrics
from cluster.config import ClusterConfig
from cluster.metrics import NOW, SO_FAR, WORKERS, Meter
from cluster.training import TrainSession, run_workers
from distillation import fit
from distillation.config import DenseLogits, FitConfig, TargetsConfig, TrainingConfig
from tests.tiny import settings, world

ROOT = Path(__file__).resolve().parents[2]
EXPORTED = {f"ray_{name}" for name, _ in (*NOW.values(), WORKERS)} | {f"ray_{name}_total" for name, _ in SO_FAR.values()}
OF_RAY = {f"ray_{name}" for name in METRICS_GAUGES}


def asked() -> set[str]:
    """Metrics of the dashboard."""
    return set(re.findall(r"\bray_\w+", (ROOT / "cluster" / "grafana" / "distillery.json").read_text()))


# -------------------------------------------------------------------------------------------------------------- a meter


@pytest.fixture
def recorded(monkeypatch):
    """Gauges as they were set last, counters as they add up, by name."""
    values: dict[str, float] = {}

    class Kept:
        def __init__(self, name, *_):
            self.name = name

        def set(self, value, tags):
            values[self.name] = value
            values["labels"] = tags

        def inc(self, value, tags):
            values[self.name] = values.get(self.name, 0.0) + value

    monkeypatch.setattr(metrics, "Gauge", Kept)
    monkeypatch.setattr(metrics, "_counter", Kept)
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.05)
    gauges = metrics.Gauges()
    monkeypatch.setattr(metrics, "_gauges", lambda: gauges)
    return values


def test_a_training_with_two_stored_teachers_and_a_live_one(recorded):
    meter = Meter("job/1a2b/six-layers", "student", stored=2, live=1)
    point = {"train/loss": 0.5, "train/rows": 100.0, "perf/rows_per_second": 40.0}
    assert meter.point(point, 10) == {**point, "perf/stored_answers": 200.0, "perf/live_answers": 100.0}
    assert recorded["labels"] == {"job_name": "job", "run": "six-layers", "role": "student"}
    assert (recorded["distillery_step"], recorded["distillery_rows_per_second"]) == (10, 40)
    assert meter.point({"validation/accuracy": 0.9, "train/rows": 100.0}, 10) == {"validation/accuracy": 0.9, "train/rows": 100.0}
    meter.point({"train/loss": 0.5, "train/rows": 60.0}, 6)  # after a failure: what was reported is reported again
    meter.point({"cluster/restarts": 1.0, "cluster/wasted_steps": 4.0}, 10)
    meter.point({"train/loss": 0.4, "train/rows": 150.0}, 15)
    meter.point({"cluster/restarts": 2.0, "cluster/wasted_steps": 9.0}, 15)
    assert {name: value for name, value in recorded.items() if name in dict(SO_FAR.values())} == {
        "distillery_rows": 150, "distillery_stored_answers": 300, "distillery_live_answers": 150,
        "distillery_restarts": 2, "distillery_wasted_steps": 9,
    }  # fmt: skip


def test_a_gauge_is_set_again_until_it_is_taken_away(recorded):
    meter = Meter("job/1a2b/s", "student")
    with metrics.at_work("job/1a2b/s", "student"):
        meter.point({"train/loss": 0.5, "perf/rows_per_second": 40.0}, 10)
        recorded.clear()
        time.sleep(0.3)
        assert {name: value for name, value in recorded.items() if name != "labels"} == {
            "distillery_workers": 1, "distillery_rows_per_second": 40, "distillery_step": 10,
        }  # fmt: skip
    meter.close()
    time.sleep(0.1)
    recorded.clear()
    time.sleep(0.1)
    assert recorded == {}


def test_a_teacher_that_answers(recorded, monkeypatch):
    meter, clock = Meter("job/1a2b/teacher", "teacher"), iter([10.0, 14.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert meter.point({"teacher/rows": 800.0}, 800) == {"teacher/rows": 800.0, "perf/live_answers": 800.0}
    assert meter.point({"teacher/rows": 1000.0}, 1000)["teacher/rows_per_second"] == 50.0
    assert (recorded["distillery_live_answers"], recorded["distillery_rows_per_second"]) == (1000, 50)
    assert "distillery_rows" not in recorded
    monkeypatch.undo()


# -------------------------------------------------------------------------------------------------------- the dashboard


def test_the_dashboard_asks_for_what_there_is():
    assert asked() - EXPORTED - OF_RAY == set()
    assert EXPORTED - asked() == set()


def test_the_dashboard_asks_by_labels_that_there_are():
    board = json.loads((ROOT / "cluster" / "grafana" / "distillery.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    used = {label.strip() for expr in queries for by in re.findall(r"by \(([^)]*)\)", expr) for label in by.split(",")}
    assert used - {"instance", "NodeAddress", "GpuIndex"} <= set(metrics.LABELS)
    assert {label for expr in queries for label in re.findall(r"(\w+)=~", expr)} <= set(metrics.LABELS)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert {name for expr in queries for name in re.findall(r"\$(\w+)", expr)} <= variables


# ------------------------------------------------------------------------------------------------------------ a real node


def working(payload):
    """A training, and what else a group of workers reports in its life."""
    session = TrainSession(payload["box"], payload["key"])
    result = fit.train(FitConfig.model_validate(payload["fit"]), session, {})
    session.report({"teacher/rows": 200.0}, 98)
    session.report({"cluster/restarts": 1.0, "cluster/wasted_steps": 2.0}, 99)
    while not Path(payload["seen"]).exists():  # as long as a training
        time.sleep(0.1)
    return result


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_a_node_shows_every_metric_of_the_dashboard(tmp_path, monkeypatch, free_port):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests/cluster")  # workers import this file
    storage = world(tmp_path / "world", config=TargetsConfig(logits=DenseLogits(dtype="float32")))
    training = TrainingConfig(epochs=1, batch_tokens=512, learning_rate=3e-4, log_every=1, precision="fp32")
    config = settings(storage, "measured", training=training)
    points = []
    ray.init(
        address="local", include_dashboard=False, num_cpus=2, object_store_memory=100 << 20, log_to_driver=False,
        _metrics_export_port=free_port, _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    try:
        cluster = ClusterConfig(storage=storage.uri, cpus_per_worker=1)
        payload = {"fit": config.model_dump(mode="json"), "key": "reviews/1a2b/measured", "seen": str(tmp_path / "seen")}
        with ThreadPoolExecutor() as beside:
            page = beside.submit(read_all, f"http://127.0.0.1:{free_port}/metrics", tmp_path / "seen")
            run_workers(working, payload, cluster, "student", lambda key, found, step: points.append((step, found)))
        lines = [line for line in page.result().splitlines() if not line.startswith("#")]
    finally:
        ray.shutdown()
    assert asked() & EXPORTED - names(page.result()) == set()
    assert {name for name in asked() & OF_RAY if "gpu" not in name} <= names(page.result())
    rows = max(found["train/rows"] for _, found in points if "train/rows" in found)
    for name in ("rows", "stored_answers"):
        (line,) = [line for line in lines if line.startswith(f"ray_distillery_{name}_total{{")]
        assert all(f'{label}="{value}"' in line for label, value in {"job_name": "reviews", "run": "measured", "role": "student"}.items())
        assert float(line.split()[-1]) == rows  # one teacher, whose answers are in the store
    assert points[-1] == (99, {"cluster/restarts": 1.0, "cluster/wasted_steps": 2.0})
    assert [found["perf/stored_answers"] for _, found in points if "perf/stored_answers" in found][-1] == rows


def names(page):
    return set(re.findall(r"^(ray_\w+)", page, re.M))


def read_all(url, seen):
    """The page, when it shows all that the dashboard asks for, or what there is after a while. Then lets the training end."""
    page, deadline = "", time.monotonic() + 240
    while asked() & EXPORTED - names(page) and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(url, timeout=30) as response:
            page = response.read().decode()
    seen.touch()
    return page


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
