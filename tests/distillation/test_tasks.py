"""How rows become a batch and answers become a score, by hand, for every task."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from torch import nn

from distillation import signals
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
from distillation.network import Network
from distillation.signals import UNLABELLED, Outputs, TeacherSignal
from distillation.tasks import TASKS, build_task, pack, spans

X = UNLABELLED


def ints(*values):
    return np.array(values, np.int32)


def columns(*rows, **more):
    return {"length": ints(*(len(row) for row in rows)), "input_ids": [ints(*row) for row in rows], **more}


def collated(config, found, labels=("a", "b", "c"), signal=None, **knobs):
    task = build_task(config, 9, labels, **knobs)
    return task, task.collate([f"r{i}" for i in range(len(found["length"]))], found, {"teacher": signal} if signal else {})


def lists(batch):
    return [batch.scored.tolist(), batch.positions.tolist(), batch.tokens.tolist(), batch.lengths.tolist()]


# ----------------------------------------------------------------------------------------------------------------- collate


def test_collate_of_texts():
    found = columns([2, 5, 3], [2, 5, 6, 7, 3], label=ints(1, -1), token_type_ids=[ints(0, 0, 1), ints(0, 1, 1, 1, 1)])
    _, batch = collated(TextClassification(), found)
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 3, 9, 9], [2, 5, 6, 7, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert all(value.dtype == torch.int64 for value in batch.inputs.values())
    assert lists(batch) == [[0, 5], [1, 1], [0, 1, 2, 5, 6, 7, 8, 9], [3, 5]]
    assert (batch.labels.tolist(), batch.labelled.tolist(), batch.row_of.tolist()) == ([1, X], [True, False], [0, 1])
    _, last = collated(TextClassification(), found, last=True)
    assert last.scored.tolist() == [2, 9]


def test_collate_of_several_labels_and_of_numbers():
    many = columns([2, 3], [2, 3], [2, 3], labels=[ints(0, 2), ints(), ints()], labelled=ints(1, 1, 0))
    _, batch = collated(MultiLabel(type="multi_label"), many)
    assert batch.labels[:2].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert batch.labels[2].isnan().all()
    assert batch.labelled.tolist() == [True, True, False]
    _, batch = collated(Regression(type="regression"), columns([2, 3], [2, 3], label=np.array([1.5, np.nan])), ())
    assert batch.labels.dtype == torch.float32
    assert batch.labelled.tolist() == [True, False]


def test_collate_of_words():
    found = columns([2, 5, 6, 3], [2, 7, 3], places=[ints(1, 2), ints(1)], labels=[ints(0, -1), ints(2)])
    _, batch = collated(TokenClassification(type="token_classification"), found)
    assert lists(batch) == [[1, 2, 5], [2, 1], [0, 1, 2, 3, 4, 5, 6], [4, 3]]
    assert (batch.labels.tolist(), batch.row_of.tolist()) == ([0, X, 2], [0, 0, 1])
    _, masked = collated(MaskedLM(type="masked_lm"), columns([2, 5, 6, 3], [2, 7, 3], places=[ints(2), ints()], labels=[ints(8), ints()]))
    assert lists(masked)[:2] == [[2], [1, 0]]
    assert masked.labels.tolist() == [8]


def test_collate_of_a_language_model_packed_and_not():
    found = columns([4, 5, 6], [7], [8, 7], [1, 2, 3, 4], bytes=ints(10, 2, 3, 9))
    _, plain = collated(CausalLM(type="causal_lm", max_length=6, pack=False), found)
    assert plain.inputs["input_ids"].tolist() == [[4, 5, 6, 9], [7, 9, 9, 9], [8, 7, 9, 9], [1, 2, 3, 4]]
    assert lists(plain) == [[0, 1, 8, 12, 13, 14], [2, 0, 1, 3], [0, 1, 2, 4, 8, 9, 12, 13, 14, 15], [3, 1, 2, 4]]
    _, packed = collated(CausalLM(type="causal_lm", max_length=6), found)
    assert packed.inputs["input_ids"].tolist() == [[4, 5, 6, 7, 8, 7], [1, 2, 3, 4, 9, 9]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 0]]
    assert "attention_mask" not in packed.inputs
    assert lists(packed) == [[0, 1, 4, 6, 7, 8], [2, 0, 1, 3], list(range(10)), [3, 1, 2, 4]]
    assert packed.labels.tolist() == plain.labels.tolist() == [5, 6, 7, 2, 3, 4]
    assert packed.bytes.tolist() == [10, 2, 3, 9]


def test_collate_of_images_and_of_embeddings():
    config = ImageClassification(type="image_classification", size=4, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[1, 2, 3] = (255, 51, 102)
    _, batch = collated(config, {"length": ints(1, 1), "pixels": [one.reshape(-1) for one in pixels], "label": ints(2, -1)})
    values = batch.inputs["pixel_values"]
    assert values.shape == (2, 3, 4, 4)
    assert values[1, :, 2, 3].tolist() == pytest.approx([1.0, (0.2 - 0.5) / 0.5, (0.4 - 1) / 2])
    assert values[0, :, 0, 0].tolist() == pytest.approx([0, -1, -0.5])
    assert lists(batch) == [[0, 1], [1, 1], [0, 1], [1, 1]]
    grey = ImageClassification(type="image_classification", size=4, channels=1)
    _, batch = collated(grey, {"length": ints(1), "pixels": [np.full(16, 255, np.uint8)], "label": ints(0)})
    assert batch.inputs["pixel_values"].unique().tolist() == [1.0]
    _, batch = collated(Embedding(type="embedding"), columns([2, 5, 3], [2, 3], label=ints(-1, 4)))
    assert (batch.labels.tolist(), batch.scored.tolist()) == ([X, 4], [0, 3])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(12, 40))
def test_packing_keeps_rows_whole_in_order_and_apart(lengths, width):
    found, places = pack(np.array(lengths), width)
    assert found == width
    ends = places + lengths
    assert (places // width == (ends - 1) // width).all()
    assert (places[1:] >= ends[:-1]).all()
    for i in range(1, len(lengths)):  # a new sequence only where a row would not fit beside the one before it
        assert places[i] == ends[i - 1] or (places[i] % width == 0 and ends[i - 1] % width + lengths[i] > width)


SIZES = {"vocab_size": 40, "initializer_range": 0.5}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request):
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SIZES)
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **SIZES)).eval()


@pytest.mark.parametrize("lengths", [(3, 4, 1, 2, 7, 6), (1, 1, 1, 8), (2, 2, 2, 2, 2, 2, 2), (8, 8), (5,)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(decoder, lengths, attention):
    decoder.set_attn_implementation(attention)
    generator = np.random.default_rng(0)
    found = columns(*(generator.integers(4, 40, n).tolist() for n in lengths))
    said, hidden = [], []
    for packed in (True, False):
        config = CausalLM(type="causal_lm", max_length=8, pack=packed)
        _, batch = collated(config, found)
        with torch.no_grad():
            outputs = Network(decoder, config, layers=(0, 1), at="tokens")(batch.inputs, batch.scored, batch.tokens, batch.lengths)
            said.append(outputs.logits_of(slice(None)))
        hidden.append(outputs.hidden)
    alone = []
    for row in found["input_ids"]:
        with torch.no_grad():
            alone.append(decoder(input_ids=torch.from_numpy(row).long()[None]).logits[0, :-1])
    for logits in said:
        assert (logits - torch.cat(alone)).abs().max() < 1e-5
    assert torch.allclose(hidden[0], hidden[1], rtol=1e-5, atol=5e-5)  # of values around 20


def test_a_change_in_one_packed_row_changes_no_other(decoder):
    config = CausalLM(type="causal_lm", max_length=8)
    said = []
    for first in (5, 6):
        _, batch = collated(config, columns([first, first, first], [7, 8, 9, 10]))
        with torch.no_grad():
            outputs = Network(decoder, config)(batch.inputs, batch.scored, batch.tokens, batch.lengths)
            said.append(outputs.logits_of(slice(None)))
    assert not torch.allclose(said[0][:2], said[1][:2], atol=0.1)
    assert (said[0][2:] - said[1][2:]).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------- statistics


def scored_by(batch, logits, task):
    """Metrics of these logits; made from states piece by piece if the task does so."""
    if task.lazy:
        head = nn.Linear(logits.shape[1], logits.shape[1], bias=False)
        with torch.no_grad():
            head.weight.copy_(torch.eye(logits.shape[1]))
            return task.statistics(Outputs(states=logits, head=head), batch)
    return task.statistics(Outputs(logits), batch)


def test_classes_by_hand():
    log = math.log
    signal = TeacherSignal(logits=torch.tensor([[0.0, log(3.0)], [0.0, 0.0], [5.0, 5.0]]))
    task, batch = collated(TextClassification(), columns([2], [2], [2], label=ints(1, 0, -1)), ("a", "b"), signal)
    sums = scored_by(batch, torch.tensor([[0.0, 0.0], [log(3.0), 0.0], [0.0, log(7.0)]]), task)
    kl = [0.25 * log(0.5) + 0.75 * log(1.5), 0.5 * log(2 / 3) + 0.5 * log(2), 0.5 * log(4) + 0.5 * log(4 / 7)]
    # labelled, right (a tie goes to the first), -log q, answered, agreeing, KL to the teacher
    expected = [[1, 0, log(2), 1, 0, kl[0]], [1, 1, log(4 / 3), 1, 1, kl[1]], [0, 0, 0, 1, 0, kl[2]]]
    assert sums.dtype == torch.float64
    assert sums.numpy() == pytest.approx(np.array(expected), abs=1e-6)
    scores = task.scores(sums.sum(0).numpy())
    assert list(scores) == ["accuracy", "nll", "agreement", "kl_to_teacher"]
    assert scores == pytest.approx({"accuracy": 0.5, "nll": (log(2) + log(4 / 3)) / 2, "agreement": 1 / 3, "kl_to_teacher": sum(kl) / 3})
    nobody, batch = collated(TextClassification(), columns([2], label=ints(-1)), ("a", "b"))
    assert nobody.scores(scored_by(batch, torch.zeros(1, 2), nobody).sum(0).numpy()) == {}


@pytest.mark.parametrize("chunk", [1, 90, 1 << 22])
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(chunk, monkeypatch):
    monkeypatch.setattr(signals, "CHUNK_VALUES", chunk)
    found = columns([4, 5, 6], [7], [8, 7], bytes=ints(4, 0, 2))
    task, batch = collated(CausalLM(type="causal_lm", max_length=6), found, ())
    sums = scored_by(batch, torch.zeros(3, 40), task)
    assert sums[:, [0, 6]].tolist() == [[2, 4], [0, 0], [1, 2]]
    scores = task.scores(sums.sum(0).numpy())
    assert next(iter(scores)) == task.headline == "perplexity"
    assert task.better == "min"
    assert scores["perplexity"] == pytest.approx(40)
    assert scores["bits_per_byte"] == pytest.approx(3 * math.log2(40) / 6)
    assert "agreement" not in scores
    task, batch = collated(MaskedLM(type="masked_lm"), columns([2, 5], [2, 7], places=[ints(1), ints()], labels=[ints(8), ints()]), ())
    scores = task.scores(scored_by(batch, torch.zeros(1, 40), task).sum(0).numpy())
    assert scores == pytest.approx({"perplexity": 40, "accuracy": 0.0, "nll": math.log(40)})


def test_top_k_answers_are_agreed_with_and_their_kl_is_of_buckets():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
    signal = TeacherSignal(ids=torch.tensor([[0, 1]]), log_p=p[:, :2].log(), label_log_p=torch.zeros(1))
    task, batch = collated(CausalLM(type="causal_lm", max_length=4), columns([1, 0]), (), signal)
    scores = task.scores(scored_by(batch, torch.zeros(1, 4), task).sum(0).numpy())
    assert scores["kl_to_teacher"] == pytest.approx(0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4))
    assert (scores["agreement"], scores["accuracy"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()), ("", set()), ("B-P", {("P", 0, 1)}), ("B-P I-P O", {("P", 0, 2)}), ("O B-P I-P", {("P", 1, 3)}),
        ("B-P B-P", {("P", 0, 1), ("P", 1, 2)}), ("B-P I-L", {("P", 0, 1), ("L", 1, 2)}), ("I-P I-P", {("P", 0, 2)}),
        ("O I-P I-L I-L", {("P", 1, 2), ("L", 2, 4)}), ("B-P I-P B-P I-P", {("P", 0, 2), ("P", 2, 4)}), ("B-P O I-P", {("P", 0, 1), ("P", 2, 3)}),
        ("noun verb verb O", {("noun", 0, 1), ("verb", 1, 2), ("verb", 2, 3)}), ("I-P B-P", {("P", 0, 1), ("P", 1, 2)}),
    ],
)  # fmt: skip
def test_entities_of_tags(tags, expected):
    assert spans(tags.split()) == expected


def test_entities_are_counted_whole():
    names = ("O", "B-P", "I-P", "B-L", "I-L")
    truth = [ints(1, 2, 0), ints(3, 0), ints(-1, -1)]
    found = columns(*([2] * (len(row) + 1) for row in truth), places=[np.arange(len(row), dtype=np.int32) for row in truth], labels=truth)
    task, batch = collated(TokenClassification(type="token_classification"), found, names)
    answers = [1, 2, 0, 3, 4, 1, 1]  # the first right; the second too long; an unlabelled row is not judged
    sums = scored_by(batch, 5 * torch.eye(5)[answers], task)
    assert sums[:, 6:].tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert sums[:, :2].tolist() == [[3, 3], [2, 1], [0, 0]]
    scores = task.scores(sums.sum(0).numpy())
    assert next(iter(scores)) == task.headline == "f1"
    assert (scores["f1"], scores["accuracy"]) == (pytest.approx(2 * 1 / 4), pytest.approx(4 / 5))
    empty = scored_by(batch, 5 * torch.eye(5)[[0] * 7], task)
    assert task.scores(empty.sum(0).numpy())["f1"] == 0.0


def test_several_labels_by_hand():
    found = columns([2], [2], [2], labels=[ints(0, 1), ints(2), ints()], labelled=ints(1, 1, 0))
    signal = TeacherSignal(logits=torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    task, batch = collated(MultiLabel(type="multi_label"), found, signal=signal)
    logits = torch.tensor([[2.0, 2.0, -2.0], [2.0, -2.0, -2.0], [2.0, 2.0, 2.0]])
    sums = scored_by(batch, logits, task)
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert sums[:, :6].numpy() == pytest.approx(
        np.array([[1, 1, 3 * right, 2, 2, 2], [1, 0, 2 * wrong + right, 1, 1, 0], [0] * 6]), abs=1e-6
    )
    assert sums[:, 7].tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])

    def kl(t, s):
        p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert sums[:, 8].tolist() == pytest.approx([kl(1, 2) + kl(-1, 2) + kl(-1, -2), 3 * kl(0, 2), 3 * kl(1, 2)], rel=1e-5)
    scores = task.scores(sums.sum(0).numpy())
    assert scores["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["exact_match"] == 0.5


def test_numbers_by_hand():
    generator = np.random.default_rng(0)
    y, x = generator.normal(3, 2, 40), generator.normal(3, 2, 40)
    y[7] = np.nan
    signal = TeacherSignal(logits=torch.from_numpy(x[:, None] + 2))
    task, batch = collated(Regression(type="regression"), columns(*([2],) * 40, label=y), (), signal)
    sums = scored_by(batch, torch.from_numpy(x[:, None]).float(), task)
    scores, known = task.scores(sums.sum(0).numpy()), ~np.isnan(y)
    assert scores["pearson"] == pytest.approx(pearsonr(x[known], y[known]).statistic, rel=1e-5)
    assert scores["mse"] == pytest.approx(((x - y)[known] ** 2).mean(), rel=1e-5)
    assert scores["mae"] == pytest.approx(np.abs(x - y)[known].mean(), rel=1e-5)
    assert scores["mse_to_teacher"] == pytest.approx(4, rel=1e-5)
    assert "pearson" not in task.scores(sums[:1].sum(0).numpy())  # of one row there is none


def test_vectors_by_hand():
    signal = TeacherSignal(pooled=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    task, batch = collated(Embedding(type="embedding"), columns([2, 3], [2, 3], label=ints(0, 1)), signal=signal)
    sums = task.statistics(Outputs(pooled=torch.tensor([[2.0, 0.0], [3.0, 4.0]])), batch)
    assert sums.numpy() == pytest.approx(np.array([[1, 1, 0.5], [1, 0.8, (9 + 9) / 2]]))
    assert task.scores(sums.sum(0).numpy()) == pytest.approx({"cosine": 0.9, "mse_to_teacher": 4.75})
    wide = Outputs(pooled=torch.zeros(2, 3), near=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert task.scores(task.statistics(wide, batch).sum(0).numpy()) == pytest.approx({"cosine": 1.0, "mse_to_teacher": 0.0})
    assert task.scores(task.statistics(Outputs(pooled=torch.zeros(2, 3)), batch).sum(0).numpy()) == {}


EXAMPLES = {
    "text_classification": (TextClassification(), columns([2, 3], [2, 4, 3], label=ints(0, 1)), 3),
    "multi_label": (MultiLabel(type="multi_label"), columns([2, 3], [2, 4, 3], labels=[ints(0), ints(1, 2)], labelled=ints(1, 1)), 3),
    "regression": (Regression(type="regression"), columns([2, 3], [2, 4, 3], label=np.array([1.0, 2.0])), 1),
    "token_classification": (
        TokenClassification(type="token_classification"), columns([2, 3], [2, 4, 3], places=[ints(0), ints(0, 1)], labels=[ints(0), ints(1, 2)]), 3
    ),
    "causal_lm": (CausalLM(type="causal_lm", max_length=4), columns([2, 3], [2, 4, 3], bytes=ints(2, 3)), 9),
    "masked_lm": (MaskedLM(type="masked_lm"), columns([2, 3], [2, 4, 3], places=[ints(0), ints(0, 1)], labels=[ints(0), ints(1, 2)]), 9),
    "image_classification": (
        ImageClassification(type="image_classification", size=4),
        {"length": ints(1, 1), "pixels": [np.zeros(48, np.uint8)] * 2, "label": ints(0, 1)}, 3,
    ),
    "embedding": (Embedding(type="embedding"), columns([2, 3], [2, 4, 3], label=ints(0, 1)), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TASKS))
def test_sums_that_are_not_finite_stay_so_and_batches_add_up(name):
    config, found, classes = EXAMPLES[name]
    n = int({"token_classification": 3, "causal_lm": 3, "masked_lm": 3}.get(name, 2))
    logits = torch.randn(n, classes, generator=torch.Generator().manual_seed(0))
    signal = TeacherSignal(pooled=logits + 1) if name == "embedding" else TeacherSignal(logits=logits + 1)
    task, batch = collated(config, found, signal=signal)

    def sums(values):
        return task.statistics(Outputs(pooled=values), batch) if name == "embedding" else scored_by(batch, values, task)

    whole = sums(logits)
    assert whole.shape == (2, len(task.names))
    with np.errstate(all="ignore"):
        each = task.metrics(whole.numpy())
    assert set(task.scores(whole.sum(0).numpy())) == set(each)
    assert task.headline == next(iter(each))
    assert {len(value) for value in each.values()} == {2}  # of every row at once
    broken = logits.clone()
    broken[0, 0] = torch.nan
    scores = task.scores(sums(broken).sum(0).numpy())
    assert any(math.isnan(value) for value in scores.values()), "a broken model is not passed over in silence"
    assert hasattr(transformers, TASKS[name].auto)


def test_every_task_has_an_example_here():
    assert set(EXAMPLES) == set(TASKS)
