"""Columns of a source as rows of a task: the one canonical form of a content and of a label, and every way in which a value can be wrong.

content   a text; of a pair, or of words, their JSON list; of an image its pixels. "" where there is none.
label     a name; several: the sorted JSON list of names; a number: its repr; of words: a JSON list with null where there is none
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from cluster.kinds import NAMES, NUMBERS, TEXTS, expected, inputs_of, label_of, wanted
from cluster.pictures import pixels
from cluster.reading import Row
from distillation.config import TaskConfig
from distillation.errors import InputError

Names = tuple[str, ...] | None

NO_TAG = (-1, -100)
"""How data sets mark a word whose label does not count."""


# ------------------------------------------------------------------------------------------------------------- contents


def as_text(value: Any, where: str) -> str:
    """The text of a row, composed (NFC) and stripped; "" where there is none. Raises InputError if it is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError("DST-3410", "text has a wrong type", where=where, expected="a string", found=_shown(value))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            "DST-3411", "text is not valid Unicode", where=where, expected="UTF-8", found=f"half a surrogate pair in {value!r:.40}"
        ) from None
    return unicodedata.normalize("NFC", value).strip()


def _texts(task: Any, row: Mapping[str, Any], where: str) -> str:
    first = as_text(row.get(task.text), where)
    if getattr(task, "pair", None) is None:
        return first
    second = as_text(row.get(task.pair), where)
    # A pair that lacks one side is no pair: it is empty like a text that is not there.
    return to_json([first, second]) if first and second else ""


def _words(task: Any, row: Mapping[str, Any], where: str) -> str:
    value = row.get(task.text)
    if value is None:
        return ""
    if not isinstance(value, list):
        raise InputError("DST-3410", "text has a wrong type", where=where, expected="a list of words", found=_shown(value))
    words = [as_text(word, where) for word in value]
    return to_json(words) if any(words) else ""


def _image(task: Any, row: Mapping[str, Any], where: str) -> bytes:
    return pixels(row.get(task.image), task, where)


# --------------------------------------------------------------------------------------------------------------- labels


def as_label(value: Any, names: Names, where: str) -> str | None:
    """The name of a row's label; None where there is none (null or ""). With `names`, an integer is a place in them.

    Raises InputError if it is neither a string nor an integer, or not one of `names`.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError("DST-3412", "label has a wrong type", where=where, expected="a string or an integer", found=_shown(value))
    if names is None or value in names:
        return _encodable(str(value), where)
    text = str(value)
    if text.lstrip("-").isdecimal() and text.isascii():
        if 0 <= int(text) < len(names):
            return names[int(text)]
        raise InputError(
            "DST-3414",
            "label is out of range",
            where=where,
            expected=f"0 to {len(names) - 1}",
            found=text,
            do="Correct the row or task.labels",
        )
    raise InputError(
        "DST-3413", "label is not among the names", where=where, expected=", ".join(names), found=repr(text)[:60],
        do="Correct the row or task.labels",
    )  # fmt: skip


def _encodable(label: str, where: str) -> str:
    as_text(label, where)  # half a surrogate pair would not come through Arrow
    return label


def as_labels(value: Any, names: Names, where: str) -> str | None:
    """Several labels: [] means that none applies, null that nothing is known."""
    if value is None:
        return None
    found = [as_label(label, names, where) for label in _list(value, where)]
    if None in found:
        raise InputError("DST-3412", "label has a wrong type", where=where, expected="a list of names or integers", found=_shown(value))
    return to_json(sorted({str(label) for label in found}))


def as_tags(value: Any, names: Names, where: str) -> str | None:
    """A label for each word; null, -1 and -100 are none. None if no word has one."""
    if value is None:
        return None
    known = [None if type(tag) is int and tag in NO_TAG else as_label(tag, names, where) for tag in _list(value, where)]
    return to_json(known)


def as_number(value: Any, names: Names, where: str) -> str | None:
    """Raises InputError for what is no number, and for one that is not finite."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError("DST-3412", "label has a wrong type", where=where, expected="a number", found=_shown(value))
    if not abs(value) <= 3.4e38:  # also false of NaN; larger ones do not fit a float32
        raise InputError(
            "DST-3465", "label is not a finite number", where=where, expected="a number that fits 32 bits", found=str(value)[:40],
            do="Correct the row, or leave its label empty",
        )  # fmt: skip
    return repr(float(value) + 0.0)  # -0.0 is 0.0


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError("DST-3412", "label has a wrong type", where=where, expected="a list", found=_shown(value))
    return value


CONTENT: Mapping[str, Callable[[Any, Mapping[str, Any], str], str | bytes]] = {
    "text_classification": _texts, "multi_label": _texts, "regression": _texts, "token_classification": _words, "causal_lm": _texts,
    "masked_lm": _texts, "image_classification": _image, "embedding": _texts,
}  # fmt: skip
LABEL: Mapping[str, Callable[[Any, Names, str], str | None] | None] = {
    "text_classification": as_label, "multi_label": as_labels, "regression": as_number, "token_classification": as_tags,
    "causal_lm": None, "masked_lm": None, "image_classification": as_label, "embedding": as_label,
}  # fmt: skip
"""None: the task has no labels, its own text is what is learned."""


# ----------------------------------------------------------------------------------------------------------------- rows


def row_of(task: TaskConfig, row: Mapping[str, Any], where: str, names: Names = None) -> Row:
    """Content and label of a row. names: what the source itself calls its labels, where it stores their numbers.

    Raises InputError naming the row, if a value has a wrong type or does not fit the task.
    """
    content = CONTENT[task.type](task, row, where)
    column, read = label_of(task), LABEL[task.type]
    if column is None or read is None:
        return content, None
    value = row.get(column)
    if names is not None and value is not None:
        value = _named(value, names, where)
    label = read(value, getattr(task, "labels", None), where)
    if read is as_tags and label is not None:
        label = _fitting(content, label, where)
    return content, label


def _named(value: Any, names: tuple[str, ...], where: str) -> Any:
    """Names for numbers. -1 is how `datasets` marks a row without label, as in the test splits of GLUE."""
    if isinstance(value, list):
        return [None if number in NO_TAG else as_label(number, names, where) for number in value]
    return None if value == -1 else as_label(value, names, where)


def _fitting(words: Any, tags: str, where: str) -> str | None:
    """The labels of words, if there is one for each. None where no word has one."""
    counts = len(json.loads(words)) if words else None, len(known := json.loads(tags))
    if counts[0] is not None and counts[0] != counts[1]:
        raise InputError(
            "DST-3464", "words and their labels differ in number", where=where, expected=f"{counts[0]} labels, one for each word",
            found=str(counts[1]), do="Correct the row; null is the label of a word without one",
        )  # fmt: skip
    return tags if any(tag is not None for tag in known) else None


def from_csv(task: TaskConfig, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A row of CSV, whose cells are all text: lists are written as JSON, numbers as such."""
    typed = dict(row)
    for column in wanted(task):
        kind = expected(task, column)
        if column not in row or kind is TEXTS or kind is NAMES:
            continue
        cell = row[column].strip()
        try:
            typed[column] = None if not cell else float(cell) if kind is NUMBERS else json.loads(cell)
        except (ValueError, RecursionError):
            code, what = ("DST-3410", "text has a wrong type") if column in inputs_of(task) else ("DST-3412", "label has a wrong type")
            shape = "a number" if kind is NUMBERS else "a list as JSON"
            raise InputError(code, what, where=where, expected=shape, found=repr(cell)[:40]) from None
    return typed


def to_json(value: Any) -> str:
    """The one way in which lists are written: their hash is an id."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"
