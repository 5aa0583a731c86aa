"""Store and live teacher say the same, whatever is kept; and what is kept of a distribution is true to it."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from distillation import divergences, signals, store
from distillation.answers import answer_part, bytes_per_position, make_teacher
from distillation.columns import Columns
from distillation.config import (
    CausalLM,
    DenseLogits,
    Embedding,
    Features,
    LossConfig,
    SampledLogits,
    TargetsConfig,
    TextClassification,
    TopKLogits,
)
from distillation.errors import InputError
from distillation.losses import unit_of, weigh
from distillation.network import Network, compress, draw, observe
from distillation.rows import Rows, Targets
from distillation.signals import UNLABELLED, Batch, Outputs
from distillation.storage import Storage
from distillation.tasks import build_task
from tests.tiny import bert

CPU = torch.device("cpu")
WORDS = CausalLM(type="causal_lm", max_length=12)
VOCABULARY = 40


def loss(type_, **knobs):
    return TypeAdapter(LossConfig).validate_python({"type": type_, **knobs})


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def written(folder, lengths, words=True, **more):
    """A part of a corpus, as the cluster writes it, in columns."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(4, VOCABULARY, n).astype(np.int32) for n in lengths]
    scored = [n - 1 for n in lengths] if words else [1] * len(lengths)
    labels = {} if words else {"label": pa.array([i % 3 if i % 4 else -1 for i in range(len(lengths))], pa.int32())}
    table = pa.table({
        "id": [f"r{i:02}" for i in range(len(lengths))], "text": [""] * len(lengths), "length": pa.array(lengths, pa.int32()),
        "scored": pa.array(scored, pa.int32()), "labelled": pa.array(scored, pa.int32()), "input_ids": pa.array(ids, pa.list_(pa.int32())), **labels,
    })  # fmt: skip
    storage = Storage(str(folder))
    record = store.write_part(storage, "c", "part", table, sum(lengths))
    return storage, Columns([storage.fetch(f"c/{record.name}")])


def kept(storage, model, rows, config, name="t", tokens=40):
    """The teacher's answers, into a part and back: what the store says about any rows."""
    table, told = answer_part(make_teacher(model, rows.task.config, config), rows, config, tokens, False, CPU)
    record = store.write_part(storage, name, "part", table, 0)
    return Targets(Columns([storage.fetch(f"{name}/{record.name}")]), config), table, told


LENGTHS = [5, 3, 12, 1, 7, 2, 4, 9, 1, 6]
EVERYTHING = Features(layers=(0, 1), at="tokens", pooled=True, relations=1, dtype="float32")
KINDS = {
    "dense fp16": (TargetsConfig(logits=DenseLogits(), features=EVERYTHING), 2e-3),
    "dense fp32": (TargetsConfig(logits=DenseLogits(dtype="float32"), features=Features(layers=(1,), pooled=True, dtype="float32")), 1e-5),
    "topk fp16": (TargetsConfig(logits=TopKLogits(type="topk", k=6, temperatures=(1, 2)), features=EVERYTHING), 5e-3),
    "topk fp32": (TargetsConfig(logits=TopKLogits(type="topk", k=6, temperatures=(2, 0.5), dtype="float32")), 1e-5),
    "topk uint8": (TargetsConfig(logits=TopKLogits(type="topk", k=6, temperatures=(1, 2), dtype="uint8")), 0.07),
    "topk of all": (TargetsConfig(logits=TopKLogits(type="topk", k=64, temperatures=(1, 2), dtype="float32")), 1e-5),
    "sampled": (TargetsConfig(logits=SampledLogits(type="sampled", draws=30, temperature=2.0)), 1e-6),
    "sampled often": (TargetsConfig(logits=SampledLogits(type="sampled", draws=300, temperature=2.0)), 1e-6),
    "features alone": (TargetsConfig(logits=None, features=EVERYTHING.model_copy(update={"dtype": "float16"})), 2e-3),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_store_says_what_a_live_teacher_says(kind, decoder, tmp_path):
    config, precision = KINDS[kind]
    storage, corpus = written(tmp_path, LENGTHS)
    rows = Rows(corpus, {}, build_task(WORDS))
    targets, _, _ = kept(storage, decoder, rows, config)
    teacher = make_teacher(decoder, WORDS, config)
    for some in (
        np.arange(10),
        np.array([7, 2, 0]),
        np.array([3]),
        np.array([8, 3, 4]),
    ):  # in any order, packed as it comes; also without words
        batch = Rows(corpus, {"teacher": targets}, build_task(WORDS)).batch(some)
        live, stored = observe(teacher, batch, False, config.logits, config.features), batch.signal
        assert (live.layers, live.temperatures) == (stored.layers, stored.temperatures)
        for each in fields(live):
            mine, its = getattr(stored, each.name), getattr(live, each.name)
            if isinstance(its, tuple) and its and isinstance(its[0], torch.Tensor):
                mine, its = torch.cat(mine, -1), torch.cat(its, -1)
            if not isinstance(its, torch.Tensor):
                assert mine is its or mine == its, each.name
            elif each.name == "ids":
                assert mine.dtype == torch.int64
                assert torch.equal(mine, its)
            else:
                assert mine.shape == its.shape, each.name
                half = each.name == "label_log_p" or "16" in kind or "alone" in kind  # the label's is always kept in 16 bits
                allowed = 5e-3 if half else precision if each.name != "log_p" or "uint8" not in kind else 1 / 16 + 1e-6
                floor = its.clamp(min=-255 / 8) if each.name == "log_p" and "uint8" in kind else its
                assert torch.allclose(mine.float(), floor.float(), rtol=1e-3 if half else 1e-5, atol=allowed), each.name


TERMS = {
    "dense fp16": {"a": loss("forward_kl"), "b": loss("logit_mse"), "c": loss("hidden_mse", layers={0: 1, 1: 0}), "d": loss("cosine")},
    "dense fp32": {"a": loss("reverse_kl"), "b": loss("standardised_kl"), "c": loss("decoupled_kd")},
    "topk fp16": {"a": loss("forward_kl"), "b": loss("reverse_kl", temperature=1), "c": loss("jsd"), "h": loss("pkd", layers={0: 1})},
    "topk fp32": {"a": loss("forward_kl"), "b": loss("skewed_kl", temperature=0.5), "c": loss("adaptive_kl"), "d": loss("total_variation")},
    "topk uint8": {"a": loss("forward_kl"), "b": loss("reverse_kl", temperature=1)},
    "sampled": {"a": loss("forward_kl")},
    "sampled often": {"a": loss("forward_kl")},
    "features alone": {"c": loss("hidden_mse", layers={0: 1}), "d": loss("cosine"), "hard": loss("cross_entropy")},
}


@pytest.mark.parametrize("kind", sorted(TERMS))
def test_gradients_from_the_store_are_those_from_a_live_teacher(kind, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "CHUNK_VALUES", 7 * VOCABULARY)
    (config, _), terms = KINDS[kind], TERMS[kind]
    storage, corpus = written(tmp_path, LENGTHS)
    rows = Rows(corpus, {}, build_task(WORDS))
    targets, _, _ = kept(storage, decoder, rows, config)
    batch = Rows(corpus, {"teacher": targets}, build_task(WORDS)).batch(np.arange(10))
    at = config.features.at if config.features else "scored"
    student = Network(transformers.GPT2LMHeadModel(decoder.config), WORDS, layers=(0, 1), at=at, pooled=True).eval()
    counts = {name: rows.count(np.arange(10), unit_of(term, at)) for name, term in terms.items()}
    live = observe(make_teacher(decoder, WORDS, config), batch, False, config.logits, config.features)

    def gradient(signal):
        student.zero_grad()
        one = replace(batch, signals={"teacher": signal})
        weigh(terms, student(one.inputs, one.scored, one.tokens, one.lengths), one, counts)[0].backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    ours, its = gradient(batch.signal), gradient(live)
    assert its.norm() > 1e-2
    assert (ours - its).norm() / its.norm() < {"topk uint8": 0.1, "dense fp32": 1e-5, "topk fp32": 1e-5}.get(kind, 2e-3)


@pytest.mark.parametrize("at", ["scored", "tokens"])
def test_a_classifier_is_stored_row_by_row(at, tmp_path):
    model, task = bert(layers=3).eval(), TextClassification()
    config = TargetsConfig(
        logits=DenseLogits(dtype="float32"), features=Features(layers=(0, 2), at=at, pooled=True, relations=1, dtype="float32")
    )
    storage, corpus = written(tmp_path, LENGTHS, words=False)
    rows = Rows(corpus, {}, build_task(task, 0, ("a", "b", "c")))
    targets, table, _ = kept(storage, model, rows, config)
    assert str(table.schema.field("logits").type) == "fixed_size_list<item: float>[3]"
    assert pa.types.is_list(table.schema.field("hidden_2").type) == (at == "tokens")
    some = np.array([4, 0, 9])
    batch = Rows(corpus, {"teacher": targets}, rows.task).batch(some)
    live, stored = observe(make_teacher(model, task, config), batch, False, config.logits, config.features), batch.signal
    assert stored.hidden.shape == ((3 if at == "scored" else 18), 2, 16)
    for mine, its in (
        (stored.logits, live.logits),
        (stored.hidden, live.hidden),
        (stored.pooled, live.pooled),
        *zip(stored.relations, live.relations, strict=True),
    ):
        assert torch.allclose(mine, its, atol=1e-5)


def test_embeddings_are_stored_as_they_are(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model, task = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).eval(), Embedding(type="embedding")
    storage, corpus = written(tmp_path, LENGTHS, words=False)
    rows = Rows(corpus, {}, build_task(task))
    config = TargetsConfig(features=Features(pooled=True, dtype="float32"))
    targets, table, told = kept(storage, model, rows, config)
    assert (table.schema.names, told) == (["id", "pooled"], {})
    batch = Rows(corpus, {"teacher": targets}, rows.task).batch(np.arange(10))
    assert torch.allclose(
        batch.signal.pooled, observe(make_teacher(model, task, config), batch, False, None, config.features).pooled, atol=1e-6
    )


def test_parts_have_one_schema_whatever_their_rows_are(decoder, tmp_path):
    """Rows of two tokens have one scored position each: the part could be mistaken for one of a classifier."""
    config = TargetsConfig(logits=TopKLogits(type="topk", k=4))
    found = []
    for number, lengths in enumerate(([2, 2, 2], [5, 1, 3], [1])):
        storage, corpus = written(tmp_path / str(number), lengths)
        found.append(kept(storage, decoder, Rows(corpus, {}, build_task(WORDS)), config)[1].schema)
    assert found[0] == found[1] == found[2]


def test_what_is_left_out_is_told(decoder, tmp_path):
    storage, corpus = written(tmp_path, LENGTHS)
    rows = Rows(corpus, {}, build_task(WORDS))
    batch = rows.batch(np.arange(10))
    dense = observe(make_teacher(decoder, WORDS, TargetsConfig(logits=DenseLogits())), batch, False, DenseLogits(), None).logits
    p = dense.double().softmax(-1).sort(-1, descending=True).values
    _, _, told = kept(storage, decoder, rows, TargetsConfig(logits=TopKLogits(type="topk", k=3)))
    missing = 1 - p[:, :3].sum(-1)
    assert told["teacher/missing_mass"] == pytest.approx(float(missing.mean()), abs=1e-6)
    assert told["teacher/missing_mass_max"] == pytest.approx(float(missing.max()), abs=1e-6)
    assert kept(storage, decoder, rows, TargetsConfig(logits=TopKLogits(type="topk", k=40)), "u")[2][
        "teacher/missing_mass"
    ] == pytest.approx(0, abs=1e-6)


def test_an_answer_that_is_not_finite_is_refused_with_its_row(tmp_path):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    storage, corpus = written(tmp_path, [5, 3, 7])
    rows = Rows(corpus, {}, build_task(WORDS.model_copy(update={"pack": False})))
    kept(storage, model, rows, TargetsConfig(logits=TopKLogits(type="topk", k=3)), tokens=7)
    model.transformer.wpe.weight.data[5] = torch.nan  # only the longest row comes so far
    with pytest.raises(InputError, match=r"DST-3301.*row r02, (ids|log_p|label_log_p)"):
        kept(storage, model, rows, TargetsConfig(logits=TopKLogits(type="topk", k=3)), tokens=7)


# ------------------------------------------------------------------------------------------------------ what is kept of classes


def rows_of(labels):
    one = torch.ones(len(labels), dtype=torch.int64)
    return Batch([f"r{i}" for i in range(len(labels))], {}, one, one, one, one, torch.tensor(labels))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.01, 1.0, 5.0, 40.0]))
def test_top_k_is_exact_at_its_temperatures(seed, k, scale):
    generator = torch.Generator().manual_seed(seed)
    t, s = scale * torch.randn(5, 40, generator=generator), torch.randn(5, 40, generator=generator)
    config = TopKLogits(type="topk", k=k, temperatures=(1.0, 2.0, 7.5, 0.3))
    said = compress(t, rows_of([1, UNLABELLED, 39, 0, 5]), config, torch.zeros(0))
    signal = signals.TeacherSignal(**said, temperatures=config.stored_temperatures)
    assert config.stored_temperatures == (2.0, 7.5, 0.3)
    assert signal.label_log_p.tolist() == pytest.approx(
        [0.0 if y < 0 else t[i].log_softmax(-1)[y].item() for i, y in enumerate((1, -1, 39, 0, 5))]
    )
    for temperature in config.temperatures:
        log_q, log_p = signal.pair(s, temperature)
        for mine, logits in ((log_q, s), (log_p, t)):
            p = (logits.double() / temperature).softmax(-1)
            kept_ = p.gather(-1, signal.ids)
            merged = torch.cat([kept_, 1 - kept_.sum(-1, keepdim=True)], -1)
            assert torch.allclose(mine.double().exp(), merged, atol=1e-5)
        whole = divergences.forward_kl(divergences.soften(s, temperature), divergences.soften(t, temperature))
        assert (divergences.forward_kl(log_q, log_p) <= whole + 1e-4).all()  # merging classes never adds
        if k == 40:
            assert torch.allclose(divergences.forward_kl(log_q, log_p), whole, rtol=1e-3, atol=1e-4)


def test_draws_are_unbiased_and_merged():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.009, 0.001], [1 / 6] * 6])
    draws, times = 7, 20000
    starts = torch.from_numpy(np.random.default_rng(0).random(times))
    total, square = torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    for row in range(2):
        said = draw(p[row : row + 1].expand(times, 6), draws, starts)
        assert torch.allclose(said["weights"].sum(-1), torch.ones(times))
        dense = torch.zeros(times, 6, dtype=torch.float64).scatter_add_(1, said["ids"], said["weights"].double())
        total[row], square[row] = dense.mean(0), dense.square().mean(0)
        for some in range(20):  # the same class once, those left over without weight
            ids = said["ids"][some][said["weights"][some] > 0]
            assert len(ids.unique()) == len(ids)
        assert ((dense * draws) - p[row] * draws).abs().max() < 1  # systematic: never a whole draw off
    error = (square - total.square()).clamp(min=0).sqrt() / times**0.5
    assert ((total - p).abs() <= 4 * error + 1e-6).all()


def test_a_sure_teacher_is_drawn_as_one_class():
    said = draw(torch.tensor([[0.0, 1.0, 0.0]]), 5, torch.tensor([0.999999], dtype=torch.float64))
    assert (said["ids"][0, 0].item(), said["weights"].tolist()) == (1, [[1.0, 0.0, 0.0, 0.0, 0.0]])


def test_draws_do_not_depend_on_the_batches(decoder, tmp_path, monkeypatch):
    config = TargetsConfig(logits=SampledLogits(type="sampled", draws=20))
    storage, corpus = written(tmp_path, LENGTHS)
    rows = Rows(corpus, {}, build_task(WORDS))
    whole = kept(storage, decoder, rows, config, "a", tokens=1000)[1]
    for number, tokens in enumerate((12, 30)):
        monkeypatch.setattr(signals, "CHUNK_VALUES", VOCABULARY * (2 + number))
        other = kept(storage, decoder, rows, config, f"b{number}", tokens=tokens)[1]
        assert other.equals(whole)
    teacher = make_teacher(decoder, WORDS, config)
    alone = [observe(teacher, rows.batch(np.array([row])), False, config.logits, None) for row in (7, 2)]
    both = observe(teacher, rows.batch(np.array([7, 2])), False, config.logits, None)
    assert torch.equal(torch.cat([one.ids for one in alone]), both.ids)
    assert torch.equal(torch.cat([one.weights for one in alone]), both.weights)
    assert not torch.equal(both.ids[0], both.ids[1])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_bytes_are_those_of_the_columns(kind, decoder, tmp_path):
    config, _ = KINDS[kind]
    storage, corpus = written(tmp_path, LENGTHS)
    rows = Rows(corpus, {}, build_task(WORDS))
    _, table, _ = kept(storage, decoder, rows, config)
    per_token = ("relation_", "hidden_") if config.features and config.features.at == "tokens" else ("relation_",)
    real = {"positions": 0, "tokens": 0}
    for name in table.schema.names[1:] if table.schema.names[0] == "id" else []:
        values = table[name].combine_chunks().flatten().flatten()
        real["tokens" if name.startswith(per_token) else "positions"] += len(values) * values.type.bit_width // 8
    position, token = bytes_per_position(config, VOCABULARY, 16)
    assert real == {"positions": position * int(rows.scored.sum()), "tokens": token * int(rows.lengths.sum())}


# -------------------------------------------------------------------------------------------------------------- small things


def test_a_part_of_a_batch_is_about_its_classes():
    signal = signals.TeacherSignal(
        ids=torch.arange(6).view(3, 2), log_p=torch.ones(3, 2), label_log_p=torch.arange(3.0), hidden=torch.ones(9, 1, 2)
    )
    part = replace(rows_of([0, 1, 2]), signals={"x": signal}).part(slice(1, 3))
    assert (part.labels.tolist(), part.signal.ids.tolist(), part.signal.label_log_p.tolist()) == ([1, 2], [[2, 3], [4, 5]], [1.0, 2.0])
    assert part.signal.hidden is signal.hidden


def test_everything_moves_along():
    """To the meta device, as there is no other here."""
    signal = signals.TeacherSignal(logits=torch.ones(2, 3), relations=(torch.ones(2, 2),) * 3, temperatures=(2.0,), layers=(1,))
    batch = replace(rows_of([0, 1]), inputs={"input_ids": torch.ones(2, 2)}, signals={"a": signal, "b": signal}, bytes=torch.ones(2))
    moved = batch.to(torch.device("meta"))
    for record in (moved, moved.signals["b"]):
        tensors = [value for each in fields(record) if isinstance(value := getattr(record, each.name), torch.Tensor)]
        assert tensors
        assert {value.device.type for value in tensors} == {"meta"}
    assert {value.device.type for value in (*moved.signals["a"].relations, moved.inputs["input_ids"])} == {"meta"}
    assert (moved.ids, moved.signals["a"].temperatures) == (["r0", "r1"], (2.0,))
    assert rows_of([0]).signal == signals.TeacherSignal()
    assert Outputs().chunks() == []
