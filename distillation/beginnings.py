"""A model to begin with where there is none to start from: random weights, and a tokenizer made from the texts it will read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from distillation import models
from distillation.config import ImageClassification, NewModel, TaskConfig
from distillation.errors import ConfigError

END, PAD, MASK, BEGIN, UNKNOWN = "<|end|>", "<|pad|>", "<|mask|>", "<|begin|>", "<|unknown|>"
IMAGES = frozenset({"resnet", "vit"})


def require_suits(config: NewModel, task: TaskConfig) -> None:
    """Raise ConfigError where an architecture cannot do a task."""
    allowed = IMAGES if isinstance(task, ImageClassification) else {"gpt2", "llama"} if task.type == "causal_lm" else {"bert"}
    if task.type in ("text_classification", "multi_label", "regression", "token_classification", "embedding"):
        allowed = {"bert", "gpt2", "llama"}
    if config.architecture not in allowed:
        raise ConfigError(
            "DST-2035", "architecture does not suit the task", where="teacher.model.architecture", expected=", ".join(sorted(allowed)),
            found=f"{config.architecture} for {task.type}",
        )  # fmt: skip


def make(config: NewModel, task: TaskConfig, texts: Iterable[str], folder: Path) -> None:
    """Write model and tokenizer to a folder as save_pretrained does. The same texts and seed give the same bytes."""
    models.quiet()
    size = 0
    if not isinstance(task, ImageClassification):
        size = _tokenizer(config, texts, folder)
    settings = _settings(config, task, size)
    torch.manual_seed(config.seed)
    model = models.new(settings, task)
    model.save_pretrained(folder)


def _tokenizer(config: NewModel, texts: Iterable[str], folder: Path) -> int:
    """Byte-level BPE: no text is unknown to it. Returns its size."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers import models as kinds
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, PAD] if config.architecture in ("gpt2", "llama") else [PAD, UNKNOWN, BEGIN, END, MASK]
    trainer = BpeTrainer(
        vocab_size=config.vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"eos_token": END, "pad_token": PAD}
    if MASK in special:
        ids = {name: tokenizer.token_to_id(name) for name in (BEGIN, END)}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B:1 {END}:1", special_tokens=list(ids.items())
        )
        names = {"cls_token": BEGIN, "sep_token": END, "pad_token": PAD, "mask_token": MASK, "unk_token": UNKNOWN}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def _settings(config: NewModel, task: TaskConfig, vocabulary: int) -> Any:
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[config.architecture]
    if isinstance(task, ImageClassification):
        if config.architecture == "resnet":
            return kind(
                num_channels=task.channels, embedding_size=config.hidden_sizes[0], hidden_sizes=list(config.hidden_sizes),
                depths=list(config.depths), layer_type="basic", downsample_in_first_stage=False,
            )  # fmt: skip
        patch = max(size for size in (16, 8, 4, 2, 1) if task.size % size == 0 and task.size // size >= 4)
        return kind(**_sizes(config), num_channels=task.channels, image_size=task.size, patch_size=patch)
    if config.architecture == "gpt2":
        return kind(
            vocab_size=vocabulary, n_positions=task.max_length, n_embd=config.hidden_size, n_layer=config.layers, n_head=config.heads,
            n_inner=_sizes(config)["intermediate_size"], bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0} if config.architecture == "llama" else {"pad_token_id": 0}
    extra = {"num_key_value_heads": config.heads, "tie_word_embeddings": True} if config.architecture == "llama" else {}
    return kind(vocab_size=vocabulary, max_position_embeddings=task.max_length, **_sizes(config), **ids, **extra)


def _sizes(config: NewModel) -> dict[str, int]:
    assert config.layers and config.hidden_size and config.heads  # noqa: PT018 - a transformer has them all
    return {
        "num_hidden_layers": config.layers, "hidden_size": config.hidden_size, "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
    }  # fmt: skip
