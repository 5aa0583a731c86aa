"""Where the rows of a corpus come from: what a source is, whether it is sound, and how it is read, piece by piece. Nothing of Ray.

describe    everything about the content that could change a corpus, without reading rows
units       pieces that can be read at the same time
read        the rows of one piece, as a stream of small tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster import docstrings, files
from cluster.config import CorpusConfig, DocstringsCorpus, FilesCorpus, HubCorpus
from cluster.reading import CHUNK_ROWS, Unit, as_label, as_text, tables
from distillation.config import TaskConfig
from distillation.errors import InputError
from distillation.store import checksum

HUB_ROWS = 50_000
"""Rows of a data set that one task reads."""


def describe(corpus: CorpusConfig, task: TaskConfig) -> dict[str, Any]:
    """What the source is, as JSON: the same for the same content. Also the check that it can be read at all.

    Raises InputError: no file matches, a file is missing, empty, damaged or of an unknown format, a column is missing or of a wrong type,
    files differ in their types, a data set, split or library is not there.
    """
    if isinstance(corpus, FilesCorpus):
        found = _files(corpus)
        files.check(found, task)
        return {"type": "files", **{split: sorted(files.identity(file) for file in group) for split, group in found.items()}}
    if isinstance(corpus, HubCorpus):
        return {"type": "hub", **_describe_hub(corpus, task)}
    return {"type": "docstrings", **docstrings.describe(corpus)}


def units(corpus: CorpusConfig, task: TaskConfig) -> list[Unit]:
    """Pieces of the source: a row group of Parquet, another file, a range of rows of a data set, a library."""
    if isinstance(corpus, FilesCorpus):
        return [unit for split, group in _files(corpus).items() for file in group for unit in files.units(file, split)]
    if isinstance(corpus, DocstringsCorpus):
        return docstrings.units(corpus)
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
    """Tables of `reading.SCHEMA` with at most a few thousand rows. A row without text has "", one without label null.

    Raises InputError naming the file and the row, and what is wrong with it.
    """
    if unit.kind == "docstrings":
        return docstrings.read(unit)
    if unit.kind == "hub":
        return tables(_hub_rows(unit, task), unit.split)
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
        for column in (task.text,) if split == "train" else (task.text, task.label):
            if features and column not in features:
                raise InputError(
                    "DST-3407",
                    "column is missing",
                    where=f"{corpus.dataset}, split {name}",
                    expected=repr(column),
                    found=", ".join(features),
                    do="Set task.text and task.label to the names of the columns",
                )
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


def _hub_rows(unit: Unit, task: TaskConfig) -> Iterator[tuple[str, str | None]]:
    from datasets import ClassLabel

    data = _load_hub(unit.path, unit.subset, unit.revision, str(unit.source_split))
    where = f"{unit.path}, split {unit.source_split}"
    if task.text not in data.column_names:
        raise InputError("DST-3407", "column is missing", where=where, expected=repr(task.text), found=", ".join(data.column_names))
    feature = data.features.get(task.label)
    row = unit.start
    wanted = [name for name in (task.text, task.label) if name in data.column_names]
    for batch in data.select_columns(wanted).select(range(unit.start, unit.stop)).with_format("arrow").iter(CHUNK_ROWS):
        labels = batch[task.label].to_pylist() if task.label in wanted else [None] * batch.num_rows
        for text, label in zip(batch[task.text].to_pylist(), labels, strict=True):
            row += 1
            place = f"{where}: row {row}"
            if isinstance(feature, ClassLabel) and label is not None:
                # -1 is how `datasets` marks a row without label, as in the test splits of GLUE.
                label = None if label == -1 else as_label(label, tuple(feature.names), place)
            yield as_text(text, place), as_label(label, task.labels, place)
