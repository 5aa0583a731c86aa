"""A model larger than one device: every weight is cut by rows among the workers of a mesh, and gathered layer by layer while it computes.

This is FSDP2 (`torch.distributed.fsdp.fully_shard`; ZeRO-3: Rajbhandari et al. 2020): each worker computes its own rows of the data, all of
them the same number of forward passes. Weights are read from safetensors a part at a time, so no process ever holds them all.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_parameter_registration_hook

from distillation import models
from distillation.config import TaskConfig
from distillation.errors import InputError
from distillation.network import Network

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FILE_BYTES = 1 << 29
"""Of a file of a finished model: what the worker that writes it holds of the whole at most, if no tensor alone is larger."""
BLOCK_BYTES = 1 << 18
"""Of a block of memory that a worker without a GPU gives back to the system as soon as it is free."""
STARTS = "starts"
"""In the header of a part: the first row of every tensor that is not whole there, as JSON."""


def mesh_of(world_size: int, shards: int | None, device: torch.device) -> DeviceMesh | None:
    """Workers as replicas x shards; None where every worker holds the whole model. shards: None for all workers together.

    Neighbours in rank hold one model. Every worker has to call it.
    """
    count = world_size if shards is None else shards
    assert world_size % count == 0, "the settings were checked"
    if count == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cpu":
        _give_memory_back()
    return init_device_mesh(device.type, (world_size // count, count), mesh_dim_names=("replicas", "shards"))


def outline(settings: Any, task: TaskConfig) -> Any:
    """A model with these settings whose parameters take no memory (meta device); its buffers are as they should be."""
    from transformers.initialization import no_init_weights

    def without_memory(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return parameter if parameter is None or parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    models.quiet()
    hook = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        with no_init_weights():
            model = models.new(settings, task)
        model.tie_weights()
    finally:
        hook.remove()
    return model


def split(network: Network, mesh: DeviceMesh, device: torch.device, *, training: bool) -> Network:
    """Cut a network without memory among a mesh and give this worker's part memory, not yet filled. In place.

    training: gradients are averaged over all workers of the mesh; else each replica stands alone. Raises InputError for a model that cannot
    be cut: one with batch norms, which would need the statistics of all workers, or without one list of layers.
    """
    from torch.distributed.fsdp import fully_shard

    model = network.model
    if any(isinstance(module, _BatchNorm) for module in network.modules()) or any(p.dim() == 0 for p in network.parameters()):
        raise InputError(
            "DST-3241", "architecture cannot be sharded", where=type(model).__name__, expected="weights of one dimension or more, no batch norms",
            found="batch norms or scalars", do="Set shards to 1",
        )  # fmt: skip
    on = mesh if training and mesh.size(0) > 1 else mesh["shards"]
    for unit in _units(network):
        fully_shard(unit, mesh=on)
    # What is left, with a head that losses use after the forward pass, stays gathered from the forward to the end of the backward pass.
    fully_shard(network, mesh=on, reshard_after_forward=False)
    shared: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            shared.setdefault(id(parameter), []).append((module, name))
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to_empty(device=device)
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    for (first, name), *others in shared.values():  # tied ones have become two
        for module, other in others:
            setattr(module, other, getattr(first, name))
    return network


def _give_memory_back() -> None:
    """Weights are read, and layers gathered, into memory that is taken and freed again and again. glibc would keep it, in pieces that the next
    does not fit into: the worker would grow by half of the whole model, or more. From before anything is read.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(-3, BLOCK_BYTES)  # M_MMAP_THRESHOLD


def _units(network: Network) -> list[nn.Module]:
    """What is gathered at once: each layer, and a large embedding unless it is the head, too."""
    model = network.model
    _, layers = models.layers_of(model)
    table = model.get_input_embeddings()
    counts = [id(parameter) for module in model.modules() for parameter in module._parameters.values() if parameter is not None]
    alone = isinstance(table, nn.Embedding) and counts.count(id(table.weight)) == 1
    return [*([table] if alone else []), *layers]


def load(
    folder: Path, network: Callable[[Any], Network], task: TaskConfig, mesh: DeviceMesh, device: torch.device, attention: str | None = None
) -> Network:  # fmt: skip
    """This worker's part of a trained model, for inference. network: what is made of the model. attention: implementation.

    Raises InputError as `models.load` does.
    """
    model, pieces = look(folder, task, attention)
    made = split(network(model), mesh, device, training=False)
    with torch.no_grad():
        for name, value in own_tensors(model).items():
            fill(value, pieces, name)
    return made.eval()


def look(folder: Path, task: TaskConfig, attention: str | None = None) -> tuple[Any, Pieces]:
    """Outline of the model in a folder, and its tensors. Raises InputError where one is missing or of another shape."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if attention:
        settings._attn_implementation = attention
    model, pieces = outline(settings, task), Pieces(sorted(folder.glob("*.safetensors")))
    if lost := sorted(name for name, value in own_tensors(model).items() if pieces.shape(name) != tuple(value.shape)):
        raise InputError(
            "DST-3207", "model lacks tensors", where=str(folder), expected="every tensor of the architecture, by its name",
            found=f"{len(lost)} missing or of another shape: {', '.join(lost[:4])}",
            do="Save the model again with save_pretrained; an architecture whose tensors are renamed as it is loaded (ViT) takes shards: 1",
        )  # fmt: skip
    return model, pieces


def own_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors of a model as its file has them: tied ones under one name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: value for name, value in model.state_dict().items() if name not in tied}


# --------------------------------------------------------------------------------------------------------------- tensors


def place(value: Any) -> tuple[int, int]:
    """First row of this worker's part of a tensor and the row after its last; of a whole tensor all of its rows."""
    if not is_cut(value):
        return 0, value.shape[0] if value.dim() else 1
    mesh, rows = value.device_mesh, value.shape[0]
    rank, count = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    each = -(-rows // count)
    found = min(rank * each, rows), min((rank + 1) * each, rows)
    assert found[1] - found[0] == local(value).shape[0]
    return found


def is_cut(value: Tensor) -> Any:
    """Whether it is a DTensor; asked this way, because importing that takes a second in every process."""
    return hasattr(value, "full_tensor")


def gathered(value: Any) -> Any:
    """The whole of a tensor. Every worker has to ask for it."""
    return value.full_tensor() if is_cut(value) else value


def local(value: Any) -> Any:
    """What this worker holds of a tensor."""
    return value.to_local() if is_cut(value) else value


def fill(value: Tensor, pieces: Pieces, name: str) -> None:
    """Read this worker's part of a tensor into place."""
    start, stop = place(value)
    if stop > start:
        local(value).copy_(pieces.read(name, start, stop))


class Pieces:
    """Tensors by name, whole or in parts along their first dimension, out of safetensors files that are open only while one is read.

    (A file that stays open stays mapped, and what was read of it counts as this process's memory.) Raises InputError for a damaged file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._where: dict[str, list[tuple[int, int, Path]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    starts = json.loads((file.metadata() or {}).get(STARTS, "{}"))
                    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (OSError, ValueError, SafetensorError) as error:
                raise InputError("DST-3206", "model cannot be loaded", where=str(path), found=str(error)) from error
            for name, shape in shapes.items():
                rows, before = shape[0] if shape else 1, self._shapes.get(name)
                self._where.setdefault(name, []).append((starts.get(name, 0), rows, path))
                self._shapes[name] = shape if before is None else (before[0] + rows, *shape[1:])

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the whole tensor; None where there is none of this name."""
        return self._shapes.get(name)

    def whole(self, name: str) -> Tensor:
        return self.read(name, 0, (self._shapes[name] or (1,))[0])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; a tensor without dimensions counts as one row. A copy."""
        found = []
        for first, rows, path in sorted(self._where[name]):
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                with safe_open(path, framework="pt") as file:
                    whole = file.get_tensor(name) if not self._shapes[name] else file.get_slice(name)[low - first : high - first]
                    found.append(whole.clone())
        return found[0] if len(found) == 1 else torch.cat(found)


def save_part(tensors: Mapping[str, Tensor], starts: Mapping[str, int], path: Path) -> None:
    """Write parts of tensors. starts: the first row of each that is not whole."""
    save_file(dict(tensors), path, {STARTS: json.dumps(dict(starts))})


def whole_tensor(_: str, value: Tensor) -> Tensor:
    """A whole tensor of a sharded model. Every worker has to ask for it."""
    whole: Tensor = gathered(value).detach().cpu()
    return whole


def save_model(model: Any, folder: Path | None, whole: Callable[[str, Tensor], Tensor] = whole_tensor) -> None:
    """Write a sharded model as save_pretrained does; every worker has to call it, one with a folder. Holds `FILE_BYTES` at a time.

    whole: what to write for a tensor of the model.
    """
    tensors = own_tensors(model)
    files: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        if files[-1] and size + value.numel() * value.element_size() > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += value.numel() * value.element_size()
    names = ["model.safetensors"] if len(files) == 1 else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for path, chosen in zip(names, files, strict=True):
        kept = {}
        for name in chosen:
            value = whole(name, tensors[name])
            if folder is not None:
                kept[name] = value
        if folder is not None:
            save_file(kept, folder / path, {"format": "pt"})
    if folder is None:
        return
    if len(files) > 1:
        where = {name: path for path, chosen in zip(names, files, strict=True) for name in chosen}
        total = sum(value.numel() * value.element_size() for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def release(module: nn.Module) -> None:
    """After forward passes without a backward pass: give back what was gathered and kept."""
    if (reshard := getattr(module, "reshard", None)) is not None:
        reshard()
