"""Trim a vocabulary to what a corpus uses: which ids to keep, a tokenizer with only those, and the rows of a model's embeddings.

An id is kept under its rank among the kept ones, so the order stays. The idea is that of Abdaoui et al. 2020 ("Load What You Need"), with
whatever a tokenizer needs on the way to a kept token kept too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distillation.errors import InputError

CARRIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files beside tokenizer.json that name tokens by their text; vocab.txt and the like would contradict it and are left behind."""


# -------------------------------------------------------------------------------------------------------- which to keep


def kept_ids(used: Iterable[int] | NDArray[np.int64], tokenizer_folder: Path, at_least: int = 1) -> NDArray[np.int64]:
    """The ids to keep, ascending: those used `at_least` times, and what the tokenizer cannot do without.

    used: an array counts [V], or any other iterable of ids as they come in the corpus. Always kept: special tokens, the unknown token,
    and the pieces a text falls apart into that has no longer token: single characters (## forms too), or the bytes where the tokenizer
    falls back on bytes. For BPE also every part of a merge that makes a kept token: so any text made only of kept tokens goes through the
    same merges as before. Ids that no token has are left out. Raises InputError where `trim_tokenizer` would.
    """
    content = _read(tokenizer_folder)
    tokens = _tokens(content)
    counts = dict(enumerate(used.tolist())) if isinstance(used, np.ndarray) else Counter(int(i) for i in used)
    kept = {tokens[i] for i, count in counts.items() if count >= at_least and i in tokens}
    kept |= set(_needed(content)) | set(_load(tokenizer_folder).all_special_tokens)
    if content["model"]["type"] == "BPE":
        kept = _with_parts(kept, content["model"])
    return np.array(sorted(i for i, token in tokens.items() if token in kept), np.int64)


def _needed(content: dict[str, Any]) -> Iterator[str]:
    """Special and unknown tokens, and the smallest pieces."""
    model = content["model"]
    yield from (added["content"] for added in content.get("added_tokens", ()) if added["special"])
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            yield model["vocab"][model["unk_id"]][0]
    elif model.get("unk_token") is not None:
        yield model["unk_token"]
    if model["type"] == "WordLevel":
        return
    vocabulary = _vocabulary(model)
    if model.get("byte_fallback"):
        yield from (token for token in vocabulary if re.fullmatch("<0x[0-9A-F]{2}>", token))
        return
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    yield from (token for token in vocabulary if len(token) == 1 or len(token.removeprefix(prefix).removesuffix(suffix)) == 1)


def _with_parts(kept: set[str], model: dict[str, Any]) -> set[str]:
    """With all parts of all merges that make a kept token, and theirs."""
    parts: dict[str, list[str]] = {}
    for one, other in _merges(model):
        parts.setdefault(_merged(one, other, model), []).extend((one, other))
    found, waiting = set(kept), list(kept)
    while waiting:
        new = set(parts.get(waiting.pop(), ())) - found
        found |= new
        waiting.extend(new)
    return found


# ------------------------------------------------------------------------------------------------------------- tokenizer


def trim_tokenizer(folder: Path, kept: NDArray[np.int64], destination: Path) -> None:
    """Write a tokenizer folder in which only the kept tokens are left, renumbered 0 to n - 1; `AutoTokenizer` loads it.

    kept: ids with a token, ascending, with all special ones (`kept_ids`). A text that was cut into kept tokens only is cut as before;
    another one falls apart into smaller pieces, bytes or the unknown token. (One that came out as the unknown token can come out as
    pieces, where a WordPiece vocabulary knows a word's pieces but not those of its longest beginning.)
    Raises InputError for a tokenizer without tokenizer.json, or one whose ids transformers changes on loading.
    """
    content = _read(folder)
    tokens = _tokens(content)
    _require_ascending(kept, max(tokens) + 1)
    assert set(kept.tolist()) <= set(tokens), "an id to keep has no token"
    new = {old: i for i, old in enumerate(kept.tolist())}
    _trim_model(content["model"], new)
    content["added_tokens"] = [{**added, "id": new[added["id"]]} for added in content.get("added_tokens", ()) if added["id"] in new]
    content["post_processor"] = _renumbered(content.get("post_processor"), new)
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    destination.mkdir(parents=True, exist_ok=True)
    for name in CARRIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
    _renumber_settings(destination / "tokenizer_config.json", new)
    (destination / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    wanted, found = {tokens[old]: i for old, i in new.items()}, _load(destination).get_vocab()
    if wanted != found:
        different = sorted(wanted.items() ^ found.items())[:3]
        raise InputError(
            "DST-3221", "tokenizer cannot be trimmed", where=str(folder), expected="the ids of tokenizer.json when it is loaded",
            found=f"others: {different}", do="Load it with transformers and save it again, or keep the whole vocabulary",
        )  # fmt: skip


def _trim_model(model: dict[str, Any], new: dict[int, int]) -> None:
    if model["type"] == "Unigram":  # an id is a place in the list
        model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
        return
    model["vocab"] = {token: new[old] for token, old in sorted(model["vocab"].items(), key=lambda entry: entry[1]) if old in new}
    if model["type"] == "BPE":
        left = model["vocab"]
        model["merges"] = [
            [one, other] for one, other in _merges(model) if one in left and other in left and _merged(one, other, model) in left
        ]


def _renumbered(processor: dict[str, Any] | None, new: dict[int, int]) -> dict[str, Any] | None:
    """A post-processor with the new ids of the tokens it adds."""
    if processor is None:
        return None
    changed = dict(processor)
    if processor["type"] == "Sequence":
        changed["processors"] = [_renumbered(one, new) for one in processor["processors"]]
    elif processor["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**token, "ids": [new[old] for old in token["ids"]]} for name, token in processor["special_tokens"].items()
        }
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            token, old = processor[name]
            changed[name] = [token, new[old]]
    return changed


def _renumber_settings(path: Path, new: dict[int, int]) -> None:
    """tokenizer_config.json lists added tokens under their ids."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in settings:
        added = {int(old): token for old, token in settings["added_tokens_decoder"].items()}
        settings["added_tokens_decoder"] = {str(new[old]): token for old, token in added.items() if old in new}
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    """tokenizer.json of a kind that is known here."""
    path = folder / "tokenizer.json"
    kinds = ("BPE", "WordPiece", "WordLevel", "Unigram")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Old files leave the type out; only that of BPE can be told for sure.
        kind = content["model"].setdefault("type", "BPE" if "merges" in content["model"] else "unknown")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "DST-3221", "tokenizer cannot be trimmed", where=str(path), expected="tokenizer.json of the tokenizers library",
            found=f"{type(error).__name__}: {error}"[:200], do="Load it with transformers and save it again, or keep the whole vocabulary",
        ) from error  # fmt: skip
    if kind not in kinds:
        raise InputError(
            "DST-3221", "tokenizer cannot be trimmed", where=str(path), expected=f"one of {', '.join(kinds)}", found=str(kind),
            do="Keep the whole vocabulary",
        )  # fmt: skip
    return content


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            "DST-3221", "tokenizer cannot be trimmed", where=str(folder), expected="one that transformers loads",
            found=" ".join(str(error).split())[:200], do="Save the tokenizer again",
        ) from error  # fmt: skip


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece[0]: i for i, piece in enumerate(model["vocab"])}
    vocabulary: dict[str, int] = model["vocab"]
    return vocabulary


def _tokens(content: dict[str, Any]) -> dict[int, str]:
    """Every token by its id."""
    added = {token["id"]: token["content"] for token in content.get("added_tokens", ())}
    return {**{i: token for token, i in _vocabulary(content["model"]).items()}, **added}


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        one, other = merge.split(" ") if isinstance(merge, str) else merge
        yield one, other


def _merged(one: str, other: str, model: dict[str, Any]) -> str:
    return one + other.removeprefix(model.get("continuing_subword_prefix") or "")


# ------------------------------------------------------------------------------------------------------------ embeddings


def trim_embeddings(model: Any, kept: NDArray[np.int64]) -> Any:
    """Keep only these rows of a transformers model's input and output embeddings, in place; returns the model.

    kept: old ids, ascending. What is tied stays tied. The logits of kept ids stay as they were. Ids of special tokens in the
    configurations follow; those of tokens that are gone become None.
    """
    entry, output = model.get_input_embeddings(), model.get_output_embeddings()
    rows = entry.weight.shape[0]
    _require_ascending(kept, rows)
    new = {old: i for i, old in enumerate(kept.tolist())}
    _move_padding(model, entry, new)
    tables = [entry.weight]
    if output is not None:
        owner = model.get_submodule(_name_of(model, output).rpartition(".")[0])  # BERT's head holds a bias beside its decoder
        biases = (getattr(output, "bias", None), owner._parameters.get("bias"))
        tables += [output.weight, *(bias for bias in biases if bias is not None and bias.shape == (rows,))]
    index = torch.from_numpy(np.asarray(kept, np.int64))
    _replace(model, {id(table): nn.Parameter(table.detach()[index.to(table.device)].clone(), table.requires_grad) for table in tables})
    for module in model.modules():  # loss functions and repr read these
        for name in ("num_embeddings", "out_features", "vocab_size"):
            if getattr(module, name, None) == rows and (name == "vocab_size" or module in (entry, output) or _shares(module, entry)):
                setattr(module, name, len(new))
    model.config.vocab_size = len(new)
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None:
            _renumber_ids(settings, new)
    return model


def _move_padding(model: nn.Module, entry: nn.Module, new: dict[int, int]) -> None:
    """RoBERTa counts positions from the id of the padding token, so its table of positions moves with that id."""
    old = getattr(entry, "padding_idx", None)
    if old is None:
        return
    for module in model.modules():
        if getattr(module, "padding_idx", None) != old:
            continue
        if isinstance(module, nn.Embedding) and module is not entry and not _shares(module, entry):
            assert old in new, "positions are counted from the padding token's id, so it has to be kept"
            module.weight.data = module.weight.data.roll(new[old] - old, 0)
        setattr(module, "padding_idx", new.get(old))  # noqa: B010


def _shares(module: Any, entry: Any) -> bool:
    return getattr(module, "weight", None) is entry.weight


def _replace(model: nn.Module, tensors: dict[int, nn.Parameter]) -> None:
    """Put new parameters wherever the old ones, named by their identity, are used."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in tensors:
                setattr(module, name, tensors[id(parameter)])


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(wanted)]


def _renumber_ids(settings: Any, new: dict[int, int]) -> None:
    for name, value in settings.to_dict().items():
        if not re.search(r"_token_ids?$", name):
            continue
        if isinstance(value, int):
            setattr(settings, name, new.get(value))
        elif isinstance(value, list):
            setattr(settings, name, [new[old] for old in value if old in new] or None)


def _require_ascending(kept: NDArray[np.int64], size: int) -> None:
    assert len(kept), "nothing is kept"
    assert (np.diff(kept) > 0).all(), "ids to keep are not ascending"
    assert set(kept[[0, -1]].tolist()) <= set(range(size)), f"ids to keep are not from 0 to {size - 1}"
