"""Build a student: from some of the teacher's layers, from scratch, from a folder, or as a probe on stored features.

Nothing here loads the teacher: the tensors a student starts from are read one by one from its safetensors files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def parameter_ratio(student_parameters: int, teacher_parameters: int) -> float:
    """R_p: parameters needed to serve the student over those of the teacher."""
    return student_parameters / teacher_parameters


# ------------------------------------------------------------------------------------------------------------- starts


def _cut(config: LayersStudent, teacher: Path, dropout: float | None) -> Any:
    """The teacher's architecture with fewer layers, every tensor taken from the teacher."""
    settings = _settings(teacher, dropout)
    layers = chosen_layers(config, settings.num_hidden_layers)
    settings.num_hidden_layers = len(layers)
    # Lists with one entry per layer (layer_types, ...) follow the cut.
    for name, value in settings.to_dict().items():
        if isinstance(value, list) and len(value) == models.read_config(teacher).get("num_hidden_layers", -1):
            setattr(settings, name, [value[i] for i in layers])
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
