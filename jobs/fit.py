"""Whether a job fits the cluster it would run on, and how long its machines would be busy. Asks Ray what there is; launches nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import ray
from rich.markup import escape
from rich.table import Table

from cluster.config import ROLES, Group, Role
from cluster.session import connect, cpus_per_worker, nodes_with, places
from distillation.errors import DistilleryError
from distillation.models import read_config, width_of
from jobs.estimate import Line, body_parameters, human, student_share
from jobs.plan import Plan

TERAFLOPS = {
    "V100": 125, "T4": 65, "A10G": 70, "L4": 121, "L40S": 362, "A100": 312, "A100-40G": 312, "A100-80G": 312, "H100": 989, "H200": 989,
    "B200": 2250,
}  # fmt: skip
"""Dense 16-bit peak of what Ray calls accelerator types. Source: data sheets of the vendor."""

UNKNOWN_TERAFLOPS = 100
CORE_TERAFLOPS = 0.05
"""Of a CPU core with AVX-512, as this app's own loops reach it."""

EFFICIENCY = 0.3
"""Share of a GPU's peak that models of this size reach."""

TRAINING_BYTES = 16
"""Of a parameter that is trained: weight, gradient and two moments in fp32. Activations come on top."""

WEIGHT_BYTES = 4


class Fit(NamedTuple):
    """One line. `do` is empty where all is well."""

    what: str
    state: Literal["ok", "warn", "fail"]
    needs: str
    has: str
    do: str
    error: DistilleryError | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "error": self.error and self.error.as_dict()}


def look(plan: Plan, lines: Sequence[Line]) -> list[Fit]:
    """Raises ClusterError if no cluster answers."""
    cluster = plan.job.cluster
    found = []
    with connect(cluster):
        for role in ROLES:
            work = sum(line.flops for line in lines if line.state == "to do" and _role(plan, line) == role)
            found += _group(plan, role, work)
        data = nodes_with(cluster.data.labels)
        cpus = sum(node.get("CPU", 0) for node in data)
        labels = _labels(dict(cluster.data.labels))
        do = "" if cpus else "Start such nodes, or change cluster.data.labels"
        found.append(Fit("data", "ok" if cpus else "warn", f"nodes{labels}", f"{len(data)} with {cpus:g} CPUs", do))
    found.append(_store(plan, sum(line.bytes for line in lines if line.state == "to do")))
    return found


def _group(plan: Plan, role: Role, work: float) -> list[Fit]:
    """Workers of a role: whether they can be placed, have the memory, and for how long they are busy. work: FLOPs."""
    cluster = plan.job.cluster
    group, nodes = cluster.group(role), nodes_with(cluster.group(role).labels)
    has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes[:4]) + (
        ", ..." if len(nodes) > 4 else ""
    )
    has = has or "no such node"
    count = f"{group.least}" if not group.elastic else f"{group.least} to {group.most}"
    try:
        cpus = cpus_per_worker(cluster, role)
    except DistilleryError as error:
        needs = f"{count} workers, {group.gpus:g} GPUs each{_labels(group.labels)}"
        return [Fit(role, "fail", needs, has, error.do, error)]
    able = places(nodes, cpus, group.gpus)
    needs = f"{count} workers of {cpus} CPUs and {group.gpus:g} GPUs{_labels(group.labels)}"
    waits = "" if able >= group.least else f"{able} fit now; waits until nodes have started"
    found = [Fit(role, "warn" if waits else "ok", needs, has, waits)]
    if not group.gpus:
        found.append(_memory(plan, role, group, nodes, cpus))
    if work:
        found.append(_busy(role, group, min(group.most, max(able, group.least)), cpus, work))
    return found


def _memory(plan: Plan, role: Role, group: Group, nodes: Sequence[dict[str, float]], cpus: int) -> Fit:
    """Of the nodes; that of a GPU Ray does not tell."""
    each = max(_parameters(plan, role)) / (group.shards or group.least)
    shares = [
        node.get("memory", 0) / max(1, min(group.most, places([node], cpus, group.gpus))) for node in nodes if places([node], cpus, 0)
    ]
    least = min(shares, default=0.0)
    do = "" if least >= each or not shares else f"Give {role} nodes with more memory, fewer workers a node, or shards"
    return Fit(f"{role} memory", "warn" if do else "ok", f"{human(each)} a worker and what a batch takes", f"{human(least)} a worker", do)


def _parameters(plan: Plan, role: Role) -> list[float]:
    """Bytes of weights, and of what training adds to them, of each model of a role."""
    sizes = {name: read_config(folder) for name, folder in plan.models.items()}
    whole = {name: body_parameters(one) + int(one.get("vocab_size", 0)) * (width_of(one) or 0) for name, one in sizes.items()}
    if role == "teacher":
        trained = {name for name, teacher in plan.job.all_teachers.items() if teacher.training}
        return [float(count * (TRAINING_BYTES if name in trained else WEIGHT_BYTES)) for name, count in whole.items()]
    lead = sizes[plan.lead]
    body, depth = body_parameters(lead), int(lead.get("num_hidden_layers", 1) or 1)
    rest = whole[plan.lead] - body
    return [TRAINING_BYTES * (body * student_share(run.student, depth, body) + rest) for run in plan.runs]


def _busy(role: Role, group: Group, workers: int, cpus: int, work: float) -> Fit:
    kinds = {node.get("Labels", {}).get("ray.io/accelerator-type", "") for node in ray.nodes() if node["Alive"]} - {""}
    if group.gpus:
        kind = next(iter(sorted(kinds, key=lambda one: TERAFLOPS.get(one, UNKNOWN_TERAFLOPS))), "unknown")
        peak = TERAFLOPS.get(kind, UNKNOWN_TERAFLOPS)
        hours, unit = work / (peak * 1e12 * EFFICIENCY) / 3600, "GPU-hours"
        assumed = f"at {EFFICIENCY:.0%} of {peak} TFLOP/s ({kind})"
        wall = hours / max(1.0, workers * group.gpus)
    else:
        hours, unit = work / (CORE_TERAFLOPS * 1e12) / 3600, "core-hours"
        assumed = f"at {CORE_TERAFLOPS * 1000:.0f} GFLOP/s a core"
        wall = hours / (workers * cpus)
    return Fit(f"{role} time", "ok", f"{work:.1e} FLOPs: {_hours(hours)} {unit}", f"{_hours(wall)} h on {workers} workers {assumed}", "")


def _store(plan: Plan, need: int) -> Fit:
    uri = plan.job.cluster.storage
    if not plan.storage.is_local:
        return Fit("store", "ok", human(need), f"{uri}: its size is not known", "")
    folder = next(path for path in (plan.workspace, *plan.workspace.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    do = "" if free > 1.2 * need else "Free some space, or set cluster.storage to a larger disk"
    return Fit("store", "warn" if do else "ok", human(need), f"{human(free)} free in {uri}", do)


def _role(plan: Plan, line: Line) -> str:
    if line.stage == "corpus":
        return "data"
    return "teacher" if line.stage in plan.job.all_teachers or line.stage.startswith("targets") else "student"


def _labels(labels: dict[str, str]) -> str:
    return f" on {', '.join(f'{key}={value}' for key, value in labels.items())}" if labels else ""


def _hours(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def table(found: Sequence[Fit]) -> Table:
    shown = Table(title="on this cluster", title_justify="left", box=None, pad_edge=False)
    for title in ("", "", "needs", "has", ""):
        shown.add_column(title)
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for one in found:
        shown.add_row(f"[{colour[one.state]}]{one.state}[/]", one.what, escape(one.needs), escape(one.has), escape(one.do))
    return shown


def require(found: Sequence[Fit]) -> None:
    """Raise what keeps the job from running there."""
    for one in found:
        if one.error is not None:
            raise one.error
