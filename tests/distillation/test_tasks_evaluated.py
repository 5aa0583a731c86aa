"""Evaluation of every task, against numbers worked out by hand or by plain transformers."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distillation import inference, intervals, neighbours, signals
from distillation.errors import InputError
from distillation.evaluate import Candidate, Evaluation, answers, evaluate
from distillation.gathering import together
from distillation.inference import costs, load_trained
from distillation.models import set_labels
from tests import kinds
from tests.kinds import LABELS, TASKS, save, split, written_down


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Throughput is not what is tested here."""
    monkeypatch.setattr(inference, "SECONDS", 0.01)


def judge(kind, columns, teacher, student=None, baseline=None, shares=1, batch_tokens=8192, **changes):
    """Evaluations by name."""
    models = [Candidate("teacher", "teacher", teacher)]
    models += [Candidate("student", "student", student, "baseline" if baseline else None)] if student else []
    models += [Candidate("baseline", "baseline", baseline)] if baseline else []
    task = TASKS[kind].model_copy(update=changes)
    about, how = (models, columns, task, LABELS.get(kind, ())), {"precision": "fp32", "batch_tokens": batch_tokens}
    found = together([answers(*about, (share, shares), **how) for share in range(shares)]) if shares > 1 else None
    return {e.name: e for e in evaluate(*about, found=found, threads=1, repeats=2, **how)}


HEADLINES = {
    "text_classification": "accuracy", "multi_label": "f1", "regression": "pearson", "token_classification": "f1", "causal_lm": "perplexity",
    "masked_lm": "perplexity", "image_classification": "accuracy", "embedding": "recall_at_1",
}  # fmt: skip


def numbers(kind, seed=3):
    """A table whose answers have to do with the first token, so that a teacher is worth keeping."""
    noise = np.random.default_rng(seed).normal(size=(40, 3 if kind == "multi_label" else 1))
    return noise


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_is_evaluated(tmp_path, kind):
    """A student beside its teacher, and the teacher beside itself as a baseline: it keeps all."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    given = {}
    if kind in ("regression", "multi_label"):
        table, first = numbers(kind), np.arange(5, 35)
        given["input_ids"] = [[token, 6, 7, 8] for token in first]
        given |= (
            {"label": [float(table[t, 0]) for t in first]}
            if kind == "regression"
            else {"labels": [np.flatnonzero(table[t] > 0) for t in first]}
        )
        written_down(teacher, kind, table)
    else:
        save(teacher, kind)
    save(student, kind, seed=1, **({"vit": True} if kind == "image_classification" else {}))
    columns = split(tmp_path, kind, **given)
    found = judge(kind, columns, teacher, student, teacher)
    e, same, big = found["student"], found["baseline"], found["teacher"]
    name = HEADLINES[kind]
    assert (e.task, e.headline, e.better) == (kind, name, "min" if name == "perplexity" else "max")
    assert big.quality == same.quality
    assert big.against == {} == big.ratios
    assert {same.against[f"retention{end}"] for end in ("", "_low", "_high")} == {1.0}
    for one in found.values():
        assert one.quality[f"{name}_low"] <= one.quality[name] <= one.quality[f"{name}_high"]
    kept = big.quality[name] / e.quality[name] if e.better == "min" else e.quality[name] / big.quality[name]
    assert e.against["retention"] == pytest.approx(kept)
    points = e.quality[name] - same.quality[name] if e.better == "max" else 1 - e.quality[name] / same.quality[name]
    assert e.against["gain"] == pytest.approx(100 * points)
    assert ("mcnemar_p" in e.against) == (name == "accuracy")
    assert ("kl_to_teacher" in e.against) == (kind not in ("regression", "embedding"))
    assert same.against.get("kl_to_teacher", 0.0) == pytest.approx(0.0, abs=1e-6)
    assert same.against.get("agreement", 1.0) == 1.0
    assert same.against.get("mse_to_teacher", 0.0) == same.against.get("cosine_to_teacher", 1.0) - 1 == pytest.approx(0.0, abs=1e-6)
    assert ("tokens_per_second" in e.cost) == (kind != "image_classification")
    assert e.cost["flops"] > 0 < e.cost["latency_ms_p50"]
    assert bool(e.reliability) == bool(e.disagreements) == (name == "accuracy")
    assert Evaluation.model_validate(json.loads(e.model_dump_json())) == e
    # Three workers, each with some of the batches, find the same to the last bit; of one batch two have nothing.
    for batch_tokens in (64, 8192):
        one, three = (judge(kind, columns, teacher, student, teacher, shares=n, batch_tokens=batch_tokens) for n in (1, 3))
        for model in one:
            mine, its = (each[model].model_dump(exclude={"cost", "ratios"}) for each in (three, one))
            assert mine == its


# ------------------------------------------------------------------------------------------------------- language models


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary(tmp_path):
    for kind in ("causal_lm", "masked_lm"):
        model = kinds.build(kind)
        with torch.no_grad():
            model.get_output_embeddings().weight.zero_()  # tied to the embeddings of the words
        columns = split(tmp_path / kind, kind)
        e = judge(kind, columns, save(tmp_path / kind / "model", kind, model=model))["teacher"]
        assert e.quality["perplexity"] == pytest.approx(40)
        assert e.quality["nll"] == pytest.approx(math.log(40))
        assert [e.quality["perplexity_low"], e.quality["perplexity_high"]] == pytest.approx([40, 40])
        if kind == "causal_lm":  # three bytes a token
            assert e.quality["bits_per_byte"] == pytest.approx(math.log2(40) / 3)
            assert e.positions == sum(columns.whole("length") - 1)


def knows(folder, token, p):
    """A masked language model that says `token` everywhere, with probability p."""
    model = kinds.build("masked_lm")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.cls.predictions.bias.fill_(math.log((1 - p) / 39))
        model.cls.predictions.bias[token] = math.log(p)
    return save(folder, "masked_lm", model=model)


def test_less_perplexity_is_better(tmp_path):
    """Every hidden token is 7: the teacher's perplexity is 2, the student's 4, the baseline's 5."""
    tokens = [[5, 6, 7, 8, 9]] * 12
    columns = split(tmp_path, "masked_lm", input_ids=tokens, places=[[2, 3]] * 12, labels=[[7, 7]] * 12)
    places = [knows(tmp_path / name, 7, p) for name, p in (("t", 1 / 2), ("s", 1 / 4), ("b", 1 / 5))]
    e = judge("masked_lm", columns, *places)["student"]
    assert e.quality["perplexity"] == pytest.approx(4)
    assert e.against["retention"] == pytest.approx(2 / 4)
    assert e.against["gain"] == pytest.approx(100 * (1 - 4 / 5))
    assert e.against["kl_to_teacher"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log((0.5 / 39) / (0.75 / 39)), abs=1e-6)
    assert e.against["agreement"] == e.quality["accuracy"] == 1.0


def test_a_language_model_scores_as_transformers_does_and_in_pieces(tmp_path, monkeypatch):
    folder, student = save(tmp_path / "model", "causal_lm"), save(tmp_path / "student", "causal_lm", seed=1)
    columns = split(tmp_path, "causal_lm")
    whole = judge("causal_lm", columns, folder, student)
    monkeypatch.setattr(signals, "CHUNK_VALUES", 40 * 7)
    pieces = judge("causal_lm", columns, folder, student)
    for name, e in whole.items():
        assert pieces[name].quality == pytest.approx(e.quality, rel=1e-5)
        assert pieces[name].against == pytest.approx(e.against, rel=1e-5)
    big, small = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (folder, student))
    nll, kl, count = 0.0, 0.0, 0
    for ids in columns.ragged("input_ids", np.arange(len(columns))):
        row = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            p, q = (model(row).logits[0, :-1].double().log_softmax(-1) for model in (big, small))
        nll -= float(q.gather(1, row[0, 1:, None]).sum())
        kl += float((p.exp() * (p - q)).sum())
        count += len(ids) - 1
    assert whole["student"].quality["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert whole["student"].against["kl_to_teacher"] == pytest.approx(kl / count, rel=1e-4)


@pytest.mark.parametrize(("mine", "its"), [(40, 44), (44, 40)])
def test_vocabularies_padded_to_different_sizes_compare(tmp_path, mine, its):
    teacher, student = save(tmp_path / "t", "causal_lm", vocab_size=its), save(tmp_path / "s", "causal_lm", vocab_size=mine)
    against = judge("causal_lm", split(tmp_path, "causal_lm"), teacher, student)["student"].against
    assert 0 <= against["kl_to_teacher"] < math.inf


# ------------------------------------------------------------------------------------------------------------ text tasks


def test_entities_are_counted_whole(tmp_path):
    """Tokens 10, 11, 12 are B-x, I-x, O to the model. It finds 3 entities, there are 2 (labels), 1 of them alike: f1 = 2 / 5."""
    table = np.zeros((40, 3))
    table[10, 0] = table[11, 1] = table[12, 2] = 5.0
    columns = split(
        tmp_path, "token_classification", input_ids=[[5, 10, 11, 12, 5], [5, 10, 12, 10, 12, 5]],
        places=[[1, 2, 3], [1, 2, 3, 4]], labels=[[0, 1, 2], [2, 2, 0, 1]],
    )  # fmt: skip
    e = judge("token_classification", columns, written_down(tmp_path / "model", "token_classification", table))["teacher"]
    assert e.quality["f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert e.quality["accuracy"] == pytest.approx(5 / 7)
    assert e.confusion == [[2, 0, 0], [0, 1, 1], [1, 0, 2]]
    assert (e.rows, e.labelled, e.positions) == (2, 2, 7)


def test_correlations_are_those_of_scipy(tmp_path):
    table = numbers("regression")
    first, rng = np.arange(5, 35), np.random.default_rng(0)
    truth = [float(table[token, 0] + rng.normal() / 2) for token in first]
    truth[3] = math.nan
    columns = split(
        tmp_path, "regression", input_ids=[[token, 6, 7] for token in first], label=truth, labelled=[int(not math.isnan(y)) for y in truth]
    )
    other = written_down(tmp_path / "student", "regression", table * 2 + 1)
    found = judge("regression", columns, written_down(tmp_path / "teacher", "regression", table), other)
    x, y = np.delete(table[first, 0], 3), np.delete(np.array(truth), 3)
    quality = found["teacher"].quality
    assert quality["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert quality["spearman"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-5)
    assert quality["mse"] == pytest.approx(((x - y) ** 2).mean(), abs=1e-4)
    assert quality["mae"] == pytest.approx(np.abs(x - y).mean(), abs=1e-4)
    assert found["student"].quality["pearson"] == pytest.approx(quality["pearson"], abs=1e-5)
    assert found["student"].against["mse_to_teacher"] == pytest.approx(((table[first, 0] + 1) ** 2).mean(), abs=1e-3)
    assert (found["teacher"].rows, found["teacher"].labelled) == (30, 29)


def test_labels_of_a_row_are_counted_one_by_one(tmp_path):
    """Row 1: says cat and dog, is cat. Row 2: says emu, is emu. f1 = 2 * 2 / (3 + 2); one of two rows is right throughout."""
    table = np.full((40, 3), -1.0)
    table[10, :2] = table[11, 2] = 1.0
    columns = split(tmp_path, "multi_label", input_ids=[[10, 5], [11, 5]], labels=[[0], [2]])
    e = judge("multi_label", columns, written_down(tmp_path / "model", "multi_label", table))["teacher"]
    assert e.quality["f1"] == pytest.approx(4 / 5)
    assert e.quality["exact_match"] == pytest.approx(1 / 2)
    nll = 5 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)
    assert e.quality["nll"] == pytest.approx(nll / 2, abs=1e-4)


def test_rows_without_a_label_do_not_widen_an_interval(tmp_path):
    rng = np.random.default_rng(0)
    tokens, labels = [[int(token), 5] for token in rng.integers(5, 40, 30)], [np.flatnonzero(rng.random(3) < 0.5) for _ in range(30)]
    folder = written_down(tmp_path / "model", "multi_label", numbers("multi_label"))
    alone = judge("multi_label", split(tmp_path / "a", "multi_label", input_ids=tokens, labels=labels), folder)["teacher"]
    more = {"input_ids": tokens + tokens, "labels": labels + labels, "labelled": [1] * 30 + [0] * 30}
    beside = judge("multi_label", split(tmp_path / "b", "multi_label", **more), folder)["teacher"]
    assert beside.quality == pytest.approx(alone.quality)
    assert (beside.rows, beside.labelled) == (60, 30)


def test_a_decoder_that_reads_the_last_token_stands_beside_an_encoder(tmp_path):
    torch.manual_seed(0)
    config = kinds.settings("causal_lm")
    set_labels(config, TASKS["text_classification"], LABELS["text_classification"])
    save(tmp_path / "gpt", "causal_lm", model=AutoModelForSequenceClassification.from_config(config))
    columns = split(tmp_path, "text_classification", token_type_ids=None)
    found = judge("text_classification", columns, tmp_path / "gpt", save(tmp_path / "bert", "text_classification"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "gpt").eval()
    with torch.no_grad():
        logits = [model(torch.tensor(ids.astype(np.int64))[None]).logits[0] for ids in columns.ragged("input_ids", np.arange(24))]
    label = torch.from_numpy(columns.whole("label").astype(np.int64))
    assert found["teacher"].quality["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(torch.stack(logits), label)), rel=1e-4)
    assert found["student"].against["retention"] >= 0


def test_a_teacher_of_score_zero_and_a_split_without_labels_are_refused(tmp_path):
    nothing = written_down(tmp_path / "model", "multi_label", np.full((40, 3), -1.0))
    for code, given in (("DST-3331", {}), ("DST-3321", {"labelled": [0] * 24})):
        with pytest.raises(InputError) as caught:
            judge("multi_label", split(tmp_path / code, "multi_label", **given), nothing)
        assert caught.value.code == code


def test_answers_that_are_not_finite_are_refused(tmp_path):
    model = kinds.build("causal_lm")
    torch.nn.init.constant_(model.transformer.ln_f.bias, float("nan"))
    with pytest.raises(InputError) as caught:
        judge("causal_lm", split(tmp_path, "causal_lm"), save(tmp_path / "model", "causal_lm", model=model))
    assert caught.value.code == "DST-3322"


def test_images_are_scaled_as_the_task_says(tmp_path):
    folder, columns = save(tmp_path / "model", "image_classification", vit=True), split(tmp_path, "image_classification")
    e = judge("image_classification", columns, folder, mean=(0.4,), std=(0.2,))["teacher"]
    pixels = torch.tensor(np.stack(columns.ragged("pixels", np.arange(24)))).view(24, 8, 8, 3).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        logits = load_trained(folder, TASKS["image_classification"], ())(pixel_values=(pixels / 255 - 0.4) / 0.2).logits
    label = torch.from_numpy(columns.whole("label").astype(np.int64))
    assert e.quality["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, label)), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ embeddings


def test_neighbours_by_hand(monkeypatch):
    """Angles 0, 10, 90, 105 and 190 degrees; lengths do not count."""
    angles, lengths = np.radians([0, 10, 90, 105, 190]), np.array([1, 5, 1, 3, 2])[:, None]
    vectors = (np.stack([np.cos(angles), np.sin(angles)], 1) * lengths).astype(np.float32)
    assert neighbours.nearest(vectors).tolist() == [1, 0, 3, 2, 3]
    assert neighbours.recall(vectors, np.array([0, 0, 1, 0, 0])).tolist() == [True, True, False, False, True]
    monkeypatch.setattr(neighbours, "BLOCK", 10)
    assert neighbours.nearest(vectors).tolist() == [1, 0, 3, 2, 3]
    assert neighbours.cosine(vectors[:1], vectors[2:3]) == pytest.approx(0, abs=1e-7)


def test_a_probe_reads_what_a_plane_divides():
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(200, 4)).astype(np.float32), np.repeat([0, 1], 100)
    vectors[:, 0] += 8 * labels
    assert neighbours.probe(vectors, labels, 0) == 1.0
    assert neighbours.probe(vectors, np.where(labels == 1, -1, 0), 0) is None


def test_embeddings_without_labels_are_judged_by_their_teacher(tmp_path):
    columns = split(tmp_path, "embedding", label=[-1] * 24)
    teacher, same, narrow = (
        save(tmp_path / "t", "embedding"),
        save(tmp_path / "s", "embedding", seed=1),
        save(tmp_path / "n", "embedding", hidden_size=8),
    )
    e = judge("embedding", columns, teacher, same)["student"]
    assert e.headline == "cosine"
    assert e.against["retention"] == pytest.approx(e.quality["cosine"]) == pytest.approx(e.against["cosine_to_teacher"])
    e = judge("embedding", columns, teacher, narrow)["student"]
    assert e.headline == "neighbours"
    assert e.against["retention"] == e.quality["neighbours"] == e.against["agreement"]
    assert "cosine_to_teacher" not in e.against


# ------------------------------------------------------------------------------------------------------------- intervals


def test_a_drawn_mean_spreads_as_theory_says():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7
    sums = {"one": np.stack([np.ones(400), right], 1), "other": np.stack([np.ones(400), right], 1)}
    drawn = intervals.redraw(sums, seed=0)
    assert drawn["one"].shape == (2000, 2)
    assert (drawn["one"][:, 0] == 400).all()
    assert (drawn["one"] == drawn["other"]).all(), "the same rows for all"
    found = intervals.bounds("x", drawn["one"][:, 1] / 400)
    p = right.mean()
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert [found["x_low"], found["x_high"]] == pytest.approx([p - half, p + half], abs=0.006)


def test_draws_are_cut_to_fit_memory(monkeypatch):
    sums = {"one": np.random.default_rng(0).normal(size=(50, 3))}
    monkeypatch.setattr(intervals, "VALUES", 50 * 7)
    drawn = intervals.redraw(sums, seed=0)["one"]
    assert drawn.shape == (2000, 3)
    assert drawn.mean(0) == pytest.approx(sums["one"].sum(0), abs=1.0)


def test_an_interval_of_ratios_leaves_out_draws_without_a_teacher():
    samples = {"t": np.array([0.0, 0.5, 0.5]), "s": np.array([0.2, 0.4, 0.4])}
    found = intervals.compare("max", {"t": 0.5, "s": 0.4}, samples, "s", "t", None)
    assert found == pytest.approx({"retention": 0.8, "retention_low": 0.8, "retention_high": 0.8})
    endless = intervals.bounds("x", np.array([1.0, 2.0, np.inf]))
    assert endless == {"x_low": 1.0, "x_high": np.inf}


def test_costs_read_rows_one_to_a_sequence(tmp_path):
    """Flops of the row of median length, 6 tokens: two layers, and a head at every token."""
    folder = save(tmp_path / "model", "causal_lm")
    columns = split(tmp_path, "causal_lm", input_ids=[[5] * n for n in (4, 6, 9)])
    model = load_trained(folder, TASKS["causal_lm"], ())
    (found,) = costs([(model, folder)], columns, TASKS["causal_lm"], (), 8192, False, torch.device("cpu"), 1, 2, 0)
    n, h = 6, 16
    layer = 2 * n * (3 * h * h + h * h + 8 * h * h) + 2 * (2 * n * n * h)
    assert found["flops"] == 2 * layer + 2 * n * h * 40
    assert found["tokens_per_second"] == pytest.approx(found["rows_per_second"] * 19 / 3)
