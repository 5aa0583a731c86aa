"""Corpus preparation on real Ray: what is counted, where rows go, and that the bytes depend on nothing but the rows."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cluster import corpus as corpora
from cluster.config import DigitsCorpus, FilesCorpus, SourceCorpus, TextCorpus
from distillation import encoding
from distillation.columns import Columns
from distillation.config import (
    CausalLM,
    Embedding,
    ImageClassification,
    MaskedLM,
    MultiLabel,
    Regression,
    TextClassification,
    TokenClassification,
)
from distillation.errors import InputError
from distillation.storage import Storage
from distillation.store import open_artifact

TASK = TextClassification()
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROOT = Path(__file__).resolve().parents[2]

# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=150 << 20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then the words from 4 on."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8")
    return str(path)


def spelled(number):
    """A text of its own for every number."""
    return " ".join(WORDS[int(digit)] for digit in str(number))


def numbered(count):
    return [(spelled(i), "even" if i % 2 == 0 else "odd") for i in range(count)]


def prepare(tokenizer, folder, *train, task=TASK, config=None, **settings):
    config = config or FilesCorpus(type="files", train=train, **settings)
    fingerprint, made_from = corpora.corpus_fingerprint(config, task, tokenizer)
    storage = Storage(str(folder))
    said = []
    manifest = corpora.prepare(config, task, tokenizer, storage, fingerprint=fingerprint, made_from=made_from, progress=said.append)
    return manifest, storage


def rows_of(manifest, storage):
    """All rows of each split, in the order they are stored, after every file was checked against its record."""
    _, paths = open_artifact(storage, f"corpora/{manifest.fingerprint}", "corpus")
    return {
        split: [row for record in records for row in datasets.Dataset.from_file(str(paths[record.name])).to_list()]
        for split, records in manifest.splits.items()
    }


def bytes_of(manifest):
    return {split: [(r.name, r.rows, r.tokens, r.checksum) for r in records] for split, records in manifest.splits.items()}


def test_every_row_is_accounted_for(cluster, tokenizer, tmp_path):
    train = [
        ("one", "x"), ("one", "x"),  # a copy
        ("two", "x"), ("two", None),  # a label beats none
        ("three", "x"), ("three", "y"),  # contradictory: unlabelled in train
        ("caf\u00e9", "y"), ("  cafe\u0301\n", "y"),  # the same after normalisation
        ("", "x"), (" \t", None), (None, "y"),  # empty
        ("four", None), ("five", "y"),
        ("six", "x"), ("seven", "y"),  # also in stronger splits
    ]  # fmt: skip
    validation = [("seven", "y"), ("eight", "x"), ("nine", None), ("zero", "x"), ("zero", "y")]
    test = [("six", None), ("seven", "y"), ("one one", "y")]
    manifest, storage = prepare(
        tokenizer, tmp_path / "s", jsonl(tmp_path / "a.jsonl", train),
        validation=jsonl(tmp_path / "v.jsonl", validation), test=jsonl(tmp_path / "t.jsonl", test),
    )  # fmt: skip
    facts = {name: manifest.facts[name] for name in corpora.FACTS}
    assert facts == {
        "rows_read": 23, "empty": 3, "duplicates": 8, "conflicting": 2, "conflicting_dropped": 1, "unlabelled_dropped": 1,
        "truncated": 0, "too_long": 0, "hidden": 0, "nothing_scored": 0, "split": 0, "pieces": 0, "rests": 0,
    }  # fmt: skip
    assert manifest.facts["labels"] == ["x", "y"]
    assert manifest.facts["labelled"] == {"train": 4, "validation": 1, "test": 3}
    assert manifest.facts["unlabelled"] == {"train": 2, "validation": 0, "test": 0}
    assert manifest.facts["scored"] == {"train": 6, "validation": 1, "test": 3}
    assert manifest.facts["labelled_positions"] == {"train": 4, "validation": 1, "test": 3}
    assert manifest.facts["label_counts"] == {"train": {"x": 2, "y": 2}, "validation": {"x": 1}, "test": {"x": 1, "y": 2}}
    rows = rows_of(manifest, storage)
    assert {split: {row["text"]: row["label"] for row in found} for split, found in rows.items()} == {
        "train": {"one": 0, "two": 0, "three": -1, "caf\u00e9": 1, "four": -1, "five": 1},
        "validation": {"eight": 0},
        "test": {"six": 0, "seven": 1, "one one": 1},
    }
    assert all(row["id"] == hashlib.sha256(row["text"].encode()).hexdigest()[:32] for found in rows.values() for row in found)


def test_parts_are_what_the_store_promises(cluster, tokenizer, tmp_path):
    manifest, storage = prepare(tokenizer, tmp_path, jsonl(tmp_path / "a.jsonl", numbered(300)), part_rows=64)
    assert sum(manifest.rows(split) for split in manifest.splits) == 300
    everything = rows_of(manifest, storage)
    for split, records in manifest.splits.items():
        assert all(record.rows == 64 for record in records[:-1])
        assert 1 <= records[-1].rows <= 64
        ids = [row["id"] for row in everything[split]]
        assert ids == sorted(set(ids))
        assert [record.name for record in records] == [f"part-{ids[start][:12]}-{split}.arrow" for start in range(0, len(ids), 64)]
        assert manifest.tokens(split) == sum(row["length"] for row in everything[split])
    assert len(manifest.splits["train"]) >= 3
    rows = {row["text"]: row for split in everything.values() for row in split}
    assert rows["two five"]["input_ids"] == [2, 6, 9, 3]
    assert rows["two five"]["length"] == 4
    assert rows["two five"]["label"] == manifest.facts["labels"].index("odd") == 1
    assert sum(manifest.tokens(split) for split in manifest.splits) == 10 * 3 + 90 * 4 + 200 * 5
    _, paths = open_artifact(storage, f"corpora/{manifest.fingerprint}", "corpus")
    columns = Columns([paths[record.name] for record in manifest.splits["train"]])
    assert columns.schema == encoding.fields(TASK)
    assert columns.whole("length").tolist() == [row["length"] for row in everything["train"]]
    assert manifest.facts["columns"] == {
        "id": "string", "text": "string", "length": "int32", "scored": "int32", "labelled": "int32", "input_ids": "list<item: int32>",
        "label": "int32",
    }  # fmt: skip


def test_bytes_depend_on_the_rows_alone(cluster, tokenizer, tmp_path, monkeypatch):
    """The same rows from one file and from six in another order, cut into many small blocks: copies meet wherever they come from."""
    rows = numbered(400) + 10 * numbered(120)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    first, _ = prepare(tokenizer, tmp_path / "s1", jsonl(tmp_path / "one/a.jsonl", rows), part_rows=50, labelled=0.5)
    assert first.facts["duplicates"] == 1200
    random.Random(1).shuffle(rows)
    for i in range(6):
        piece = rows[i::6]
        jsonl(tmp_path / f"many/{i}.jsonl", piece)
        if i % 2:
            (tmp_path / f"many/{i}.jsonl").unlink()
            pq.write_table(
                pa.table({"text": [t for t, _ in piece], "label": [x for _, x in piece]}),
                tmp_path / f"many/{i}.parquet",
                row_group_size=100,
            )
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 20_000)
    second, storage = prepare(tokenizer, tmp_path / "s2", str(tmp_path / "many/*"), part_rows=50, labelled=0.5)
    assert bytes_of(first) == bytes_of(second)
    assert first.facts == second.facts
    assert first.fingerprint != second.fingerprint
    ids = [row["id"] for found in rows_of(second, storage).values() for row in found]
    assert len(ids) == len(set(ids)) == 400


def test_bytes_do_not_depend_on_the_number_of_cpus(cluster, tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered(200))
    here, _ = prepare(tokenizer, tmp_path / "s1", path, part_rows=32)
    program = (
        "import sys, ray; from pathlib import Path; from tests.cluster.test_corpus import prepare, bytes_of\n"
        "ray.init(address='local', include_dashboard=False, num_cpus=1, object_store_memory=100 << 20, log_to_driver=False)\n"
        "manifest, _ = prepare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], part_rows=32)\n"
        "print(repr(bytes_of(manifest)))"
    )
    command = [sys.executable, "-c", program, str(tokenizer), str(tmp_path / "s2"), path]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    there = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert there.returncode == 0, there.stderr
    assert there.stdout.splitlines()[-1] == repr(bytes_of(here))


def test_splits_and_hidden_labels_follow_the_text(cluster, tokenizer, tmp_path):
    few = jsonl(tmp_path / "few.jsonl", numbered(600))
    more = jsonl(tmp_path / "more.jsonl", numbered(1000))
    half = rows_of(*prepare(tokenizer, tmp_path / "s", few, validation=0.2, test=0.1, labelled=0.5))
    quarter = rows_of(*prepare(tokenizer, tmp_path / "s", more, validation=0.2, test=0.1, labelled=0.25))
    texts = lambda rows, split, labelled=False: {row["text"] for row in rows[split] if not labelled or row["label"] >= 0}  # noqa: E731
    for split in ("train", "validation", "test"):
        assert texts(half, split) == texts(quarter, split) & {spelled(i) for i in range(600)}
    # Four standard deviations of a binomial count around its mean.
    assert 149 < len(quarter["validation"]) < 251
    assert 62 < len(quarter["test"]) < 138
    assert texts(quarter, "train", True) & texts(half, "train") < texts(half, "train", True)
    assert 0.18 < len(texts(quarter, "train", True)) / len(quarter["train"]) < 0.32
    assert texts(quarter, "test", True) == texts(quarter, "test")
    assert texts(quarter, "validation", True) == texts(quarter, "validation")


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_long_rows(cluster, tokenizer, tmp_path, too_long):
    # 10 texts of one word, 90 of two, 200 of three: with two special tokens, only the last have more than four.
    task = TextClassification(max_length=4, too_long=too_long)
    manifest, storage = prepare(tokenizer, tmp_path, jsonl(tmp_path / "a.jsonl", numbered(300)), task=task)
    rows = {row["text"]: row["input_ids"] for split in rows_of(manifest, storage).values() for row in split}
    assert rows["four two"] == [2, 8, 6, 3]
    if too_long == "truncate":
        assert (manifest.facts["truncated"], manifest.facts["too_long"], len(rows)) == (200, 0, 300)
        assert rows["two five nine"] == [2, 6, 9, 3]
    else:
        assert (manifest.facts["truncated"], manifest.facts["too_long"], len(rows)) == (0, 200, 100)


def test_finished_and_half_finished_work(cluster, tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered(200))
    first, storage = prepare(tokenizer, tmp_path / "s", path, part_rows=40)
    again, _ = prepare(tokenizer, tmp_path / "s", path, part_rows=40)
    assert again == first
    folder = tmp_path / "s/corpora" / first.fingerprint
    (folder / "manifest.json").unlink()
    (folder / first.splits["train"][0].name).unlink()
    (folder / first.splits["train"][1].name).write_bytes(b"half of it")
    repaired, _ = prepare(tokenizer, tmp_path / "s", path, part_rows=40)
    assert repaired.model_copy(update={"created": first.created}) == first
    assert repaired.created > first.created
    rows_of(repaired, storage)
    assert not list(folder.glob(".tmp*"))


def test_labels_that_are_given(cluster, tokenizer, tmp_path):
    train, held = jsonl(tmp_path / "a.jsonl", numbered(60)), jsonl(tmp_path / "v.jsonl", [("nine " * 5, "none")])
    with pytest.raises(InputError, match=r"DST-3441.*split validation: expected even, odd but found none"):
        prepare(tokenizer, tmp_path / "s", train, validation=held)
    task = TextClassification(labels=("odd", "none", "even"))
    manifest, storage = prepare(tokenizer, tmp_path / "s", train, validation=held, task=task)
    assert manifest.facts["labels"] == ["odd", "none", "even"]
    found = rows_of(manifest, storage)
    assert [row["label"] for row in found["validation"]] == [1]
    assert {row["text"]: row["label"] for split in found.values() for row in split}["four"] == 2


def test_bad_rows_come_out_of_the_tasks_as_our_errors(cluster, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    jsonl(path, numbered(50))
    with open(path, "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"^error\[DST-3411\]: text is not UTF-8: \S+a\.jsonl:line 51, byte \d+: [^\n]*$") as caught:
        prepare(tokenizer, tmp_path / "s", str(path))
    assert type(caught.value) is InputError
    assert not (tmp_path / "s").exists()


def test_corpora_that_cannot_be_used(cluster, tokenizer, tmp_path):
    def refused(message, rows, **settings):
        with pytest.raises(InputError, match=message):
            prepare(tokenizer, tmp_path / "s", jsonl(tmp_path / "a.jsonl", rows), **settings)

    refused(r"DST-3440.*train, validation, test is empty.*train 0, validation 0, test 0 of 3 rows read, without 3 empty", [("", "x")] * 3)
    long = TextClassification(max_length=4, too_long="drop")
    refused(r"DST-3440.*validation 0, test 0 of 2 rows read, without 2 too_long", [("one " * 9, "x"), ("two " * 9, "y")], task=long)
    held = jsonl(tmp_path / "v.jsonl", [("one one one one", None)])
    refused(r"DST-3440.*split validation is empty.*of 61 rows read, without 1 unlabelled_dropped", numbered(60), validation=held)
    refused(
        r"DST-3442.*too few labels: corpus, split train: expected two or more different labels but found x",
        [(t, "x") for t, _ in numbered(60)],
    )


def test_fingerprint_covers_what_changes_the_bytes(tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered(5))

    def print_of(task=TASK, folder=tokenizer, **settings):
        return corpora.corpus_fingerprint(FilesCorpus(type="files", train=path, **settings), task, folder)[0]

    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text().replace('"nine"', '"ten"'))
    prints = {
        print_of(), print_of(part_rows=5), print_of(labelled=0.5), print_of(test=0.2), print_of(test=path), print_of(folder=other),
        print_of(TextClassification(max_length=16)), print_of(TextClassification(too_long="drop")),
        print_of(TextClassification(labels=("even", "odd"))),
    }  # fmt: skip
    assert len(prints) == 9
    assert print_of() == print_of()
    with pytest.raises(InputError, match=r"DST-3203"):
        print_of(folder=tmp_path)


def test_unwrap_finds_our_error_behind_others():
    ours = InputError("DST-3402", "file does not exist")
    try:
        try:
            raise ours
        except InputError as error:
            raise KeyError("x") from error
    except KeyError as error:
        wrapped = RuntimeError()
        wrapped.cause = error
    assert corpora.unwrap(wrapped) is ours
    assert corpora.unwrap(ours) is ours
    assert corpora.unwrap(ValueError("x")) is None


# ------------------------------------------------------------------------------------------------------- every other task


@pytest.fixture(scope="module")
def masking(tokenizer, tmp_path_factory):
    """The same tokenizer with a mask token, 14, and the second text of a pair told apart."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("masking")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"), model_input_names=inputs, **special)
    made.save_pretrained(folder)
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def accounted(manifest):
    """Every row that was read is in the splits, or counted where it was dropped."""
    facts = manifest.facts
    assert facts["rows_read"] + facts["pieces"] == sum(facts[name] for name in corpora.DROPPED) + sum(map(manifest.rows, manifest.splits))
    return facts


def test_several_labels_of_pairs(cluster, masking, tmp_path):
    rows = [{"text": spelled(i), "other": spelled(i + 1), "label": ["odd"] * (i % 2) + ["small"] * (i < 30)} for i in range(100)]
    rows += [{"text": "one", "other": "nine", "label": None}, {"text": "one", "other": "", "label": []}]
    task = MultiLabel(type="multi_label", pair="other")
    manifest, storage = prepare(masking, tmp_path / "s", lines(tmp_path / "a.jsonl", rows), task=task, labelled=0.5)
    facts, found = accounted(manifest), rows_of(manifest, storage)
    assert (facts["labels"], facts["empty"]) == (["odd", "small"], 1)
    every = {row["text"]: row for split in found.values() for row in split}
    row = every["two one  ⏎  two two"]
    assert (row["input_ids"], row["token_type_ids"]) == ([2, 6, 5, 3, 6, 6, 3], [0, 0, 0, 0, 1, 1, 1])
    assert row["id"] == hashlib.sha256(b'["two one","two two"]').hexdigest()[:32]
    for i in range(100):
        row = every[f"{spelled(i)}  ⏎  {spelled(i + 1)}"]
        assert row["labels"] == ([0] * (i % 2) + [1] * (i < 30) if row["labelled"] else [])
    for split, some in found.items():
        known = [row for row in some if row["labelled"]]
        assert facts["labelled"][split] == facts["labelled_positions"][split] == len(known)
        counts = {name: sum(i in row["labels"] for row in known) for i, name in enumerate(facts["labels"])}
        assert facts["label_counts"][split] == {name: count for name, count in counts.items() if count}
    # The row without a label is not hidden: it never had one.
    assert 25 < facts["hidden"] == facts["unlabelled"]["train"] - ("one  ⏎  nine" in {row["text"] for row in found["train"]}) < 60


def test_labels_of_words(cluster, tokenizer, tmp_path):
    rows = [{"tokens": spelled(i).split(), "tags": ["odd" if int(d) % 2 else "even" for d in str(i)]} for i in range(100, 200)]
    rows += [{"tokens": ["one", "two"], "tags": [None, "even"]}, {"tokens": ["one", "two"], "tags": ["odd", "even"]}]
    task = TokenClassification(type="token_classification")
    manifest, storage = prepare(tokenizer, tmp_path / "s", lines(tmp_path / "a.jsonl", rows), task=task)
    facts, found = accounted(manifest), rows_of(manifest, storage)
    assert (facts["labels"], facts["conflicting"]) == (["even", "odd"], 1)
    row = next(row for split in found.values() for row in split if row["text"] == "one five two")
    assert (row["input_ids"], row["places"], row["labels"]) == ([2, 5, 9, 6, 3], [1, 2, 3], [1, 1, 0])
    for split in found:
        assert facts["scored"][split] == sum(row["scored"] for row in found[split])
        assert facts["labelled_positions"][split] == sum(facts["label_counts"][split].values())


def test_a_text_of_several_parts(cluster, tokenizer, tmp_path):
    (tmp_path / "long.txt").write_text("\n\n".join(" ".join([spelled(i)] * 40) for i in range(30)) + "\n\none\n\none")
    config = TextCorpus(type="text", train=str(tmp_path / "long.txt"), documents="blank_line", part_rows=7, validation=0.3, test=0.3)
    manifest, storage = prepare(tokenizer, tmp_path / "s", task=CausalLM(type="causal_lm", max_length=4), config=config)
    facts, found = accounted(manifest), rows_of(manifest, storage)
    assert facts["labels"] == []
    assert (facts["rows_read"], facts["duplicates"], facts["split"], facts["rests"]) == (32, 1, 30, 0)
    assert facts["unlabelled"] == {"train": 0, "validation": 0, "test": 0}
    assert facts["label_counts"] == {"train": {}, "validation": {}, "test": {}}
    for split, rows in found.items():
        assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
        assert facts["scored"][split] == facts["labelled_positions"][split] == sum(row["length"] - 1 for row in rows)
        # A document is whole, in order, and in one split.
        for start in {row["id"][:24] for row in rows}:
            pieces = [row for row in rows if row["id"].startswith(start)]
            assert [int(row["id"][24:], 16) for row in pieces] == list(range(len(pieces)))
            tokens = [token for row in pieces for token in row["input_ids"]]
            assert tokens[0] == 2
            assert len({tuple(tokens[1 + i : 3 + i]) for i in range(0, len(tokens) - 4, 2)}) <= 2
    assert manifest.rows("train") > 7 * 10, "a text of 80 words fills three parts"


def test_a_reading_has_the_rows_of_its_corpus(cluster, tokenizer, masking, tmp_path):
    task = CausalLM(type="causal_lm", max_length=8)
    texts = [(" ".join([spelled(1_000_000 + i)] * (1 + i % 3)), None) for i in range(60)]
    path = jsonl(tmp_path / "a.jsonl", texts)
    manifest, storage = prepare(tokenizer, tmp_path / "s", path, task=task, validation=0.2, test=0.2, part_rows=16)
    config = FilesCorpus(type="files", train=path, validation=0.2, test=0.2, part_rows=16)
    fingerprint, made_from = corpora.reading_fingerprint(manifest.fingerprint, manifest.made_from, masking)
    assert fingerprint != manifest.fingerprint
    settings = {"fingerprint": fingerprint, "made_from": made_from, "progress": lambda _: None, "reader_dir": masking}
    again = corpora.prepare(config, task, tokenizer, storage, **settings)
    assert again.facts["reads"] == manifest.fingerprint
    assert again.facts["tokenizer"] == made_from["reader"] != manifest.facts["tokenizer"]
    names = {split: [(record.name, record.rows) for record in records] for split, records in again.splits.items()}
    assert names == {split: [(record.name, record.rows) for record in records] for split, records in manifest.splits.items()}
    pairs = [rows_of(one, storage) for one in (manifest, again)]
    found = [pair for split in names for pair in zip(*(each[split] for each in pairs), strict=True)]
    for mine, its in found:
        assert (its["id"], its["text"], its["told"]) == (mine["id"], mine["text"], mine["scored"])
        assert len(its["theirs"]) == its["scored"]
        assert its["aligned"] == sum(place >= 0 for place in its["theirs"]) > 0
    path = jsonl(tmp_path / "a.jsonl", texts[:-20])  # the source has changed behind our back
    other = {**settings, "fingerprint": "f" * 16}
    with pytest.raises(InputError, match=r"DST-3113\]: sources have changed since the corpus was made"):
        corpora.prepare(config, task, tokenizer, storage, **other)


def test_hidden_words_of_real_text(cluster, masking, tmp_path):
    folder = next((p for p in (ROOT.parent / "shared/data/wikitext2", ROOT / "shared/data/wikitext2") if p.is_dir()), None)
    if folder is None:
        pytest.skip("no WikiText on this machine")
    task = MaskedLM(type="masked_lm", max_length=64)
    config = TextCorpus(type="text", train=str(folder / "valid.txt"), test=str(folder / "test.txt"), documents="heading")
    manifest, storage = prepare(masking, tmp_path / "s", task=task, config=config)
    facts, found = accounted(manifest), rows_of(manifest, storage)
    assert facts["rows_read"] == 122
    assert sum(manifest.tokens(split) for split in manifest.splits) > 10_000
    for rows in found.values():
        for row in rows[:50]:
            assert len(row["input_ids"]) == row["length"] <= 64
            assert (row["input_ids"][0], row["input_ids"][-1]) == (2, 3)
            assert row["scored"] == len(row["places"]) == len(row["labels"]) >= 1
            assert min(row["labels"]) > 3, "neither special tokens nor unknown words"


def test_digits_as_images(cluster, tmp_path):
    task = ImageClassification(type="image_classification", size=8, channels=1)
    manifest, storage = prepare(None, tmp_path, task=task, config=DigitsCorpus(type="digits"))
    facts, found = accounted(manifest), rows_of(manifest, storage)
    assert facts["labels"] == list("0123456789")
    assert facts["tokenizer"] is None
    assert sum(len(rows) for rows in found.values()) == 1797 - facts["duplicates"]
    row = found["train"][0]
    assert row["id"] == hashlib.sha256(bytes(row["pixels"])).hexdigest()[:32]
    assert (row["text"], row["length"], row["scored"], row["labelled"], len(row["pixels"])) == ("", 1, 1, 1, 64)
    assert manifest.tokens("train") == len(found["train"])


def test_numbers_and_embeddings(cluster, tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [(spelled(i), i / 8) for i in range(100)] + [(spelled(i), None) for i in range(100, 150)])
    manifest, storage = prepare(tokenizer, tmp_path / "s", path, task=Regression(type="regression"))
    facts, found = accounted(manifest), rows_of(manifest, storage)
    assert (facts["labels"], facts["label_counts"]["train"]) == ([], {})
    assert facts["labelled"]["train"] + facts["unlabelled"]["train"] == len(found["train"])
    assert facts["unlabelled_dropped"] > 0 == facts["unlabelled"]["validation"]
    assert {row["text"]: row["label"] for split in found.values() for row in split if row["labelled"]} == {
        spelled(i): i / 8 for i in range(100)
    }
    assert all((row["label"] != row["label"]) == (row["labelled"] == 0) for row in found["train"])
    rows = [(spelled(i), "x" if i < 9 else None) for i in range(100)] + [("one", "y")]
    kept, storage = prepare(tokenizer, tmp_path / "s", jsonl(tmp_path / "b.jsonl", rows), task=Embedding(type="embedding"))
    facts, found = accounted(kept), rows_of(kept, storage)
    assert (sum(map(kept.rows, kept.splits)), facts["labels"], facts["conflicting"]) == (100, ["x"], 1)
    assert sum(row["label"] == 0 for split in found.values() for row in split) == 8


def test_words_of_source_code(cluster, tokenizer, tmp_path):
    config = SourceCorpus(type="source", packages=("json", "csv"), kind="tokens")
    manifest, storage = prepare(tokenizer, tmp_path, task=TokenClassification(type="token_classification"), config=config)
    facts = accounted(manifest)
    assert {"KEYWORD", "NAME", "PARAMETER"} < set(facts["labels"])
    assert facts["scored"]["train"] == facts["labelled_positions"]["train"] > 1000
    rows_of(manifest, storage)


def test_tokenizers_that_do_not_serve_are_refused_at_once(cluster, tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered(5))
    with pytest.raises(InputError, match=r"DST-3466.*no mask token: \S+tokenizer"):
        prepare(tokenizer, tmp_path / "s", path, task=MaskedLM(type="masked_lm"))


def test_fingerprint_of_images_has_no_tokenizer(tokenizer):
    task = ImageClassification(type="image_classification", size=8, channels=1)
    corpus = DigitsCorpus(type="digits")
    assert corpora.corpus_fingerprint(corpus, task, None) == corpora.corpus_fingerprint(corpus, task, tokenizer)
