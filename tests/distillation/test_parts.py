"""A manifest of many parts names a table of their records; what is read from it is what was written."""

from __future__ import annotations

import json

import pytest

from distillation import parts, store
from distillation.errors import InputError
from distillation.parts import FileRecord, read_table, total, write_table
from distillation.storage import Storage
from distillation.store import Manifest, commit, committed_parts, find
from tests.distillation.test_store import table, write


def record(i, split="train"):
    return FileRecord(name=f"part-{i:07d}-{split}.arrow", bytes=1000 + i, checksum=f"{i:032x}", rows=8192, tokens=100 * i)


def test_a_table_gives_back_what_was_written(tmp_path):
    splits = {"train": tuple(record(i) for i in range(70_000)), "test": (record(5, "test"),)}
    write_table(tmp_path / "records", splits)
    found = read_table(tmp_path / "records")
    assert list(found) == ["train", "test"]
    assert [len(found[split]) for split in found] == [70_000, 1]
    assert found["test"] == splits["test"]
    assert (found["train"][0], found["train"][69_999], found["train"][-1]) == (record(0), record(69_999), record(69_999))
    assert found["train"][65_535:65_538] == [record(65_535), record(65_536), record(65_537)]
    assert total(found["train"], "rows") == 70_000 * 8192
    assert total(found["train"], "tokens") == 100 * 70_000 * 69_999 // 2
    assert [r.name for r in found["train"]] == [r.name for r in splits["train"]]
    with pytest.raises(IndexError):
        found["test"][1]


def big(count):
    splits = {"train": tuple(record(i) for i in range(count)), "validation": (record(0, "validation"),)}
    return Manifest(kind="corpus", fingerprint="f" * 16, made_from={"source": "by hand"}, splits=splits, facts={"labels": []})


@pytest.mark.parametrize("count", [parts.MANY - 1, parts.MANY])
def test_a_manifest_of_many_parts_stays_small(tmp_path, count):
    storage = Storage(str(tmp_path))
    commit(storage, "corpora/1", big(count))
    manifest = find(storage, "corpora/1")
    assert manifest.splits == big(count).splits
    assert (manifest.rows("train"), manifest.tokens("train"), manifest.rows("none")) == (count * 8192, 50 * count * (count - 1), 0)
    assert manifest.total_bytes() == 1000 * (count + 1) + count * (count - 1) // 2
    many = count + 1 > parts.MANY
    assert (len(storage.read("corpora/1/manifest.json")) < 1500) == many
    assert len(storage.list("corpora/1")) == 1 + many
    commit(storage, "corpora/1", manifest)
    assert find(storage, "corpora/1").splits == manifest.splits, "what was read can be committed again"


def test_an_altered_table_of_records_is_refused(tmp_path):
    storage = Storage(str(tmp_path))
    commit(storage, "corpora/1", big(parts.MANY))
    name = find(storage, "corpora/1").table.name
    content = bytearray(storage.read(f"corpora/1/{name}"))
    content[len(content) // 2] ^= 1
    storage.write(f"corpora/1/{name}", bytes(content))
    with pytest.raises(InputError, match=rf"DST-3106.*{name}"):
        find(storage, "corpora/1")
    storage.delete(f"corpora/1/{name}")
    with pytest.raises(InputError, match=rf"DST-3105.*{name}"):
        find(storage, "corpora/1")


def test_a_manifest_that_was_written_before_there_were_tables_is_read(tmp_path):
    storage = Storage(str(tmp_path))
    written = write(storage)
    fields = json.loads(storage.read("corpora/1/manifest.json"))
    assert fields.pop("table") is None
    del fields["seal"]
    storage.write("corpora/1/manifest.json", json.dumps({**fields, "seal": store._seal(fields)}).encode())
    assert find(storage, "corpora/1") == written


def test_records_of_parts_by_one_listing(tmp_path):
    storage = Storage(str(tmp_path))
    write(storage)
    names = [f"part-{i}-train" for i in range(4)]
    whole = committed_parts(storage, "corpora/1", names)
    assert list(whole) == names[:3]
    assert whole["part-1-train"] == store.committed_part(storage, "corpora/1", "part-1-train")
    storage.write("corpora/1/part-0-train.arrow", storage.read("corpora/1/part-0-train.arrow")[:-1])
    storage.write("corpora/1/part-1-train.json", b"{}")
    storage.delete("corpora/1/part-2-train.arrow")
    store.write_part(storage, "corpora/1", "part-3-train", table(2), 1)
    assert list(committed_parts(storage, "corpora/1", names)) == ["part-3-train"]
    assert committed_parts(storage, "corpora/none", names) == {}
