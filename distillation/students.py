"""Build a student: from some of the teacher's layers, from scratch, from a folder, or as a probe on stored features.

Nothing here loads the teacher: the tensors a student starts from are read one by one from its safetensors files.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distillation import models
from distillation.config import (
    ConvolutionalStudent,
    ImageClassification,
    LayersStudent,
    PretrainedStudent,
    ProbeStudent,
    ScratchStudent,
    StudentConfig,
    TaskConfig,
)
from distillation.errors import ConfigError, InputError
from distillation.network import output_head
from distillation.signals import Outputs
from distillation.vocabulary import trim_embeddings
from distillation.width import Widths, cut_width, measure, settings_for


def chosen_layers(config: LayersStudent, depth: int) -> list[int]:
    """Which layers of a teacher with `depth` layers a student keeps, counted from 0.

    even: round(i * (depth - 1) / (count - 1)), halves down; a single layer is the first. Raises ConfigError where the teacher has too few.
    """
    if config.layers is not None:
        layers = list(config.layers)
    elif config.count is None:
        layers = list(range(depth))
    else:
        count = config.count
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
    config: StudentConfig, teacher: Path | None, task: TaskConfig, labels: Sequence[str], *, dropout: float | None, seed: int,
    attention: str | None = None, sample: Callable[[int], Iterable[Mapping[str, Tensor]]] | None = None, kept: np.ndarray | None = None,
) -> Any:  # fmt: skip
    """A model of transformers, fp32; of a probe a `Probe`.

    teacher: its save_pretrained folder; None only for a pretrained student (and the teacher's own training). attention: implementation, as
    transformers names it. sample: batches of so many rows, for a cut in width. kept: ids of the tokens that a trimmed vocabulary keeps.
    The same seed gives the same start.
    """
    torch.manual_seed(seed)
    if isinstance(config, PretrainedStudent):
        folder = models.locate(config.model, revision=config.revision, pickled_weights=config.pickled_weights)
        return models.load(folder, task, labels, dropout=dropout, pickled=config.pickled_weights, attention=attention)
    assert teacher is not None
    if isinstance(config, ProbeStudent):
        return Probe(teacher, task, len(labels))
    settings = _settings(teacher, dropout)
    if attention:
        settings._attn_implementation = attention
    if not isinstance(config, LayersStudent):
        return _scratch(config, settings, teacher, task)
    model = _cut(config, settings, teacher, task)
    if config.cuts_width:
        assert sample is not None
        model = cut_width(model, widths_of(config), measure(model.eval(), sample(config.sample)))
    return trim_embeddings(model, kept) if kept is not None else model


def require_buildable(config: StudentConfig, model: Path, task: TaskConfig) -> None:
    """Raise now what `build_student` would raise after the teacher was trained. model: the folder the teacher starts from; no tensor is read."""
    if isinstance(config, LayersStudent | ScratchStudent | ConvolutionalStudent):
        settings = _settings(model, None)
        if isinstance(config, LayersStudent):
            if config.cuts_width:
                settings_for(settings, widths_of(config))
            with torch.device("meta"):
                models.layers_of(models.new(settings, task))
        else:
            _resize(settings, config, model)


class Probe(nn.Module):
    """A linear layer on the teacher's stored pooled output. Exported, it is the teacher with this layer as its head."""

    def __init__(self, teacher: Path, task: TaskConfig, classes: int) -> None:
        super().__init__()
        self._teacher, self._task = teacher, task
        settings = _settings(teacher, None)
        with torch.device("meta"):
            head = output_head(models.new(settings, task))
        self.head = nn.Linear(head.in_features, classes, bias=head.bias is not None)

    def forward(
        self, inputs: Mapping[str, Tensor], scored: Tensor, tokens: Tensor, lengths: Tensor, pooled: Tensor | None = None
    ) -> Outputs:
        assert pooled is not None, "the job was checked: a probe needs stored pooled output"
        return Outputs(self.head(pooled.to(self.head.weight.dtype)))

    def whole_model(self) -> Any:
        """The model that serves: reads the teacher's weights, once, at the end of the training."""
        model = models.load(self._teacher, self._task)
        output_head(model).load_state_dict(self.head.state_dict())
        return model


# -------------------------------------------------------------------------------------------------------------- sizes


def widths_of(config: LayersStudent) -> Widths:
    return Widths(config.hidden_size, config.heads, config.intermediate_size)


def cut_config(config: LayersStudent, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a teacher at the widths of a student. Raises what `settings_for` raises."""
    from transformers import AutoConfig

    found: dict[str, Any] = settings_for(AutoConfig.for_model(**teacher), widths_of(config)).to_dict()
    return found


def outline(config: StudentConfig, model: Path, task: TaskConfig, labels: Sequence[str], vocabulary: int | None = None) -> nn.Module:
    """The network of a student on the meta device: every shape, no tensor read or filled. A probe is the whole teacher with its head.

    model: folder of the teacher, or of what it starts from; how many labels that has does not matter. vocabulary: of a
    student whose vocabulary is trimmed. Raises what `build_student` raises about settings that do not fit.
    """
    if isinstance(config, PretrainedStudent):
        model = models.locate(config.model, revision=config.revision, pickled_weights=config.pickled_weights)
    settings = _settings(model, None)
    if isinstance(config, LayersStudent):
        _keep_layers(settings, chosen_layers(config, models.depth_of(settings.to_dict()) or 0))
        settings = settings_for(settings, widths_of(config)) if config.cuts_width else settings
        if vocabulary and config.trim_vocabulary:
            settings.vocab_size = vocabulary
            if getattr(settings, "pad_token_id", None) is not None:
                settings.pad_token_id = min(settings.pad_token_id, vocabulary - 1)  # only its being there matters to sizes
    elif isinstance(config, ScratchStudent | ConvolutionalStudent):
        _resize(settings, config, model)
    models.set_labels(settings, task, labels)
    with torch.device("meta"):
        network: nn.Module = models.new(settings, task).eval()
    return network


def size_of(
    config: StudentConfig, model: Path, task: TaskConfig, labels: Sequence[str], tokens: int, vocabulary: int | None = None
) -> dict[str, float]:
    """What serving a student takes, known before it is trained: parameters, bytes of its fp32 weights, flops of a row of `tokens` tokens.

    Arguments and errors as of `outline`. As `inference.cost` finds them, but for the header of the file.
    """
    try:
        return _size_of(outline(config, model, task, labels, vocabulary), task, tokens)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # what architectures say to sizes they do not take
        raise InputError(
            "DST-3210", "architecture cannot be built at these sizes", where=str(model), found=f"{type(error).__name__}: {error}"[:300],
            do="Use other sizes, or a student of another type",
        ) from error  # fmt: skip


def size_of_trained(folder: Path, task: TaskConfig, tokens: int) -> dict[str, float]:
    """As `size_of`, of a model in a folder, of which no weight is read."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        network = models.new(settings, task).eval()
    return _size_of(network, task, tokens)


def _size_of(network: Any, task: TaskConfig, tokens: int) -> dict[str, float]:
    distinct = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}  # shared ones are written once
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in distinct.values()),
        "flops": _flops_of_outline(network, task, tokens),
    }


def _flops_of_outline(network: Any, task: TaskConfig, tokens: int) -> int:
    network.config.use_cache = False  # makes real tensors
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return flops(network, _one_row(task, tokens, "meta"))
    except RuntimeError:  # an architecture that looks at values, such as longformer: zeros do, and bart's end of a text
        network.to_empty(device="cpu")
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.zero_()
        row = _one_row(task, tokens, "cpu")
        if "input_ids" in row:
            row["input_ids"][:, -1] = network.config.eos_token_id or 0
        return flops(network, row)


def _one_row(task: TaskConfig, tokens: int, device: str) -> dict[str, Tensor]:
    if isinstance(task, ImageClassification):
        return {"pixel_values": torch.zeros(1, task.channels, task.size, task.size, device=device)}
    row = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def flops(model: Any, row: Mapping[str, Tensor]) -> int:
    """Of the matrix products of one forward pass; a product and a sum are two."""
    # The fused attention kernel of the CPU has no formula in the counter and would count as nothing; the plain one is matrix products.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**row)
    return int(counter.get_total_flops())


def label(config: StudentConfig, depth: int) -> str:
    """A student's size in a few characters, for people: L2, L4H312, a model's name, probe. depth: layers of the teacher."""
    if isinstance(config, LayersStudent):
        sizes = (("H", config.hidden_size), ("A", config.heads), ("F", config.intermediate_size))
        width = "".join(f"{letter}{size}" for letter, size in sizes if size is not None)
        return f"L{len(chosen_layers(config, depth))}{width}{'v' if config.trim_vocabulary else ''}"
    if isinstance(config, ScratchStudent):
        return f"L{config.layers}H{config.hidden_size}"
    if isinstance(config, ConvolutionalStudent):
        return f"D{sum(config.depths)}W{config.hidden_sizes[-1]}"
    if isinstance(config, ProbeStudent):
        return "probe"
    name = re.split(r"[/:]", config.model.rstrip("/"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:16].strip("-._") or "pretrained"


def parameter_ratio(student_parameters: int, teacher_parameters: int) -> float:
    """R_p: parameters needed to serve the student over those of the teacher."""
    return student_parameters / teacher_parameters


# ------------------------------------------------------------------------------------------------------------- starts


def _cut(config: LayersStudent, settings: Any, teacher: Path, task: TaskConfig) -> Any:
    """The teacher's architecture with fewer layers, every tensor taken from the teacher."""
    layers = chosen_layers(config, models.depth_of(settings.to_dict()) or 0)
    _keep_layers(settings, layers)
    model = models.new(settings, task)
    prefix, _ = models.layers_of(model)
    tensors = Tensors(teacher)
    state, tied = {}, set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in model.state_dict():
        source = name
        if name.startswith(f"{prefix}."):
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            source = f"{prefix}.{layers[int(number)]}.{rest}"
        if name not in tied:
            state[name] = tensors.read(source)
    model.load_state_dict(state, strict=False)  # `read` raises where one is missing; tied ones are the same tensor
    return model


def _keep_layers(settings: Any, layers: Sequence[int]) -> None:
    """Lists with one entry per layer (layer_types, ...) follow the cut."""
    depth = models.depth_of(settings.to_dict())
    if hasattr(settings, "num_hidden_layers"):
        settings.num_hidden_layers = len(layers)
    for name, value in settings.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(settings, name, [value[i] for i in layers])


def _scratch(config: ScratchStudent | ConvolutionalStudent, settings: Any, teacher: Path, task: TaskConfig) -> Any:
    _resize(settings, config, teacher)
    return models.new(settings, task)


def _resize(settings: Any, config: ScratchStudent | ConvolutionalStudent, teacher: Path) -> None:
    if isinstance(config, ConvolutionalStudent):
        sizes: dict[str, Any] = {
            "depths": list(config.depths), "hidden_sizes": list(config.hidden_sizes),
            "embedding_size": config.embedding_size or config.hidden_sizes[0],
        }  # fmt: skip
    else:
        sizes = {
            "num_hidden_layers": config.layers, "hidden_size": config.hidden_size, "num_attention_heads": config.heads,
            "intermediate_size": config.intermediate_size,
        }  # fmt: skip
        if not hasattr(settings, "intermediate_size") and hasattr(settings, "n_inner"):
            sizes["n_inner"] = sizes.pop("intermediate_size")
        if hasattr(settings, "num_key_value_heads"):
            sizes["num_key_value_heads"] = config.heads
        if hasattr(settings, "head_dim"):
            sizes["head_dim"] = config.hidden_size // config.heads
    for name, value in sizes.items():
        if not hasattr(settings, name):
            raise InputError(
                "DST-3210", "architecture cannot be built at other sizes", where=str(teacher), expected=name, found="no such size",
                do="Use a student of another type",
            )  # fmt: skip
        setattr(settings, name, value)
    if isinstance(config, ConvolutionalStudent):
        settings.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(config.depths)))]
        settings.out_features = settings.stage_names[-1:]  # of the teacher's, which may have more stages


def _settings(teacher: Path, dropout: float | None) -> Any:
    from transformers import AutoConfig

    settings = copy.deepcopy(AutoConfig.from_pretrained(teacher, trust_remote_code=False, local_files_only=True))
    if dropout is not None:
        models.set_dropout(settings, dropout)
    return settings


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
