"""What the machines do while a job runs: a curve for each node's processor, memory, disk, network and GPUs, on the run of the job.

Ray has an agent on every node that measures this and offers it to Prometheus; the driver reads it there. A process of ours on every node
would keep idle nodes from being given back: for Ray a node on which an actor lives, even one that asks for nothing, is in use.
Names and numbering are those by which MLflow's page of system metrics groups curves: system/node_0/cpu_utilization_percentage.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

from cluster.journal import Journal

_log = logging.getLogger(__name__)

SECONDS = 10.0
"""Between two points of a curve, of a short job on few nodes."""

MOST_POINTS = 300
"""Of a curve that are as far apart: later ones are a 300th of the time apart. MLflow draws no more of a curve."""

SECONDS_A_NODE = 0.5
"""At the least, so that a driver of a thousand nodes has no more to do than one of twenty."""

GAUGES = {
    "cpu_utilization_percentage": ("ray_node_cpu_utilization", 1.0),
    "system_memory_usage_megabytes": ("ray_node_mem_used", 1e-6),
    "disk_usage_percentage": ("ray_node_disk_utilization_percentage", 1.0),
    "disk_usage_megabytes": ("ray_node_disk_usage", 1e-6),
    "disk_available_megabytes": ("ray_node_disk_free", 1e-6),
    "network_receive_megabytes": ("ray_node_network_received", 1e-6),
    "network_transmit_megabytes": ("ray_node_network_sent", 1e-6),
}
"""MLflow's name: Ray's name, and by what to multiply."""

GPU_GAUGES = {
    "utilization_percentage": ("ray_node_gpus_utilization", 1.0),
    "memory_usage_megabytes": ("ray_node_gram_used", 1.0),
    "power_usage_watts": ("ray_node_gpu_power_milliwatts", 1e-3),
}
"""The same of each GPU, below gpu_<index>_."""

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def watched(journal: Journal, key: str) -> Iterator[None]:
    """Record what the nodes of the cluster do on the run `key`, from a thread, until the block ends. Ray must be initialised."""
    nodes, done = Nodes(), threading.Event()

    def work() -> None:
        started = time.monotonic()
        with ThreadPoolExecutor(16, "system") as pool:
            while not done.wait(max(SECONDS, (time.monotonic() - started) / MOST_POINTS, SECONDS_A_NODE * len(nodes.numbers))):
                try:
                    new, alive = nodes.look()
                except ray.exceptions.RayError:  # the cluster is gone; what the job does says why
                    return
                if new:
                    journal.tags(key, new)
                # The time of the run, so that a job that goes on continues its curves.
                step = int(time.time() - journal.began(key) / 1000)
                for number, values in pool.map(_measure, alive):
                    if done.is_set():  # soon the journal is closed
                        break
                    if values:
                        journal.metrics(key, {f"system/node_{number}/{name}": value for name, value in values.items()}, step)

    thread = threading.Thread(target=work, name="system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(SECONDS)


class Nodes:
    """Numbers of nodes: 0 is the driver's. One that comes gets the number of one that is gone, so there are no more curves than nodes at once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        """By Ray's id of a node."""
        self._own = ray.get_runtime_context().get_node_id()

    def look(self) -> tuple[dict[str, str], list[tuple[int, str]]]:
        """Tags that say which node a number is, of those that are new; number and address of all that are alive."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self.numbers = {name: number for name, number in self.numbers.items() if name in alive}
        tags = {}
        for name in sorted(alive.keys() - self.numbers.keys(), key=lambda name: (name != self._own, _title(alive[name]))):
            number = next(n for n in range(len(alive)) if n not in self.numbers.values())
            self.numbers[name] = number
            tags[f"distillery.node_{number}"] = _title(alive[name])
        places = [(self.numbers[name], f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}") for name, node in alive.items()]
        return tags, places


def _title(node: Mapping[str, Any]) -> str:
    labels = (f"{name}={value}" for name, value in sorted(node["Labels"].items()) if not name.startswith("ray.io/node-id"))
    return ", ".join([node["NodeManagerHostname"], node["NodeManagerAddress"], *labels])


def _measure(place: tuple[int, str]) -> tuple[int, dict[str, float]]:
    """Number of a node and what its agent says now; nothing where it does not answer: it starts, ends, or is behind a firewall."""
    number, address = place
    try:
        with _direct.open(f"http://{address}/metrics", timeout=3) as answer:
            return number, values_of(answer.read().decode())
    except (OSError, ValueError) as error:
        _log.debug("no system metrics of node %d: %s", number, error)
        return number, {}


def values_of(page: str) -> dict[str, float]:
    """MLflow's names and units of what a page of Ray's agent says about its node."""
    lines = "\n".join(line for line in page.splitlines() if line.startswith("ray_node_"))
    plain: dict[str, float] = {}
    gpus: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            of = gpus.setdefault(sample.labels["GpuIndex"], {}) if "GpuIndex" in sample.labels else plain
            of[sample.name] = sample.value
    found = {name: plain[gauge] * unit for name, (gauge, unit) in GAUGES.items() if gauge in plain}
    if plain.get("ray_node_mem_total"):
        found["system_memory_usage_percentage"] = 100 * plain["ray_node_mem_used"] / plain["ray_node_mem_total"]
    if not plain.get("ray_node_disk_usage"):  # inside Kubernetes Ray says 0 of 1 bytes
        found = {name: value for name, value in found.items() if not name.startswith("disk_")}
    for index, values in gpus.items():
        found |= {f"gpu_{index}_{name}": values[gauge] * unit for name, (gauge, unit) in GPU_GAUGES.items() if gauge in values}
        if total := values.get("ray_node_gram_used", 0.0) + values.get("ray_node_gram_available", 0.0):
            found[f"gpu_{index}_memory_usage_percentage"] = 100 * values["ray_node_gram_used"] / total
    return found
