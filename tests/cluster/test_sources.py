"""Sources: every kind of file read to the same rows, and every kind of damage named by file and row."""

import gzip
import json
import os
import pickle
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import docstrings, files, reading, sources
from cluster.config import DocstringsCorpus, FilesCorpus, HubCorpus
from distillation.config import TextClassification
from distillation.errors import InputError, SecurityError

TASK = TextClassification()
NAMED = TextClassification(labels=("bad", "good"))
ROWS = [("one", "good"), ("two, with a comma", "bad"), ("zwölf\nlines", None), ("", "good")]


def corpus(*train, **settings):
    return FilesCorpus(type="files", train=tuple(map(str, train)), **settings)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(rows=ROWS):
    return pa.table({"text": [t for t, _ in rows], "label": [x for _, x in rows], "other": list(range(len(rows)))})


def write_arrow(path, rows=ROWS, stream=True):
    content = table(rows)
    with pa.OSFile(str(path), "wb") as sink, (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=2)
    return path


def csv_of(rows):
    quoted = ('"' + text.replace('"', '""') + '"' for text, _ in rows)
    return "text,label\n" + "".join(f"{text},{label or ''}\n" for text, (_, label) in zip(quoted, rows, strict=True))


def jsonl_of(rows):
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


def read_all(source, task=TASK):
    units = pickle.loads(pickle.dumps(sources.units(source, task)))
    tables = [found for unit in units for found in sources.read(unit, task)]
    assert all(found.schema == reading.SCHEMA for found in tables)
    return [(row["text"], row["label"], row["split"]) for found in tables for row in found.to_pylist()]


def refused(source, message, task=TASK, *, at_once=True, kind=InputError):
    """The source is refused with this message: already by `describe`, or else when the row is read."""
    if at_once:
        with pytest.raises(kind, match=message) as caught:
            sources.describe(source, task)
    else:
        sources.describe(source, task)
        with pytest.raises(kind, match=message) as caught:
            read_all(source, task)
    assert "\n" not in str(caught.value)
    return caught.value


def test_all_formats_give_the_same_rows(tmp_path):
    made = {
        "a.csv": csv_of(ROWS).encode(), "b.csv.gz": gzip.compress(csv_of(ROWS).encode()), "c.jsonl": jsonl_of(ROWS).encode(),
        "d.jsonl.gz": gzip.compress(jsonl_of(ROWS).encode()), "e.csv": b"\xef\xbb\xbf" + csv_of(ROWS).replace("\n", "\r\n", 1).encode(),
    }  # fmt: skip
    for name, content in made.items():
        write(tmp_path / name, content)
    write_arrow(tmp_path / "f.arrow")
    write_arrow(tmp_path / "g.arrow", stream=False)
    pq.write_table(table(), tmp_path / "h.parquet", row_group_size=3)
    compact = pa.schema([("text", pa.large_string()), ("label", pa.dictionary(pa.int8(), pa.string())), ("other", pa.int8())])
    pq.write_table(table().cast(compact), tmp_path / "i.parquet")
    for name in [*made, "f.arrow", "g.arrow", "h.parquet", "i.parquet"]:
        source = corpus(tmp_path / name)
        sources.describe(source, TASK)
        assert read_all(source) == [(text, label, "train") for text, label in ROWS], name
    assert [(u.start, u.group) for u in sources.units(corpus(tmp_path / "h.parquet"), TASK)] == [(0, 0), (3, 1)]


def test_tables_stay_small(tmp_path):
    rows = [(f"text {i}", "good") for i in range(10_000)]
    source = corpus(write(tmp_path / "a.jsonl", jsonl_of(rows)))
    assert [t.num_rows for t in sources.read(sources.units(source, TASK)[0], TASK)] == [4096, 4096, 1808]
    long = [("x" * (1 << 22), None)] * 5
    source = corpus(write(tmp_path / "b.jsonl", jsonl_of(long)))
    assert [t.num_rows for t in sources.read(sources.units(source, TASK)[0], TASK)] == [2, 2, 1]


def test_globs_and_splits(tmp_path):
    for name in ("a/x.csv", "a/b/y.csv", "a/b/z.txt", "a/.hidden.csv", "v.csv", "[1].csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, csv_of([(name, "good")]))
    names = lambda pattern: [os.path.relpath(f.path, tmp_path) for f in files.find(str(tmp_path / pattern))]  # noqa: E731
    assert names("a/*.csv") == ["a/x.csv"]
    assert names("a/**/*.csv") == ["a/b/y.csv", "a/x.csv"]
    assert names("a/?.csv") == names("a/[w-x].csv") == ["a/x.csv"]
    assert names("[!w]/x.csv") == ["a/x.csv"]
    assert names("[1].csv") == ["[1].csv"]
    assert len(files.find([str(tmp_path / "a/*.csv"), str(tmp_path / "a/x.csv")])) == 1
    source = corpus(tmp_path / "a/**/*.csv", validation=str(tmp_path / "v.csv"))
    assert read_all(source) == [("a/b/y.csv", "good", "train"), ("a/x.csv", "good", "train"), ("v.csv", "good", "validation")]


def test_description_follows_content_not_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.csv", csv_of(ROWS))
        write(tmp_path / folder / "b.csv", csv_of(ROWS[:1]))
    first = sources.describe(corpus(tmp_path / "one/a.csv", tmp_path / "one/b.csv"), TASK)
    assert first == sources.describe(corpus(tmp_path / "two/b.csv", tmp_path / "two/a.csv"), TASK)
    assert json.loads(json.dumps(first)) == first
    assert [entry[:2] for entry in first["train"]] == [["a.csv", len(csv_of(ROWS).encode())], ["b.csv", 22]]
    write(tmp_path / "two/b.csv", csv_of([("onE", "good")]))
    assert first != sources.describe(corpus(tmp_path / "two/*.csv"), TASK)


def test_files_that_cannot_be_read(tmp_path):
    whole = tmp_path / "whole.csv"
    write(whole, csv_of(ROWS))
    refused(corpus(tmp_path / "none*.csv"), r"DST-3401.*no file matches: \S+none\*\.csv")
    refused(corpus(tmp_path / "none.csv"), r"DST-3402.*does not exist: \S+/none\.csv")
    refused(corpus(tmp_path), r"DST-3403.*not a regular file.*directory")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(corpus(tmp_path / "pipe.csv"), r"DST-3403.*not a regular file: \S+pipe\.csv")
    refused(corpus(write(tmp_path / "a.txt", "x")), r"DST-3404.*a\.txt: expected \.parquet, .* but found a\.txt")
    refused(corpus(whole, write(tmp_path / "empty.parquet", "")), r"DST-3405.*empty\.parquet")
    refused(corpus(write(tmp_path / "blank.jsonl", "\n \n")), r"DST-3405.*blank\.jsonl.*no line")
    refused(corpus("file:///etc/passwd"), r"DST-9001", kind=SecurityError)


def test_truncated_files_are_named(tmp_path):
    pq.write_table(table(), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    refused(corpus(write(tmp_path / "cut.parquet", whole[:-10])), r"DST-3406.*cut\.parquet.*copy it again")
    pq.write_table(pa.table({"text": [f"{i}" * 50 for i in range(5000)]}), tmp_path / "b.parquet", compression="none", use_dictionary=False)
    damaged = bytearray((tmp_path / "b.parquet").read_bytes())
    damaged[4:64] = b"\xff" * 60
    refused(corpus(write(tmp_path / "hole.parquet", bytes(damaged))), r"DST-3406.*hole\.parquet", at_once=False)
    for stream in (True, False):
        content = write_arrow(tmp_path / "a.arrow", ROWS * 100, stream).read_bytes()
        refused(corpus(write(tmp_path / "cut.arrow", content[: len(content) // 2])), r"DST-3406.*cut\.arrow", at_once=not stream)
    text = "".join(f'{{"text": "{os.urandom(30).hex()}"}}\n' for _ in range(60_000)).encode()
    refused(corpus(write(tmp_path / "cut.jsonl.gz", gzip.compress(text)[:2_000_000])), r"DST-3406.*cut\.jsonl\.gz", at_once=False)
    refused(corpus(write(tmp_path / "no.csv.gz", b"text,label\n")), r"DST-3406.*no\.csv\.gz.*[Nn]ot a gzipped file")
    refused(corpus(write(tmp_path / "cut.jsonl", '{"text": "a"}\n{"text": "b"')), r"DST-3409.*cut\.jsonl:line 2.*cut off", at_once=False)


def test_bad_rows_are_named(tmp_path):
    def one(content, message, task=TASK, name="x.jsonl", at_once=False):
        refused(corpus(write(tmp_path / name, content)), message, task, at_once=at_once)

    good = '{"text": "a", "label": "good"}\n'
    one(good + '["a"]\n', r"DST-3409.*x\.jsonl:line 2: expected a JSON object on one line but found list")
    one(good + '\n{"label": "good"}\n', r"DST-3407.*x\.jsonl:line 3: expected 'text' but found label")
    one(good + '{"text": 5}\n', r"DST-3410.*x\.jsonl:line 2: expected a string but found int 5")
    one(good + '{"text": "\\ud800"}\n', r"DST-3411.*x\.jsonl:line 2.*surrogate")
    one(good + '{"text": "a", "label": 1.5}\n', r"DST-3412.*x\.jsonl:line 2.*found float 1\.5")
    one(good + '{"text": "a", "label": true}\n', r"DST-3412.*x\.jsonl:line 2.*found bool True")
    one(good + '{"text": "a", "label": 1}\n', r"DST-3412.*x\.jsonl:line 2: expected str as in line 1 but found int")
    one(good.encode() + b'{"text": "\xff"}\n', rf"DST-3411.*x\.jsonl:line 2, byte {len(good) + 10}: .*0xff")
    one(good + '{"text": "a", "label": "ugly"}\n', r"DST-3413.*x\.jsonl:line 2: expected bad, good but found 'ugly'", NAMED)
    one('{"text": "a", "label": 1}\n{"text": "a", "label": 2}\n', r"DST-3414.*x\.jsonl:line 2: expected 0 to 1 but found 2", NAMED)
    one('{"text": "a", "label": 1}\n{"text": "a", "label": -1}\n', r"DST-3414.*x\.jsonl:line 2: .* but found -1", NAMED)
    one('{"text": 5}\n', r"DST-3410.*x\.jsonl:line 1", at_once=True)
    one("text,label\na,good\nb\n", r"DST-3409.*x\.csv:line 3: expected 2 fields but found 1", name="x.csv")
    one('text,label\na,good\n"b\nc', r"DST-3409.*x\.csv:line 4.*unexpected end of data", name="x.csv")
    one(b"text,label\na,good\nb\xc3,bad\n", r"DST-3411.*x\.csv:line 3, byte 19", name="x.csv")
    one("text,label\na,3\n", r"DST-3414.*x\.csv:line 2", NAMED, name="x.csv")


def test_bad_rows_of_parquet_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"] * 5, "label": [0, 1, 0, 1, 2]}), path, row_group_size=2)
    refused(corpus(path), r"DST-3414.*x\.parquet:row 5: expected 0 to 1 but found 2", NAMED, at_once=False)
    broken = pa.Array.from_buffers(pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": pa.concat_arrays([pa.array(["a"] * 4), broken])}), path, row_group_size=4)
    refused(corpus(path), r"DST-3411.*x\.parquet:row 6, byte 0: expected UTF-8 but found byte 0xff", at_once=False)
    for values, found in (([1.5], "double"), ([True], "bool")):
        pq.write_table(pa.table({"text": ["a"], "label": values}), path)
        refused(corpus(path), rf"DST-3412.*x\.parquet: column 'label': expected a string or an integer but found {found}")
    pq.write_table(pa.table({"text": [1]}), path)
    refused(corpus(path), r"DST-3410.*x\.parquet: column 'text': expected a string but found int64")


def test_columns_that_are_missing_or_differ(tmp_path):
    labelled = write(tmp_path / "a.csv", csv_of(ROWS))
    bare = write(tmp_path / "b.csv", "text\nfive\n")
    assert len(read_all(corpus(labelled, bare))) == 5
    sources.describe(corpus(labelled, bare), TASK)
    refused(corpus(labelled, validation=str(bare)), r"DST-3407.*b\.csv: expected 'label' but found text\. Set task\.text")
    refused(corpus(labelled), r"DST-3407.*a\.csv: expected 'body' but found text, label", TextClassification(text="body"))
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "c.parquet")
    mixed = r"DST-3408.*mixed schemas: \S+a\.csv and \S+c\.parquet: .*'label' but found string in the first and integer in the second"
    refused(corpus(labelled, tmp_path / "c.parquet"), mixed)


def test_labels_become_names(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": null}\n{"text": "c"}\n{"text": null, "label": 0}\n'
    )
    assert read_all(corpus(path)) == [("a", "1", "train"), ("b", None, "train"), ("c", None, "train"), ("", "0", "train")]
    assert [label for _, label, _ in read_all(corpus(path), NAMED)] == ["good", None, None, "bad"]
    path = write(tmp_path / "a.csv", "text,label\na,bad\nb,1\nc,\n")
    assert [label for _, label, _ in read_all(corpus(path), NAMED)] == ["bad", "good", None]


@pytest.fixture
def saved(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}).cast_column("label", ClassLabel(names=["no", "yes"]))
    DatasetDict({"train": data, "held": data.select([0])}).save_to_disk(tmp_path / "dict")
    data.save_to_disk(tmp_path / "single")
    return tmp_path


def test_saved_data_sets(saved):
    source = HubCorpus(type="hub", dataset=str(saved / "dict"), test="held")
    described = sources.describe(source, TASK)
    assert [name for name, _ in described["train"]] == ["dataset_info.json", "data-00000-of-00001.arrow"]
    assert read_all(source) == [("a", "yes", "train"), ("b", "no", "train"), ("c", None, "train"), ("a", "yes", "test")]
    assert read_all(HubCorpus(type="hub", dataset=str(saved / "single"))) == [
        ("a", "yes", "train"),
        ("b", "no", "train"),
        ("c", None, "train"),
    ]
    unit = sources.units(source, TASK)[0]
    middle = reading.Unit(**{**vars(unit), "start": 1, "stop": 2})
    assert [t["text"].to_pylist() for t in sources.read(middle, TASK)] == [["b"]]
    refused(source, r"DST-3413.*split train: row 1: expected bad, good but found 'yes'", NAMED, at_once=False)


def test_data_sets_that_cannot_be_read(saved):
    dataset = str(saved / "dict")
    refused(HubCorpus(type="hub", dataset=dataset, test="dev"), r"DST-3431.*no such split: \S+dict: expected train, held but found dev")
    refused(HubCorpus(type="hub", dataset=dataset), r"DST-3407.*expected 'body' but found text, label", TextClassification(text="body"))
    refused(HubCorpus(type="hub", dataset=str(saved)), r"DST-3430.*not a data set.*type files")
    arrow = saved / "dict/train/data-00000-of-00001.arrow"
    content = arrow.read_bytes()
    arrow.write_bytes(content[: len(content) // 2])
    refused(HubCorpus(type="hub", dataset=dataset), r"DST-3432.*dict/train", at_once=False)
    arrow.unlink()
    refused(HubCorpus(type="hub", dataset=dataset), r"DST-3402.*dict/train/data-00000-of-00001\.arrow")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An importable package that must not be imported, and a module."""
    root = tmp_path / "lumen"
    (root / "tests").mkdir(parents=True)
    write(
        root / "__init__.py", '"""The lumen   package\n  makes light of PyLumen things.\n\nSecond paragraph of it."""\nraise RuntimeError\n'
    )
    method = '    def f(self):\n        """A method of five words."""\n'
    write(root / "a.py", f'class A:\n    """Too short a text."""\n{method}class B:\n{method}')
    write(root / "broken.py", 'def f(:\n    """This file cannot be parsed here."""\n')
    write(root / "latin.py", b'"""This is not \xff UTF-8 at all."""\n')
    write(root / "tests" / "b.py", '"""Tests are not read at all."""\n')
    write(tmp_path / "ohm.py", '"""One module: ohm and OhmLaw, not ohmic."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_docstrings(library):
    source = DocstringsCorpus(type="docstrings", packages=("lumen", "ohm"))
    described = sources.describe(source, TASK)
    assert sorted(read_all(source)) == [
        ("A method of five words.", "lumen", None),
        ("One module: library and libraryLaw, not ohmic.", "ohm", None),
        ("The library package makes light of library things.", "lumen", None),
    ]
    assert "lumen" not in sys.modules
    assert len(read_all(DocstringsCorpus(type="docstrings", packages=("lumen", "ohm"), per_package=1))) == 2
    write(library / "ohm.py", '"""One module with another text than before."""\n')
    assert described != sources.describe(source, TASK)
    refused(
        DocstringsCorpus(type="docstrings", packages=("ohm", "no_such_library")), r"DST-3420.*corpus\.packages: no_such_library.*Install it"
    )


def test_docstrings_of_installed_code():
    source = DocstringsCorpus(type="docstrings", packages=("stdlib", "numpy"), per_package=40)
    described = sources.describe(source, TASK)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", described["packages"]["stdlib"])
    assert described["packages"]["numpy"].startswith("numpy ")
    rows = read_all(source)
    assert [label for _, label, _ in rows] == ["stdlib"] * 40 + ["numpy"] * 40
    assert len({text for text, _, _ in rows}) >= 79
    assert all(len(text.split()) >= 5 and "\n" not in text for text, _, _ in rows)
    assert not [text for text, label, _ in rows if label == "numpy" and "numpy" in text.lower()]
    assert (
        docstrings._own_name("ray").sub("library", "Ray array ray.get RayActor x_ray") == "library array library.get libraryActor x_library"
    )


@pytest.fixture
def bucket(monkeypatch):
    """Address of a folder in an S3 bucket, and the query that leads to the server."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import FileSystem

    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    query = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
    system, path = FileSystem.from_uri(f"s3://corpora/x{query}")
    system.create_dir("corpora")
    yield system, path, query
    server.stop()


def test_remote_files(bucket):
    system, folder, query = bucket
    for name, content in (
        ("a.csv", csv_of(ROWS).encode()),
        ("b.jsonl.gz", gzip.compress(jsonl_of(ROWS[:1]).encode())),
        ("c.parquet", b"PAR1"),
    ):
        with system.open_output_stream(f"{folder}/{name}", compression=None) as stream:
            stream.write(content)
    source = corpus(f"s3://{folder}/[ab].*{query}")
    described = sources.describe(source, TASK)
    assert [entry[0] for entry in described["train"]] == ["a.csv", "b.jsonl.gz"]
    assert described["train"][0][1] == len(csv_of(ROWS).encode())
    assert read_all(source) == [(text, label, "train") for text, label in [*ROWS, ROWS[0]]]
    refused(corpus(f"s3://{folder}/*.parquet{query}"), r"DST-3406.*: s3://corpora/x/c\.parquet: ")
    refused(corpus(f"s3://{folder}/none.csv{query}"), r"DST-3402.*: s3://corpora/x/none\.csv")
