"""Ray Train: run a worker function on a group of workers, restart it when a worker dies, and train models that way."""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cluster.config import ClusterConfig, Group, Role
from cluster.session import Record, cpus_per_worker, mailbox, unwrap
from distillation import fit
from distillation.config import FitConfig
from distillation.errors import ClusterError, DistilleryError
from distillation.storage import Storage


class TrainSession:
    """The training loop's view of a Ray Train worker."""

    def __init__(self, box: Any, key: str) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self._box, self._key = box, key

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.world_size == 1:
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
    session = TrainSession(payload["box"], payload["key"])
    return fit.train(FitConfig.model_validate(payload["fit"]), session, payload["made_from"])


def run_workers(
    worker: Callable[[dict[str, Any]], Any], payload: Mapping[str, Any], cluster: ClusterConfig, role: Role, record: Record
) -> Any:
    """Run `worker(payload)` on every worker of a role's group; returns what rank 0 returned. The payload gets `box`, the mailbox."""
    group, threads = cluster.group(role), cpus_per_worker(cluster, role)
    storage = Storage(cluster.storage)
    resources = {"CPU": float(threads)} | ({"GPU": group.gpus} if group.gpus else {})
    name = f"workers-{uuid.uuid4().hex[:12]}"
    with mailbox(record) as box:
        trainer = TorchTrainer(
            _guarded,
            train_loop_config={**payload, "box": box, "worker": worker, "threads": threads},
            scaling_config=ScalingConfig(
                num_workers=(group.least, group.most) if group.elastic else group.most, use_gpu=group.gpus > 0,
                resources_per_worker=resources, label_selector=group.labels or None,
            ),
            # A new name each time: Ray would otherwise resume from a file of its own, and nothing of ours depends on it.
            run_config=RunConfig(
                name=name,
                storage_path=storage.path(".ray"),
                storage_filesystem=storage.arrow,
                failure_config=FailureConfig(max_failures=cluster.max_failures),
            ),
        )  # fmt: skip
        try:
            result = _fit(trainer)
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:  # of a worker, or of what runs them
            raise _reason(error, box, group, cluster.max_failures) from error
        finally:
            storage.delete(f".ray/{name}")
        if (failed := ray.get(box.error.remote())) is not None:
            raise failed
        return result.return_value


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
    """What a worker runs. An error of ours is told to the driver, and a group restarted after one ends at once: it would fail again."""
    if ray.get(payload["box"].error.remote()) is not None:
        return None
    torch.set_num_threads(payload["threads"])
    try:
        return payload["worker"](payload)
    except DistilleryError as error:
        ray.get(payload["box"].fail.remote(error))
        raise


def _reason(error: BaseException, box: Any, group: Group, restarts: int) -> DistilleryError:
    told: DistilleryError | None = ray.get(box.error.remote())
    if found := told or unwrap(error):
        return found
    causes = list((getattr(error, "worker_failures", None) or {}).items())
    text = f"worker {causes[0][0]}: {_last_line(causes[0][1])}" if causes else _last_line(error)
    return ClusterError(
        "DST-6003", "workers failed", where=f"{group.most} workers", expected=f"at most {restarts} restarts", found=text,
        do="Run the job again: it goes on from the last checkpoint. --debug shows the whole traceback",
    )  # fmt: skip


def _last_line(error: BaseException) -> str:
    """What a traceback ends with."""
    return ([type(error).__name__, *str(error).strip().splitlines()])[-1]
