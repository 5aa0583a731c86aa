"""Looks at every node of a cluster: one line for each thing that has to be alike or within reach everywhere. Prints nothing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import doctor, package, preflight
from cluster.config import ROLES, ClusterConfig, TrackingConfig
from cluster.doctor import GB, PACKAGES, Check
from distillation.errors import DistilleryError

SECONDS = 90
"""For a node to start a process and look."""


def check(cluster: ClusterConfig, tracking: TrackingConfig | None, storage: str | None) -> list[Check]:
    """Needs a connection to Ray. storage, tracking: None where no job names them."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    uri = tracking.uri if tracking and (tracking.uri or "").startswith("http") else None
    gpus = max(cluster.group(role).gpus for role in ROLES)
    looked = {node["NodeID"]: look.options(  # type: ignore[attr-defined]
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    ).remote(uri, bool(node["Resources"].get("GPU"))) for node in alive}  # fmt: skip
    ray.wait(list(looked.values()), num_returns=len(looked), timeout=SECONDS)
    found: dict[str, dict[str, Any]] = {}
    silent: dict[str, str] = {}
    for node in alive:
        name = _name(node)
        try:
            found[name] = ray.get(looked[node["NodeID"]], timeout=0)
        except ray.exceptions.RayError as error:
            silent[name] = "no answer" if isinstance(error, ray.exceptions.GetTimeoutError) else str(error).strip().splitlines()[-1]
    return [
        _answered(alive, silent),
        *_versions(found),
        _alike("distillery", {name: one["code"] for name, one in found.items()}),
        _gpus(alive, found, gpus),
        _least("memory", found, "free", 4 * GB, "Close other programs on it, or give it fewer workers"),
        _least("/dev/shm", found, "shm", 0.2 * GB, "Ray keeps objects there, else on the slower disk; in a container set --shm-size"),
        *([_storage(storage)] if storage is not None else []),
        *([_everywhere("mlflow server", found, "mlflow", f"{uri} answers", tracking.strict if tracking else False)] if uri else []),
        _tokens(found),
    ]


@ray.remote(num_cpus=0, max_retries=0)
def look(uri: str | None, has_gpu: bool) -> dict[str, Any]:
    """What a node has. Runs there."""
    free, total = (int(doctor.line_of("/proc/meminfo", key).split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    reached = doctor.server(uri, "fail") if uri else None
    return {
        "versions": {"python": ".".join(map(str, sys.version_info[:3])), **{name: _version(name) for name in PACKAGES}},
        "code": f"code {package.code_fingerprint()}", "free": free, "total": total,
        "shm": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "gpus": _devices() if has_gpu else [],
        "mlflow": (f"{reached.found}. {reached.do}" if reached and reached.state != "ok" else ""),
        "token": os.environ.get("RAY_AUTH_MODE", "not set"),
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


# ----------------------------------------------------------------------------------------------------------- into lines


def _answered(alive: Sequence[Mapping[str, Any]], silent: Mapping[str, str]) -> Check:
    resources = [node["Resources"] for node in alive]
    has = ", ".join(f"{sum(one.get(kind, 0) for one in resources):g} {kind}s" for kind in ("CPU", "GPU"))
    if silent:
        do = "Look at the log of its raylet, and whether it reaches the head and has the same Ray and Python"
        return Check("nodes", "fail", "; ".join(f"{name}: {why}" for name, why in silent.items()), do)
    return Check("nodes", "ok", f"{len(alive)} with {has}: {', '.join(map(_name, alive))}")


def _versions(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    """One line for all that is alike, and one for each that is not."""
    checks = [_alike(name, {node: one["versions"][name] for node, one in found.items()}) for name in ("python", *PACKAGES)]
    if well := [f"{one.name} {one.found.split()[0]}" for one in checks if one.state == "ok"]:
        yield Check("versions", "ok", f"{', '.join(well)} on every node")
    yield from (one for one in checks if one.state != "ok")


def _alike(name: str, versions: Mapping[str, str]) -> Check:
    """One version everywhere."""
    by_version = defaultdict(list)
    for node, version in versions.items():
        by_version[version].append(node)
    if not by_version:
        return Check(name, "fail", "no node answered", "As above")
    common = max(by_version, key=lambda version: len(by_version[version]))
    if len(by_version) == 1 and common != "not installed":
        return Check(name, "ok", f"{common} on every node")
    others = "; ".join(f"{version} on {_few(nodes)}" for version, nodes in by_version.items() if version != common or len(by_version) == 1)
    if len(by_version) == 1:
        return Check(name, "fail", "not installed on any node", f"Install {name} on all of them, best from one image")
    return Check(
        name, "fail", f"{common} on {len(by_version[common])}, but {others}", "Start all nodes from one image, or install the same version"
    )


def _gpus(alive: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], asked: float) -> Check:
    counted: dict[str, int] = defaultdict(int)
    hidden = []
    for node in alive:
        has, sees = int(node["Resources"].get("GPU", 0)), found.get(_name(node), {}).get("gpus", [])
        for device in sees:
            counted[device] += 1
        if has > len(sees) and _name(node) in found:
            hidden.append(f"{_name(node)}: Ray counts {has}, torch sees {len(sees)}")
    if hidden:
        return Check("gpus", "fail", "; ".join(hidden), "Install the driver, and a torch that is built for it")
    if asked and not counted:
        return Check(
            "gpus", "warn", "none, but the job asks for some", "Nodes that start on demand may have them; else set gpus_per_worker=0"
        )
    return Check("gpus", "ok", ", ".join(f"{count} x {device}" for device, count in counted.items()) or "none")


def _least(name: str, found: Mapping[str, Mapping[str, Any]], key: str, need: float, do: str) -> Check:
    few = {node: one[key] for node, one in found.items() if one[key] < need}
    if few:
        return Check(name, "warn", "; ".join(f"{node}: {value / GB:.1f} GB" for node, value in few.items()), do)
    return Check(name, "ok", f"at least {min((one[key] for one in found.values()), default=0) / GB:.1f} GB on every node")


def _storage(uri: str) -> Check:
    """Nodes read what the head wrote, and the head what they wrote."""
    try:
        problems = [one for one in preflight.check_nodes(uri, SECONDS) if one.found]
    except DistilleryError as error:
        return Check("storage", "fail", f"head: {error.what}: {error.where}: {error.found}", error.do)
    if problems:
        return Check("storage", "fail", "; ".join(f"{one.node}: {one.found}" for one in problems), problems[0].do)
    return Check("storage", "ok", f"{uri}: every node reads what the head writes, and the head what they write")


def _everywhere(name: str, found: Mapping[str, Mapping[str, Any]], key: str, well: str, strict: bool) -> Check:
    problems = {node: one[key] for node, one in found.items() if one[key]}
    if problems:
        why, _, do = next(iter(problems.values())).partition(". ")
        return Check(name, "fail" if strict else "warn", f"from {_few(list(problems))}: {why}", do)
    return Check(name, "ok", f"{well} on every node")


def _tokens(found: Mapping[str, Mapping[str, Any]]) -> Check:
    open_ = [node for node, one in found.items() if one["token"] != "token"]
    if open_:
        return Check(
            "token", "warn", f"RAY_AUTH_MODE is not token on {_few(open_)}", "Start every node with RAY_AUTH_MODE=token and the same token"
        )
    return Check("token", "ok", "every node asks for the token")


def _name(node: Mapping[str, Any]) -> str:
    role = node.get("Labels", {}).get("role")
    return f"{node['NodeManagerAddress']} ({', '.join(filter(None, [role, node['NodeID'][:6]]))})"


def _few(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")
