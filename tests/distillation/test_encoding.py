"""Every task's rows, worked out by hand on tokenizers of a few words."""

import json
import math
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distillation import documents, encoding
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
from distillation.errors import InputError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "##s"]
A, B = "a" * 32, "b" * 32
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def bert(**changes):
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, zero 5, ..., nine 14, ##s 15."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Replace("~", "")
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **{**SPECIAL, "mask_token": "[MASK]", "model_input_names": inputs, **changes}
    )  # fmt: skip


def bytewise(bos=False):
    """A byte a token, as numbers from 1 on in the order of `ByteLevel.alphabet`; <eos> 0, and if asked for <bos> 257 before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}, "<bos>": 257}
    made = Tokenizer(models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>", model_input_names=["input_ids"]), {
        letter: vocabulary["\u0120" if letter == " " else letter] for letter in "abcdefgh "
    }


def rows(task, tokenizer, contents, labels=None, ids=(A, B)):
    made = encoding.encode(task, tokenizer, ids[: len(contents)], contents, labels)
    lengths = {len(values) for values in made.columns.values()}
    assert lengths <= {len(made.source)}
    named = set(encoding.label_columns(task, [], []))
    types = tokenizer is not None and encoding.makes_token_types(task, tokenizer)
    schema = encoding.fields(task, types)
    if made.source:
        assert set(made.columns) == set(schema.names) - named
        for name, values in made.columns.items():
            assert len(pa.array(values, schema.field(name).type)) == len(values)
    return made


def facts(made):
    return {key: count for key, count in made.tallies.items() if count}


def test_every_type_of_task_has_an_encoding():
    types = [get_args(task.model_fields["type"].annotation)[0] for task in get_args(get_args(TaskConfig)[0])]
    assert list(encoding.ENCODINGS) == types


def test_columns_of_parts():
    common = ["id", "text", "length", "scored", "labelled"]
    names = {
        "text": TextClassification(), "pair": TextClassification(pair="b"), "multi": MultiLabel(type="multi_label"),
        "number": Regression(type="regression"), "words": TokenClassification(type="token_classification"),
        "causal": CausalLM(type="causal_lm"), "masked": MaskedLM(type="masked_lm"),
        "image": ImageClassification(type="image_classification"), "embedding": Embedding(type="embedding"),
    }  # fmt: skip
    found = {name: encoding.fields(task, name == "pair") for name, task in names.items()}
    assert {name: schema.names[: len(common)] for name, schema in found.items()} == dict.fromkeys(names, common)
    assert {name: ", ".join(f"{f.name} {f.type}".replace("item: ", "") for f in list(schema)[5:]) for name, schema in found.items()} == {
        "text": "input_ids list<int32>, label int32",
        "pair": "input_ids list<int32>, token_type_ids list<int8>, label int32",
        "multi": "input_ids list<int32>, labels list<int32>",
        "number": "input_ids list<int32>, label float",
        "words": "input_ids list<int32>, places list<int32>, labels list<int32>",
        "causal": "input_ids list<int32>, bytes int32",
        "masked": "input_ids list<int32>, places list<int32>, labels list<int32>",
        "image": "pixels list<uint8>, label int32",
        "embedding": "input_ids list<int32>, label int32",
    }
    assert str(found["text"].field("scored").type) == str(found["text"].field("labelled").type) == "int32"


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_texts(too_long):
    task = TextClassification(max_length=4, too_long=too_long)
    made = rows(task, bert(), ["two fives", "one two", "one"], ["x", None, "y"], (A, B, "c" * 32))
    if too_long == "truncate":
        assert made.columns["input_ids"] == [[2, 7, 10, 3], [2, 6, 7, 3], [2, 6, 3]]
        assert (made.source, made.labels, facts(made)) == ([0, 1, 2], ["x", None, "y"], {("truncated", 0): 1})
        assert (made.columns["scored"], made.columns["labelled"], made.columns["length"]) == ([1, 1, 1], [1, 0, 1], [4, 4, 3])
        assert (made.columns["id"][0], made.columns["text"]) == (A, ["two fives", "one two", "one"])
    else:
        assert made.columns["input_ids"] == [[2, 6, 7, 3], [2, 6, 3]]
        assert (made.source, made.labels, facts(made)) == ([1, 2], [None, "y"], {("too_long", 0): 1})


def test_pairs():
    pair = [json.dumps(["one two", "three"]), json.dumps(["one", "two three four five"])]
    made = rows(TextClassification(pair="other", max_length=7), bert(), pair, ["x", "y"])
    assert made.columns["input_ids"] == [[2, 6, 7, 3, 8, 3], [2, 6, 3, 7, 8, 9, 3]]
    assert made.columns["token_type_ids"] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert made.columns["text"] == ["one two  ⏎  three", "one  ⏎  two three four five"]
    assert facts(made) == {("truncated", 1): 1}
    plain = bert(model_input_names=["input_ids", "attention_mask"])
    assert "token_type_ids" not in rows(Regression(type="regression", pair="other"), plain, pair).columns
    assert "token_type_ids" not in rows(TextClassification(), bert(), ["one"]).columns


def test_words():
    words = json.dumps(["ones", "~", "two", "threes", "four"])
    tags = json.dumps(["X", "Y", None, "Z", "X"])
    task = TokenClassification(type="token_classification", max_length=6)
    tokenizer = bert()
    # [CLS] one ##s two three [SEP]: the second word gives no piece, of the fourth only the first is left, the fifth is cut off.
    made = rows(task, tokenizer, [words, json.dumps(["~", "~~"])], [tags, '["X","X"]'])
    assert made.columns["input_ids"] == [[2, 6, 15, 7, 8, 3]]
    assert made.columns["places"] == [[1, 3, 4]]
    assert made.labels == ['["X", null, "Z"]']
    assert (made.columns["scored"], made.columns["labelled"], made.columns["length"]) == ([3], [2], [6])
    assert made.columns["text"] == ["ones ~ two threes four"]
    assert facts(made) == {("truncated", 0): 1, ("nothing_scored", 1): 1}
    found = encoding.label_columns(task, [*made.labels, None], ["X", "Z"], [3, 2])
    assert found["labels"].to_pylist() == [[0, -1, 1], [-1, -1]]
    assert encoding.classes(task, made.labels[0]) == ["X", "Z"]
    without = rows(task, tokenizer, [json.dumps(["one", "two"])], [None])
    assert (without.labels, without.columns["scored"], without.columns["labelled"]) == ([None], [2], [0])


def test_label_columns():
    assert encoding.label_columns(TextClassification(), ["b", None, "a"], ["a", "b"])["label"].to_pylist() == [1, -1, 0]
    several = encoding.label_columns(MultiLabel(type="multi_label"), ['["c","a"]', None, "[]"], ["a", "b", "c"])["labels"]
    assert several.to_pylist() == [[0, 2], [], []]
    made = rows(MultiLabel(type="multi_label"), bert(), ["one", "two"], [None, "[]"])
    assert (made.columns["labelled"], encoding.classes(MultiLabel(type="multi_label"), '["c","a"]')) == ([0, 1], ["c", "a"])
    numbers = encoding.label_columns(Regression(type="regression"), ["0.1", None], [])["label"]
    assert (str(numbers.type), numbers.null_count) == ("float", 0)
    assert numbers[0].as_py() == np.float32(0.1)
    assert math.isnan(numbers[1].as_py())
    assert encoding.classes(Regression(type="regression"), "0.1") == []
    assert encoding.label_columns(CausalLM(type="causal_lm"), [None], []) == {}
    assert encoding.label_columns(MaskedLM(type="masked_lm"), [None], []) == {}
    assert encoding.label_columns(Embedding(type="embedding"), [None, "x"], ["x"])["label"].to_pylist() == [-1, 0]


def test_causal_texts_are_cut_into_rows():
    tokenizer, n = bytewise()
    task = CausalLM(type="causal_lm", max_length=4)
    made = rows(task, tokenizer, ["abc defg", "ab"])
    # Nine tokens with the end of text: the last one would be a row of its own with nothing to score.
    assert made.columns["input_ids"] == [[n[c] for c in "abc "], [n[c] for c in "defg"], [n["a"], n["b"], 0]]
    assert made.columns["id"] == ["a" * 24 + "00000000", "a" * 24 + "00000001", "b" * 24 + "00000000"]
    assert made.columns["text"] == ["abc", "defg", "ab"]
    assert (made.source, made.columns["length"]) == ([0, 0, 1], [4, 4, 3])
    assert made.columns["scored"] == made.columns["labelled"] == [3, 3, 2]
    assert made.columns["bytes"] == [3, 3, 1], "of bc_, efg, and b with the end of text that has no bytes"
    assert facts(made) == {("split", 0): 1, ("pieces", 0): 1, ("rests", 0): 1}
    dropped = rows(CausalLM(type="causal_lm", max_length=4, too_long="drop"), tokenizer, ["abc defg", "abc"])
    assert dropped.columns["input_ids"] == [[n[c] for c in "abc"] + [0]]
    assert facts(dropped) == {("too_long", 0): 1}


def test_special_tokens_of_causal_texts():
    tokenizer, n = bytewise(bos=True)
    task = CausalLM(type="causal_lm", max_length=4)
    made = rows(task, tokenizer, ["abcde", "é"])
    assert made.columns["input_ids"][:2] == [[257, n["a"], n["b"], n["c"]], [n["d"], n["e"]]], "and none at the end"
    assert made.columns["bytes"] == [3, 1, 2], "abc, e, and the two bytes of é"
    tokenizer.eos_token = None
    assert rows(task, tokenizer, ["ab"]).columns["input_ids"] == [[257, n["a"], n["b"]]]
    alone, _ = bytewise()
    alone.eos_token = None
    assert facts(rows(task, alone, ["a"])) == {("nothing_scored", 0): 1}


def test_bytes_cover_what_stands_between_tokens():
    tokenizer = bert()
    made = rows(CausalLM(type="causal_lm", max_length=5), tokenizer, ["one  two   three four five"])
    # [CLS] one two three four | five [SEP]
    assert made.columns["input_ids"] == [[2, 6, 7, 8, 9], [10, 3]]
    assert made.columns["bytes"] == [len("one  two   three four"), 0]
    assert made.columns["text"] == ["one  two   three four", "five"]


def test_masked_texts():
    task, tokenizer = MaskedLM(type="masked_lm", max_length=6, mask=0.5), bert()
    made = rows(task, tokenizer, ["zero one two three four five", "[SEP] nine", "[MASK]"], ids=(A, B, "c" * 32))
    originals = [[2, 5, 6, 7, 8, 3], [2, 9, 10, 3], [2, 3, 14, 3]]
    assert made.columns["id"] == ["a" * 24 + "00000000", "a" * 24 + "00000001", "b" * 24 + "00000000"]
    assert made.columns["text"] == ["zero one two three", "four five", "[SEP] nine"]
    assert made.columns["scored"] == made.columns["labelled"] == [2, 1, 1]
    assert facts(made) == {("split", 0): 1, ("pieces", 0): 1, ("nothing_scored", 2): 1}
    for original, hidden, places, labels in zip(
        originals, made.columns["input_ids"], made.columns["places"], made.columns["labels"], strict=True
    ):
        assert labels == [original[place] for place in places]
        assert places == sorted(set(places))
        assert [token for i, token in enumerate(hidden) if i not in places] == [t for i, t in enumerate(original) if i not in places]
    assert made.columns["places"][2] == [2], "a special token is never hidden, also where a text spells it out"
    again = rows(task, tokenizer, ["zero one two three four five"])
    assert again.columns["places"] == made.columns["places"][:2], "the id alone decides"
    other = [rows(task, tokenizer, ["zero one two three"], ids=(f"{i:02x}" * 16,)).columns["places"][0] for i in range(20)]
    assert len(set(map(tuple, other))) == 6, "every two of four places"
    dropped = rows(MaskedLM(type="masked_lm", max_length=6, too_long="drop"), tokenizer, ["zero one two three four five", "one"])
    assert (dropped.source, facts(dropped)) == ([1], {("too_long", 0): 1})


def test_hidden_tokens_are_masked_replaced_or_left():
    free, ordinary = np.arange(1, 2001), np.arange(10, 30)
    row = np.concatenate([[2], np.full(2000, 7), [3]])
    hidden, places = documents.hide(row, free, 0.5, A, 4, ordinary)
    assert len(places) == 1000
    kinds = [int((hidden[places] == 4).sum()), int((hidden[places] == 7).sum())]
    # Four standard deviations of a binomial count around 800 and around 100.
    assert 750 < kinds[0] < 850
    assert 62 < kinds[1] < 138
    others = set(hidden[places].tolist()) - {4, 7}
    assert others == set(range(10, 30))
    assert (np.delete(hidden, places) == np.delete(row, places)).all()
    # The stream of RandomState is frozen: these places are those of every machine.
    assert documents.hide(row[:9], np.arange(1, 9), 0.3, A, 4, ordinary)[1].tolist() == [4, 7]
    assert [len(documents.hide(row, np.arange(1, 1 + n), 0.15, A, 4, ordinary)[1]) for n in (1, 2, 10, 20)] == [1, 1, 2, 3]


def test_images():
    task = ImageClassification(type="image_classification", size=4, channels=1)
    made = rows(task, None, [bytes(range(16)), bytes(16)], ["x", None])
    assert [list(pixels) for pixels in made.columns["pixels"]] == [list(range(16)), [0] * 16]
    assert (made.columns["length"], made.columns["scored"], made.columns["labelled"]) == ([1, 1], [1, 1], [1, 0])
    assert made.columns["text"] == ["", ""]


def test_embeddings():
    made = rows(Embedding(type="embedding"), bert(), ["one two", "three"], [None, "x"])
    assert (made.columns["input_ids"], made.columns["scored"], made.columns["labelled"]) == ([[2, 6, 7, 3], [2, 8, 3]], [1, 1], [0, 1])


def test_nothing_is_no_rows():
    assert rows(TextClassification(), bert(), []).source == []


def test_tokenizers_that_do_not_serve():
    with pytest.raises(InputError, match=r"DST-3466.*no mask token: here.*made for masked_lm"):
        encoding.check(MaskedLM(type="masked_lm"), bert(mask_token=None), "here")
    slow = SimpleNamespace(is_fast=False, mask_token_id=1, num_special_tokens_to_add=lambda pair: 0)
    for task in (TokenClassification(type="token_classification"), CausalLM(type="causal_lm"), MaskedLM(type="masked_lm")):
        with pytest.raises(InputError, match=r"DST-3467.*found SimpleNamespace"):
            encoding.check(task, slow, "here")
    encoding.check(TextClassification(), slow, "here")
    many = SimpleNamespace(is_fast=True, num_special_tokens_to_add=lambda pair: 4 if pair else 2)
    encoding.check(TextClassification(max_length=4), many, "here")
    with pytest.raises(InputError, match=r"DST-3468.*task\.max_length: expected above 4.*found 4"):
        encoding.encode(TextClassification(max_length=4, pair="b"), many, [A], ['["a","b"]'])
