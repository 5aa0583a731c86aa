"""What is committed is what is read; whatever was altered, cut or left half-way is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from distillation.columns import Columns
from distillation.errors import ConflictError, InputError
from distillation.storage import Storage
from distillation.store import (
    MANIFEST,
    VERSION,
    FileRecord,
    Manifest,
    commit,
    commit_folder,
    committed_part,
    find,
    fingerprint,
    open_artifact,
    write_part,
)

TOKENS = [[[1, 2, 3], [4]], [[5, 6], [], [7, 8, 9, 10]], [[11]]]
"""Token ids of three parts with 2, 3 and 1 rows."""


def table(part: int) -> pa.Table:
    """Rows of one part; row i of the whole split has id "row i", length and the targets [i, i + 0.5]."""
    first = sum(len(rows) for rows in TOKENS[:part])
    rows = range(first, first + len(TOKENS[part]))
    logits = pa.array([x for i in rows for x in (i, i + 0.5)], pa.float16())
    return pa.table(
        {
            "id": pa.array([f"row {i}" for i in rows], pa.string()),
            "length": pa.array([len(ids) for ids in TOKENS[part]], pa.int32()),
            "input_ids": pa.array(TOKENS[part], pa.list_(pa.int32())),
            "logits": pa.FixedSizeListArray.from_arrays(logits, 2),
        }
    )


def write(storage: Storage, folder: str = "corpora/1") -> Manifest:
    records = [write_part(storage, folder, f"part-{i}-train", table(i), sum(map(len, TOKENS[i]))) for i in range(3)]
    made_from = {"source": "by hand"}
    facts = {"labels": ["no", "yes"], "dropped": 17, "share": 0.25, "per_label": {"0": 4}}
    return commit(
        storage,
        folder,
        Manifest(kind="corpus", fingerprint=fingerprint(made_from), made_from=made_from, splits={"train": records}, facts=facts),
    )


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


@pytest.fixture
def columns(storage):
    manifest = write(storage)
    _, paths = open_artifact(storage, "corpora/1", "corpus")
    return Columns([paths[record.name] for record in manifest.splits["train"]])


# --------------------------------------------------------------------------------------------------------------------- read


def test_a_part_comes_back_and_datasets_opens_it(storage):
    record = write_part(storage, "corpora/1", "part-1-train", table(1), tokens=6)
    path = storage.fetch("corpora/1/part-1-train.arrow")
    assert (record.name, record.rows, record.tokens, record.bytes) == ("part-1-train.arrow", 3, 6, path.stat().st_size)
    assert committed_part(storage, "corpora/1", "part-1-train") == record
    rows = datasets.Dataset.from_file(str(path))
    assert rows["id"][:] == ["row 2", "row 3", "row 4"]
    assert rows["input_ids"][:] == [[5, 6], [], [7, 8, 9, 10]]
    assert rows[1]["logits"] == [3.0, 3.5]


def test_columns_over_several_parts(columns):
    assert len(columns) == 6
    assert columns.offsets.tolist() == [0, 2, 5, 6]
    assert columns.schema.names == ["id", "length", "input_ids", "logits"]
    assert columns.whole("length").tolist() == [3, 1, 2, 0, 4, 1]
    rows = np.array([5, 0, 3, 4, 0])
    assert [part.tolist() for part in columns.locate(rows)] == [[2, 0, 1, 1, 0], [0, 0, 1, 2, 0]]
    assert columns.strings("id", rows) == ["row 5", "row 0", "row 3", "row 4", "row 0"]
    assert [ids.tolist() for ids in columns.ragged("input_ids", rows)] == [[11], [1, 2, 3], [], [7, 8, 9, 10], [1, 2, 3]]
    logits = columns.fixed("logits", rows)
    assert logits.dtype == np.float16
    assert logits.tolist() == [[5, 5.5], [0, 0.5], [3, 3.5], [4, 4.5], [0, 0.5]]


def test_columns_of_no_rows(columns):
    none = np.array([], dtype=np.int64)
    assert columns.fixed("logits", none).shape == (0, 2)
    assert columns.ragged("input_ids", none) == columns.strings("id", none) == []
    assert len(Columns([])) == 0
    assert Columns([]).whole("length").tolist() == []


def test_ragged_rows_are_views_and_fixed_rows_are_copies(columns):
    rows = np.array([0, 1])
    assert not columns.ragged("input_ids", rows)[0].flags.owndata
    columns.fixed("logits", rows)[:] = 9
    assert columns.fixed("logits", rows).tolist() == [[0, 0.5], [1, 1.5]]


def test_reading_many_batches_does_not_convert_the_parts_again(columns):
    first, second = (columns.ragged("input_ids", np.array([0]))[0] for _ in range(2))
    assert first.base is second.base


def test_manifest_counts_and_facts(storage):
    written = write(storage)
    manifest, paths = open_artifact(storage, "corpora/1", "corpus")
    assert manifest == written == find(storage, "corpora/1")
    assert (manifest.rows("train"), manifest.tokens("train"), manifest.rows("test")) == (6, 11, 0)
    assert manifest.total_bytes() == sum(path.stat().st_size for path in paths.values())
    assert manifest.facts["share"] == 0.25
    assert json.loads(storage.read("corpora/1/manifest.json"))["facts"]["labels"] == ["no", "yes"]
    assert abs(manifest.created - time.time()) < 60


def test_fingerprint_covers_everything_and_not_the_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) == hashlib.sha256(b'{"a": 1, "b": [1, 2], "version": %d}' % VERSION).hexdigest()[:16]
    assert len({fingerprint(x) for x in ({}, {"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"b": 1})}) == 6
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"a": float("nan")})


# ------------------------------------------------------------------------------------------------------------------ refused


def test_missing_other_kind_other_version(storage):
    assert find(storage, "corpora/1") is None
    with pytest.raises(InputError, match=r"DST-3101.*corpora/1.*no manifest"):
        open_artifact(storage, "corpora/1", "corpus")
    write(storage)
    with pytest.raises(InputError, match=r"DST-3104.*expected targets but found corpus"):
        open_artifact(storage, "corpora/1", "targets")
    text = storage.read("corpora/1/manifest.json").replace(b'"version": 1', b'"version": 2')
    storage.write("corpora/1/manifest.json", text)
    with pytest.raises(InputError, match=r"DST-3102.*expected 1 but found 2"):
        open_artifact(storage, "corpora/1", "corpus")


@pytest.mark.parametrize("size", ["nothing", "header", "half", "all but one byte"])
def test_a_part_that_was_cut(storage, size):
    write(storage)
    path = storage.fetch("corpora/1/part-1-train.arrow")
    whole = path.stat().st_size
    kept = {"nothing": 0, "header": 8, "half": whole // 2, "all but one byte": whole - 1}[size]
    os.truncate(path, kept)
    with pytest.raises(InputError, match=f"DST-3106.*part-1-train.arrow: expected {whole} bytes but found {kept} bytes"):
        open_artifact(storage, "corpora/1", "corpus")
    assert committed_part(storage, "corpora/1", "part-1-train") is None
    assert committed_part(storage, "corpora/1", "part-0-train") is not None


def test_one_flipped_bit_anywhere_in_a_part_is_found(storage):
    write(storage)
    path = storage.fetch("corpora/1/part-1-train.arrow")
    whole, choice = path.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[choice.randrange(len(whole))] ^= 1 << choice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"DST-3106.*part-1-train.arrow"):
            open_artifact(storage, "corpora/1", "corpus")
        assert committed_part(storage, "corpora/1", "part-1-train") is None
    path.write_bytes(whole)
    open_artifact(storage, "corpora/1", "corpus")


def test_one_flipped_bit_anywhere_in_a_manifest_is_found_or_means_nothing(storage):
    written = write(storage)
    path = storage.fetch("corpora/1/manifest.json")
    whole, choice, harmless, codes = path.read_bytes(), random.Random(0), 0, set()
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[choice.randrange(len(whole))] ^= 1 << choice.randrange(8)
        path.write_bytes(damaged)
        try:
            assert open_artifact(storage, "corpora/1", "corpus")[0] == written
            harmless += 1
        except InputError as error:
            codes.add(error.code)
    assert "DST-3103" in codes
    assert codes <= {"DST-3102", "DST-3103"}
    assert harmless < 100, "only white space may be harmless"


def test_one_flipped_bit_anywhere_in_the_record_of_a_part_is_found_or_means_nothing(storage):
    record = write_part(storage, "corpora/1", "part-1-train", table(1), tokens=6)
    path = storage.fetch("corpora/1/part-1-train.json")
    whole, choice, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[choice.randrange(len(whole))] ^= 1 << choice.randrange(8)
        path.write_bytes(damaged)
        found = committed_part(storage, "corpora/1", "part-1-train")
        assert found in (None, record)
        refused += found is None
    assert refused > 250


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'{"version": 1}', b"\xff\xfe", b'{"version": 1, "kind": "corpus"}', b"{" * 50])
def test_a_manifest_that_is_none(storage, text):
    storage.write("corpora/1/manifest.json", text)
    with pytest.raises(InputError, match=r"DST-3103.*corpora/1/manifest.json.*Remove the folder"):
        open_artifact(storage, "corpora/1", "corpus")


def test_another_part_under_this_name_is_not_this_part(storage):
    write(storage)
    for ending in ("json", "arrow"):
        storage.write(f"corpora/1/part-1-train.{ending}", storage.read(f"corpora/1/part-0-train.{ending}"))
    assert committed_part(storage, "corpora/1", "part-1-train") is None
    with pytest.raises(InputError, match=r"DST-3106.*part-1-train.arrow"):
        open_artifact(storage, "corpora/1", "corpus")


def test_a_deleted_part_is_named_and_an_extra_file_is_ignored(storage):
    write(storage)
    storage.write("corpora/1/part-9-train.arrow", b"not ours")
    _, paths = open_artifact(storage, "corpora/1", "corpus")
    assert sorted(paths) == ["part-0-train.arrow", "part-1-train.arrow", "part-2-train.arrow"]
    storage.delete("corpora/1/part-2-train.arrow")
    with pytest.raises(InputError, match=r"DST-3105.*part-2-train.arrow"):
        open_artifact(storage, "corpora/1", "corpus")


def test_two_artifacts_in_one_folder_conflict(storage):
    written = write(storage)
    other = Manifest(kind="corpus", fingerprint="f" * 16, made_from={})
    with pytest.raises(ConflictError, match=f"DST-8002.*expected {'f' * 16} but found {written.fingerprint}"):
        commit(storage, "corpora/1", other)
    assert find(storage, "corpora/1") == written
    assert write(storage).fingerprint == written.fingerprint


def test_a_file_that_changes_after_it_was_opened_is_read_again(storage):
    write(storage)
    path = storage.fetch("corpora/1/part-1-train.arrow")
    long_ago = time.time_ns() - 3_600_000_000_000
    os.utime(path, ns=(long_ago, long_ago))
    open_artifact(storage, "corpora/1", "corpus")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match="DST-3106"):
        open_artifact(storage, "corpora/1", "corpus")


# -------------------------------------------------------------------------------------------------------------- half-way


def test_stopped_between_the_rows_and_their_record(storage):
    write_part(storage, "corpora/1", "part-0-train", table(0), 4)
    rows = storage.read("corpora/1/part-0-train.arrow")
    storage.delete("corpora/1/part-0-train.json")
    assert committed_part(storage, "corpora/1", "part-0-train") is None
    assert find(storage, "corpora/1") is None
    record = write_part(storage, "corpora/1", "part-0-train", table(0), 4)
    assert committed_part(storage, "corpora/1", "part-0-train") == record
    assert storage.read("corpora/1/part-0-train.arrow") == rows


_WRITER = """
import sys
import pyarrow as pa
from distillation.storage import Storage
from distillation.store import committed_part, write_part

storage, written = Storage(sys.argv[1]), 0
for i in range(40):
    if committed_part(storage, "targets/1", f"part-{i}") is None:
        rows = pa.table({"id": [f"{i}-{j}" for j in range(1000)], "value": pa.array(range(i, i + 1000), pa.int32())})
        write_part(storage, "targets/1", f"part-{i}", rows, 1000)
        written += 1
    print(written, flush=True)
"""


def test_killed_while_writing_and_run_again_leaves_the_same_bytes(tmp_path):
    def contents(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (folder / "targets/1").iterdir() if not p.name.startswith(".tmp-")}

    root = Path(__file__).parents[2]
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    kills = 0
    for after in (1, 7, 20):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(disturbed)], stdout=subprocess.PIPE, text=True, cwd=root) as writer:
            for line in writer.stdout:
                if int(line) == after:
                    writer.send_signal(signal.SIGKILL)
                    break
        kills += writer.returncode == -signal.SIGKILL
    assert kills == 3
    before = {name: content for name, content in contents(disturbed).items() if name.endswith(".json")}
    assert 1 <= len(before) < 40
    for folder in (disturbed, undisturbed):
        done = subprocess.run([sys.executable, "-c", _WRITER, str(folder)], capture_output=True, text=True, cwd=root, check=True)
    assert int(done.stdout.split()[-1]) == 40
    assert contents(disturbed) == contents(undisturbed)
    assert len(contents(disturbed)) == 80


# ------------------------------------------------------------------------------------------------------------------ folders


def test_a_model_folder_is_committed_whole(storage, tmp_path):
    source = tmp_path / "source"
    (source / "tokenizer").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "tokenizer" / "vocab.txt").write_bytes(b"a b c")
    (source / MANIFEST).write_bytes(b"of the artifact this was copied from")
    written = commit_folder(storage, "teachers/1", source, "model", "0" * 16, {"from": "x"}, {"accuracy": 0.5})
    manifest, paths = open_artifact(storage, "teachers/1", "model")
    assert manifest == written
    assert [(r.name, r.bytes) for r in manifest.files] == [("model.safetensors", 7), ("tokenizer/vocab.txt", 5)]
    assert paths["tokenizer/vocab.txt"].read_bytes() == b"a b c"
    (source / "model.safetensors").write_bytes(b"WEIGHTS")
    commit_folder(storage, "teachers/1", source, "model", "0" * 16, {"from": "x"}, {})
    assert open_artifact(storage, "teachers/1", "model")[1]["model.safetensors"].read_bytes() == b"WEIGHTS"


def test_a_record_with_other_fields_is_refused():
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        FileRecord(name="a", bytes=1, checksum="x", colour="red")


def test_an_object_store_holds_artifacts_too(tmp_path, monkeypatch):
    """A damaged copy in the node's cache is fetched again; a damaged original is refused."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        Storage(f"s3://bucket/x?{address}&allow_bucket_creation=true")._filesystem.create_dir("bucket")
        storage = Storage(f"s3://bucket/distillery?{address}")
        manifest = write(storage)
        _, paths = open_artifact(storage, "corpora/1", "corpus")
        assert Columns(list(paths.values())).whole("length").tolist() == [3, 1, 2, 0, 4, 1]
        copy = paths["part-0-train.arrow"]
        whole = copy.read_bytes()
        copy.write_bytes(bytes(len(whole)))
        assert open_artifact(storage, "corpora/1", "corpus")[0] == manifest
        assert copy.read_bytes() == whole
        storage.write("corpora/1/part-0-train.arrow", bytes(len(whole)))
        with pytest.raises(InputError, match=r"DST-3106.*part-0-train.arrow"):
            open_artifact(storage, "corpora/1", "corpus")
        assert committed_part(storage, "corpora/1", "part-0-train") is None
        storage.delete("corpora/1/part-1-train.arrow")
        assert committed_part(storage, "corpora/1", "part-1-train") is None
    finally:
        server.stop()
