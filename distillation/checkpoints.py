"""Checkpoints of a training run: safetensors and readable JSON, no pickle, written beside the training and committed like any artifact.

Of a model that is cut among workers each one writes its part. Whatever number of workers wrote a checkpoint, any number reads it.
"""

from __future__ import annotations

import functools
import json
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distillation import store
from distillation.errors import InputError, StorageError
from distillation.sharding import Pieces, fill, is_cut, local, place, save_part
from distillation.storage import Storage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KEEP = 2
"""Newest checkpoints that stay: one more than is needed, in case the newest is damaged."""


Tensors = Mapping[str, dict[str, Tensor]]
"""weights and optimizer: tensors by name."""


@dataclass(frozen=True)
class Position:
    """How far a run is. Rows, learning rate and random numbers of every step follow from it."""

    step: int
    """Optimizer steps done."""
    epoch: int
    step_in_epoch: int


class Ranks(Protocol):
    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None

    def all_reduce(self, values: Tensor) -> Tensor: ...


class Checkpoints:
    """Those of one run, in one folder of the storage. All ranks restore the same one.

    Only rank 0 writes, or with a mesh every rank of the first replica its part, and rank 0 the manifest when all have.
    """

    def __init__(self, storage: Storage, folder: str, fingerprint: str, warn: Callable[[str], None] = print) -> None:
        self._storage, self._folder, self._fingerprint, self._warn = storage, folder, fingerprint, warn
        self._writer: threading.Thread | None = None
        self._failed: list[BaseException] = []
        self._writers: Any = None
        self.history: list[tuple[int, dict[str, float]]] = []
        """Points of the learning curves so far; the loop adds to it, checkpoints keep it."""
        self.factors: dict[str, float] = {}
        """Of the balanced terms of the loss, likewise."""

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, position: Position, session: Ranks) -> None:
        """Copy the state and write it in a thread. Waits for the one before; raises what went wrong with it."""
        if session.rank != 0 and session.mesh is None:
            return
        self.close()
        if session.mesh is not None and self._writers is None:  # a group of its own: the threads of writers meet beside the training
            self._writers = torch.distributed.new_group(backend="gloo")
        state = {"weights": _tensors(module), "optimizer": _moments(module, optimizer)}
        told = position, list(self.history), {"model": _settings(module), "factors": dict(self.factors)}
        if session.mesh is None:
            copies = {kind: {name: _copy(value) for name, value in tensors.items()} for kind, tensors in state.items()}
            self._writer = threading.Thread(target=self._guarded, args=(self._write, copies, *told), name="checkpoint")
        else:
            parts = {kind: _part(tensors, session.mesh) for kind, tensors in state.items()}
            self._writer = threading.Thread(target=self._guarded, args=(self._write_part, parts, session.rank, *told), name="checkpoint")
        self._writer.start()

    def begin(self, module: nn.Module) -> None:
        """Write what a run starts from as its checkpoint of step 0. Raises what went wrong."""
        copies: dict[str, dict[str, Tensor]] = {"weights": {n: value.detach() for n, value in _tensors(module).items()}, "optimizer": {}}
        self._write(copies, Position(0, 0, 0), [], {"model": _settings(module)})

    def wait(self) -> None:
        """Until what was saved is committed, or has failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def close(self) -> None:
        """Wait, and raise what went wrong."""
        self.wait()
        if self._failed:
            raise self._failed.pop()

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer, session: Ranks) -> Position | None:
        """Load the newest valid checkpoint of this very run. A damaged one is passed over with a warning, never deleted."""
        step = self._agreed(session)
        if step < 0:
            return None
        manifest, files = store.open_artifact(self._storage, self._name(step), "checkpoint")
        weights, moments = _pieces(files, "weights"), _pieces(files, "optimizer")
        there = moments.names()
        with torch.no_grad():
            for name, value in _tensors(module).items():
                fill(value, weights, name)
            for name, parameter in module.named_parameters():
                if f"{name}.exp_avg" not in there:
                    continue
                state = {"step": moments.read(f"{name}.step", 0, 1).to(parameter.device)}
                for leaf in ("exp_avg", "exp_avg_sq"):
                    state[leaf] = torch.zeros_like(parameter)
                    fill(state[leaf], moments, f"{name}.{leaf}")
                optimizer.state[parameter] = state
        self.history[:] = [(step, metrics) for step, metrics in json.loads(files["history.json"].read_text())]
        self.factors.update(manifest.facts.get("factors", {}))
        return Position(**manifest.facts["position"])

    def settings(self, session: Ranks) -> dict[str, Any] | None:
        """config.json of the model in the newest valid checkpoint of this very run; None where there is none."""
        if (step := self._agreed(session)) < 0:
            return None
        manifest = store.find(self._storage, self._name(step))
        assert manifest is not None
        return dict(manifest.facts["model"])

    def adopt(self, folder: str, step: int) -> None:
        """Go on from a checkpoint of the run whose checkpoints lie in `folder`; once, and not where this run is beyond it. Raises InputError."""
        mine, name = store.find(self._storage, self._name(step)), f"{folder}/{_step_name(step)}"
        if (mine is not None and mine.made_from.get("adopted") == folder) or any(later > step for later in self._steps()):
            return
        manifest, files = store.open_artifact(self._storage, name, "checkpoint")
        self._storage.delete(self._name(step))
        made_from = {"run": self._fingerprint, "step": step, "adopted": folder}
        source = files["weights.safetensors"].parent
        store.commit_folder(self._storage, self._name(step), source, "checkpoint", self._fingerprint, made_from, manifest.facts)

    def _guarded(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            write(*arguments)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, which raises it
            self._failed.append(error)

    def _write(self, tensors: Tensors, position: Position, history: list[Any], told: Mapping[str, Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="distillery-") as name:
            folder = Path(name)
            for kind, its in tensors.items():
                save_file(its, folder / f"{kind}.safetensors")
            (folder / "position.json").write_text(json.dumps(asdict(position)))
            (folder / "history.json").write_text(json.dumps(history))
            made_from, facts = {"run": self._fingerprint, "step": position.step}, {"position": asdict(position), **told}
            store.commit_folder(self._storage, self._name(position.step), folder, "checkpoint", self._fingerprint, made_from, facts)
        self._prune()

    def _write_part(
        self, parts: dict[str, tuple[dict[str, Tensor], dict[str, int]]], rank: int, position: Position, history: list[Any],
        told: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Write this rank's part; rank 0 waits for those of all others and writes the manifest."""
        folder, files = self._name(position.step), []
        failed: BaseException | None = None
        try:
            for kind, (tensors, starts) in parts.items():
                name = f"{kind}-{rank:05d}.safetensors"
                if tensors:
                    files.append(store.write_file(self._storage, folder, name, functools.partial(save_part, tensors, starts)))
        except BaseException as error:  # noqa: BLE001 - raised below, when the others know
            failed = error
        mine = [[file.model_dump() for file in files], failed is None]
        everybody = _exchange(json.dumps(mine), self._writers)
        if failed is not None:
            raise failed
        if not all(well for _, well in map(json.loads, everybody)):
            raise StorageError(
                "DST-5007", "part of a checkpoint cannot be written", where=self._storage.path(folder), expected="the parts of all workers",
                found="a worker that failed", do="Look at the errors of the other workers",
            )  # fmt: skip
        if rank != 0:
            return
        for name, text in (("position.json", json.dumps(asdict(position))), ("history.json", json.dumps(history))):
            files.append(store.write_file(self._storage, folder, name, functools.partial(Path.write_text, data=text)))
        others = [store.FileRecord(**each) for its, _ in map(json.loads, everybody[1:]) for each in its]
        made_from, facts = {"run": self._fingerprint, "step": position.step}, {"position": asdict(position), **told}
        whole = {"made_from": made_from, "files": (*files, *others), "facts": facts}
        store.commit(self._storage, folder, store.Manifest(kind="checkpoint", fingerprint=self._fingerprint, **whole))
        self._prune()

    def _prune(self) -> None:
        for step in self._steps()[:-KEEP]:
            self._storage.delete(self._name(step))

    def _agreed(self, session: Ranks) -> int:
        """Step of the newest valid checkpoint as rank 0 sees it; -1 where there is none."""
        newest = torch.tensor([self._newest() + 1 if session.rank == 0 else 0], dtype=torch.int64, device=session.device)
        return int(session.all_reduce(newest)[0]) - 1

    def _newest(self) -> int:
        for step in reversed(self._steps()):
            try:
                manifest, files = store.open_artifact(self._storage, self._name(step), "checkpoint")
                if manifest.fingerprint == self._fingerprint:
                    _pieces(files, "optimizer")
                    return step
                self._warn(f"checkpoint {self._name(step)} is of another run and passed over")
            except InputError as error:
                self._warn(f"checkpoint {self._name(step)} is passed over: {error}")
        return -1

    def _steps(self) -> list[int]:
        names = self._storage.list(self._folder)
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def _name(self, step: int) -> str:
        return f"{self._folder}/{_step_name(step)}"


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer by name; tensors shared under two names once."""
    saved = module.state_dict().keys()
    return {**dict(module.named_parameters()), **{name: value for name, value in module.named_buffers() if name in saved}}


def _moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[Any, dict[str, Tensor]] = optimizer.state
    return {f"{name}.{leaf}": value for name, p in module.named_parameters() if p in state for leaf, value in state[p].items()}


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _part(tensors: dict[str, Tensor], mesh: DeviceMesh) -> tuple[dict[str, Tensor], dict[str, int]]:
    """This rank's part of what a checkpoint holds, and its first rows; what is whole everywhere is the first rank's."""
    replica, shard = mesh.get_coordinate() or [0, 0]
    found, starts = {}, {}
    for name, value in tensors.items():
        start, stop = place(value)
        if replica == 0 and stop > start and (is_cut(value) or shard == 0):
            found[name], starts[name] = _copy(local(value)), start
    return found, starts


def _pieces(files: Mapping[str, Path], kind: str) -> Pieces:
    return Pieces([path for name, path in files.items() if name.startswith(kind) and name.endswith(".safetensors")])


def _settings(module: nn.Module) -> dict[str, Any]:
    """config.json of the model that is trained; empty for what is none of transformers."""
    config = getattr(getattr(module, "model", None), "config", None)
    return dict(json.loads(config.to_json_string(use_diff=False))) if config is not None else {}


def _exchange(text: str, group: Any) -> list[str]:
    """What every rank says, in the order of ranks."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    count = torch.distributed.get_world_size(group)
    sizes = torch.zeros(count, dtype=torch.int64)
    torch.distributed.all_gather_single(sizes, torch.tensor([len(mine)]), group=group)
    padded, everything = torch.zeros(int(sizes.max()), dtype=torch.uint8), torch.zeros(count * int(sizes.max()), dtype=torch.uint8)
    padded[: len(mine)] = mine
    torch.distributed.all_gather_single(everything, padded, group=group)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(everything.view(count, -1), sizes.tolist(), strict=True)]
