"""Content-addressed artifacts: corpora, target stores, models, checkpoints. Each is a folder with a manifest that is committed last.

    {folder}/part-3f0a....arrow     rows, an Arrow stream of one record batch: `datasets.Dataset.from_file` opens it memory-mapped
    {folder}/part-3f0a....json      the part's record, committed after it: rows, tokens, bytes, checksum
    {folder}/manifest.json          what the artifact is, what it was made from, and the record of every file
    {folder}/records-9c01....arrow  of more than `MANY` parts: the records, named with its checksum by the manifest instead of them

Records and manifests carry a checksum of their own under "seal". A reader trusts the manifest only. Names come from the fingerprint of
everything that could change the bytes, so whoever wants the same thing finds it, and two that write it at once write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

from distillation import cache
from distillation.cache import checksum as checksum
from distillation.errors import ConflictError, InputError
from distillation.parts import MANY, Parts, read_table, total, write_table
from distillation.parts import FileRecord as FileRecord
from distillation.storage import Storage

VERSION = 1
"""Of the layout above. An artifact of another version is refused, not guessed at."""

MANIFEST = "manifest.json"

FETCHERS = 8
"""Files of one artifact that are fetched at a time: an object store answers after tens of milliseconds, however small the file."""

READERS = 32
"""Records of parts that are read at a time from an object store."""

Kind = Literal["corpus", "targets", "model", "checkpoint"]


def _splits(splits: Mapping[str, Any]) -> dict[str, Sequence[FileRecord]]:
    return {
        name: parts if isinstance(parts, Parts) else tuple(map(FileRecord.model_validate, parts)) for name, parts in splits.items()
    }  # fmt: skip


def _dumped(splits: Mapping[str, Sequence[FileRecord]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [part.model_dump() for part in parts] for name, parts in splits.items()}


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    kind: Kind
    fingerprint: str
    made_from: dict[str, Any]
    """Everything that went into the fingerprint, for people and for `open` errors."""
    splits: Annotated[dict[str, Sequence[FileRecord]], PlainValidator(_splits), PlainSerializer(_dumped)] = {}
    """Parts of each split, in the order of their rows' ids."""
    table: FileRecord | None = None
    """The file with `splits`, of which there are too many for the manifest."""
    files: tuple[FileRecord, ...] = ()
    """Other files, of models and checkpoints."""
    facts: dict[str, Any] = {}
    """What was found on the way: labels, counts, dropped rows, shapes."""
    created: float = 0.0
    """Seconds since the epoch."""

    def rows(self, split: str) -> int:
        return total(self.splits.get(split, ()), "rows")

    def tokens(self, split: str) -> int:
        return total(self.splits.get(split, ()), "tokens")

    def total_bytes(self) -> int:
        return sum(r.bytes for r in self.files) + sum(total(parts, "bytes") for parts in self.splits.values())


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """16 hexadecimal digits over the canonical JSON of everything that could change the bytes."""
    text = json.dumps({"version": VERSION, **made_from}, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- write


def write_part(storage: Storage, folder: str, name: str, table: pa.Table, tokens: int) -> FileRecord:
    """Commit one part: the rows, then the record that says they are whole. Writing the same part twice is harmless."""
    batches = table.combine_chunks().to_batches()
    assert len(batches) == 1, "a part holds at least one row, in one record batch"
    with storage.writing(f"{folder}/{name}.arrow") as path:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_batch(batches[0])
        record = FileRecord(name=f"{name}.arrow", bytes=path.stat().st_size, checksum=checksum(path), rows=table.num_rows, tokens=tokens)
    storage.write(f"{folder}/{name}.json", _sealed(record))
    return record


def write_file(storage: Storage, folder: str, name: str, write: Callable[[Path], Any]) -> FileRecord:
    """One file of an artifact that several processes write: it counts when a manifest lists its record. write: gets the path to write at."""
    with storage.writing(f"{folder}/{name}") as path:
        write(path)
        return FileRecord(name=name, bytes=path.stat().st_size, checksum=checksum(path))


def committed_part(storage: Storage, folder: str, name: str) -> FileRecord | None:
    """The record of a part that is whole and unaltered, or None if it has to be written (again)."""
    try:
        record = FileRecord.model_validate(_unsealed(storage.read(f"{folder}/{name}.json")))
        _intact(storage, folder, record)
    except (FileNotFoundError, ValueError, InputError):
        return None
    return record if record.name == f"{name}.arrow" else None


def committed_parts(storage: Storage, folder: str, names: Sequence[str]) -> dict[str, FileRecord]:
    """Records of those parts that lie there in the size that their record tells, by name. Content is checked by whoever opens them.

    One listing, then the records alone, several at a time: it costs a small request for each part, and none of their rows.
    """
    there = storage.sizes(folder)
    asked = [name for name in names if f"{name}.json" in there and f"{name}.arrow" in there]

    def record_of(name: str) -> FileRecord | None:
        try:
            record = FileRecord.model_validate(_unsealed(storage.read(f"{folder}/{name}.json")))
        except (FileNotFoundError, ValueError):
            return None
        return record if (record.name, record.bytes) == (f"{name}.arrow", there[record.name]) else None

    with ThreadPoolExecutor(1 if storage.is_local else READERS, thread_name_prefix="records") as threads:
        return {name: record for name, record in zip(asked, threads.map(record_of, asked), strict=True) if record is not None}


def commit(storage: Storage, folder: str, manifest: Manifest) -> Manifest:
    """Write the manifest of a folder whose parts are committed. From here on the artifact exists."""
    if (existing := find(storage, folder)) and existing.fingerprint != manifest.fingerprint:
        raise ConflictError(
            "DST-8002", "another artifact already lies here", where=storage.path(folder),
            expected=manifest.fingerprint, found=existing.fingerprint, do="Remove the folder or use another storage",
        )  # fmt: skip
    manifest = manifest.model_copy(update={"created": time.time()})
    if sum(map(len, manifest.splits.values())) > MANY:
        manifest = manifest.model_copy(update={"table": _write_table(storage, folder, manifest.splits)})
    storage.write(f"{folder}/{MANIFEST}", _sealed(manifest))
    return manifest


def _write_table(storage: Storage, folder: str, splits: Mapping[str, Sequence[FileRecord]]) -> FileRecord:
    # Under a name of its own: a manifest that is already there goes on to name what it was made with.
    with tempfile.TemporaryDirectory(prefix="distillery-") as place:
        path = Path(place) / "records"
        write_table(path, splits)
        record = FileRecord(name="", bytes=path.stat().st_size, checksum=checksum(path))
        record = record.model_copy(update={"name": f"records-{record.checksum[:12]}.arrow"})
        with storage.writing(f"{folder}/{record.name}") as beside:
            shutil.copyfile(path, beside)
    return record


def commit_folder(
    storage: Storage, folder: str, source: Path, kind: Kind, print_: str, made_from: Mapping[str, Any], facts: Mapping[str, Any]
) -> Manifest:
    """Copy the files under `source` into the storage as one artifact that appears whole or not at all."""
    with storage.writing_folder(folder, last=MANIFEST) as beside:
        shutil.copytree(source, beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        files = [
            FileRecord(name=p.relative_to(beside).as_posix(), bytes=p.stat().st_size, checksum=checksum(p))
            for p in sorted(beside.rglob("*"))
            if p.is_file()
        ]
        whole = {"made_from": dict(made_from), "files": tuple(files), "facts": dict(facts)}
        manifest = Manifest(kind=kind, fingerprint=print_, created=time.time(), **whole)
        (beside / MANIFEST).write_bytes(_sealed(manifest))
    return manifest


def _sealed(record: FileRecord | Manifest) -> bytes:
    """JSON for people, with a checksum over what it means: one altered digit is an error, another indentation is not."""
    many = isinstance(record, Manifest) and record.table is not None
    fields = json.loads(record.model_dump_json(exclude={"splits"} if many else None))
    return json.dumps({**fields, "seal": _seal(fields)}, indent=1).encode()


def _unsealed(text: bytes) -> dict[str, Any]:
    """Fields of a record. Raises ValueError if it was altered."""
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.pop("seal", None) != _seal(fields):
        raise ValueError("content and checksum that do not belong together")
    return fields


def _seal(fields: Any) -> str:
    return xxhash.xxh3_128(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------- read


def find(storage: Storage, folder: str) -> Manifest | None:
    """The manifest of a folder, or None if there is none. Reads no parts. Raises InputError if it cannot be read."""
    try:
        text = storage.read(f"{folder}/{MANIFEST}")
    except FileNotFoundError:
        return None
    where = f"{storage.path(folder)}/{MANIFEST}"
    try:
        fields = json.loads(text)
        version = fields.get("version") if isinstance(fields, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise InputError(
                "DST-3102", "artifact has another version", where=where, expected=str(VERSION), found=str(version),
                do="Remove the folder and run again, or use the release that wrote it",
            )  # fmt: skip
        manifest = Manifest.model_validate(_unsealed(text))
        if manifest.table is None:
            return manifest
        return manifest.model_copy(update={"splits": read_table(_intact(storage, folder, manifest.table))})
    except ValueError as error:
        raise InputError(
            "DST-3103", "manifest was altered", where=where, expected="a manifest", found=str(error).splitlines()[0],
            do="Remove the folder and run again",
        ) from error  # fmt: skip


def require(storage: Storage, folder: str, kind: Kind) -> Manifest:
    """The manifest of a folder. Raises InputError where there is none, or one of another kind. Reads no parts."""
    manifest = find(storage, folder)
    if manifest is None:
        raise InputError(
            "DST-3101", f"{kind} is missing or incomplete", where=storage.path(folder), expected=MANIFEST, found="no manifest",
            do="Run the job again: it continues where it stopped",
        )  # fmt: skip
    if manifest.kind != kind:
        raise InputError("DST-3104", "artifact is of another kind", where=storage.path(folder), expected=kind, found=manifest.kind)
    return manifest


def open_artifact(storage: Storage, folder: str, kind: Kind) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the local path of every file, each checked against its record.

    Raises InputError naming the file that is missing or altered, or the folder that is incomplete or of another kind.
    """
    manifest = require(storage, folder, kind)
    records = [*manifest.files, *(record for parts in manifest.splits.values() for record in parts)]
    return manifest, dict(zip((record.name for record in records), intact(storage, folder, records), strict=True))


def intact(storage: Storage, folder: str, records: Sequence[FileRecord]) -> list[Path]:
    """Local path of each file, checked against its record; from a remote storage several are fetched at a time.

    Raises InputError as `open_artifact` does, and StorageError where the node has no room for them.
    """
    if storage.is_local:
        return [_intact(storage, folder, record) for record in records]
    place = cache.folder_of(storage.uri) / folder
    cache.require_space(place, sum(r.bytes for r in records if not (place / r.name).is_file()))
    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") as threads:
        return list(threads.map(lambda record: _intact(storage, folder, record), records))


_seen: dict[tuple[str, int, int], str] = {}


def _intact(storage: Storage, folder: str, record: FileRecord) -> Path:
    """Local path of a file whose size and checksum are right; a copy in the node's cache that is not is fetched again. Raises InputError."""
    where, name = f"{storage.path(folder)}/{record.name}", f"{folder}/{record.name}"
    try:
        path = storage.fetch(name, record.bytes, record.checksum)
    except FileNotFoundError:
        raise InputError("DST-3105", "file of an artifact is missing", where=where, do="Remove the folder and run again") from None
    if not storage.is_local and cache.is_checked(path, record.bytes, record.checksum):
        return path
    expected, found = f"{record.bytes} bytes", f"{path.stat().st_size} bytes"
    if expected == found:
        expected, found = f"checksum {record.checksum}", f"checksum {_checksum_once(path)}"
    if expected == found:
        return path
    repair = "Remove the folder and run again: it is made anew"
    raise InputError("DST-3106", "file was altered", where=where, expected=expected, found=found, do=repair)


def _checksum_once(path: Path) -> str:
    """Checksum of a file, remembered by this process until the file changes."""
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key in _seen:
        return _seen[key]
    found = checksum(path)
    # Time stamps are coarse: a file written just now could change again without showing it.
    if time.time_ns() - status.st_mtime_ns > 2_000_000_000:
        _seen[key] = found
    return found
