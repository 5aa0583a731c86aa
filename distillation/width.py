"""Cut the width of a transformer in memory: hidden size, attention heads, feed-forward units, keeping those that matter most.

What matters is measured on real input with forward hooks, as in Minitron (Muralidharan et al. 2024, "Compact Language Models via Pruning
and Knowledge Distillation"). Nothing is trained here.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distillation.errors import ConfigError
from distillation.families import Places, family_of


@dataclass(frozen=True)
class Widths:
    """Sizes of a student; None is as in the teacher. A head is as wide as the teacher's: whole heads are cut."""

    hidden_size: int | None = None
    heads: int | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True)
class Importance:
    """How much each unit of a model does, on the CPU in double precision; more is kept longer. Lists have one entry per layer.

    hidden [hidden_size]: mean absolute value of a residual dimension after the layer norms, over tokens and norms.
    heads [heads]: mean length of what a head adds to the residual stream. intermediate [intermediate_size]: mean absolute activation of
    a unit times the length of its outgoing weights. pooled [hidden_size]: the same for what a pooler hands to the output layer; None
    where there is no such layer. shares [hidden_size] by the name of a norm: the mean square of each dimension after normalisation.
    """

    hidden: Tensor
    heads: tuple[Tensor, ...]
    intermediate: tuple[Tensor, ...]
    pooled: Tensor | None
    shares: Mapping[str, Tensor]


# -------------------------------------------------------------------------------------------------------------- sizes


def settings_for(config: Any, widths: Widths) -> Any:
    """A copy of a transformers configuration with these sizes.

    BERT, RoBERTa and GPT-2 derive the width of a head as hidden_size / heads and project back from hidden_size: for them hidden_size is
    heads * (the teacher's width of a head). One of the two given, the other follows; both given must agree. Llama-like models and ViT
    read a `head_dim`, so there the two are independent; Llama alone refuses to load a hidden_size that its heads do not divide.
    Grouped queries: heads that are a multiple of the size of a group cut whole groups, each with its key-value head; otherwise heads must
    be a multiple of the number of key-value heads, and every group loses as many.

    Raises InputError for another architecture, ConfigError for sizes that cannot be.
    """
    family, old = family_of(config), _sizes(config)
    hidden, heads = widths.hidden_size, widths.heads
    for name in ("hidden_size", "heads", "intermediate_size"):
        size, largest = getattr(widths, name), getattr(old, name)
        if size is not None and not 1 <= size <= largest:
            raise ConfigError(
                "DST-2021", "student cannot have this width", where=f"student.{name}", expected=f"1 to {largest}, as in the teacher",
                found=str(size), do="Name a size the teacher can be cut to",
            )  # fmt: skip
    if family.hidden_is_heads:
        if hidden is None and heads is not None:
            hidden = heads * old.head_dim
        elif heads is None and hidden is not None and hidden % old.head_dim == 0:
            heads = hidden // old.head_dim
    hidden, heads = hidden or old.hidden_size, heads or old.heads
    if family.hidden_is_heads and hidden != heads * old.head_dim:
        raise ConfigError(
            "DST-2023", "hidden size does not fit the heads", where="student.hidden_size",
            expected=f"{old.head_dim} for each head, as in the teacher: {heads * old.head_dim} with {heads} heads", found=str(hidden),
            do=f"Name a multiple of {old.head_dim}, and leave the heads out or give as many",
        )  # fmt: skip
    if family.heads_divide_hidden and hidden % heads:
        raise ConfigError(
            "DST-2023", "hidden size does not fit the heads", where="student.hidden_size", expected=f"a multiple of the {heads} heads",
            found=str(hidden), do="Change one of the two: this architecture refuses other sizes",
        )  # fmt: skip
    settings = copy.deepcopy(config)
    settings.hidden_size, settings.num_attention_heads = hidden, heads
    setattr(settings, family.intermediate_size, widths.intermediate_size or old.intermediate_size)
    if hasattr(settings, "num_key_value_heads"):
        settings.num_key_value_heads = _kv_heads(heads, old)
    if not family.hidden_is_heads and hidden != heads * old.head_dim:
        settings.head_dim = old.head_dim
    return settings


@dataclass(frozen=True)
class _Sizes:
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int


def _sizes(config: Any) -> _Sizes:
    hidden, heads = config.hidden_size, config.num_attention_heads
    return _Sizes(
        hidden_size=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate_size=getattr(config, family_of(config).intermediate_size) or 4 * hidden,  # None: GPT-2's default
    )


def _kv_heads(heads: int, old: _Sizes) -> int:
    group = old.heads // old.kv_heads
    if heads % group == 0:
        return heads // group
    if heads % old.kv_heads == 0:
        return old.kv_heads
    raise ConfigError(
        "DST-2022", "query heads do not fit the key-value heads", where="student.heads",
        expected=f"a multiple of {group} (whole groups) or of {old.kv_heads} (as many from every group)", found=str(heads),
        do="Name such a number of heads",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- importance


class _Sums:
    """Running means over the tokens of batches, by name."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.mask: Tensor | None = None

    def tokens(self, values: Tensor) -> Tensor:
        """[..., width] to [tokens, width] in fp32, without padding."""
        flat = values.detach().reshape(-1, values.shape[-1]).float()
        return flat if self.mask is None else flat[self.mask.reshape(-1)]

    def add(self, name: str, values: Tensor) -> None:
        """values: [tokens, width]."""
        total = values.sum(0, dtype=torch.float64).cpu()
        self.totals[name] = self.totals[name] + total if name in self.totals else total
        self.counts[name] += len(values)

    def mean(self, name: str) -> Tensor:
        assert self.counts[name], "there was no batch, or nothing but padding"
        return self.totals[name] / self.counts[name]


def measure(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Importance:
    """What the units of a model do on these inputs: dicts of what its forward takes (input_ids and attention_mask, or pixel_values).

    Padding does not count. The model is left as it was. Raises InputError for an architecture that cannot be cut.
    """
    sums, names = _Sums(), Places(model)
    modules = dict(model.named_modules())
    pooled = names.pooled()
    handles = [modules[name].register_forward_hook(partial(_on_norm, sums, name)) for name in names.norms()]
    for i in range(model.config.num_hidden_layers):
        attention, feed_forward = (names.in_layer(i, name) for name in (names.family.attention, names.family.feed_forward))
        grams = _head_grams(modules[attention], _sizes(model.config))
        handles.append(modules[attention].register_forward_pre_hook(partial(_on_heads, sums, f"heads {i}", grams)))
        handles.append(modules[feed_forward].register_forward_pre_hook(partial(_on_units, sums, f"intermediate {i}")))
    if pooled is not None:
        handles.append(modules[pooled].register_forward_pre_hook(partial(_on_pooled, sums)))
    was, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {name: value.to(device) for name, value in batch.items()}
                sums.mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was)
    layers = range(model.config.num_hidden_layers)
    return Importance(
        hidden=torch.stack([sums.mean(f"hidden {name}") for name in names.norms()]).mean(0),
        heads=tuple(sums.mean(f"heads {i}") for i in layers),
        intermediate=tuple(sums.mean(f"intermediate {i}") for i in layers),
        pooled=None if pooled is None else sums.mean("pooled"),
        shares={name: sums.mean(f"share {name}") for name in names.norms()},
    )


def _on_norm(sums: _Sums, name: str, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    sums.add(f"hidden {name}", sums.tokens(output).abs())
    squares = sums.tokens(inputs[0])
    if isinstance(norm, nn.LayerNorm):  # the others, RMS norms, do not centre
        squares = squares - squares.mean(1, keepdim=True)
    squares = squares**2
    sums.add(f"share {name}", squares / squares.mean(1, keepdim=True).clamp_min(1e-30))


def _on_heads(sums: _Sums, name: str, grams: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    context = sums.tokens(inputs[0]).reshape(-1, *grams.shape[:2])
    # |c W|^2 = c (W W^T) c: the contributions themselves would be [tokens, heads, hidden].
    sums.add(name, torch.einsum("thd,hde,the->th", context, grams, context).clamp_min(0).sqrt())


def _on_units(sums: _Sums, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    sums.add(name, sums.tokens(inputs[0]).abs() * _outgoing(module).norm(dim=1))


def _on_pooled(sums: _Sums, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    sums.add("pooled", inputs[0].detach().float().abs() * _outgoing(module).norm(dim=1))


def _head_grams(module: nn.Module, sizes: _Sizes) -> Tensor:
    """Inner products of the outgoing weights of each head: [heads, head_dim, head_dim]."""
    weights = _outgoing(module).reshape(sizes.heads, sizes.head_dim, -1)
    return weights @ weights.transpose(1, 2)


def _outgoing(module: Any) -> Tensor:
    """Weights [inputs, outputs] in fp32: a Linear stores them the other way round, GPT-2's Conv1D as they are."""
    weight: Tensor = module.weight.detach().float()
    return weight.T if isinstance(module, nn.Linear) else weight


# ---------------------------------------------------------------------------------------------------------------- cut


def cut_width(model: Any, widths: Widths, importance: Importance) -> Any:
    """A new fp32 model of the same class with these widths, on the same device: the most important units in their old order.

    One set of residual dimensions serves the whole model; heads and feed-forward units are chosen in each layer. A norm over fewer
    dimensions divides by the size of those alone, so its weight is scaled by the root of their mean square after the teacher's norm:
    what is kept comes out as large as before, and exactly so where the dimensions cut were zero (under an RMS norm).
    importance: of this model. Raises what `settings_for` raises.
    """
    places, settings = Places(model), settings_for(model.config, widths)
    settings.dtype = torch.float32
    old, new = _sizes(model.config), _sizes(settings)
    assert len(importance.heads) == settings.num_hidden_layers, "importance was measured on another model"
    kept = _kept_everywhere(importance, new), [_kept_in_layer(importance, i, old, new) for i in range(settings.num_hidden_layers)]
    tensors = {name: _cut_tensor(tensor, places.axes(name), kept) for name, tensor in model.state_dict().items()}
    if new.hidden_size < old.hidden_size:
        for name, share in importance.shares.items():
            tensors[f"{name}.weight"] *= share[kept[0]["hidden"]].mean().sqrt().to(tensors[f"{name}.weight"])
    with torch.random.fork_rng(devices=[]):  # what it starts with is overwritten: nobody else's random numbers should move
        student = type(model)(settings)
    student.load_state_dict(tensors)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(next(model.parameters()).device).train(model.training)


Kept = dict[str, Tensor]


def _kept_everywhere(importance: Importance, new: _Sizes) -> Kept:
    hidden = _top(importance.hidden, new.hidden_size)
    return {"hidden": hidden, "pooled": hidden if importance.pooled is None else _top(importance.pooled, new.hidden_size)}


def _kept_in_layer(importance: Importance, layer: int, old: _Sizes, new: _Sizes) -> Kept:
    group = old.heads // old.kv_heads
    by_group = importance.heads[layer].reshape(old.kv_heads, group)
    kv = _top(by_group.sum(1), new.kv_heads)
    heads = torch.cat([k * group + _top(by_group[k], new.heads // new.kv_heads) for k in kv.tolist()])
    units = {"heads": _units(heads, old.head_dim), "kv": _units(kv, old.head_dim)}
    units["qkv"] = torch.cat([units["heads"] + i * old.heads * old.head_dim for i in range(3)])  # GPT-2's are one tensor
    return {**units, "intermediate": _top(importance.intermediate[layer], new.intermediate_size)}


def _top(importance: Tensor, count: int) -> Tensor:
    """Places of the largest in ascending order; of equals the first."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _units(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _cut_tensor(tensor: Tensor, place: tuple[int | None, tuple[str, ...]], kept: tuple[Kept, list[Kept]]) -> Tensor:
    layer, axes = place
    places = kept[0] if layer is None else {**kept[0], **kept[1][layer]}
    cut = tensor.detach().float()
    assert cut.ndim == len(axes), f"{tuple(cut.shape)} is not {axes}"
    for dimension, axis in enumerate(axes):
        if axis != "-":
            cut = cut.index_select(dimension, places[axis].to(cut.device))
    return cut.clone()
