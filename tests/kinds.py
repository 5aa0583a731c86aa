"""A tiny split and tiny models of every task, built on the spot; and models whose answers are written down in a table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertTokenizerFast,
    GPT2Config,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ViTConfig,
)

from distillation.columns import Columns
from distillation.config import (
    CausalLM,
    Embedding,
    ImageClassification,
    MaskedLM,
    MultiLabel,
    Regression,
    TextClassification,
    TokenClassification,
)
from distillation.models import set_labels
from distillation.storage import Storage
from distillation.store import write_part

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "some", "text", "another", "one", *(f"w{i}" for i in range(9, 40))]
TASKS = {
    "text_classification": TextClassification(type="text_classification", max_length=32, pair="other"),
    "multi_label": MultiLabel(type="multi_label", max_length=32),
    "regression": Regression(type="regression", max_length=32),
    "token_classification": TokenClassification(type="token_classification", max_length=32),
    "causal_lm": CausalLM(type="causal_lm", max_length=32),
    "masked_lm": MaskedLM(type="masked_lm", max_length=32),
    "image_classification": ImageClassification(type="image_classification", size=8),
    "embedding": Embedding(type="embedding", max_length=32),
}
LABELS = {
    "text_classification": ("cat", "dog", "emu"),
    "multi_label": ("cat", "dog", "emu"),
    "token_classification": ("B-x", "I-x", "O"),
    "image_classification": ("cat", "dog"),
    "embedding": ("cat", "dog"),
}
AUTO = {
    "token_classification": AutoModelForTokenClassification, "causal_lm": AutoModelForCausalLM, "masked_lm": AutoModelForMaskedLM,
    "image_classification": AutoModelForImageClassification, "embedding": AutoModel,
}  # fmt: skip
TYPES = {
    "label": pa.int32(), "labels": pa.list_(pa.int32()), "places": pa.list_(pa.int32()), "bytes": pa.int32(),
    "input_ids": pa.list_(pa.int32()), "token_type_ids": pa.list_(pa.int8()), "pixels": pa.list_(pa.uint8()),
}  # fmt: skip


def split(folder, kind, count=24, seed=0, **given):
    """Random rows; a column in `given` (one list a column; None: none) replaces the random one, and `labelled` follows what there is."""
    rng = np.random.default_rng(seed)
    tokens = given.get("input_ids") or [rng.integers(5, 40, rng.integers(4, 12)) for _ in range(count)]
    count, lengths = len(tokens), [len(row) for row in tokens]
    made = {"input_ids": tokens, "scored": [1] * count, "labelled": [1] * count}
    if kind == "image_classification":
        lengths = [1] * count
        made = {"pixels": [rng.integers(0, 256, 8 * 8 * 3) for _ in tokens], "scored": lengths, "labelled": lengths}
    if kind == "text_classification":
        made["token_type_ids"] = [np.arange(len(row)) > len(row) // 2 for row in tokens]
    if kind in ("text_classification", "image_classification", "embedding"):
        made["label"] = [int(rng.integers(0, len(LABELS[kind]))) for _ in tokens]
    if kind == "regression":
        made["label"] = [float(rng.normal()) for _ in tokens]
    if kind == "multi_label":
        made["labels"] = [np.flatnonzero(rng.random(3) < 0.5) for _ in tokens]
    if kind in ("token_classification", "masked_lm"):
        made["places"] = [np.arange(1, len(row) - 1) for row in tokens]
        top = 3 if kind == "token_classification" else 40
        made["labels"] = [rng.integers(0, top, len(row) - 2) for row in tokens]
    if kind == "causal_lm":
        made["bytes"] = [3 * (length - 1) for length in lengths]
        made["scored"] = made["labelled"] = [length - 1 for length in lengths]
    made = {name: values for name, values in {**made, **given}.items() if values is not None}
    if "places" in made:
        made["scored"] = [len(row) for row in made["places"]]
        made["labelled"] = [sum(label >= 0 for label in row) for row in made["labels"]]
    elif kind == "embedding" or (kind.endswith("_classification") and "labelled" not in given):
        made["labelled"] = [int(label >= 0) for label in made["label"]]
    types = {**TYPES, **({"label": pa.float32()} if kind == "regression" else {})}
    table = pa.table(
        {
            "id": [f"{i:032x}" for i in range(count)], "text": [f"text {i}" for i in range(count)], "length": pa.array(lengths, pa.int32()),
            **{name: pa.array([v if np.isscalar(v) else np.asarray(v) for v in each], types.get(name, pa.int32())) for name, each in made.items()},
        }
    )  # fmt: skip
    write_part(Storage(str(folder)), "split", "part-0", table, sum(lengths))
    return Columns([folder / "split" / "part-0.arrow"])


def settings(kind, **changes):
    if kind == "image_classification":
        if changes.pop("vit", False):
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4}
            return ViTConfig(**{"image_size": 8, **sizes, "initializer_range": 0.5, **changes})
        return ResNetConfig(**{"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", **changes})
    if kind == "causal_lm":
        return GPT2Config(**{"vocab_size": 40, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3,
                             "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, **changes})  # fmt: skip
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(**{**sizes, "max_position_embeddings": 64, "initializer_range": 0.5, **changes})


def build(kind, seed=0, **changes):
    torch.manual_seed(seed)
    config = settings(kind, **changes)
    set_labels(config, TASKS[kind], LABELS.get(kind, ()))
    return AUTO.get(kind, AutoModelForSequenceClassification).from_config(config)


def save(folder, kind, seed=0, model=None, **changes):
    (model or build(kind, seed, **changes)).save_pretrained(folder)
    if kind == "causal_lm":
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]",
            model_input_names=["input_ids", "attention_mask"],
        ).save_pretrained(folder)  # fmt: skip
    elif kind != "image_classification":
        BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def written_down(folder, kind, table):
    """A model whose logits are table [40, c] at a token: each word's own, or those of a row's first token."""
    model = build(kind, num_hidden_layers=0, hidden_size=40, num_attention_heads=1, layer_norm_eps=1e-12)
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.word_embeddings.weight.copy_(torch.eye(40))
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        model.eval()
        ids = torch.arange(40)[:, None]
        if kind == "token_classification":
            states = model.bert(ids).last_hidden_state[:, 0]
        else:
            model.bert.pooler.dense.weight.copy_(torch.eye(40))
            model.bert.pooler.dense.bias.zero_()
            states = model.bert(ids).pooler_output
        solved = torch.linalg.lstsq(
            torch.cat([states, torch.ones(40, 1)], 1).double(), torch.as_tensor(table).double(), driver="gelsd"
        ).solution
        model.classifier.weight.copy_(solved[:-1].T)
        model.classifier.bias.copy_(solved[-1])
    return save(folder, kind, model=model)
