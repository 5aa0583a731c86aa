"""Connect to Ray, check that a job fits, and stand between the training loop and Ray Train."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ClusterConfig, Role
from distillation.errors import ClusterError, DistilleryError, SecurityError

Record = Callable[[str, Mapping[str, float], int], None]
"""Takes what a worker reports: run key, metrics, step."""

OBJECT_STORE_BYTES = 1_000_000_000
"""Of a local cluster. Ray Data spills what does not fit to disk."""


@contextlib.contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster of the job, or start one on this machine for as long as the block runs.

    A local cluster gets a token of its own that is written nowhere: other users of the machine cannot reach it.
    """
    if ray.is_initialized():
        yield
        return
    for name in ("RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA", "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR"):
        if os.environ.get(name):
            raise SecurityError("DST-9006", "an unsafe switch of Ray is on", where=name, do="Unset it: it lets data files run code")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process for every group; cluster.elastic watches
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of a job mean the same in workers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Ray starts workers at niceness 15: whatever else the machine does would come first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray Train runs a training in a thread, where glibc would give the memory of every step back to the system and take it again.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        # A local cluster of this Ray asks for a token unless RAY_AUTH_MODE says otherwise; it would write one into the home folder.
        if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        options |= {"address": config.address}
    ray._private.worker.print_to_stdstream = _briefly
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except BaseException as error:
        # A plain Exception is what Ray raises where its processes did not start within its 30 seconds.
        if not isinstance(error, ConnectionError | RuntimeError | ValueError) and type(error) is not Exception:
            raise
        do = "Check cluster.address and the token, or leave the address out to run on this machine"
        if type(error) is Exception:
            do = "Run again when the machine has less to do, or look into the logs of Ray in /tmp/ray/session_latest/logs"
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError("DST-6001", "no Ray cluster", where=config.address or "this machine", found=found, do=do) from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put in one of its own, which ends the program with exit code 15
    try:
        yield
    finally:
        ray.shutdown()


_say = ray._private.worker.print_to_stdstream


def _briefly(data: dict[str, Any], **options: Any) -> None:
    """Of what Ray says of a lost node the first line: with it come 20 lines of that node's log."""
    _say({**data, "lines": [line.partition("\n")[0] for line in data["lines"]]}, **options)


def cpus_per_worker(config: ClusterConfig, role: Role) -> int:
    """Threads of each worker of a role: as set, or the most with which the cluster's nodes hold all workers.

    Raises ClusterError if they cannot be placed. On a cluster that starts nodes when asked, cpus_per_worker has to be set: then nothing is
    refused, and Ray waits for the nodes.
    """
    group = config.group(role)
    nodes = nodes_with(group.labels)
    largest = int(max((node.get("CPU", 0) for node in nodes), default=0))
    fitting = [n for n in range(1, largest + 1) if places(nodes, n, group.gpus) >= group.most]
    each = group.cpus or max(fitting, default=1)
    if places(nodes, each, group.gpus) < group.least and not (config.address and group.cpus):
        do = f"Lower workers or what each one asks for, in cluster or cluster.{role}; set cpus_per_worker if nodes start on demand"
        raise does_not_fit(f"cluster.{role}", f"{group.least} workers", each, group.gpus, nodes, do, group.labels)
    return each


def nodes_with(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """Resources of the nodes that run now and have these labels. Syntax of the values: label selectors of Ray."""

    def has(node: Mapping[str, Any], label: str, wanted: str) -> bool:
        plain = wanted.removeprefix("!")
        values = plain[3:-1].split(",") if plain.startswith("in(") else [plain]
        return (node.get("Labels", {}).get(label) in values) != wanted.startswith("!")

    return [node["Resources"] for node in ray.nodes() if node["Alive"] and all(has(node, *pair) for pair in labels.items())]


def does_not_fit(
    where: str, workers: str, cpus: int, gpus: float, nodes: Sequence[Mapping[str, float]], do: str, labels: Mapping[str, str] | None = None
) -> ClusterError:  # fmt: skip
    has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    kind = f"nodes labelled {', '.join(f'{k}={v}' for k, v in labels.items())}" if labels else "nodes"
    return ClusterError(
        "DST-6002", "job does not fit the cluster", where=where, expected=f"{workers} with {cpus} CPUs and {gpus:g} GPUs each",
        found=f"{kind} with {has}" if nodes else f"no {kind}", do=do,
    )  # fmt: skip


def places(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """How many workers of this size the nodes hold together. nodes: their resources."""
    # 1.0 // 0.2 is 4 in floating point.
    return sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) / gpus + 1e-9 if gpus else math.inf)) for node in nodes)


@ray.remote(num_cpus=0)
class Mailbox:
    """What workers and driver tell each other: points of curves, the error that ends a job, where the workers are, whether they are to leave.

    Lives on as workers die and come back.
    """

    def __init__(self) -> None:
        self._events: list[tuple[str, dict[str, float], int]] = []
        self._error: DistilleryError | None = None
        self._groups, self._first, self._furthest, self._wasted, self._failures = 0, -1, 0, 0, 0
        self._begun: dict[int, str] = {}
        self._watched = self._asked = self._left = False

    def put(self, key: str, metrics: dict[str, float], step: int) -> None:
        self._events.append((key, metrics, step))
        self._furthest = max(self._furthest, step)

    def start(self, watched: bool) -> None:
        """A new group of workers. watched: it may be asked to leave."""
        self._begun, self._watched, self._asked, self._left = {}, watched, False, False

    def begin(self, key: str, rank: int, workers: int, node: str, step: int, repeats: bool) -> bool:
        """A worker of the new group begins, with so many steps done and kept; those after it are done again if it `repeats` steps.

        Returns whether it may be asked to leave.
        """
        self._begun[rank] = node
        if rank == 0:
            self._wasted += max(0, self._furthest - step)
            if step > self._first:  # the group before got somewhere
                self._first, self._failures = step, 0
            self._furthest = max(self._furthest, step)
            points = {"cluster/workers": workers, "cluster/restarts": self._groups} | (
                {"cluster/wasted_steps": self._wasted} if repeats else {}
            )
            self._events.append((key, {name: float(value) for name, value in points.items()}, self._furthest))
            self._groups += 1
        return self._watched

    def begun(self) -> dict[int, str]:
        """Ranks that have begun, and their nodes."""
        return self._begun

    def ask(self) -> None:
        """For the workers to save and leave."""
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to leave, from a worker that has done so many steps."""
        self._furthest = max(self._furthest, step)
        return self._asked

    def leave(self) -> None:
        self._left = True

    def left(self) -> bool:
        """Whether any worker left before its work was done."""
        return self._left

    def failed(self) -> int:
        """Another group failed. Returns how many did since one got further than those before it."""
        self._failures += 1
        return self._failures

    def take(self) -> list[tuple[str, dict[str, float], int]]:
        events, self._events = self._events, []
        return events

    def fail(self, error: DistilleryError) -> None:
        self._error = self._error or error

    def error(self) -> DistilleryError | None:
        return self._error


@contextlib.contextmanager
def mailbox(record: Record) -> Iterator[Any]:
    """A mailbox whose content is passed to `record` from a thread, in order, until the block ends."""
    # Beside the driver: it must outlive every worker's node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    box = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    done = threading.Event()

    def drain() -> None:
        while True:
            last = done.wait(0.3)
            try:
                events = ray.get(box.take.remote())
            except ray.exceptions.RayError:  # the cluster is gone; the call that runs the workers says why
                return
            for event in events:
                record(*event)
            if last:
                return

    thread = threading.Thread(target=drain, name="mailbox", daemon=True)
    thread.start()
    try:
        yield box
    finally:
        done.set()
        thread.join()
        ray.kill(box)


def unwrap(error: BaseException) -> DistilleryError | None:
    """The error of ours inside what Ray raises, if there is one."""
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        one = pending.pop()
        # Ray raises an error that is of our class as well as of its own, and whose text is a traceback: that one is not meant.
        if isinstance(one, DistilleryError) and not isinstance(one, ray.exceptions.RayError):
            return one
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            pending += [
                one.__context__,
                one.__cause__,
                getattr(one, "cause", None),
                *(getattr(one, "worker_failures", None) or {}).values(),
            ]
    return None
