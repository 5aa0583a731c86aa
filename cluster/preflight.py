"""Before a job runs on a cluster: does every node see the same storage? A number is written here and read there, and the other way round."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distillation.errors import ClusterError, DistilleryError, StorageError
from distillation.storage import Storage

SECONDS = 60
"""How long a node may take: on a busy one a first worker process starts slowly."""

SHARE = "Mount one folder on every node (NFS, EFS), or set cluster.storage to a URI such as s3://bucket/distillery"


@dataclass(frozen=True)
class NodeFinding:
    """What one node sees of the storage. `found` says what is amiss and `do` what to do; both are empty where all is well."""

    node: str
    """Address and host name."""
    found: str = ""
    do: str = ""
    answered: bool = True


def check_nodes(storage_uri: str, seconds: float = SECONDS) -> list[NodeFinding]:
    """One finding for each node that is alive, all asked at once. Ray must be initialised.

    Raises StorageError where this process itself cannot write the storage.
    """
    storage, name, nonce = Storage(storage_uri), f".preflight-{uuid.uuid4().hex}", secrets.token_hex(16)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    storage.write(f"{name}/driver", nonce.encode())
    try:
        asked = {_ask(node, storage_uri, name, nonce): node for node in nodes}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        findings = [_finding(task, node, task in done, storage, name, nonce, seconds) for task, node in asked.items()]
        for task in asked:
            if task not in done:
                ray.cancel(task, force=True)
        return findings
    finally:
        with contextlib.suppress(StorageError):
            storage.delete(name)


def require_shared(storage_uri: str, seconds: float = SECONDS) -> list[NodeFinding]:
    """The findings of `check_nodes`. Raises StorageError or ClusterError naming the nodes where something is amiss."""
    findings = check_nodes(storage_uri, seconds)
    if silent := [finding for finding in findings if not finding.answered]:
        raise ClusterError(
            "DST-6030", "a node does not answer", where=", ".join(finding.node for finding in silent), expected="a small task that runs",
            found=silent[0].found, do=silent[0].do,
        )  # fmt: skip
    if blind := [finding for finding in findings if finding.found]:
        raise not_shared(", ".join(finding.node for finding in blind), storage_uri, blind[0].found, blind[0].do)
    return findings


def not_shared(node: str, storage_uri: str, found: str, do: str = SHARE) -> StorageError:
    where = f"node {node}"
    return StorageError("DST-5006", "storage is not shared by all nodes", where=where, expected=storage_uri, found=found, do=do)


def light(storage: Storage, folder: str) -> None:
    """Leave a sign in the storage by which a worker that starts later knows that it sees this one."""
    storage.write(f"{folder}/beacon", folder.encode())


def require_light(storage_uri: str, folder: str) -> None:
    """Raise StorageError naming this node where the sign of `light` is not seen: a node that came later was not checked with the others."""
    if not Storage(storage_uri).exists(f"{folder}/beacon"):
        raise not_shared(socket.gethostname(), storage_uri, "another folder under this name on that node")


def _ask(node: Mapping[str, Any], storage_uri: str, name: str, nonce: str) -> ray.ObjectRef[Any]:
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(look)
    return task.remote(storage_uri, name, node["NodeID"], nonce)


def look(storage_uri: str, name: str, node_id: str, nonce: str) -> tuple[str, str]:
    """Runs on a node: read what the driver wrote, then write for it to read. Returns what is amiss and what to do."""
    try:
        storage = Storage(storage_uri)
        if storage.read(f"{name}/driver") != nonce.encode():
            return "it reads other bytes than the driver wrote", "Look at the network file system"
        storage.write(f"{name}/{node_id}", nonce[::-1].encode())
    except FileNotFoundError:
        folder = os.path.isdir(storage.root) or not storage.is_local
        return "another folder under this name" if folder else "no such folder", SHARE
    except DistilleryError as error:
        return f"{error.what}: {error.found}", error.do
    return "", ""


def _finding(
    task: ray.ObjectRef[Any], node: Mapping[str, Any], done: bool, storage: Storage, name: str, nonce: str, seconds: float
) -> NodeFinding:
    address, host = node["NodeManagerAddress"], node.get("NodeManagerHostname", "")
    place, do = f"{address} ({host})", "Look at it with `ray status` and at its log, or remove it from the cluster"
    if not done:
        return NodeFinding(place, f"no answer in {seconds:g} s", do, answered=False)
    try:
        found, advice = ray.get(task)
    except ray.exceptions.RayError as error:  # it died, or lacks the code
        text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return NodeFinding(place, text, "Install the same code and versions there: " + do, answered=False)
    if not found:
        with contextlib.suppress(FileNotFoundError):
            if storage.read(f"{name}/{node['NodeID']}") == nonce[::-1].encode():
                return NodeFinding(place)
        return NodeFinding(place, "what it writes is not seen by the driver", SHARE)
    return NodeFinding(place, found, advice)
