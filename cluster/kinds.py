"""Which columns a task reads, and the types they may have: what can be said of a file before its rows are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from distillation.config import Embedding, ImageClassification, TaskConfig
from distillation.errors import InputError


def inputs_of(task: TaskConfig) -> tuple[str, ...]:
    """Columns that every row needs."""
    if isinstance(task, ImageClassification):
        return (task.image,)
    pair = getattr(task, "pair", None)
    return (task.text,) if pair is None else (task.text, pair)


def label_of(task: TaskConfig) -> str | None:
    """Column of the label; None for a task without labels."""
    return getattr(task, "label", None)


def wanted(task: TaskConfig) -> tuple[str, ...]:
    label = label_of(task)
    return inputs_of(task) if label is None else (*inputs_of(task), label)


def needs_label(task: TaskConfig) -> bool:
    """Whether rows of validation and test are of no use without a label."""
    return label_of(task) is not None and not isinstance(task, Embedding)


def required(task: TaskConfig, split: str) -> tuple[str, ...]:
    return wanted(task) if needs_label(task) and split != "train" else inputs_of(task)


def require(task: TaskConfig, columns: tuple[str, ...], present: Mapping[str, Any], where: str) -> None:
    """Raise InputError for the first of `columns` that is not there."""
    for column in columns:
        if column not in present:
            raise InputError(
                "DST-3407", "column is missing", where=where, expected=repr(column), found=", ".join(map(str, present)) or "no column",
                do=f"Set {' and '.join(f'task.{name}' for name in ('image', 'text', 'pair', 'label') if getattr(task, name, None))} "
                "to the names of the columns",
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- types

TEXTS = ("a string", {"string"})
WORDS = ("a list of words", {"list of string"})
IMAGES = (
    "an image, its bytes or a list of rows of pixels",
    {"image", "binary", "list of list of integer", "list of list of list of integer"},
)
NAMES = ("a string or an integer", {"string", "integer"})
LISTS = ("a list of strings or of integers", {"list of string", "list of integer"})
NUMBERS = ("a number", {"number", "integer"})

EXPECTED: Mapping[str, tuple[Any, Any]] = {
    "text_classification": (TEXTS, NAMES), "multi_label": (TEXTS, LISTS), "regression": (TEXTS, NUMBERS),
    "token_classification": (WORDS, LISTS), "causal_lm": (TEXTS, None), "masked_lm": (TEXTS, None),
    "image_classification": (IMAGES, NAMES), "embedding": (TEXTS, NAMES),
}  # fmt: skip
"""What the columns of content and of label may hold, in words and as kinds of `kind_of`."""


def expected(task: TaskConfig, column: str) -> Any:
    content, label = EXPECTED[task.type]
    return content if column in inputs_of(task) else label


def checked_kind(task: TaskConfig, column: str, kind: str, where: str, found: str) -> str:
    """The kind of a column, if the task can use it. `found` is what people call it. Raises InputError."""
    if column not in wanted(task) or kind in ("null", "list of null"):
        return "null" if kind == "list of null" else kind
    words, allowed = expected(task, column)
    if kind not in allowed:
        code, what = ("DST-3410", "text has a wrong type") if column in inputs_of(task) else ("DST-3412", "label has a wrong type")
        if isinstance(task, ImageClassification) and column == task.image:
            code, what = "DST-3461", "image cannot be read"
        raise InputError(code, what, where=f"{where}: column {column!r}", expected=words, found=found)
    return "number" if allowed is NUMBERS[1] else kind


def kind_of(found: pa.DataType) -> str:
    """ "string", "integer", "number", "binary", "image" (as `datasets` stores it), "null", "list of ...", or the type's own name."""
    if isinstance(found, pa.BaseExtensionType):
        return kind_of(found.storage_type)
    if pa.types.is_dictionary(found):
        return kind_of(found.value_type)
    if pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found):
        return f"list of {kind_of(found.value_type)}"
    if pa.types.is_struct(found) and "bytes" in {field.name for field in found}:
        return "image"
    names = {
        "string": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view), "integer": (pa.types.is_integer,),
        "number": (pa.types.is_floating,), "null": (pa.types.is_null,),
        "binary": (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view),
    }  # fmt: skip
    return next((name for name, tests in names.items() if any(test(found) for test in tests)), str(found))


def kind_of_value(value: Any) -> str:
    """The same for a value of a JSON file."""
    if value is None or value == "":
        return "null"
    if isinstance(value, list):
        return f"list of {next((kind for kind in map(kind_of_value, value) if kind != 'null'), 'null')}"
    return {str: "string", int: "integer", float: "number"}.get(type(value), type(value).__name__)
