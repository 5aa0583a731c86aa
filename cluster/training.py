"""Ray Train: run a worker function on a group of workers, restart it when a worker dies, and train models that way."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cluster import preflight
from cluster.config import ClusterConfig, Group, Role
from cluster.elastic import wait_for_room, watching
from cluster.metrics import at_work, metered
from cluster.session import Record, cpus_per_worker, mailbox, unwrap
from distillation import fit
from distillation.config import FitConfig
from distillation.errors import ClusterError, DistilleryError
from distillation.loop import Left
from distillation.sharding import mesh_of
from distillation.storage import Storage


class TrainSession:
    """The training loop's view of a Ray Train worker."""

    def __init__(self, box: Any, key: str, shards: int | None = 1) -> None:
        """shards: workers that hold one model together; None: all."""
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self.mesh = mesh_of(self.world_size, shards, self.device)
        self._box, self._key = box, key
        self._watched: bool | None = None
        self._answer: Any = None
        self._asked = False

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world_size == 1 or self.mesh is not None:
            return module
        # Buffers are the same on all ranks, but for the running means of batch norms.
        devices, changing = [self.device] if self.device.type == "cuda" else None, any(isinstance(m, _BatchNorm) for m in module.modules())
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=changing)

    def all_reduce(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        if self.rank == 0:
            self._box.put.remote(self._key, dict(metrics), step)

    def leave(self, step: int) -> bool:
        if self._watched is None:
            self.begin(step, repeats=True)
        if not self._watched:
            return False
        # One question is under way while the steps go on. Ranks may hear the answer at different steps, so rank 0's counts for all.
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._asked, self._answer = ray.get(self._answer), None
        if self.rank == 0 and self._answer is None:
            self._answer = self._box.asked.remote(step)
        return bool(self.all_reduce(torch.tensor([float(self._asked)], device=self.device)).item())

    def begin(self, step: int, *, repeats: bool = False) -> None:
        """Tell the driver where this worker is, how many steps are done and kept, and if it does those again that others did after them."""
        node = ray.get_runtime_context().get_node_id()
        self._watched = ray.get(self._box.begin.remote(self._key, self.rank, self.world_size, node, step, repeats))

    def asked(self) -> bool:
        """Whether this worker is to end what it has in hand and leave; for work that the ranks do not do in step. After `begin`."""
        return bool(self._watched) and ray.get(self._box.asked.remote(0))


def train(
    config: FitConfig, made_from: Mapping[str, Any], cluster: ClusterConfig, record: Record, key: str, role: Role = "student"
) -> dict[str, float]:  # fmt: skip
    """Train one model on the cluster's workers of a role. Points of its curves go to `record(key, metrics, step)`.

    Raises the DistilleryError a worker raised, or ClusterError if workers died more often than cluster.max_failures.
    """
    payload = {"fit": config.model_dump(mode="json"), "made_from": dict(made_from), "key": key}
    result: dict[str, float] = run_workers(_train_worker, payload, cluster, role, record)
    return result


def _train_worker(payload: dict[str, Any]) -> dict[str, float] | None:
    session = TrainSession(payload["box"], payload["key"], payload["shards"])
    return fit.train(FitConfig.model_validate(payload["fit"]), session, payload["made_from"])


def run_workers(
    worker: Callable[[dict[str, Any]], Any], payload: Mapping[str, Any], cluster: ClusterConfig, role: Role, record: Record
) -> Any:
    """Run `worker(payload)` on every worker of a role's group; returns what rank 0 returned. The payload gets `box`, the mailbox.

    A worker that raises `Left`, or dies, is followed by another group, as large as there is room for; it has to go on by itself where the one
    before stood. Groups that fail one after the other and get no further than the one before are counted: see cluster.max_failures.
    """
    group, threads = cluster.group(role), cpus_per_worker(cluster, role)
    resources = {"CPU": float(threads)} | ({"GPU": group.gpus} if group.gpus else {})
    watched = group.elastic or cluster.address is not None  # nodes of a cluster of one's own neither come nor go
    with metered(record, payload, role) as told, mailbox(told) as box:
        while True:
            count = wait_for_room(group, resources) if watched else group.most
            ray.get(box.start.remote(watched))
            config = {**payload, "box": box, "worker": worker, "threads": threads, "role": role, "shards": group.shards}
            try:
                with watching(box, group, count, resources) if watched else contextlib.nullcontext():
                    result = _run_group(config, cluster, group, count, resources)
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:  # of a worker, or of what runs them
                if (ours := ray.get(box.error.remote()) or unwrap(error)) is not None:
                    raise ours from error
                if isinstance(error, ray.train.ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                    continue  # a node went as the group started
                if isinstance(error, ray.exceptions.RayError) or ray.get(box.failed.remote()) > cluster.max_failures:
                    raise _reason(error, count, cluster.max_failures) from error
                continue
            if not ray.get(box.left.remote()):
                return result.return_value


class _Trainer(TorchTrainer):
    """Without an actor, detached from the job, that takes back a group's place if its controller is lost: a process more for every group, of
    whose start it takes 3 of 10 seconds. The group's place ends with the job that asked for it, and a job whose controller is lost ends.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if type(each).__name__ != "PlacementGroupCleanerCallback"]


def _run_group(config: dict[str, Any], cluster: ClusterConfig, group: Group, count: int, resources: dict[str, float]) -> Any:
    """Start a group, and wait for its end."""
    storage, name = Storage(cluster.storage), f"workers-{uuid.uuid4().hex[:12]}"
    preflight.light(storage, f".ray/{name}")
    trainer = _Trainer(
        _guarded,
        train_loop_config={**config, "sign": (cluster.storage, f".ray/{name}")},
        scaling_config=ScalingConfig(
            num_workers=count, use_gpu=group.gpus > 0, resources_per_worker=resources, label_selector=group.labels or None
        ),
        run_config=RunConfig(
            # A new name each time: Ray would otherwise resume from a file of its own, and nothing of ours depends on it.
            name=name,
            storage_path=storage.path(".ray"),
            storage_filesystem=storage.arrow,
            # What follows a failure is decided above. A group of a fixed size waits for its nodes.
            failure_config=FailureConfig(max_preemption_failures=0, controller_failure_limit=0 if group.elastic else -1),
        ),
    )  # fmt: skip
    try:
        return _fit(trainer)
    finally:
        storage.delete(f".ray/{name}")


def _fit(trainer: TorchTrainer) -> Any:
    """`trainer.fit()` in a thread: in the main one Ray puts in a handler for Ctrl-C of its own, which ends the program with exit code 0."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, which raises it
            outcome.set_exception(error)

    threading.Thread(target=run, name="trainer", daemon=True).start()
    return outcome.result()


def _guarded(payload: dict[str, Any]) -> Any:
    """What a worker runs. An error of ours is told to the driver."""
    torch.set_num_threads(payload["threads"])
    try:
        preflight.require_light(*payload["sign"])
        with at_work(payload.get("key", ""), payload["role"]):
            return payload["worker"](payload)
    except DistilleryError as error:
        ray.get(payload["box"].fail.remote(error))
        raise
    except Left:
        ray.get(payload["box"].leave.remote())


def _reason(error: BaseException, count: int, restarts: int) -> ClusterError:
    causes = list((getattr(error, "worker_failures", None) or {}).items())
    text = f"worker {causes[0][0]}: {_last_line(causes[0][1])}" if causes else _last_line(error)
    return ClusterError(
        "DST-6003", "workers failed", where=f"{count} workers", expected=f"at most {restarts} restarts without a new checkpoint", found=text,
        do="Run the job again: it goes on from the last checkpoint. --debug shows the whole traceback",
    )  # fmt: skip


def _last_line(error: BaseException) -> str:
    """What a traceback ends with."""
    return ([type(error).__name__, *str(error).strip().splitlines()])[-1]
