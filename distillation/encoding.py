"""Rows of a corpus as they are stored: contents and labels become numbers. One function a task; numpy and pyarrow only, no Ray.

encode          contents -> token ids or pixels, and where a row is scored
read_again      the same for a student that has another tokenizer than its teacher
label_columns   labels -> numbers, once the names of all labels are known
fields          the columns of a part

A content is what its id is a hash of: a text; the JSON list of two texts or of words; the pixels of an image. A label is a string too: a
name, the JSON list of names or of tags (null where a word has none), or the repr of a number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distillation.config import CausalLM, MaskedLM, TaskConfig
from distillation.documents import Encoded, encode_causal, encode_masked
from distillation.errors import InputError

VERSION = 1
"""Of the rules below: what they yield is part of a corpus's fingerprint."""

READINGS = 1
"""The same of the rules of readings."""

UNLABELLED = -1

LENGTH, IDS = pa.int32(), pa.list_(pa.int32())
COMMON = (("id", pa.string()), ("text", pa.string()), ("length", LENGTH), ("scored", LENGTH), ("labelled", LENGTH))
SUMS = ("length", "scored", "labelled")
"""Of the columns of every part those that are added up over a split."""
TOKENS = ("input_ids", IDS)
TOKEN_TYPES = ("token_type_ids", pa.list_(pa.int8()))
ALIGNED = (("theirs", IDS), ("told", LENGTH), ("aligned", LENGTH))
READ_AGAIN = frozenset({"text_classification", "multi_label", "regression", "embedding", "causal_lm"})
"""Tasks whose rows another tokenizer can read: a row is one position, or its places are found by the text before them."""


# --------------------------------------------------------------------------------------------------------------- public


def fields(task: TaskConfig, token_types: bool = False, reading: bool = False) -> pa.Schema:
    """Columns of a part. token_types: whether a pair also has `token_type_ids`, see `makes_token_types`. reading: see `read_again`.

    length: tokens. scored: positions that are compared. labelled: how many of them have a label; -1 or NaN stands where there is none.
    Of a reading of a language model also theirs: for each scored position which of the first tokenizer's it is, -1 for none; told: how many
    the first has; aligned: how many of these are one of them.
    """
    coding = ENCODINGS[task.type]
    aligned = ALIGNED if reading and isinstance(task, CausalLM) else ()
    return pa.schema([*COMMON, *coding.content, *aligned, *((TOKEN_TYPES,) if token_types else ()), *coding.label])


def makes_token_types(task: TaskConfig, tokenizer: Any) -> bool:
    """Whether the tokenizer tells the two texts of a pair apart by `token_type_ids`."""
    return getattr(task, "pair", None) is not None and "token_type_ids" in tokenizer.model_input_names


def check(task: TaskConfig, tokenizer: Any, where: str) -> None:
    """Raise InputError if the task cannot be done with this tokenizer (None for images)."""
    if tokenizer is None:
        return
    if isinstance(task, MaskedLM) and tokenizer.mask_token_id is None:
        raise InputError(
            "DST-3466", "tokenizer has no mask token", where=where, expected="a mask token, which hides the others", found="none",
            do="Take a model that was made for masked_lm",
        )  # fmt: skip
    if task.type in NEED_PLACES and not tokenizer.is_fast:
        raise InputError(
            "DST-3467", "tokenizer does not say where its tokens stand", where=where, expected="a tokenizer.json, of a fast tokenizer",
            found=type(tokenizer).__name__, do="Convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )  # fmt: skip
    special = tokenizer.num_special_tokens_to_add(pair=getattr(task, "pair", None) is not None)
    if special >= task.max_length:
        raise InputError(
            "DST-3468", "no room is left for text", where="task.max_length", expected=f"above {special}, the tokenizer's special tokens",
            found=str(task.max_length), do="Raise it",
        )  # fmt: skip


def encode(
    task: TaskConfig, tokenizer: Any, ids: Sequence[str], contents: Sequence[Any], labels: Sequence[str | None] | None = None
) -> Encoded:
    """Rows of these contents, in their order. labels: of each content; None: no labels.

    Raises InputError if the tokenizer does not serve the task.

    A row of a language model has the id of its text up to digit 24, and its number in it: rows of a text stay in order.
    """
    made = Encoded()
    check(task, tokenizer, "tokenizer")
    if contents:
        ENCODINGS[task.type].encode(task, tokenizer, list(ids), list(contents), list(labels or [None] * len(contents)), made)
    return made


def read_again(
    task: TaskConfig, tokenizer: Any, reader: Any, ids: Sequence[str], contents: Sequence[Any], labels: Sequence[str | None] | None = None
) -> Encoded:
    """The rows that `encode` makes with `tokenizer`, the same ones in the same order, in the tokens of `reader`. For tasks in `READ_AGAIN`.

    A row with too many of these is cut. Raises InputError if a tokenizer does not serve the task.
    """
    assert task.type in READ_AGAIN, "the job was checked"
    given = list(labels or [None] * len(contents))
    check(task, reader, "tokenizer of the student")
    if isinstance(task, CausalLM):
        made = Encoded()
        check(task, tokenizer, "tokenizer")
        if contents:
            encode_causal(task, tokenizer, list(ids), list(contents), given, made, reader)
        return made
    first = encode(task, tokenizer, ids, contents, labels)
    kept = first.source
    again = encode(
        task.model_copy(update={"too_long": "truncate"}),
        reader,
        [ids[i] for i in kept],
        [contents[i] for i in kept],
        [given[i] for i in kept],
    )
    again.source = kept
    tallies = {key: count for key, count in first.tallies.items() if key[0] != "truncated"}
    again.tallies = Counter({**tallies, **{(fact, kept[i]): count for (fact, i), count in again.tallies.items()}})
    return again


def classes(task: TaskConfig, label: str | None) -> list[str]:
    """Names of labels in a label: what has to be known to number them."""
    return ENCODINGS[task.type].classes(label) if label is not None else []


def label_columns(
    task: TaskConfig, labels: Sequence[str | None], names: Sequence[str], scored: Sequence[int] | None = None
) -> dict[str, pa.Array]:
    """Columns of labels, numbered by their place in `names`. scored: of each row, for tags. {} for language models.

    label [rows]: -1 (of numbers NaN) where there is none. labels [rows, any]: of several labels their numbers, sorted; of words one a place.
    """
    coding = ENCODINGS[task.type]
    numbers = {name: number for number, name in enumerate(names)}
    counts = scored if scored is not None else [1] * len(labels)
    made = coding.number
    if made is None:
        return {}
    ((name, kind),) = coding.label
    return {name: pa.array([made(label, numbers, count) for label, count in zip(labels, counts, strict=True)], kind)}


# ---------------------------------------------------------------------------------------------------------------- texts


def _texts(task: Any, tokenizer: Any, ids: list[str], contents: list[Any], labels: list[str | None], made: Encoded) -> None:
    """A row for each text or pair of texts; one label, or several, or a number."""
    paired, types = getattr(task, "pair", None) is not None, makes_token_types(task, tokenizer)
    sides = [list(side) for side in zip(*map(json.loads, contents), strict=True)] if paired else [contents]

    def tokens_of(rows: Sequence[int], **options: Any) -> Any:
        return tokenizer(*([side[i] for i in rows] for side in sides), return_token_type_ids=types, verbose=False, **options)

    found = _within(task, tokens_of, len(contents), made)
    for i, (tokens, place) in found.items():
        known = int(labels[i] is not None)
        text = "  ⏎  ".join(side[i] for side in sides)
        made.add(i, labels[i], id=ids[i], text=text, length=len(tokens["input_ids"][place]), scored=1, labelled=known)
        made.columns["input_ids"].append(tokens["input_ids"][place])
        if types:
            made.columns["token_type_ids"].append(tokens["token_type_ids"][place])


def _within(task: Any, tokens_of: Callable[..., Any], count: int, made: Encoded) -> dict[int, tuple[Any, int]]:
    """For each content that is kept, in order: tokens within max_length, and the place among them where its own are."""
    whole = tokens_of(range(count))
    long = [i for i, row in enumerate(whole["input_ids"]) if len(row) > task.max_length]
    found = {i: (whole, i) for i in range(count)}
    if long and task.too_long == "truncate":
        cut = tokens_of(long, truncation=True, max_length=task.max_length)
        found.update({i: (cut, place) for place, i in enumerate(long)})
    for i in long:
        made.tallies["truncated" if task.too_long == "truncate" else "too_long", i] += 1
        if task.too_long == "drop":
            del found[i]
    return found


def _words(task: Any, tokenizer: Any, ids: list[str], contents: list[Any], labels: list[str | None], made: Encoded) -> None:
    """A row for each list of words; scored is the first piece of every word that gives one."""
    words = [json.loads(content) for content in contents]

    def tokens_of(rows: Sequence[int], **options: Any) -> Any:
        return tokenizer([words[i] for i in rows], is_split_into_words=True, verbose=False, **options)

    for i, (tokens, place) in _within(task, tokens_of, len(contents), made).items():
        first: dict[int, int] = {}
        for position, word in enumerate(tokens.word_ids(place)):
            if word is not None:
                first.setdefault(word, position)
        if not first:
            made.tallies["nothing_scored", i] += 1
            continue
        tags, label = [None] * len(words[i]) if labels[i] is None else json.loads(str(labels[i])), None
        if known := sum(tags[word] is not None for word in first):
            label = json.dumps([tags[word] for word in first], ensure_ascii=False)
        row, places = tokens["input_ids"][place], list(first.values())
        made.add(i, label, id=ids[i], text=" ".join(words[i]), length=len(row), scored=len(first), labelled=known,
                 input_ids=row, places=places)  # fmt: skip


def _image(task: Any, tokenizer: Any, ids: list[str], contents: list[Any], labels: list[str | None], made: Encoded) -> None:
    for i, content in enumerate(contents):
        assert len(content) == task.size**2 * task.channels, "sources refuse images of another size"
        pixels = np.frombuffer(content, np.uint8)
        made.add(i, labels[i], id=ids[i], text="", length=1, scored=1, labelled=int(labels[i] is not None), pixels=pixels)


# --------------------------------------------------------------------------------------------------------------- labels


def _name(label: str | None, numbers: Mapping[str, int], count: int) -> int:
    return UNLABELLED if label is None else numbers[label]


def _names(label: str | None, numbers: Mapping[str, int], count: int) -> list[int]:
    return [] if label is None else sorted(numbers[name] for name in json.loads(label))


def _tags(label: str | None, numbers: Mapping[str, int], count: int) -> list[int]:
    return [UNLABELLED if tag is None else numbers[tag] for tag in ([None] * count if label is None else json.loads(label))]


def _number(label: str | None, numbers: Mapping[str, int], count: int) -> float:
    return float("nan") if label is None else float(label)


def _one(label: str) -> list[str]:
    return [label]


def _several(label: str) -> list[str]:
    return [name for name in json.loads(label) if name is not None]


def _none(label: str) -> list[str]:
    return []


@dataclass(frozen=True)
class Encoding:
    """How the rows of one type of task are stored."""

    encode: Callable[..., None]
    content: tuple[tuple[str, Any], ...]
    """Columns that `encode` makes, besides those of `COMMON`."""
    label: tuple[tuple[str, Any], ...] = ()
    """The column that `label_columns` makes."""
    number: Callable[[str | None, Mapping[str, int], int], Any] | None = None
    classes: Callable[[str], list[str]] = _none


PLACES, LABEL, LABELS = ("places", IDS), (("label", pa.int32()),), (("labels", IDS),)

ENCODINGS: Mapping[str, Encoding] = {
    "text_classification": Encoding(_texts, (TOKENS,), LABEL, _name, _one),
    "multi_label": Encoding(_texts, (TOKENS,), LABELS, _names, _several),
    "regression": Encoding(_texts, (TOKENS,), (("label", pa.float32()),), _number),
    "token_classification": Encoding(_words, (TOKENS, PLACES), LABELS, _tags, _several),
    "causal_lm": Encoding(encode_causal, (TOKENS, ("bytes", pa.int32()))),
    "masked_lm": Encoding(encode_masked, (TOKENS, PLACES, ("labels", IDS))),
    "image_classification": Encoding(_image, (("pixels", pa.list_(pa.uint8())),), LABEL, _name, _one),
    "embedding": Encoding(_texts, (TOKENS,), LABEL, _name, _one),
}
NEED_PLACES = frozenset({"token_classification", "causal_lm", "masked_lm"})
"""Tasks that ask a tokenizer where in the text its tokens stand."""
