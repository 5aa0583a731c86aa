"""Checkpoints of a training run: safetensors and readable JSON, no pickle, written beside the training and committed like any artifact."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distillation import store
from distillation.errors import InputError
from distillation.storage import Storage

KEEP = 2
"""Newest checkpoints that stay: one more than is needed, in case the newest is damaged."""


@dataclass(frozen=True)
class Position:
    """How far a run is. Rows, learning rate and random numbers of every step follow from it."""

    step: int
    """Optimizer steps done."""
    epoch: int
    step_in_epoch: int


class Ranks(Protocol):
    rank: int
    device: torch.device

    def all_reduce(self, values: Tensor) -> Tensor: ...


class Checkpoints:
    """Those of one run, in one folder of the storage. Only rank 0 writes; all ranks restore the same one."""

    def __init__(self, storage: Storage, folder: str, fingerprint: str, warn: Callable[[str], None] = print) -> None:
        self._storage, self._folder, self._fingerprint, self._warn = storage, folder, fingerprint, warn
        self._writer: threading.Thread | None = None
        self._failed: list[BaseException] = []
        self.history: list[tuple[int, dict[str, float]]] = []
        """Points of the learning curves so far; the loop adds to it, checkpoints keep it."""
        self.factors: dict[str, float] = {}
        """Of the balanced terms of the loss, likewise."""

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, position: Position, session: Ranks) -> None:
        """Copy the state and write it in a thread. Waits for the one before; raises what went wrong with it."""
        if session.rank != 0:
            return
        self.close()
        weights = {name: value.detach().to("cpu", copy=True) for name, value in _tensors(module).items()}
        moments = {name: value.detach().to("cpu", copy=True) for name, value in _moments(module, optimizer).items()}
        self._writer = threading.Thread(
            target=self._write, args=(weights, moments, position, list(self.history), dict(self.factors)), name="checkpoint"
        )
        self._writer.start()

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
        newest = torch.tensor([self._newest() if session.rank == 0 else 0], dtype=torch.int64, device=session.device)
        step = int(session.all_reduce(newest)[0])
        if step == 0:
            return None
        manifest, files = store.open_artifact(self._storage, self._name(step), "checkpoint")
        weights, moments = load_file(files["weights.safetensors"]), load_file(files["optimizer.safetensors"])
        with torch.no_grad():
            for name, value in _tensors(module).items():
                value.copy_(weights[name])
        for name, parameter in module.named_parameters():
            if f"{name}.exp_avg" in moments:
                optimizer.state[parameter] = {
                    leaf: moments[f"{name}.{leaf}"].to(parameter.device) for leaf in ("step", "exp_avg", "exp_avg_sq")
                }
        self.history[:] = [(step, metrics) for step, metrics in json.loads(files["history.json"].read_text())]
        self.factors.update(manifest.facts.get("factors", {}))
        return Position(**manifest.facts["position"])

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

    def _write(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor], position: Position, history: list[Any], factors: dict[str, float]
    ) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="distillery-") as name:
                folder = Path(name)
                save_file(weights, folder / "weights.safetensors")
                save_file(moments, folder / "optimizer.safetensors")
                (folder / "position.json").write_text(json.dumps(asdict(position)))
                (folder / "history.json").write_text(json.dumps(history))
                facts = {"position": asdict(position), "factors": factors}
                made_from = {"run": self._fingerprint, "step": position.step}
                store.commit_folder(self._storage, self._name(position.step), folder, "checkpoint", self._fingerprint, made_from, facts)
            for step in self._steps()[:-KEEP]:
                self._storage.delete(self._name(step))
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, which raises it
            self._failed.append(error)

    def _newest(self) -> int:
        for step in reversed(self._steps()):
            try:
                manifest, files = store.open_artifact(self._storage, self._name(step), "checkpoint")
                if manifest.fingerprint == self._fingerprint:
                    load_file(files["optimizer.safetensors"])
                    return step
                self._warn(f"checkpoint {self._name(step)} is of another run and passed over")
            except (InputError, SafetensorError) as error:
                self._warn(f"checkpoint {self._name(step)} is passed over: {error}")
        return 0

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
