"""The rows of a corpus in the tokens of another tokenizer: which places are the same, what is learned from them, how it is judged."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from distillation import divergences, encoding, fit, store
from distillation.answers import answer_part, make_teacher
from distillation.columns import Columns
from distillation.config import (
    CausalLM,
    CrossEntropy,
    DenseLogits,
    FitConfig,
    PretrainedStudent,
    TargetsConfig,
    TextClassification,
    TopKLogits,
    TrainingConfig,
    UniversalLogit,
)
from distillation.errors import InputError
from distillation.evaluate import Candidate, evaluate
from distillation.loop import LocalSession
from distillation.losses import gradient_squares, weigh
from distillation.network import Network
from distillation.rows import Rows, open_rows
from distillation.storage import Storage
from distillation.tasks import build_task

ID = "0" * 31 + "a"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACED = [("a", "b"), ("\u0120", "ab"), ("\u0120", "c"), ("\u0120c", "d")]
"""ab, " ab", " cd": a space goes with the word behind it."""
TRAILED = [("b", "\u0120"), ("a", "b\u0120"), ("d", "\u0120"), ("c", "d\u0120")]
""" "ab ", "cd ": with the word before it."""


def bytewise(*merges, bos=False):
    """<eos> 0, a byte a token, and what the merges make of them; with <bos> before a text if asked for."""
    tokens = ["<eos>", *LETTERS, *dict.fromkeys(one + other for one, other in merges), *(["<bos>"] if bos else [])]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", len(tokens) - 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", model_input_names=["input_ids"])


def read(tokenizer, reader, text, length=32):
    return encoding.read_again(CausalLM(type="causal_lm", max_length=length), tokenizer, reader, [ID], [text]).columns


# ---------------------------------------------------------------------------------------------------------- the same places


def test_places_are_the_same_where_the_same_text_stands_before_them():
    mine = read(bytewise(*SPACED), bytewise(), "ab cd")
    # ab| cd|: after 2 and 5 characters; the bytes a, b, space, c, d and then the end, which is foretold after the fifth.
    assert bytewise().convert_ids_to_tokens(mine["input_ids"][0]) == ["a", "b", "\u0120", "c", "d", "<eos>"]
    assert mine["theirs"] == [[-1, 0, -1, -1, 1]]
    assert [mine[name] for name in ("told", "aligned", "scored", "labelled", "length", "bytes")] == [[2], [2], [5], [5], [6], [4]]
    # The other way round the two are at the second and the fifth byte.
    assert read(bytewise(), bytewise(*SPACED), "ab cd")["theirs"] == [[1, 4]]


def test_a_character_of_several_tokens_counts_at_its_last():
    whole = bytewise(("\u00c3", "\u00a9"))
    assert read(whole, bytewise(), "éa")["theirs"] == [[-1, 0, 1]]
    assert read(bytewise(), whole, "éa")["theirs"] == [[1, 2]]


def test_special_tokens_before_a_text():
    assert read(bytewise(bos=True), bytewise(bos=True), "ab")["theirs"] == [[0, 1]]  # without an end: nothing is foretold after b
    assert read(bytewise(), bytewise(bos=True), "ab")["theirs"] == [[-1, 0]]
    assert read(bytewise(bos=True), bytewise(), "ab")["theirs"] == [[1, -1]]  # the teacher's row ends with b


def test_rows_are_those_of_the_first_tokenizer():
    made = read(bytewise(*SPACED), bytewise(*TRAILED), "ab cd ab cd ab cd", 5)
    # The teacher's: ab| cd| ab| cd| ab and cd|end. "ab " reaches over the border and belongs where it ends.
    tokens = [bytewise(*TRAILED).convert_ids_to_tokens(row) for row in made["input_ids"]]
    assert tokens == [["ab\u0120", "cd\u0120", "ab\u0120", "cd\u0120"], ["ab\u0120", "c", "d", "<eos>"]]
    assert made["theirs"] == [[-1, -1, -1], [-1, -1, 0]]
    assert (made["told"], made["aligned"], made["bytes"]) == ([4, 1], [0, 1], [9, 2])
    first = encoding.encode(CausalLM(type="causal_lm", max_length=5), bytewise(*SPACED), [ID], ["ab cd ab cd ab cd"])
    assert (made["id"], made["text"]) == (first.columns["id"], first.columns["text"])


def test_a_row_of_too_many_tokens_is_cut_and_one_of_none_filled():
    task = CausalLM(type="causal_lm", max_length=4)
    made = encoding.read_again(task, bytewise(*SPACED), bytewise(), [ID], ["ab cd"])
    assert (made.columns["length"], made.columns["theirs"], made.columns["bytes"]) == ([4], [[-1, 0, -1]], [3])
    assert {key: count for key, count in made.tallies.items() if count} == {("truncated", 0): 1}
    word = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f"), ("abcd", "ef")]
    filled = read(bytewise(), bytewise(*word), "abcdef", 4)
    assert (filled["length"], filled["scored"], filled["theirs"], filled["told"]) == ([1, 2], [0, 1], [[], [1]], [3, 2])
    assert (filled["input_ids"][0], filled["bytes"]) == ([0], [0, 0])


def test_a_row_that_is_one_position_is_the_same_row():
    one, other = bytewise(*SPACED), bytewise()
    task = TextClassification(max_length=4, too_long="drop")
    texts = ["ab cd", "abab abab ab", "ab"]
    made = encoding.read_again(task, one, other, [ID[:-1] + end for end in "abc"], texts, ["x", "y", None])
    assert (made.source, made.labels) == ([0, 2], ["x", None])  # the second has more than 4 tokens of the teacher's
    assert (made.columns["length"], made.columns["text"]) == ([4, 2], ["ab cd", "ab"])
    assert {key: count for key, count in made.tallies.items() if count} == {("too_long", 1): 1, ("truncated", 0): 1}
    assert "theirs" not in encoding.fields(task, reading=True).names


# ------------------------------------------------------------------------------------------------------------------- learning

TASK = CausalLM(type="causal_lm", max_length=16, pack=False)
TEXTS = ["ab cd ab", "cd ab", "abab cd cd ab ab cd", "é ab", "cd", "ab ab ab ab ab ab ab ab ab ab ab ab ab cd"]
TARGETS = {"dense": TargetsConfig(logits=DenseLogits(dtype="float32")), "topk": TargetsConfig(logits=TopKLogits(type="topk", k=3))}


def gpt(vocabulary, seed):
    torch.manual_seed(seed)
    sizes = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, **sizes))


def table(columns, reading):
    schema = encoding.fields(TASK, reading=reading)
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)


@pytest.fixture
def world(tmp_path):
    """Storage with a corpus, its reading, a teacher and what it says; folders of the two models."""
    storage, one, other = Storage(str(tmp_path / "storage")), bytewise(*SPACED), bytewise()
    ids = [f"{i:032x}" for i in range(len(TEXTS))]
    tables = {
        "c": table(encoding.encode(TASK, one, ids, TEXTS).columns, False),
        "r": table(encoding.read_again(TASK, one, other, ids, TEXTS).columns, True),
    }
    for name, rows in tables.items():
        splits = {s: (store.write_part(storage, f"corpora/{name}", f"part-{s}", rows, 1),) for s in ("train", "validation")}
        facts = {"labels": [], **({"reads": "c"} if name == "r" else {})}
        store.commit(storage, f"corpora/{name}", store.Manifest(kind="corpus", fingerprint=name, made_from={}, splits=splits, facts=facts))
    for name, tokenizer, seed in (("teacher", one, 1), ("student", other, 2)):
        gpt(len(tokenizer), seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    fit.commit_model(storage, "teachers/t", gpt(len(one), 1), tmp_path / "teacher", TASK, (), "t", {}, {"result": {}, "history": []})
    for name, targets in TARGETS.items():
        teacher = make_teacher(gpt(len(one), 1), TASK, targets)
        said, _ = answer_part(teacher, Rows(Columns.of(tables["c"]), {}, build_task(TASK)), targets, 64, False, torch.device("cpu"))
        splits = {s: (store.write_part(storage, f"targets/{name}", f"part-{s}", said, 1),) for s in ("train", "validation")}
        facts = {"corpus": "c", "targets": targets.model_dump(mode="json"), "labels": []}
        store.commit(storage, f"targets/{name}", store.Manifest(kind="targets", fingerprint=name, made_from={}, splits=splits, facts=facts))
    return storage, tmp_path


LOSS = {"uld": UniversalLogit(type="universal_logit", weight=1.0)}


def together(storage, targets):
    rows = open_rows(storage, "corpora/r", {"teacher": f"targets/{targets}"}, "train", build_task(TASK))
    network = Network(gpt(len(bytewise()), 2), TASK).eval()
    batch = rows.batch(np.arange(len(rows)))
    return rows, network, batch, network(batch.inputs, batch.scored, batch.tokens, batch.lengths)


@pytest.mark.parametrize("targets", TARGETS)
def test_the_loss_is_that_of_the_places_that_both_have(world, targets):
    storage, _ = world
    rows, network, batch, outputs = together(storage, targets)
    count = rows.count(np.arange(len(rows)), "positions")
    _, sums = weigh(LOSS, outputs, batch, {"uld": count})
    # By hand: each row alone through both models, and the places where both have read the same characters.
    one, other, teacher, compared, value = bytewise(*SPACED), bytewise(), gpt(len(bytewise(*SPACED)), 1).eval(), 0, 0.0
    for text in TEXTS:
        sides = []
        for tokenizer, model in ((one, teacher), (other, network.model)):
            ids = [*tokenizer(text)["input_ids"], 0][: TASK.max_length]
            said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids) - 1)]
            known = [not tokenizer.decode(ids[: i + 1]).endswith("\ufffd") for i in range(len(ids) - 1)]
            sides.append({end: said[i] for i, (end, whole) in enumerate(zip(ends, known, strict=True)) if whole})
        for end in sides[0].keys() & sides[1].keys():
            compared += 1
            q, p = sides[1][end][None], sides[0][end][None]
            if targets == "dense":
                value += divergences.universal_logit(q, p).item()
            else:
                p, q = p.exp().sort(descending=True).values[0], q.exp().sort(descending=True).values[0]
                value += ((p[:3] - q[:3]).abs().sum() + (p[3:].sum() - q[3:].sum()).abs()).item()
    assert (count, int(batch.signal.known.sum())) == (compared, compared)
    assert sums["uld"].item() == pytest.approx(value, rel=2e-3 if targets == "topk" else 1e-5)
    assert 0 < gradient_squares(LOSS, outputs, batch, {"uld": count})["uld"].item() < math.inf


def test_the_gradient_does_not_depend_on_the_cut(world):
    storage, _ = world
    rows, network, batch, outputs = together(storage, "topk")
    count = rows.count(np.arange(len(rows)), "positions")
    whole, _ = weigh(LOSS, outputs, batch, {"uld": count})
    expected = torch.autograd.grad(whole, list(network.parameters()))
    found = [torch.zeros_like(p) for p in network.parameters()]
    for piece in (np.array([0, 3]), np.array([5]), np.array([1, 2, 4])):
        part = rows.batch(piece)
        share, _ = weigh(LOSS, network(part.inputs, part.scored, part.tokens, part.lengths), part, {"uld": count})
        for mine, new in zip(found, torch.autograd.grad(share, list(network.parameters())), strict=True):
            mine += new
    for mine, its in zip(found, expected, strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-6)


def settings(storage, folder, **changes):
    training = TrainingConfig(steps=30, batch_tokens=128, learning_rate=1e-2, log_every=1, checkpoint_every=0, precision="fp32")
    values = {
        "name": "s", "task": TASK, "labels": (), "student": PretrainedStudent(type="pretrained", model=str(folder / "student")),
        "losses": {"hard": CrossEntropy(type="cross_entropy", weight=0.5), **LOSS}, "training": training, "storage": storage.uri,
        "corpus": "corpora/r", "targets": {"teacher": "targets/topk"}, "teacher": "teachers/t", "output": "students/s", "fingerprint": "s",
    }  # fmt: skip
    return FitConfig(**{**values, **changes})


def test_a_student_learns_in_its_own_tokens_and_keeps_its_tokenizer(world):
    storage, folder = world
    session = LocalSession()
    result = fit.train(settings(storage, folder, losses=LOSS), session, {})
    curve = [metrics["train/loss/uld"] for _, metrics in session.history if "train/loss/uld" in metrics]
    assert curve[-1] < 0.7 * curve[0]
    assert result["validation/bits_per_byte"] > 0
    assert not {"validation/agreement", "validation/kl_to_teacher"} & set(result)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(fit.model_folder(storage, "students/s")).get_vocab() == bytewise().get_vocab()


def test_the_corpus_itself_is_refused_for_it(world):
    storage, folder = world
    with pytest.raises(InputError, match="DST-3212"):
        fit.train(settings(storage, folder, corpus="corpora/c"), LocalSession(), {})
    manifest = store.find(storage, "targets/dense")
    facts = {**manifest.facts, "corpus": "c2"}
    store.commit(storage, "targets/other", manifest.model_copy(update={"facts": facts, "splits": {}}))
    with pytest.raises(InputError, match=r"DST-3110.*expected c but found c2"):
        open_rows(storage, "corpora/r", {"teacher": "targets/other"}, "train", build_task(TASK))


def test_models_of_different_tokens_are_compared_by_bits_per_byte(world):
    storage, folder = world
    corpus, reading = (Columns([storage.fetch(f"corpora/{name}/part-train.arrow")]) for name in ("c", "r"))
    models_ = [Candidate("teacher", "t", folder / "teacher"), Candidate("student", "s", folder / "student", None, reading)]
    teacher, student = evaluate(models_, corpus, TASK, (), precision="fp32", repeats=10)
    for e, model, columns in ((teacher, gpt(len(bytewise(*SPACED)), 1), corpus), (student, gpt(len(bytewise()), 2), reading)):
        nats = 0.0
        for ids in columns.ragged("input_ids", np.arange(len(columns))):
            ids = torch.tensor(ids.tolist())[None]
            nats -= model.eval()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        assert (e.headline, e.better) == ("bits_per_byte", "min")
        assert e.quality["bits_per_byte"] == pytest.approx(nats / math.log(2) / columns.whole("bytes").sum(), rel=1e-5)
    assert student.against["retention"] == pytest.approx(teacher.quality["bits_per_byte"] / student.quality["bits_per_byte"])
    assert "agreement" not in student.against
    assert (student.positions, teacher.positions) == (reading.whole("scored").sum(), corpus.whole("scored").sum())
