"""What the dimensions of each parameter count, for the architectures that can be cut in width (names of transformers 5).

hidden: residual dimensions; heads: the query heads side by side; kv: the key-value heads; qkv: heads thrice; intermediate: feed-forward
units; pooled: what a pooler or a dense layer before the output layer makes, which is the residual stream where there is no such layer;
-: nothing that is cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distillation.errors import InputError


@dataclass(frozen=True)
class Family:
    """Names and sizes of one architecture; patterns match whole names, without the body's prefix."""

    layers: str  # pattern and name of the list of layers
    attention: str  # in a layer, the module that reads the heads
    feed_forward: str  # the one that reads the intermediate units
    in_layer: Mapping[str, str]
    around: Mapping[str, str]
    intermediate_size: str = "intermediate_size"
    hidden_is_heads: bool = False  # hidden_size has to be heads * width of a head
    heads_divide_hidden: bool = False


BERT = Family(
    layers="encoder.layer",
    attention="attention.output.dense",
    feed_forward="output.dense",
    in_layer={
        r"attention\.self\.(query|key|value)\.weight": "heads hidden",
        r"attention\.self\.(query|key|value)\.bias": "heads",
        r"attention\.output\.dense\.weight": "hidden heads",
        r"intermediate\.dense\.weight": "intermediate hidden",
        r"intermediate\.dense\.bias": "intermediate",
        r"output\.dense\.weight": "hidden intermediate",
        r"(attention\.)?output\.(dense\.bias|LayerNorm\.(weight|bias))": "hidden",
    },
    around={
        r"embeddings\.\w+_embeddings\.weight": "- hidden",
        r"embeddings\.LayerNorm\.(weight|bias)": "hidden",
        r"(pooler|classifier)\.dense\.weight": "pooled hidden",
        r"(pooler|classifier)\.dense\.bias": "pooled",
        r"(classifier|classifier\.out_proj|cls\.seq_relationship)\.weight": "- pooled",
        r"qa_outputs\.weight": "- hidden",
        r"(cls\.predictions\.transform|lm_head)\.dense\.weight": "hidden hidden",
        r"(cls\.predictions\.transform|lm_head)\.(dense\.bias|(LayerNorm|layer_norm)\.(weight|bias))": "hidden",
        r"(cls\.predictions|lm_head)\.decoder\.weight": "- hidden",
        r"(classifier|classifier\.out_proj|cls\.seq_relationship|qa_outputs)\.bias": "-",
        r"(cls\.predictions|lm_head)\.(decoder\.)?bias": "-",
    },
    hidden_is_heads=True,
)

GPT2 = Family(
    layers="h",
    attention="attn.c_proj",
    feed_forward="mlp.c_proj",
    in_layer={
        r"ln_[12]\.(weight|bias)": "hidden",
        r"attn\.c_attn\.weight": "hidden qkv",
        r"attn\.c_attn\.bias": "qkv",
        r"attn\.c_proj\.weight": "heads hidden",
        r"mlp\.c_fc\.weight": "hidden intermediate",
        r"mlp\.c_fc\.bias": "intermediate",
        r"mlp\.c_proj\.weight": "intermediate hidden",
        r"(attn|mlp)\.c_proj\.bias": "hidden",
    },
    around={
        r"(wte|wpe|lm_head|score|classifier|qa_outputs)\.weight": "- hidden",
        r"ln_f\.(weight|bias)": "hidden",
        r"(classifier|qa_outputs)\.bias": "-",
    },
    intermediate_size="n_inner",
    hidden_is_heads=True,
)

_LLAMA_LAYER = {
    r"self_attn\.q_proj\.weight": "heads hidden",
    r"self_attn\.q_proj\.bias": "heads",
    r"self_attn\.[kv]_proj\.weight": "kv hidden",
    r"self_attn\.[kv]_proj\.bias": "kv",
    r"self_attn\.o_proj\.weight": "hidden heads",
    r"mlp\.(gate|up)_proj\.weight": "intermediate hidden",
    r"mlp\.(gate|up)_proj\.bias": "intermediate",
    r"mlp\.down_proj\.weight": "hidden intermediate",
    r"(self_attn\.o_proj|mlp\.down_proj)\.bias|(input|post_attention)_layernorm\.weight": "hidden",
}
_LLAMA_AROUND = {
    r"(embed_tokens|lm_head|score|classifier|qa_outputs)\.weight": "- hidden",
    r"norm\.weight": "hidden",
    r"(score|classifier|qa_outputs)\.bias": "-",
}


QWEN2 = Family(  # and Mistral: the same names
    layers="layers", attention="self_attn.o_proj", feed_forward="mlp.down_proj", in_layer=_LLAMA_LAYER, around=_LLAMA_AROUND
)
LLAMA = replace(QWEN2, heads_divide_hidden=True)

VIT = Family(
    layers="layers",
    attention="attention.o_proj",
    feed_forward="mlp.fc2",
    in_layer={
        r"layernorm_(before|after)\.(weight|bias)": "hidden",
        r"attention\.[qkv]_proj\.weight": "heads hidden",
        r"attention\.[qkv]_proj\.bias": "heads",
        r"attention\.o_proj\.weight": "hidden heads",
        r"mlp\.fc1\.weight": "intermediate hidden",
        r"mlp\.fc1\.bias": "intermediate",
        r"mlp\.fc2\.weight": "hidden intermediate",
        r"(attention\.o_proj|mlp\.fc2)\.bias": "hidden",
    },
    around={
        r"embeddings\.(cls_token|mask_token|position_embeddings)": "- - hidden",
        r"embeddings\.patch_embeddings\.projection\.weight": "hidden - - -",
        r"embeddings\.patch_embeddings\.projection\.bias|layernorm\.(weight|bias)": "hidden",
        r"(pooler\.dense|classifier)\.weight": "- hidden",  # the pooler's size is a setting of its own
        r"(pooler\.dense|classifier)\.bias": "-",
    },
)

FAMILIES: dict[str, Family] = {
    "bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "camembert": BERT, "gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "mistral": QWEN2,
    "vit": VIT,
}  # fmt: skip


def family_of(config: Any) -> Family:
    """Raises InputError for an architecture that cannot be cut."""
    if config.model_type not in FAMILIES or getattr(config, "add_cross_attention", False):
        raise InputError(
            "DST-3220", "architecture cannot be cut in width", where=config.model_type, expected=f"one of {', '.join(FAMILIES)}",
            found=f"{config.model_type}{' with cross-attention' if config.model_type in FAMILIES else ''}", do="Use a student of another type",
        )  # fmt: skip
    return FAMILIES[config.model_type]


class Places:
    """Where the parameters of one model lie in its family."""

    def __init__(self, model: Any) -> None:
        self.family = family_of(model.config)
        self._model = model
        self._body = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
        self._names = set(model.state_dict())

    def axes(self, name: str) -> tuple[int | None, tuple[str, ...]]:
        """The layer a parameter lies in, if any, and what each of its dimensions counts. Raises InputError where that is not known."""
        inside = name.removeprefix(self._body)
        in_layer = re.fullmatch(rf"{self.family.layers}\.(\d+)\.(.+)", inside)
        patterns, inside = (self.family.in_layer, in_layer[2]) if in_layer else (self.family.around, inside)
        found = [axes for pattern, axes in patterns.items() if re.fullmatch(pattern, inside)]
        if len(found) != 1:
            raise InputError(
                "DST-3220", "architecture cannot be cut in width", where=type(self._model).__name__, expected="parameters that are known",
                found=name, do="Use a student of another type",
            )  # fmt: skip
        return int(in_layer[1]) if in_layer else None, tuple(found[0].split())

    def norms(self) -> list[str]:
        """Norms over the residual dimensions: what has one weight for each of them."""
        weights = sorted(name for name in self._names if name.endswith(".weight"))
        return [name.removesuffix(".weight") for name in weights if self.axes(name)[1] == ("hidden",)]

    def in_layer(self, layer: int, name: str) -> str:
        return f"{self._body}{self.family.layers}.{layer}.{name}"

    def pooled(self) -> str | None:
        """The output layer that reads a pooler, if the model has both."""
        if not any(self.axes(name)[1] == ("pooled", "hidden") for name in self._names):
            return None
        readers = [name for name in self._names if name.endswith(".weight") and self.axes(name)[1] == ("-", "pooled")]
        return min(readers).removesuffix(".weight") if readers else None
