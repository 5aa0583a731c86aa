"""Sources: every kind of file read to the same rows, and every kind of damage named by file and row."""

import gzip
import io
import json
import math
import os
import pickle
import re
import sys
from pathlib import Path
from typing import get_args

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import columns, docstrings, files, kinds, pictures, plaintext, reading, sourcecode, sources
from cluster.config import CorpusConfig, DigitsCorpus, DocstringsCorpus, FilesCorpus, HubCorpus, SourceCorpus, TextCorpus
from distillation.config import (
    CausalLM,
    Embedding,
    ImageClassification,
    MaskedLM,
    MultiLabel,
    Regression,
    TaskConfig,
    TextClassification,
    TokenClassification,
)
from distillation.errors import InputError, SecurityError
from jobs.counting import rows_by_split

HERE = Path(__file__).resolve().parents[2]
WIKITEXT = next((p for p in (HERE.parent / "shared/data/wikitext2", HERE / "shared/data/wikitext2") if p.is_dir()), Path("/nowhere"))

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


# ------------------------------------------------------------------------------------------------------- every other task

PAIRS = TextClassification(pair="other")
SEVERAL = MultiLabel(type="multi_label")
NUMBER = Regression(type="regression")
TAGS = TokenClassification(type="token_classification")
CAUSAL = CausalLM(type="causal_lm")
IMAGE = ImageClassification(type="image_classification", size=4, channels=1)
TASKS = {task.type: task for task in (TASK, SEVERAL, NUMBER, TAGS, CAUSAL, MaskedLM(type="masked_lm"), IMAGE, Embedding(type="embedding"))}


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs_read(source, task):
    units = pickle.loads(pickle.dumps(sources.units(source, task)))
    return [(r["text"], r["label"]) for unit in units for found in sources.read(unit, task) for r in found.to_pylist()]


def in_both(tmp_path, rows, task, expected):
    """The rows come out as expected from JSON lines, from Parquet and from a saved data set."""
    from datasets import Dataset
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    made = [corpus(write(tmp_path / "x.jsonl", lines_of(rows))), corpus(tmp_path / "x.parquet")]
    for source in [*made, HubCorpus(type="hub", dataset=str(tmp_path / "saved"))]:
        sources.describe(source, task)
        assert pairs_read(source, task) == expected, source


def test_every_task_is_read():
    names = [get_args(task.model_fields["type"].annotation)[0] for task in get_args(get_args(TaskConfig)[0])]
    assert list(columns.CONTENT) == list(columns.LABEL) == list(kinds.EXPECTED) == list(sources.EVERY) == names
    assert list(sources.SERVES) == [get_args(c.model_fields["type"].annotation)[0] for c in get_args(get_args(CorpusConfig)[0])]


def test_pairs(tmp_path):
    rows = [
        {"text": " one ", "other": "cafe\u0301", "label": "x"}, {"text": "two", "other": "", "label": "y"},
        {"text": None, "other": "three", "label": None},
    ]  # fmt: skip
    in_both(tmp_path, rows, PAIRS, [('["one","caf\u00e9"]', "x"), ("", "y"), ("", None)])
    refused(corpus(write(tmp_path / "y.csv", "text,label\na,x\n")), r"DST-3407.*expected 'other' but.*task\.text and task\.pair", PAIRS)


def test_several_labels(tmp_path):
    rows = [{"text": "a", "label": ["y", "x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": None}]
    in_both(tmp_path, rows, SEVERAL, [("a", '["x","y"]'), ("b", "[]"), ("c", None)])
    named = MultiLabel(type="multi_label", labels=("x", "y"))
    numbers = [{"text": "a", "label": [1, 0]}, {"text": "b", "label": [1]}]
    in_both(tmp_path, numbers, named, [("a", '["x","y"]'), ("b", '["y"]')])
    source = corpus(write(tmp_path / "c.csv", 'text,label\na,"[""x"",""y""]"\nb,[]\nc,\n'))
    assert pairs_read(source, SEVERAL) == [("a", '["x","y"]'), ("b", "[]"), ("c", None)]

    def one(row, message, task=SEVERAL, first="x"):
        path = write(tmp_path / "bad.jsonl", lines_of([{"text": "a", "label": [first]}, row]))
        refused(corpus(path), message, task, at_once=False)

    one({"text": "b", "label": "x"}, r"DST-3412.*bad\.jsonl:line 2: expected a list but found str 'x'")
    one({"text": "b", "label": ["x", None]}, r"DST-3412.*line 2: expected a list of names or integers")
    one({"text": "b", "label": ["z"]}, r"DST-3413.*line 2: expected x, y but found 'z'", named)
    one({"text": "b", "label": [2]}, r"DST-3414.*line 2: expected 0 to 1 but found 2", named, 1)
    one({"text": "b", "label": [1]}, r"DST-3412.*line 2: expected str as in line 1 but found int")
    refused(
        corpus(write(tmp_path / "d.csv", "text,label\na,x\n")), r"DST-3412.*d\.csv:line 2: expected a list as JSON", SEVERAL, at_once=False
    )
    pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / "e.parquet")
    refused(
        corpus(tmp_path / "e.parquet"), r"DST-3412.*column 'label': expected a list of strings or of integers but found string", SEVERAL
    )


def test_numbers(tmp_path):
    rows = [{"text": "a", "label": 0.1}, {"text": "b", "label": 2.0}, {"text": "c", "label": None}]
    in_both(tmp_path, rows, NUMBER, [("a", "0.1"), ("b", "2.0"), ("c", None)])
    source = corpus(write(tmp_path / "c.csv", "text,label\na,1e-3\nb,2\nc,\n"), write(tmp_path / "d.csv", "text,label\nd,3\n"))
    sources.describe(source, NUMBER)
    assert pairs_read(source, NUMBER) == [("a", "0.001"), ("b", "2.0"), ("c", None), ("d", "3.0")]
    for value, message in (("nan", "found nan"), ("-inf", "found -inf"), ("1e39", r"found 1e\+39")):
        path = write(tmp_path / "bad.csv", f"text,label\na,1\nb,{value}\n")
        refused(corpus(path), rf"DST-3465.*bad\.csv:line 3: .*{message}", NUMBER, at_once=False)
    refused(corpus(write(tmp_path / "e.csv", "text,label\na,one\n")), r"DST-3412.*e\.csv:line 2: expected a number", NUMBER, at_once=False)
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, math.nan]}), tmp_path / "f.parquet")
    refused(corpus(tmp_path / "f.parquet"), r"DST-3465.*f\.parquet:row 2", NUMBER, at_once=False)
    refused(corpus(write(tmp_path / "g.jsonl", '{"text": "a", "label": "1"}\n')), r"DST-3412.*expected a number but found str '1'", NUMBER)


def test_words_and_their_labels(tmp_path):
    rows = [
        {"tokens": ["one ", "cafe\u0301"], "tags": ["x", "y"]}, {"tokens": ["two", ""], "tags": [None, "x"]},
        {"tokens": ["three"], "tags": None}, {"tokens": [], "tags": []}, {"tokens": ["four"], "tags": [None]},
    ]  # fmt: skip
    expected = [('["one","caf\u00e9"]', '["x","y"]'), ('["two",""]', '[null,"x"]'), ('["three"]', None), ("", None), ('["four"]', None)]
    in_both(tmp_path, rows, TAGS, expected)
    numbers = [{"tokens": ["one", "two", "three"], "tags": [1, -100, 0]}]
    named = TokenClassification(type="token_classification", labels=("o", "x"))
    in_both(tmp_path, numbers, named, [('["one","two","three"]', '["x",null,"o"]')])
    source = corpus(write(tmp_path / "c.csv", 'tokens,tags\n"[""a"",""b""]","[""x"",null]"\n'))
    assert pairs_read(source, TAGS) == [('["a","b"]', '["x",null]')]
    bad = [rows[0], {"tokens": ["one", "two"], "tags": ["x"]}]
    message = r"differ in number: \S+bad\.jsonl:line 2: expected 2 labels, one for each word but found 1"
    refused(corpus(write(tmp_path / "bad.jsonl", lines_of(bad))), "DST-3464.*" + message, TAGS, at_once=False)
    refused(corpus(write(tmp_path / "d.jsonl", '{"tokens": "one two"}\n')), r"DST-3410.*d\.jsonl:line 1: expected a list of words", TAGS)
    pq.write_table(pa.table({"tokens": [[1]], "tags": [["x"]]}), tmp_path / "e.parquet")
    refused(corpus(tmp_path / "e.parquet"), r"DST-3410.*column 'tokens': expected a list of words but found list<", TAGS)


def test_class_names_of_lists(tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B"]))})
    Dataset.from_dict({"tokens": [["a", "b", "c"]], "tags": [[1, 0, -1]]}, features=features).save_to_disk(tmp_path / "d")
    assert pairs_read(HubCorpus(type="hub", dataset=str(tmp_path / "d")), TAGS) == [('["a","b","c"]', '["B","O",null]')]


def test_tasks_without_labels(tmp_path):
    bare = corpus(write(tmp_path / "a.csv", "text,label\none,x\ntwo,\n"), validation=str(write(tmp_path / "b.csv", "text\nthree\n")))
    sources.describe(bare, CAUSAL)
    assert pairs_read(bare, CAUSAL) == [("one", None), ("two", None), ("three", None)]
    sources.describe(bare, TASKS["embedding"])
    assert pairs_read(bare, TASKS["embedding"]) == [("one", "x"), ("two", None), ("three", None)]


def picture(mode="L", size=(4, 4), kind="PNG", colour=7):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, kind)
    return stream.getvalue()


def test_images(tmp_path):
    square = [[0, 50, 100, 255]] * 4
    grey = bytes([0, 50, 100, 255] * 4)
    pq.write_table(pa.table({"image": [picture(), None], "label": ["x", "y"]}), tmp_path / "a.parquet")
    assert pairs_read(corpus(tmp_path / "a.parquet"), IMAGE) == [(bytes([7] * 16), "x"), (b"", "y")]
    pq.write_table(pa.table({"image": [{"bytes": picture(), "path": "a.png"}], "label": [3]}), tmp_path / "b.parquet")
    assert pairs_read(corpus(tmp_path / "b.parquet"), IMAGE) == [(bytes([7] * 16), "3")]
    nested = pa.array([square], pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table({"image": nested, "label": ["x"]}), tmp_path / "c.parquet")
    path = write(tmp_path / "d.jsonl", lines_of([{"image": square, "label": "x"}, {"image": [[[v] for v in row] for row in square]}]))
    for source in (corpus(tmp_path / "c.parquet"), corpus(path)):
        sources.describe(source, IMAGE)
        assert {content for content, _ in pairs_read(source, IMAGE)} == {grey}
    described = sources.describe(corpus(path), IMAGE)
    assert described["pillow"] == PIL.__version__
    assert "pillow" not in sources.describe(corpus(write(tmp_path / "e.csv", csv_of(ROWS))), TASK)


def test_image_features_of_data_sets(tmp_path):
    from datasets import Array2D, ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"image": [{"bytes": picture(), "path": None}], "label": [1]}, features=features).save_to_disk(tmp_path / "i")
    assert pairs_read(HubCorpus(type="hub", dataset=str(tmp_path / "i")), IMAGE) == [(bytes([7] * 16), "yes")]
    arrays = Features({"image": Array2D((4, 4), "uint8"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"image": [[[9] * 4] * 4], "label": [0]}, features=arrays).save_to_disk(tmp_path / "a")
    assert pairs_read(HubCorpus(type="hub", dataset=str(tmp_path / "a")), IMAGE) == [(bytes([9] * 16), "no")]


def test_images_are_only_changed_without_loss():
    colour = ImageClassification(type="image_classification", size=4)
    scaled = ImageClassification(type="image_classification", size=8, channels=1, resize=True)
    assert pictures.pixels(picture("1", colour=1), IMAGE, "x") == bytes([255] * 16)
    assert pictures.pixels(picture("LA", colour=(7, 255)), IMAGE, "x") == bytes([7] * 16)
    assert pictures.pixels(picture("RGB", colour=(1, 2, 3)), colour, "x") == bytes([1, 2, 3] * 16)
    assert pictures.pixels(picture("RGBA", colour=(1, 2, 3, 255)), colour, "x") == bytes([1, 2, 3] * 16)
    assert pictures.pixels([[[1, 2, 3]] * 4] * 4, colour, "x") == bytes([1, 2, 3] * 16)
    assert len(pictures.pixels(picture("RGB", kind="JPEG", colour=0), colour, "x")) == 48
    assert pictures.pixels(picture(size=(2, 5)), scaled, "x") == bytes([7] * 64)

    def one(value, message, task=IMAGE):
        with pytest.raises(InputError, match=message):
            pictures.pixels(value, task, "f:row 2")

    one(picture(size=(10, 8)), r"DST-3462.*another size: f:row 2: expected 4x4 but found 10x8\. Set task\.size, or task\.resize")
    one([[1, 2]], r"DST-3462.*expected 4x4 but found 2x1")
    one(picture("L"), r"DST-3463.*expected red, green and blue \(RGB\) but found grey \(L\)\. Set task\.channels to 1", colour)
    one(picture("RGB", colour=0), r"DST-3463.*expected grey \(L\) but found red, green and blue \(RGB\)\. Set task\.channels to 3")
    one(picture("RGBA", colour=(1, 2, 3, 4)), r"DST-3463.*found RGBA\. Convert", colour)
    one(picture("I;16", colour=7), r"DST-3463.*found I;16")
    one(picture(kind="GIF"), r"DST-3461.*f:row 2: expected a whole PNG or JPEG file but found bytes of another kind")
    one(picture()[:50], r"DST-3461.*expected a whole PNG")
    one({"bytes": None, "path": "a.png"}, r"DST-3461.*only a path, 'a\.png'\. Save the data set with the images inside")
    one([[1, 2], [3]], r"DST-3461.*expected integers from 0 to 255 in lists")
    one([[1, 256]] * 2, r"DST-3461.*int64 of shape \[2, 2\] from 1 to 256")
    one([[0.5] * 4] * 4, r"DST-3461.*float64 of shape \[4, 4\]")
    one("a.png", r"DST-3461.*found str")


def test_bad_images_are_named(tmp_path):
    pq.write_table(pa.table({"image": [picture(), picture(size=(2, 2))], "label": ["x", "y"]}), tmp_path / "a.parquet")
    refused(corpus(tmp_path / "a.parquet"), r"DST-3462.*a\.parquet:row 2: expected 4x4 but found 2x2", IMAGE, at_once=False)
    pq.write_table(pa.table({"image": ["a.png"], "label": ["x"]}), tmp_path / "b.parquet")
    refused(corpus(tmp_path / "b.parquet"), r"DST-3461.*column 'image': expected an image.*found string", IMAGE)


# ---------------------------------------------------------------------------------------------------------- other corpora


def plain(*train, **settings):
    return TextCorpus(type="text", train=tuple(map(str, train)), **settings)


TEXT = "\n = One = \n \n = = Part = = \n a b\n\n c\n = Two , twice = \n d\n"


def test_documents_of_plain_text(tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    documents = {
        "file": [TEXT.strip()],
        "blank_line": ["= One =", "= = Part = = \n a b", "c\n = Two , twice = \n d"],
        "heading": ["= One = \n \n = = Part = = \n a b\n\n c", "= Two , twice = \n d"],
    }
    for mode, expected in documents.items():
        source = plain(path, documents=mode)
        assert pairs_read(source, CAUSAL) == [(text, None) for text in expected], mode
        assert [unit.rows for unit in sources.units(source, CAUSAL)] == [len(expected)]
    write(tmp_path / "b.txt.gz", gzip.compress(TEXT.encode()))
    assert pairs_read(plain(tmp_path / "b.txt.gz"), CAUSAL) == pairs_read(plain(path), CAUSAL)
    one = sources.describe(plain(path), CAUSAL)
    assert one["train"][0][:2] == ["a.txt", len(TEXT)]
    assert one != sources.describe(plain(path, documents="heading"), CAUSAL)
    assert [plaintext.is_heading(line) for line in (" = A = \n", "= =\n", "= = A = =", "a = b", "= a", " = A = B = \n")] == [
        True, False, False, False, False, True,
    ]  # fmt: skip


def test_plain_text_that_cannot_be_read(tmp_path):
    refused(plain(tmp_path / "none*"), r"DST-3401", CAUSAL)
    refused(plain(tmp_path / "none.txt"), r"DST-3402", CAUSAL)
    refused(plain(write(tmp_path / "a.txt", "")), r"DST-3405.*a\.txt", CAUSAL)
    refused(plain(write(tmp_path / "b.txt", " \n \n")), r"DST-3405.*b\.txt.*white space", CAUSAL)
    refused(plain(write(tmp_path / "c.txt", b"one\ntw\xff\n")), r"DST-3411.*c\.txt:line 2, byte 6", CAUSAL)
    late = b"one\n" * plaintext.HEAD_LINES + b"tw\xff\n"
    refused(plain(write(tmp_path / "d.txt", late)), r"DST-3411.*d\.txt:line 4097, byte 16386", CAUSAL, at_once=False)
    with pytest.raises(ValueError, match="shares of validation and test"):
        plain("a.txt", validation=0.5, test=0.5)


def test_wikitext():
    folder = WIKITEXT
    if not folder.is_dir():
        pytest.skip("no WikiText on this machine")
    source = plain(folder / "valid.txt", test=str(folder / "test.txt"), documents="heading")
    sources.describe(source, CAUSAL)
    found = {unit.split: [r for t in sources.read(unit, CAUSAL) for r in t["text"].to_pylist()] for unit in sources.units(source, CAUSAL)}
    assert {split: len(texts) for split, texts in found.items()} == {"train": 60, "test": 62}
    assert found["train"][0].startswith("= Homarus gammarus = ")
    assert sum(len(text) for text in found["train"]) > 1_000_000
    # From the head of each file: within a tenth or two of what is there.
    assert [abs(unit.rows - 60) < 15 for unit in sources.units(source, CAUSAL)] == [True, True]
    assert rows_by_split(sources.units(source, CAUSAL))["test"] > 40


CODE = '''\
# The first line.
import os.path as p
LIMIT = 5

@p.cached(key=len)
async def load(self, size: int = 3 * LIMIT, *rest, **more):
    """Words of a docstring that is long."""
    return self.size.of(size, width=f"{size!r} and more", *rest)  # done
class Thing(p.Base): pass
'''


def test_words_of_source_code():
    rows = [list(zip(words, tags, strict=True)) for words, tags in sourcecode.rows_of_words(CODE)]
    assert [row[0][0] for row in rows] == ["# The first line", "@", "class"]
    tags = {(word, tag) for row in rows for word, tag in row if tag != "OP"}
    assert tags == {
        ("# The first line", "COMMENT"), ("import", "KEYWORD"), ("os", "MODULE"), ("path", "MODULE"), ("as", "KEYWORD"), ("p", "MODULE"),
        ("LIMIT", "NAME"), ("5", "NUMBER"), ("p", "NAME"), ("cached", "ATTRIBUTE"), ("key", "ARGUMENT"), ("len", "BUILTIN"),
        ("async", "KEYWORD"), ("def", "KEYWORD"), ("load", "FUNCTION"), ("self", "PARAMETER"), ("size", "PARAMETER"), ("int", "BUILTIN"),
        ("3", "NUMBER"), ("rest", "PARAMETER"), ("more", "PARAMETER"), ('"""Words of a do', "STRING"), ("return", "KEYWORD"),
        ("self", "NAME"), ("size", "ATTRIBUTE"), ("of", "ATTRIBUTE"), ("size", "NAME"), ("width", "ARGUMENT"),
        ('f"{size!r} and m', "STRING"), ("rest", "NAME"), ("# done", "COMMENT"), ("class", "KEYWORD"), ("Thing", "CLASS"),
        ("Base", "ATTRIBUTE"), ("pass", "KEYWORD"),
    }  # fmt: skip
    assert list(sourcecode.rows_of_words("x = (")) == list(sourcecode.rows_of_words("x = 1 ? 2\ny = 3\n")) == []
    long = list(sourcecode.rows_of_words("x = [" + "1, " * 100 + "]\ny = 1\n"))
    assert [len(words) for words, _ in long] == [60, 60, 60, 27]


def test_installed_source_code():
    words = SourceCorpus(type="source", packages=("json",), kind="tokens", per_package=3)
    assert sources.describe(words, TAGS)["kind"] == "tokens"
    rows = [(json.loads(text), json.loads(tags)) for text, tags in pairs_read(words, TAGS)]
    assert len(rows) > 20
    assert all(sourcecode.LEAST_WORDS <= len(words) == len(tags) <= sourcecode.ROW_WORDS for words, tags in rows)
    assert {tag for _, tags in rows for tag in tags} == {
        "ARGUMENT", "ATTRIBUTE", "BUILTIN", "CLASS", "COMMENT", "FUNCTION", "KEYWORD", "MODULE", "NAME", "NUMBER", "OP", "PARAMETER", "STRING",
    }  # fmt: skip
    files_ = SourceCorpus(type="source", packages=("json", "stdlib"), per_package=3)
    assert sources.describe(files_, CAUSAL) != sources.describe(words, TAGS)
    texts = [text for text, label in pairs_read(files_, CAUSAL) if label is None]
    assert len(texts) == 6
    assert any("def " in text for text in texts)
    assert [label for _, label in pairs_read(files_, TASKS["embedding"])] == ["json"] * 3 + ["stdlib"] * 3
    assert rows_by_split(sources.units(files_, CAUSAL)) == {"train": 6, "validation": 0, "test": 0}
    assert rows_by_split(sources.units(words, TAGS))["train"] > 20
    refused(SourceCorpus(type="source", packages=("no_such_library",)), r"DST-3420", CAUSAL)


def test_source_code_is_not_imported(library):
    source = SourceCorpus(type="source", packages=("lumen",))
    texts = [text for text, _ in pairs_read(source, CAUSAL)]
    assert len(texts) == 3, "the file that is not in UTF-8 is left out, and the tests"
    assert "lumen" not in sys.modules
    assert len(pairs_read(SourceCorpus(type="source", packages=("lumen",), per_package=2), CAUSAL)) <= 2


def test_digits():
    task = ImageClassification(type="image_classification", size=8, channels=1)
    source = DigitsCorpus(type="digits")
    rows = pairs_read(source, task)
    assert len(rows) == 1797
    assert {len(content) for content, _ in rows} == {64}
    assert list(rows[0][0][:8]) == [0, 0, 80, 207, 143, 16, 0, 0], "5, 13, 9 and 1 of 16"
    assert [label for _, label in rows[:10]] == list("0123456789")
    assert {value for content, _ in rows for value in content} == {round(i * 255 / 16) for i in range(17)}
    assert sorted(sources.describe(source, task)) == ["data", "pillow", "reader", "type"]
    assert rows_by_split(sources.units(source, task))["train"] == 1797
    scaled = ImageClassification(type="image_classification", size=16, channels=1, resize=True)
    unit = reading.Unit(**{**vars(sources.units(source, scaled)[0]), "stop": 2})
    assert [len(row) for found in sources.read(unit, scaled) for row in found["text"].to_pylist()] == [256, 256]


def test_docstrings_for_other_tasks():
    source = DocstringsCorpus(type="docstrings", packages=("json", "email"), per_package=5)
    assert {label for _, label in pairs_read(source, CAUSAL)} == {None}
    assert {label for _, label in pairs_read(source, TASKS["embedding"])} == {"json", "email"}
    refused(source, r"DST-3413.*corpus\.packages: json: expected a, b", TextClassification(labels=("a", "b")), at_once=False)


def test_corpora_that_do_not_serve_a_task():
    made = {
        "docstrings": DocstringsCorpus(type="docstrings", packages=("json", "email")), "text": plain("a.txt"),
        "documents": SourceCorpus(type="source", packages=("json",)),
        "tokens": SourceCorpus(type="source", packages=("json",), kind="tokens"),
        "digits": DigitsCorpus(type="digits"), "files": corpus("a.csv"), "hub": HubCorpus(type="hub", dataset="x"),
    }  # fmt: skip
    small = {**TASKS, "image_classification": ImageClassification(type="image_classification", size=8, channels=1)}

    def serves(source, task):
        try:
            sources.require_serves(source, task)
        except InputError as error:
            return error.code != "DST-3460"
        return True

    language = {"causal_lm", "masked_lm", "embedding"}
    assert {name: {kind for kind, task in small.items() if serves(source, task)} for name, source in made.items()} == {
        "docstrings": language | {"text_classification"}, "text": language, "documents": language, "tokens": {"token_classification"},
        "digits": {"image_classification"}, "files": set(TASKS), "hub": set(TASKS),
    }  # fmt: skip
    message = r"DST-3460.*corpus\.type: source, kind: tokens: expected task\.type token_classification but found causal_lm"
    refused(made["tokens"], message, CAUSAL)
    refused(made["docstrings"], r"DST-3460.*found text_classification of pairs", PAIRS)
    refused(made["digits"], r"DST-3460.*found channels 1, size 4", IMAGE)
    large = ImageClassification(type="image_classification", size=1024)
    refused(made["files"], r"DST-3469.*expected at most 682 images of 3145728 bytes but found 8192", large)
    sources.require_serves(corpus("a.csv", part_rows=682), large)
