"""What the nodes do, as MLflow's page of system metrics names it."""

from __future__ import annotations

import time

import pytest
import ray

from cluster import system
from cluster.journal import Journal
from tests.servers import until

PAGE = """# HELP ray_node_cpu_utilization Total CPU usage on a ray node
# TYPE ray_node_cpu_utilization gauge
ray_node_cpu_utilization{IsHeadNode="true",ip="10.0.0.1"} 37.5
ray_node_mem_used{ip="10.0.0.1"} 3.0e+09
ray_node_mem_total{ip="10.0.0.1"} 12.0e+09
ray_node_disk_usage{ip="10.0.0.1"} 5.0e+09
ray_node_disk_free{ip="10.0.0.1"} 15.0e+09
ray_node_disk_utilization_percentage{ip="10.0.0.1"} 25.0
ray_node_network_received{ip="10.0.0.1"} 2.0e+06
ray_node_gpus_utilization{GpuIndex="1",GpuDeviceName="NVIDIA H100",ip="10.0.0.1"} 90.0
ray_node_gram_used{GpuIndex="1",GpuDeviceName="NVIDIA H100",ip="10.0.0.1"} 20000.0
ray_node_gram_available{GpuIndex="1",GpuDeviceName="NVIDIA H100",ip="10.0.0.1"} 60000.0
ray_node_gpu_power_milliwatts{GpuIndex="1",GpuDeviceName="NVIDIA H100",ip="10.0.0.1"} 350000.0
ray_tasks{Name="train",State="RUNNING"} 3.0
"""


def test_names_and_units() -> None:
    assert system.values_of(PAGE) == {
        "cpu_utilization_percentage": 37.5, "system_memory_usage_megabytes": 3000.0, "system_memory_usage_percentage": 25.0,
        "disk_usage_percentage": 25.0, "disk_usage_megabytes": 5000.0, "disk_available_megabytes": 15000.0, "network_receive_megabytes": 2.0,
        "gpu_1_utilization_percentage": 90.0, "gpu_1_memory_usage_megabytes": 20000.0, "gpu_1_memory_usage_percentage": 25.0,
        "gpu_1_power_usage_watts": 350.0,
    }  # fmt: skip


def test_a_disk_that_ray_does_not_look_at_is_left_out() -> None:
    page = "ray_node_disk_usage 0.0\nray_node_disk_free 1.0\nray_node_disk_utilization_percentage 0.0\nray_node_cpu_utilization 1.0\n"
    assert system.values_of(page) == {"cpu_utilization_percentage": 1.0}


def test_the_names_are_those_of_mlflow() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs: set[str] = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= set(monitor.metrics)
    assert theirs == {*system.GAUGES, "system_memory_usage_percentage"}


@pytest.mark.ray
def test_a_job_that_goes_on_continues_the_curves_of_its_node(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(system, "SECONDS", 1.0)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        for _ in range(2):
            with Journal(tmp_path / "t.jsonl") as journal:
                journal.run("job", name="job")

                def points(journal: Journal = journal) -> list[dict]:
                    return [event for event, _ in journal.events() if event["kind"] == "metrics"]

                before = len(points())
                with system.watched(journal, "job"):
                    until(lambda: len(points()) >= before + 2, 60)  # noqa: B023
                after = points()
                time.sleep(1.5)
                assert points() == after
    finally:
        ray.shutdown()
    steps = [event["step"] for event in after]
    assert steps == sorted(set(steps))
    assert len(steps) >= 4
    assert steps[-1] == pytest.approx(steps[0] + (after[-1]["time"] - after[0]["time"]) / 1000, abs=1.1)
    for event in after:
        assert 0 <= event["values"]["system/node_0/cpu_utilization_percentage"] <= 100
        assert 0 < event["values"]["system/node_0/system_memory_usage_percentage"] < 100
