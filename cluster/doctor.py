"""Looks whether a job can run from here: one line for each thing it needs, and what to do where something is amiss. Prints nothing.

Reading never changes anything, but for a small file that is written to the storage and removed again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.config import ROLES, ClusterConfig, TrackingConfig
from distillation.errors import DistilleryError

PACKAGES = ("ray", "torch", "transformers", "datasets", "mlflow")
GB = 1e9
SECONDS = 5
"""How long a server may take to answer."""


@dataclass(frozen=True)
class Check:
    """One line of the table. `do` says what to do, and is empty where all is well."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    do: str = ""


def check(config: ClusterConfig, tracking: TrackingConfig, *, places: bool = True) -> list[Check]:
    """Every check in the order in which to mend things. Takes seconds; up to a minute where a cluster or server does not answer.

    places: look at storage and MLflow, too; they are a job's.
    """
    return [
        _python(),
        *_packages(),
        _device(config),
        _processors(config),
        _memory(),
        _shared_memory(),
        _ray_folder(),
        *([*_storage(config), _tracking(config, tracking)] if places else []),
        _authentication(config),
        _hub(),
        *([_cluster(config.address)] if config.address else []),
    ]


# ------------------------------------------------------------------------------------------------------------- software


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    try:
        allowed = importlib.metadata.metadata("distillery")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:  # the code travelled with a job
        return Check("python", "ok", f"{found} at {sys.prefix}")
    if SpecifierSet(allowed).contains(found):
        return Check("python", "ok", f"{found} at {sys.prefix}")
    return Check("python", "fail", found, f"Install Python {allowed} and set up again: make quickstart PYTHON=python3.11")


def _packages() -> Iterator[Check]:
    needs = {name: SpecifierSet() for name in PACKAGES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        needs |= {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("distillery") or ()) if r.marker is None}
    for name in PACKAGES:
        install = f'pip install -c constraints.txt "{name}{needs[name]}"'
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", install)
            continue
        allowed = needs[name].contains(found, prereleases=True)
        yield Check(name, "ok", found) if allowed else Check(name, "fail", f"{found}, but {needs[name]} is needed", install)


# ------------------------------------------------------------------------------------------------------------- hardware


def _device(config: ClusterConfig) -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("device", "fail", f"torch cannot be loaded: {error}", "Install it again: pip install --force-reinstall torch")
    if torch.cuda.is_available():
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}))
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: fp32 is used"
        return Check("device", "ok", f"{torch.cuda.device_count()} x {names}, {bf16}")
    asked = max(config.group(role).gpus for role in ROLES)
    if asked and not config.address:
        do = "Set cluster.gpus_per_worker=0, or install the driver and a torch that is built for it"
        return Check("device", "fail", f"no GPU, but {asked:g} asked for each worker", do)
    flags = set(line_of("/proc/cpuinfo", "flags").split())
    bf16 = ", ".join(sorted(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert"})) or "no bf16: fp32 is used, about half as fast"
    return Check("device", "ok", f"cpu, {bf16}")


def _processors(config: ClusterConfig) -> Check:
    have = len(os.sched_getaffinity(0))
    group = max((config.group(role) for role in ROLES), key=lambda group: group.least * (group.cpus or 1))
    need = group.least * (group.cpus or 1)
    if not config.address and need > have:
        do = "Lower cluster.workers or cluster.cpus_per_worker"
        return Check("cpus", "fail", f"{have}, but {group.least} workers ask for {need}", do)
    return Check("cpus", "ok", str(have))


def _memory() -> Check:
    free, total = (int(line_of("/proc/meminfo", key).split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    found = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    if free < 4 * GB:
        return Check("memory", "warn", found, "Close other programs, or use fewer workers; the quickstart needs about 6 GB")
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    need = 0.3 * int(line_of("/proc/meminfo", "MemTotal").split()[0]) * 1024
    size = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    if size < need:
        do = f"Ray keeps objects there, else on the slower disk; in a container: docker run --shm-size={max(1, round(need / GB))}g"
        return Check("/dev/shm", "warn", f"{size / GB:.1f} GB", do)
    return Check("/dev/shm", "ok", f"{size / GB:.1f} GB")


def _ray_folder() -> Check:
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("RAY_TEMP_DIR") or "/tmp"
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        return Check("ray folder", "fail", f"{folder} cannot be written", "Set RAY_TMPDIR to a folder that can")
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GB:.1f} GB free in {folder}"
    if usage.used / usage.total > 0.95:
        return Check("ray folder", "fail", f"{found}, over 95 % full: Ray stores nothing more there", "Free some space, or set RAY_TMPDIR")
    return Check("ray folder", "ok", found)


def line_of(path: str, key: str) -> str:
    """What stands behind the colon of the first line that begins with `key`; empty where there is none (other processors than x86)."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


# -------------------------------------------------------------------------------------------------------------- storage


def _storage(config: ClusterConfig) -> Iterator[Check]:
    from distillation.storage import Storage  # a machine that has only the client shows what others checked

    try:
        storage = Storage(config.storage)
        is_new = storage.is_local and not os.path.exists(storage.root)
        storage.require_writable()
    except DistilleryError as error:
        yield Check("storage", "fail", f"{error.what}: {error.where or 'cluster.storage'}{error.found and f': {error.found}'}", error.do)
        return
    yield Check("storage", "ok", f"{config.storage} can be written")
    if storage.is_local:
        usage = shutil.disk_usage(storage.root)
        if is_new:
            os.rmdir(storage.root)
        found = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free in {config.storage}"
        few = usage.free < 5 * GB
        yield Check("disk", "warn" if few else "ok", found, "Free some space, or set cluster.storage to a larger disk" if few else "")
        if config.address:
            do = "Make sure that every node sees this folder (NFS, EFS), or set cluster.storage to a URI such as s3://bucket/distillery"
            yield Check("shared", "warn", f"{config.storage} is a folder, and the job runs on a cluster", do)


# ------------------------------------------------------------------------------------------------------------- tracking


def _tracking(config: ClusterConfig, tracking: TrackingConfig) -> Check:
    uri = tracking.uri
    if uri is None:
        if "://" in config.storage:
            do = "Set tracking.uri to a server: SQLite cannot lie in an object store"
            return Check("mlflow", "fail", "no tracking.uri, and the storage is remote", do)
        return Check("mlflow", "ok", "SQLite in the storage")
    bad: Literal["warn", "fail"] = "fail" if tracking.strict else "warn"
    kind = uri.split(":", 1)[0].split("+", 1)[0]
    if kind == "sqlite":
        return _database(uri, bad)
    return _port(uri, bad) if kind == "postgresql" else server(uri, bad)


def server(uri: str, bad: Literal["warn", "fail"]) -> Check:
    """Whether an MLflow server answers this machine, and takes its login."""
    # Not /health: MLflow answers it to every host and without a login.
    request = urllib.request.Request(uri.rstrip("/") + "/api/2.0/mlflow/experiments/search?max_results=1")
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if user:
        request.add_header("Authorization", "Basic " + b64encode(f"{user}:{password or ''}".encode()).decode())
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            json.loads(answer.read())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 403:
            do = f"Start the server with --allowed-hosts {urlsplit(uri).netloc} (or this user lacks permission)"
        elif error.code == 401:
            do = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        else:
            do = "Look at the server's log; is this the address of an MLflow server?"
        return Check("mlflow", bad, f"{uri} answers HTTP {error.code}", do)
    except (OSError, ValueError) as error:
        found = f"{uri} does not answer as MLflow does: {getattr(error, 'reason', error)}"
        return Check("mlflow", bad, found, "Check tracking.uri; start one with: mlflow server --host 127.0.0.1")
    return Check("mlflow", "ok", uri)


def _database(uri: str, bad: Literal["warn", "fail"]) -> Check:
    path = Path(uri.split(":///", 1)[-1]).absolute()
    if not path.exists():
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            return Check("mlflow", "ok", f"{path} will be made")
        return Check("mlflow", bad, f"{path.parent} cannot be written", "Make the folder, or set tracking.uri to another file")
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=SECONDS)
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Check("mlflow", bad, f"{path}: {error}", "Set tracking.uri to an SQLite file, or remove this one")
    return Check("mlflow", "ok", str(path))


def _port(uri: str, bad: Literal["warn", "fail"]) -> Check:
    place = urlsplit(uri)
    host, port = place.hostname or "localhost", place.port or 5432
    if error := _refused(host, port):
        return Check("mlflow", bad, f"{host}:{port}: {error}", "Check tracking.uri and whether the database runs")
    return Check("mlflow", "ok", f"{host}:{port} answers (login not tried)")


def _refused(host: str, port: int) -> str:
    """Why a port does not take connections; empty if it does."""
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        return str(error)
    return ""


# -------------------------------------------------------------------------------------------------------------- cluster


def _authentication(config: ClusterConfig) -> Check:
    """As Ray does: the token comes from RAY_AUTH_TOKEN, the file in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.is_file() and (rights := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        return Check("token", "warn", f"{path} can be read by others (mode {rights:04o})", f"chmod 600 {path}")
    if config.address and mode != "token":
        do = "Without it anybody who reaches a port of the cluster runs code there: start it and submit with RAY_AUTH_MODE=token"
        return Check("token", "warn", f"RAY_AUTH_MODE is {mode}", do)
    if mode == "token" and config.address and not (os.environ.get("RAY_AUTH_TOKEN") or path.is_file()):
        return Check("token", "fail", f"no token in RAY_AUTH_TOKEN or {path}", f"Copy that of the cluster to {path}, then chmod 600 {path}")
    return Check("token", "ok", f"RAY_AUTH_MODE is {mode}" + ("" if config.address else "; a cluster on this machine only"))


def _hub() -> Check:
    names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")]
    return Check("hub", "ok", f"offline by {' and '.join(names)}: folders and cached models only" if names else "online")


_CONNECT = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
nodes = [node for node in ray.nodes() if node["Alive"]]
print(json.dumps([len(nodes), ray.cluster_resources()]))
"""


def _cluster(address: str, seconds: int = 45) -> Check:
    """In a process of its own: a connection that fails can take this one down, or never return."""
    do = "Check cluster.address, that the cluster runs the same Ray and Python, and the token"
    place = urlsplit(address if "://" in address else f"ray://{address}")
    # Ray itself would try for a minute or more.
    if place.port and (error := _refused(place.hostname or "", place.port)):
        return Check("cluster", "fail", f"{address}: {error}", do)
    try:
        with tempfile.TemporaryFile() as errors:
            command = [sys.executable, "-c", _CONNECT, address]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, timeout=seconds, check=False)
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
    except subprocess.TimeoutExpired:
        return Check("cluster", "fail", f"{address} did not answer in {seconds} s", do)
    if done.returncode:
        return Check("cluster", "fail", f"{address}: {said[-1] if said else f'exit code {done.returncode}'}", do)
    nodes, resources = json.loads(done.stdout.splitlines()[-1])
    have = ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    return Check("cluster", "ok", f"{address}: {nodes} nodes, {have}")
