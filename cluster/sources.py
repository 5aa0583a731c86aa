"""Where the rows of a corpus come from: what a source is, whether it is sound, and how it is read, piece by piece. Nothing of Ray.

require_serves  whether a task can learn from it at all
describe        everything about the content that could change a corpus, without reading rows
units           pieces that can be read at the same time
read            the rows of one piece, as a stream of small tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster import digits, docstrings, files, pictures, plaintext, sourcecode
from cluster.columns import row_of
from cluster.config import CorpusConfig, DigitsCorpus, DocstringsCorpus, FilesCorpus, HubCorpus, SourceCorpus, TextCorpus
from cluster.kinds import inputs_of, label_of, require, required, wanted
from cluster.reading import CHUNK_ROWS, Row, Unit, tables
from distillation.config import ImageClassification, TaskConfig
from distillation.errors import InputError
from distillation.store import checksum

HUB_ROWS = 50_000
"""Rows of a data set that one task reads."""

PART_BYTES = 2**31 - 1
"""Of the images of a part: what a column of Arrow lists holds."""

EVERY = (
    "text_classification", "multi_label", "regression", "token_classification", "causal_lm", "masked_lm", "image_classification",
    "embedding",
)  # fmt: skip
SERVES: Mapping[str, tuple[str, ...]] = {
    "files": EVERY, "hub": EVERY, "docstrings": ("text_classification", "causal_lm", "masked_lm", "embedding"),
    "text": ("causal_lm", "masked_lm", "embedding"), "source": ("causal_lm", "masked_lm", "embedding"), "digits": ("image_classification",),
}  # fmt: skip
"""Types of tasks that can learn from a type of corpus."""


def require_serves(corpus: CorpusConfig, task: TaskConfig) -> None:
    """Raise InputError if nothing in the corpus is what the task learns from. Reads nothing."""
    where = f"corpus.type: {corpus.type}"
    serves = SERVES[corpus.type]
    if isinstance(corpus, SourceCorpus):
        where += f", kind: {corpus.kind}"
        serves = ("token_classification",) if corpus.kind == "tokens" else serves
    if task.type not in serves or (isinstance(corpus, DocstringsCorpus) and getattr(task, "pair", None) is not None):
        raise InputError(
            "DST-3460", "corpus does not serve this task", where=where, expected=f"task.type {', '.join(serves)}",
            found=task.type + (" of pairs" if task.type in serves else ""), do="Take another corpus, such as one of type files",
        )  # fmt: skip
    if not isinstance(task, ImageClassification):
        return
    if isinstance(corpus, DigitsCorpus) and (task.channels != 1 or (task.size != digits.SIZE and not task.resize)):
        raise InputError(
            "DST-3460", "corpus does not serve this task", where=where, expected="task.channels 1, and task.size 8 or task.resize",
            found=f"channels {task.channels}, size {task.size}", do="Set them",
        )  # fmt: skip
    each = task.size**2 * task.channels
    if corpus.part_rows * each > PART_BYTES:
        raise InputError(
            "DST-3469", "parts would be too large", where="corpus.part_rows", expected=f"at most {PART_BYTES // each} images of {each} bytes",
            found=str(corpus.part_rows), do="Lower it",
        )  # fmt: skip


def describe(corpus: CorpusConfig, task: TaskConfig) -> dict[str, Any]:
    """What the source is, as JSON: the same for the same content. Also the check that it can be read at all.

    Raises InputError: the corpus does not serve the task, no file matches, a file is missing, empty, damaged or of an unknown format, a
    column is missing or of a wrong type, files differ in their types, a data set, split or library is not there.
    """
    require_serves(corpus, task)
    # Scaling, and what a JPEG looks like, is up to the decoder.
    decoder = {"pillow": pictures.version()} if isinstance(task, ImageClassification) else {}
    return {"type": corpus.type, **_describe(corpus, task), **decoder}


def _describe(corpus: CorpusConfig, task: TaskConfig) -> dict[str, Any]:
    if isinstance(corpus, FilesCorpus):
        found = _files(corpus)
        files.check(found, task)
        return {split: sorted(files.identity(file) for file in group) for split, group in found.items()}
    if isinstance(corpus, HubCorpus):
        return _describe_hub(corpus, task)
    if isinstance(corpus, TextCorpus):
        return plaintext.describe(corpus)
    if isinstance(corpus, SourceCorpus):
        return sourcecode.describe(corpus)
    return digits.describe() if isinstance(corpus, DigitsCorpus) else docstrings.describe(corpus)


def units(corpus: CorpusConfig, task: TaskConfig) -> list[Unit]:
    """Pieces of the source: a row group of Parquet, another file, a range of rows of a data set, a library."""
    if isinstance(corpus, FilesCorpus):
        return [unit for split, group in _files(corpus).items() for file in group for unit in files.units(file, split)]
    if isinstance(corpus, DocstringsCorpus):
        return docstrings.units(corpus)
    if isinstance(corpus, TextCorpus):
        return plaintext.units(corpus)
    if isinstance(corpus, SourceCorpus):
        return sourcecode.units(corpus)
    if isinstance(corpus, DigitsCorpus):
        return digits.units()
    found = []
    for split, name in _hub_splits(corpus).items():
        rows = len(_load_hub(corpus.dataset, corpus.subset, corpus.revision, name))
        for start in range(0, rows, HUB_ROWS):
            stop = min(rows, start + HUB_ROWS)
            found.append(
                Unit(
                    "hub",
                    corpus.dataset,
                    split,
                    start=start,
                    stop=stop,
                    bytes=200 * (stop - start),
                    subset=corpus.subset,
                    revision=corpus.revision,
                    source_split=name,
                )
            )
    return found


def read(unit: Unit, task: TaskConfig) -> Iterator[pa.Table]:
    """Tables of `reading.SCHEMA` (of images `PIXELS`) with at most a few thousand rows. A row without text has "", one without label null.

    Raises InputError naming the file and the row, and what is wrong with it.
    """
    if unit.kind == "docstrings":
        return docstrings.read(unit, task)
    if unit.kind == "text":
        return plaintext.read(unit, task)
    if unit.kind == "source":
        return sourcecode.read(unit, task)
    if unit.kind == "digits":
        return digits.read(unit, task)
    if unit.kind == "hub":
        return tables(_hub_rows(unit, task), unit.split, task)
    return files.read(unit, task)


def _files(corpus: FilesCorpus) -> dict[str, list[files.File]]:
    named = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    return {split: files.find(patterns) for split, patterns in named.items() if not isinstance(patterns, float)}


# ------------------------------------------------------------------------------------------------------------------- hub


def _hub_splits(corpus: HubCorpus) -> dict[str, str]:
    named = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    return {split: name for split, name in named.items() if isinstance(name, str)}


def _describe_hub(corpus: HubCorpus, task: TaskConfig) -> dict[str, Any]:
    splits = _hub_splits(corpus)
    for split, name in splits.items():
        if (folder := _saved_folder(corpus.dataset, name)) is not None:
            features = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        else:
            features = _builder(corpus).info.features or {}
        if features:
            require(task, required(task, split), features, f"{corpus.dataset}, split {name}")
    if not Path(corpus.dataset).is_dir():
        return {
            "dataset": corpus.dataset,
            "subset": corpus.subset,
            "revision": corpus.revision,
            "hash": _builder(corpus).hash,
            "splits": splits,
        }
    return {split: [[path.name, checksum(path)] for path in _saved_files(corpus.dataset, name)] for split, name in splits.items()}


def _saved_folder(dataset: str, split: str) -> Path | None:
    """Folder of a split that `datasets` saved; None if `dataset` is no folder and so the name of one on the hub."""
    root = Path(dataset)
    if not root.is_dir():
        return None
    try:
        if (root / "dataset_dict.json").is_file():
            known = json.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        elif (root / "state.json").is_file():
            known = ["train"]
        else:
            raise InputError(
                "DST-3430",
                "folder is not a data set",
                where=dataset,
                expected="dataset_dict.json or state.json, as save_to_disk writes them",
                found="neither",
                do="Use a corpus of type files for other folders",
            )
    except (ValueError, KeyError) as error:
        raise InputError(
            "DST-3430", "folder is not a data set", where=dataset, expected="a whole dataset_dict.json", found=str(error)
        ) from error
    if split not in known:
        raise InputError("DST-3431", "data set has no such split", where=dataset, expected=", ".join(known), found=split)
    return root / split if (root / "dataset_dict.json").is_file() else root


def _saved_files(dataset: str, split: str) -> list[Path]:
    folder = _saved_folder(dataset, split)
    assert folder is not None
    names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]]
    for name in names:
        if not (folder / name).is_file():
            raise InputError("DST-3402", "file does not exist", where=str(folder / name), do="Save the data set again")
    return [folder / "dataset_info.json", *(folder / name for name in names)]


def _builder(corpus: HubCorpus) -> Any:
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(corpus.dataset, corpus.subset, revision=corpus.revision)
    except (OSError, ValueError) as error:
        raise _no_dataset(corpus.dataset, error) from error


def _load_hub(dataset: str, subset: str | None, revision: str | None, split: str) -> Any:
    """A split as a memory-mapped `datasets.Dataset`; downloaded once a node."""
    from datasets import load_dataset, load_from_disk
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    folder = _saved_folder(dataset, split)
    try:
        return load_from_disk(str(folder)) if folder else load_dataset(dataset, subset, revision=revision, split=split)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _no_dataset(str(folder or dataset), error) from error


def _no_dataset(where: str, error: Exception) -> InputError:
    return InputError(
        "DST-3432",
        "data set cannot be loaded",
        where=where,
        expected="a data set of the hub, or a folder that `datasets` saved",
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        do="Check corpus.dataset, subset, revision and the network",
    )


def _hub_rows(unit: Unit, task: TaskConfig) -> Iterator[Row]:
    data = _load_hub(unit.path, unit.subset, unit.revision, str(unit.source_split))
    where = f"{unit.path}, split {unit.source_split}"
    require(task, inputs_of(task), dict.fromkeys(data.column_names), where)
    columns = [name for name in wanted(task) if name in data.column_names]
    names = _class_names(data.features.get(label_of(task)))
    rows = files.IMAGE_ROWS if isinstance(task, ImageClassification) else CHUNK_ROWS
    row = unit.start
    # As Arrow: an image stays the bytes that it was saved as.
    for batch in data.select_columns(columns).select(range(unit.start, unit.stop)).with_format("arrow").iter(rows):
        for values in zip(*(_plain(batch[name]).to_pylist() for name in columns), strict=True):
            row += 1
            yield row_of(task, dict(zip(columns, values, strict=True)), f"{where}: row {row}", names)


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Names of the classes of a column, or of the entries of its lists, where the data set knows them."""
    from datasets import ClassLabel

    inner = getattr(feature, "feature", feature)
    return tuple(inner.names) if isinstance(inner, ClassLabel) else None


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Arrays of `datasets` as the lists that they are stored in."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
