"""A transformers model as losses want it: what it says at the scored positions and, on request, its inner states.

Inner states are taken by hooks on the layers themselves, so that the last one is compared as the others are: before a final norm.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillation.augment import PARTNER, SHARE
from distillation.config import DenseLogits, Embedding, Features, LogitsConfig, SampledLogits, TaskConfig, TopKLogits
from distillation.errors import InputError
from distillation.models import label_names, label_order, layers_of
from distillation.signals import Batch, Outputs, TeacherSignal, count_answers
from distillation.tasks import TASKS


class Network(nn.Module):
    """`model` for a task. forward(inputs, scored, tokens, lengths, pooled of the teacher) -> Outputs; see `Batch`."""

    def __init__(
        self, model: Any, task: TaskConfig, *, layers: Sequence[int] = (), at: str = "scored", pooled: bool = False,
        relations: int | None = None, attentions: bool = False, projections: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> None:  # fmt: skip
        """layers: whose outputs are reported. at: of every scored position or of all tokens. relations: layer of queries, keys, values.

        projections: loss term -> (how many, from width, to width); its first are those of `layers` or the pooled output, see `losses`.
        """
        super().__init__()
        self.model, self.task = model, task
        self.layers, self.at, self.pooled, self.relations, self.attentions = tuple(layers), at, pooled, relations, attentions
        self.lazy = TASKS[task.type].lazy
        self._asked: dict[str, bool] = {"output_attentions": True} if attentions else {}
        if "use_cache" in inspect.signature(model.forward).parameters:
            # With a cache transformers does not look where packed rows end, and each would attend to those before it.
            self._asked["use_cache"] = False
        self._heads = () if isinstance(task, Embedding) else (output_head(model),)  # in a tuple: it is a module of the model already
        if isinstance(task, Embedding) and isinstance(pooler := getattr(model, "pooler", None), nn.Module):
            pooler.requires_grad_(False)  # nothing reads it: several workers would wait for its gradient
        self.projections = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Linear(narrow, wide, bias=False) for _ in range(count)])
                for name, (count, narrow, wide) in (projections or {}).items()
            }
        )
        self.picks: dict[str, list[int]] = {}
        """Of each projection: the place of its layers in `layers`; empty: the pooled output."""

    @property
    def head(self) -> Any:
        """The linear layer that makes the logits; None for embeddings."""
        return self._heads[0] if self._heads else None

    def forward(self, inputs: Mapping[str, Tensor], scored: Tensor, tokens: Tensor, lengths: Tensor, _: Tensor | None = None) -> Outputs:
        with contextlib.ExitStack() as stack:
            states = stack.enter_context(_input_of(self.head, skip=self.lazy)) if self.head is not None else []
            seen = stack.enter_context(_outputs_of(self._modules_of_layers()))
            related = stack.enter_context(_outputs_of(self._modules_of_relations()))
            result = self.model(**self._mixed(inputs), **self._asked)
        images, logits, read, pooled = "pixel_values" in inputs, None, None, None
        places = scored if self.at == "scored" else tokens
        hidden = torch.stack([_at(value, places, images) for value in seen], dim=1) if self.layers else None
        if self.head is None:
            pooled = self._embedding(result, tokens, lengths, scored)
        else:
            # A decoder's head reads every token, also where the answer is that of the last one.
            read = _flat(states[0])[scored] if states[0].dim() == 3 else states[0].flatten(1)
            logits, pooled = (None if self.lazy else result.logits), (read if self.pooled else None)
        relations = tuple(_flat(value)[tokens] for value in _three(related)) if self.relations is not None else ()
        attentions = torch.stack([result.attentions[i] for i in self.layers], dim=1) if self.attentions else None
        projected = self._projected(hidden, pooled)
        near = next((value[:, 0] for name, value in projected.items() if not self.picks[name]), None)
        return Outputs(
            logits, read if self.lazy else None, self.head if self.lazy else None, hidden, pooled, relations, attentions,
            projected, near, self.layers, torch.is_autocast_enabled(scored.device.type),
        )  # fmt: skip

    def _mixed(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of a mixed batch (see `augment`) the pixels, or this model's own embeddings of the tokens, mixed."""
        if PARTNER not in inputs:
            return inputs
        partner, plain = inputs[PARTNER], {name: value for name, value in inputs.items() if name not in (PARTNER, SHARE)}
        source = plain.pop("pixel_values") if "pixel_values" in plain else self.model.get_input_embeddings()(plain.pop("input_ids"))
        share = inputs[SHARE].view(-1, *[1] * (source.dim() - 1)).to(source.dtype)
        if "attention_mask" in plain:
            plain["attention_mask"] = plain["attention_mask"] | plain["attention_mask"][partner]
        return {**plain, "pixel_values" if source.dim() == 4 else "inputs_embeds": share * source + (1 - share) * source[partner]}

    def _embedding(self, result: Any, tokens: Tensor, lengths: Tensor, scored: Tensor) -> Tensor:
        assert isinstance(self.task, Embedding)
        states = _flat(result.last_hidden_state)
        if self.task.pooling == "first":
            return states[scored]
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        sums = torch.zeros(len(lengths), states.shape[1], device=states.device, dtype=torch.float32)
        return sums.index_add(0, rows, states[tokens].float()) / lengths[:, None]

    def _projected(self, hidden: Tensor | None, pooled: Tensor | None) -> dict[str, Tensor]:
        found = {}
        for name, each in self.projections.items():
            assert isinstance(each, nn.ModuleList)
            sources = [hidden[:, place] for place in self.picks[name]] if self.picks[name] and hidden is not None else [pooled]
            found[name] = torch.stack([one(source) for one, source in zip(each, sources, strict=True)], dim=1)
        return found

    def _modules_of_layers(self) -> list[nn.Module]:
        if not self.layers:
            return []
        _, modules = layers_of(self.model)
        return [modules[i] for i in self.layers]

    def _modules_of_relations(self) -> list[nn.Module]:
        if self.relations is None:
            return []
        _, modules = layers_of(self.model)
        return relation_modules(modules[self.relations])


def relation_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that make queries, keys and values: three, or one that makes all. Raises InputError if there are none."""
    found: list[nn.Module] = []
    for pattern in (r"(^|\.)(query|q_proj|q_lin|q)$", r"(^|\.)(key|k_proj|k_lin|k)$", r"(^|\.)(value|v_proj|v_lin|v)$"):
        found += [module for name, module in layer.named_modules() if re.search(pattern, name)][:1]
    if len(found) == 3:
        return found
    if fused := [module for name, module in layer.named_modules() if re.search(r"(^|\.)(c_attn|qkv)$", name)]:
        return fused[:1]
    raise InputError(
        "DST-3230", "architecture shows no queries, keys and values", where=type(layer).__name__,
        expected="modules query, key, value or c_attn", found="none", do="Use a loss on hidden states instead",
    )  # fmt: skip


def output_head(model: Any) -> Any:
    """The linear layer that makes the logits: of a language model its output embedding, else the last one with as many outputs as labels."""
    if (embeddings := model.get_output_embeddings()) is not None:
        return embeddings
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    assert heads, f"{type(model).__name__} ends in no linear layer"
    return heads[-1]


def order_head(model: Any, labels: Sequence[str], where: str) -> list[int]:
    """Put a trained classifier's outputs into the order of these labels, in place: it is read by name. Returns where each one was.

    Raises InputError where its labels are others.
    """
    order = label_order(label_names(model.config.to_dict()), model.config.num_labels, tuple(labels), where)
    with torch.no_grad():
        for parameter in output_head(model).parameters():
            parameter.copy_(parameter[order])
    return order


def mixed(networks: Iterable[nn.Module], bf16: bool, device: torch.device) -> torch.autocast:
    """bf16 where it helps, for forward passes without gradients. Autocast keeps what it has cast until it ends: of a model that is cut among
    workers that would be all of it.
    """
    cut = any(hasattr(parameter, "full_tensor") for network in networks for parameter in network.parameters())
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=not cut)


def observe(teacher: Network, batch: Batch, bf16: bool, logits: LogitsConfig | None, features: Features | None) -> TeacherSignal:
    """Run a live teacher over a batch: no gradient, evaluation mode, results in fp32.

    The store is filled by this function, so that both ways give the same signal.
    """
    count_answers(len(batch.ids))
    teacher.eval()
    with torch.no_grad(), mixed([teacher], bf16, batch.scored.device):
        outputs = teacher(batch.inputs, batch.scored, batch.tokens, batch.lengths)
        said = _compressed(outputs, batch, logits)
    inner: dict[str, Any] = {
        "hidden": outputs.hidden.float() if outputs.hidden is not None else None,
        "pooled": outputs.pooled.float() if outputs.pooled is not None and (features is None or features.pooled) else None,
        "relations": tuple(value.float() for value in outputs.relations),
        "attentions": outputs.attentions.float() if outputs.attentions is not None else None,
        "layers": teacher.layers,
    }
    return TeacherSignal(**said, **inner)


def _compressed(outputs: Outputs, batch: Batch, config: LogitsConfig | None) -> dict[str, Any]:
    """Fields of the signal that tell of the classes, made chunk by chunk."""
    if config is None:
        return {}
    starts = _starts(batch) if isinstance(config, SampledLogits) else torch.zeros(0)
    pieces = [compress(outputs.logits_of(part).float(), batch.part(part), config, starts[part]) for part in outputs.chunks()]
    joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]} if pieces else {}
    if isinstance(config, TopKLogits):
        return {**joined, "temperatures": config.stored_temperatures}
    return {**joined, "temperatures": (config.temperature,)} if isinstance(config, SampledLogits) else joined


def compress(logits: Tensor, batch: Batch, config: LogitsConfig, starts: Tensor) -> dict[str, Tensor]:
    """What is kept of logits [N, C] (fp32): fields of `TeacherSignal`, all [N, ...]. starts: where draws begin, between 0 and 1, [N]."""
    if isinstance(config, DenseLogits):
        return {"logits": logits}
    log_p, known = logits.log_softmax(-1), batch.labels >= 0
    own = torch.where(known, log_p.gather(1, batch.labels.clamp(min=0)[:, None])[:, 0], 0.0)
    if isinstance(config, TopKLogits):
        top = log_p.topk(min(config.k, log_p.shape[1]), dim=-1)
        softer = [torch.logsumexp(log_p / temperature, dim=-1) for temperature in config.stored_temperatures]
        found = {"ids": top.indices, "log_p": top.values, "label_log_p": own}
        return {**found, "normalisers": torch.stack(softer, dim=1)} if softer else found
    drawn = draw((logits / config.temperature).softmax(-1), config.draws, starts.to(logits.device))
    return {**drawn, "label_log_p": own}


def _starts(batch: Batch) -> Tensor:
    """A random number for each scored position that depends on its row's id and its place there alone. [N]"""
    counts = zip(batch.ids, batch.positions.tolist(), strict=True)
    return torch.from_numpy(np.concatenate([np.random.default_rng(list(id_.encode())).random(count) for id_, count in counts]))


def draw(p: Tensor, draws: int, starts: Tensor) -> dict[str, Tensor]:
    """Classes drawn from p [N, C] at evenly spaced quantiles from a random start each: every class is expected `draws` * p times.

    (Systematic sampling: unbiased as independent draws are, with less variance.) Returns ids and weights, [N, draws]; those of the same
    class are merged, and what is left over has weight 0.
    """
    quantiles = (torch.arange(draws, device=p.device)[None] + starts[:, None]) / draws
    ids = torch.searchsorted(p.double().cumsum(-1), quantiles).clamp(max=p.shape[1] - 1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]  # they rise: equal ones stand together
    run = first.cumsum(-1) - 1
    weights = torch.zeros_like(quantiles).scatter_add_(1, run, torch.full_like(quantiles, 1 / draws))
    return {"ids": torch.zeros_like(ids).scatter_(1, run, ids), "weights": weights.float()}


@contextlib.contextmanager
def _input_of(module: nn.Module, *, skip: bool) -> Iterator[list[Tensor]]:
    """What a module reads; with `skip` it computes nothing itself."""
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        seen.append(inputs[0])
        return (inputs[0][..., :0, :],) if skip else None

    hook = module.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules return, in their order."""
    seen: list[Any] = [None] * len(modules)

    def note(place: int) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, result: Any) -> None:
            seen[place] = result[0] if isinstance(result, tuple) else result

        return keep

    hooks = [module.register_forward_hook(note(place)) for place, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _three(related: list[Tensor]) -> Sequence[Tensor]:
    return related if len(related) == 3 else related[0].chunk(3, dim=-1)


def _flat(states: Tensor) -> Tensor:
    """[sequences, S, H] -> [sequences * S, H]"""
    return states.reshape(-1, states.shape[-1])


def _at(states: Tensor, places: Tensor, images: bool) -> Tensor:
    """[places, H]. Of images: the mean over a feature map, or the first token of a transformer."""
    if images:
        return states.mean((-1, -2)) if states.dim() == 4 else states[:, 0]
    return _flat(states)[places]
