"""Plain processes that train together, as Ray Train's workers do, without Ray."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import traceback
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from distillation.config import FitConfig
from distillation.sharding import mesh_of

# One process imports what all of them need, and they are forked from it.
multiprocessing.set_forkserver_preload(["distillation.fit", "torch.distributed.fsdp", "transformers.models.bert.modeling_bert"])


class Stopped(Exception):
    pass


class PeerSession:
    """Of one process out of a group. stop: step after which all of them die."""

    def __init__(self, shards, stop=None):
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device, self.history, self._stop = torch.device("cpu"), [], stop
        self.mesh = mesh_of(self.world_size, shards, self.device)

    def wrap(self, module):
        return module if self.mesh is not None or self.world_size == 1 else DistributedDataParallel(module)

    def all_reduce(self, values):
        torch.distributed.all_reduce(values)
        return values

    def leave(self, step):
        return False

    def report(self, metrics, step):
        self.history.append((step, dict(metrics)))
        if step == self._stop and "train/loss" in metrics:
            raise Stopped


def fit_together(config, shards, stop, folder):
    """Train; leaves the result and the curve of rank 0."""
    from distillation import fit

    session, result = PeerSession(shards, stop), None
    with contextlib.suppress(Stopped):
        result = fit.train(FitConfig.model_validate_json(config), session, {})
    if session.rank == 0:
        (Path(folder) / "told.json").write_text(json.dumps([result, session.history]))


def _start(rank, count, work, arguments, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "meet"), count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=300))
    try:
        work(*arguments)
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise
    torch.distributed.destroy_process_group()


def together(folder, count, work, *arguments):
    """Run `work(*arguments)` in `count` processes. Raises what went wrong there."""
    folder.mkdir()
    try:
        torch.multiprocessing.start_processes(_start, (count, work, arguments, str(folder)), nprocs=count, start_method="forkserver")
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        raise AssertionError("\n".join(path.read_text() for path in sorted(folder.glob("error-*")))) from error


def trained_together(folder, count, shards, config, stop=None):
    """Result and curve of a training by `count` processes of which `shards` hold one model (None: all)."""
    together(folder, count, fit_together, config.model_dump_json(), shards, stop, str(folder))
    return json.loads((folder / "told.json").read_text())
