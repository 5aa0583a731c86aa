"""Build a student: from some of the teacher's layers, from scratch, from a folder, or as a probe on stored features.

Nothing here loads the teacher: the tensors a student starts from are read one by one from its safetensors files.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distillation import models
from distillation.config import LayersStudent, PretrainedStudent, ProbeStudent, ScratchStudent, StudentConfig
from distillation.errors import ConfigError, InputError
from distillation.signals import Classifier, Outputs, output_head


def chosen_layers(config: LayersStudent, depth: int) -> list[int]:
    """Which layers of a teacher with `depth` layers a student keeps, counted from 0.

    even: round(i * (depth - 1) / (count - 1)), halves down; a single layer is the first. Raises ConfigError where the teacher has too few.
    """
    if config.layers is not None:
        layers = list(config.layers)
    else:
        count = config.count or 0
        if count > depth:
            layers = list(range(count))
        elif config.choose in ("even", None):
            layers = [(2 * i * (depth - 1) + count - 2) // (2 * (count - 1)) for i in range(count)] if count > 1 else [0]
        else:
            layers = list(range(count)) if config.choose == "first" else list(range(depth - count, depth))
    if layers[-1] >= depth:
        raise ConfigError(
            "DST-2011", "teacher has no such layer", where="student.layers", expected=f"layers 0 to {depth - 1}", found=str(layers[-1]),
            do="Name other layers, or fewer",
        )  # fmt: skip
    return layers


def build_student(
    config: StudentConfig, teacher: Path | None, labels: Sequence[str], *, report_layers: Sequence[int], dropout: float | None, seed: int
) -> nn.Module:
    """A module from (input_ids, attention_mask, pooled) to `Outputs` that reports the hidden states of `report_layers`.

    teacher: its save_pretrained folder; None only for a pretrained student (and the teacher's own training).
    The same seed gives the same start.
    """
    torch.manual_seed(seed)
    if isinstance(config, PretrainedStudent):
        folder = models.locate(config.model, revision=config.revision, pickled_weights=config.pickled_weights)
        model = models.load_classifier(folder, labels, dropout=dropout, pickled=config.pickled_weights)
    elif isinstance(config, ProbeStudent):
        assert teacher is not None
        return Probe(teacher, len(labels))
    else:
        assert teacher is not None
        model = _cut(config, teacher, dropout) if isinstance(config, LayersStudent) else _scratch(config, teacher, dropout)
    depth = model.config.num_hidden_layers
    if report_layers and max(report_layers) >= depth:
        raise ConfigError(
            "DST-2012", "student has no such layer", where="losses", expected=f"layers 0 to {depth - 1}", found=str(max(report_layers)),
            do="Change the layer map of the loss",
        )  # fmt: skip
    return Classifier(model, layers=report_layers)


def require_buildable(config: StudentConfig, model: Path) -> None:
    """Raise now what `build_student` would raise after the teacher was trained. model: the folder the teacher starts from; no tensor is read."""
    if isinstance(config, PretrainedStudent):
        models.require_same_vocabulary(models.locate(config.model, revision=config.revision, pickled_weights=config.pickled_weights), model)
    elif isinstance(config, LayersStudent | ScratchStudent):
        settings = _settings(model, None)
        if isinstance(config, ScratchStudent):
            _resize(settings, config, model)
        else:
            with torch.device("meta"):
                _layer_list(_new(settings), settings.num_hidden_layers, model)


class Probe(nn.Module):
    """A linear layer on the teacher's stored pooled output. Exported, it is the teacher with this layer as its head."""

    def __init__(self, teacher: Path, classes: int) -> None:
        super().__init__()
        self._teacher = teacher
        self.head = nn.Linear(_head_width(teacher), classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pooled: Tensor | None) -> Outputs:
        assert pooled is not None, "the job was checked: a probe needs stored pooled output"
        return Outputs(self.head(pooled.to(self.head.weight.dtype)))

    def whole_model(self) -> Any:
        """The model that serves: reads the teacher's weights, once, at the end of the training."""
        model = models.load_classifier(self._teacher)
        output_head(model).load_state_dict(self.head.state_dict())
        return model


# -------------------------------------------------------------------------------------------------------------- sizes


def outline(config: StudentConfig, model: Path, labels: Sequence[str]) -> nn.Module:
    """The network of a student on the meta device: every shape, no tensor read or filled. A probe is the whole teacher with its head.

    model: folder of the teacher, or of what it starts from; how many labels that has does not matter. Raises what `build_student` raises
    about settings that do not fit.
    """
    if isinstance(config, PretrainedStudent):
        model = models.locate(config.model, revision=config.revision, pickled_weights=config.pickled_weights)
    settings = _settings(model, None)
    if isinstance(config, LayersStudent):
        _keep_layers(settings, chosen_layers(config, settings.num_hidden_layers))
    elif isinstance(config, ScratchStudent):
        _resize(settings, config, model)
    settings.id2label, settings.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    with torch.device("meta"):
        network: nn.Module = _new(settings).eval()
    return network


def size_of(config: StudentConfig, model: Path, labels: Sequence[str], tokens: int) -> dict[str, float]:
    """What serving a student takes, known before it is trained: parameters, bytes of its fp32 weights, flops of a row of `tokens` tokens.

    Arguments and errors as of `outline`. As `inference.cost` finds them, but for the header of the file.
    """
    try:
        return _size_of(outline(config, model, labels), tokens)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # what architectures say to sizes they do not take
        raise InputError(
            "DST-3210", "architecture cannot be built at these sizes", where=str(model), found=f"{type(error).__name__}: {error}"[:300],
            do="Use other sizes, or a student of another type",
        ) from error  # fmt: skip


def _size_of(network: Any, tokens: int) -> dict[str, float]:
    distinct = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}  # shared ones are written once
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in distinct.values()),
        "flops": _flops_of_outline(network, tokens),
    }


def _flops_of_outline(network: Any, tokens: int) -> int:
    network.config.use_cache = False  # makes real tensors
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            row = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
            return flops(network, {"input_ids": row, "attention_mask": torch.ones_like(row)})
    except RuntimeError:  # an architecture that looks at values, such as longformer: zeros do, and bart's end of a text
        network.to_empty(device="cpu")
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.zero_()
        row = torch.zeros(1, tokens, dtype=torch.int64)
        row[:, -1] = network.config.eos_token_id or 0
        return flops(network, {"input_ids": row, "attention_mask": torch.ones_like(row)})


def flops(model: Any, row: dict[str, Tensor]) -> int:
    """Of the matrix products of one forward pass; a product and a sum are two."""
    # The fused attention kernel of the CPU has no formula in the counter and would count as nothing; the plain one is matrix products.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**row)
    return int(counter.get_total_flops())


def label(config: StudentConfig, depth: int) -> str:
    """A student's size in a few characters, for people: L2, L4H312, a model's name, probe. depth: layers of the teacher."""
    if isinstance(config, LayersStudent):
        return f"L{len(chosen_layers(config, depth))}"
    if isinstance(config, ScratchStudent):
        return f"L{config.layers}H{config.hidden_size}"
    if isinstance(config, ProbeStudent):
        return "probe"
    name = re.split(r"[/:]", config.model.rstrip("/"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:16].strip("-._") or "pretrained"


def parameter_ratio(student_parameters: int, teacher_parameters: int) -> float:
    """R_p: parameters needed to serve the student over those of the teacher."""
    return student_parameters / teacher_parameters


# ------------------------------------------------------------------------------------------------------------- starts


def _cut(config: LayersStudent, teacher: Path, dropout: float | None) -> Any:
    """The teacher's architecture with fewer layers, every tensor taken from the teacher."""
    settings = _settings(teacher, dropout)
    layers = chosen_layers(config, settings.num_hidden_layers)
    _keep_layers(settings, layers)
    model = _new(settings)
    prefix = _layer_list(model, len(layers), teacher)
    tensors = Tensors(teacher)
    state = {}
    for name in model.state_dict():
        source = name
        if name.startswith(f"{prefix}."):
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            source = f"{prefix}.{layers[int(number)]}.{rest}"
        state[name] = tensors.read(source)
    model.load_state_dict(state)
    return model


def _keep_layers(settings: Any, layers: Sequence[int]) -> None:
    """Lists with one entry per layer (layer_types, ...) follow the cut."""
    depth, settings.num_hidden_layers = settings.num_hidden_layers, len(layers)
    for name, value in settings.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(settings, name, [value[i] for i in layers])


def _scratch(config: ScratchStudent, teacher: Path, dropout: float | None) -> Any:
    settings = _settings(teacher, dropout)
    _resize(settings, config, teacher)
    return _new(settings)


def _resize(settings: Any, config: ScratchStudent, teacher: Path) -> None:
    sizes = {
        "num_hidden_layers": config.layers, "hidden_size": config.hidden_size, "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size,
    }  # fmt: skip
    for name, value in sizes.items():
        if not hasattr(settings, name):
            raise InputError(
                "DST-3210", "architecture cannot be built at other sizes", where=str(teacher), expected=name, found="no such size"
            )
        setattr(settings, name, value)


def _settings(teacher: Path, dropout: float | None) -> Any:
    from transformers import AutoConfig

    settings = copy.deepcopy(AutoConfig.from_pretrained(teacher, trust_remote_code=False, local_files_only=True))
    if dropout is not None:
        models.set_dropout(settings, dropout)
    return settings


def _new(settings: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(settings, trust_remote_code=False, dtype=torch.float32)


def _layer_list(model: Any, depth: int, teacher: Path) -> str:
    """Name of the module list that holds the layers."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise InputError(
            "DST-3211", "architecture cannot be cut into layers", where=str(teacher), expected="one list of layers",
            found=", ".join(lists) or "none", do="Use a scratch or pretrained student",
        )  # fmt: skip
    return str(lists[0])


def _head_width(teacher: Path) -> int:
    """Inputs of the teacher's output layer, read from its weights."""
    settings = _settings(teacher, None)
    with torch.device("meta"):
        return output_head(_new(settings)).in_features


class Tensors:
    """Tensors of a safetensors folder by name, sharded or not, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        self._folder = folder
        try:
            files: list[Any] = [safe_open(folder / Path(name).name, framework="pt") for name in names]
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError("DST-3206", "model cannot be loaded", where=str(folder), found=str(error)) from error
        self._where = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """Raises InputError where there is no such tensor."""
        if name not in self._where:
            raise InputError("DST-3207", "model lacks tensors", where=str(self._folder), expected=name, found="no such tensor")
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor
