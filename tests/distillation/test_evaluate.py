import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from distillation.columns import Columns
from distillation.config import TextClassification
from distillation.errors import InputError
from distillation.evaluate import Candidate, Evaluation, evaluate
from distillation.inference import cost, predict, ratios
from distillation.quality import against, confusion, disagreements, quality, reliability
from distillation.storage import Storage
from distillation.store import write_part

LABELS = ("cat", "dog", "emu")
TASK = TextClassification(max_length=64)


def settings(**changes):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    # A wide start: with the usual 0.02 all rows would get nearly the same answer, and a mixed-up order would not show.
    return BertConfig(**{**sizes, **names, "max_position_embeddings": 64, "initializer_range": 0.5, **changes})


def save(folder, seed=0, **changes):
    torch.manual_seed(seed)
    BertForSequenceClassification(settings(**changes)).save_pretrained(folder)
    return folder


def rows(folder, lengths, labels=None):
    """A split in two parts, as the corpus writes it."""
    rng, storage = np.random.default_rng(1), Storage(str(folder))
    labels = list(rng.integers(0, 3, len(lengths))) if labels is None else labels
    paths, half = [], len(lengths) // 2
    for k, part in enumerate((range(half), range(half, len(lengths)))):
        table = pa.table(
            {
                "id": [f"{i:032x}" for i in part],
                "text": [f"text {i}" for i in part],
                "label": pa.array([int(labels[i]) for i in part], pa.int32()),
                "length": pa.array([lengths[i] for i in part], pa.int32()),
                "scored": pa.array([1 for _ in part], pa.int32()),
                "labelled": pa.array([int(labels[i] >= 0) for i in part], pa.int32()),
                "input_ids": pa.array([rng.integers(1, 50, lengths[i]) for i in part], pa.list_(pa.int32())),
            }
        )
        write_part(storage, "split", f"part-{k}", table, sum(lengths[i] for i in part))
        paths.append(folder / "split" / f"part-{k}.arrow")
    return Columns(paths)


def right(*flags):
    """Two-class logits that are right, or wrong, about label 0."""
    return np.array([[2.0, 0.0] if flag else [0.0, 2.0] for flag in flags], np.float32)


# --------------------------------------------------------------------------------------------------------------- quality


def test_quality_of_four_rows_by_hand():
    """Probabilities of the answer 0.9, 0.8 (right, label 0), 0.9 (right, label 1), 0.6 (wrong: says 0, is 1)."""
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.6, 0.4]])
    found = quality(np.log(p).astype(np.float32), np.array([0, 0, 1, 1]))
    assert found["accuracy"] == 0.75
    # class 0: precision 2/3, recall 1, F1 0.8; class 1: precision 1, recall 1/2, F1 2/3
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.9) * 2 + math.log(0.8) + math.log(0.4)) / 4, rel=1e-6)
    # bins of 1/15: 0.9 in (13/15, 14/15] twice, both right; 0.8 alone, right; 0.6 alone, wrong
    assert found["ece"] == pytest.approx(2 / 4 * abs(1 - 0.9) + 1 / 4 * abs(1 - 0.8) + 1 / 4 * abs(0 - 0.6), rel=1e-6)


def test_reliability_bins_hold_every_row_once():
    bins = reliability(np.log([[0.9, 0.1], [0.9, 0.1], [0.35, 0.65]]), np.array([0, 1, 1]))
    assert len(bins) == 15
    assert [(i, b.rows, b.accuracy) for i, b in enumerate(bins) if b.rows] == [(9, 1, 1.0), (13, 2, 0.5)]
    assert bins[13].confidence == pytest.approx(0.9)


def test_wilson_interval_by_the_formula():
    """8 of 10 right: (0.8 + z2/20 ± z sqrt(0.16/10 + z2/400)) / (1 + z2/10) with z2 = 3.841459."""
    found = quality(right(*[True] * 8, False, False), np.zeros(10, int))
    assert found["accuracy_low"] == pytest.approx(0.490162, abs=1e-6)
    assert found["accuracy_high"] == pytest.approx(0.943318, abs=1e-6)
    perfect = quality(right(*[True] * 10), np.zeros(10, int))
    assert perfect["accuracy_high"] == pytest.approx(1.0, abs=1e-12)
    assert perfect["accuracy_low"] == pytest.approx(10 / (10 + 3.841459), abs=1e-6)


def test_rows_without_a_label_count_for_agreement_only():
    labels = np.array([0, -1, 0, -1])
    assert quality(right(True, False, True, False), labels)["accuracy"] == 1.0
    assert confusion(right(True, False, False, False), labels) == [[1, 1], [0, 0]]
    assert against(right(True, False, True, False), right(True, True, True, True), labels)["agreement"] == 0.5


@pytest.mark.parametrize(("labels", "code"), [([-1, -1], "DST-3321"), ([], "DST-3321"), ([0, 2], "DST-3324")])
def test_labels_that_cannot_be_evaluated_are_refused(labels, code):
    with pytest.raises(InputError) as caught:
        quality(right(*[True] * len(labels)).reshape(-1, 2), np.array(labels, int))
    assert caught.value.code == code


# --------------------------------------------------------------------------------------------------------------- against


def test_kl_of_two_classes_by_hand():
    teacher, student = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    found = against(student, teacher, np.array([0]))
    assert found["kl_to_teacher"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    # forward, not reverse: the other direction is 0.5 ln(0.5/0.75) + 0.5 ln(0.5/0.25) = 0.1438
    assert found["kl_to_teacher"] == pytest.approx(0.1308, abs=1e-4)


def test_mcnemar_by_hand():
    """One row only the baseline gets right, eight only the student: p = 2 (C(9,0) + C(9,1)) / 2^9 = 20/512."""
    student, baseline = right(*[False] + [True] * 8 + [True] * 11), right(*[True] + [False] * 8 + [True] * 11)
    found = against(student, right(*[True] * 20), np.zeros(20, int), baseline)
    assert found["mcnemar_p"] == pytest.approx(20 / 512)
    assert found["gain"] == pytest.approx(100 * 7 / 20)
    assert found["gain_low"] > 0 > against(baseline, right(*[True] * 20), np.zeros(20, int), student)["gain_high"]


def test_a_model_beside_itself_keeps_everything():
    model = right(*[True, False] * 20)
    found = against(model, model, np.zeros(40, int), model)
    assert {found[key] for key in ("retention", "retention_low", "retention_high", "agreement", "mcnemar_p")} == {1.0}
    assert {found[key] for key in ("gain", "gain_low", "gain_high", "kl_to_teacher")} == {0.0}


def test_bootstrap_is_paired_and_follows_its_seed():
    rng = np.random.default_rng(3)
    teacher, student = rng.random(500) < 0.9, rng.random(500) < 0.8
    one = against(right(*student), right(*teacher), np.zeros(500, int))
    assert one == against(right(*student), right(*teacher), np.zeros(500, int))
    assert one != against(right(*student), right(*teacher), np.zeros(500, int), seed=1)
    assert one["retention_low"] < one["retention"] < one["retention_high"]
    # Drawing the rows themselves gives the same interval, up to the noise of 2,000 draws.
    drawn = rng.integers(0, 500, (2000, 500))
    plain = np.percentile(student[drawn].sum(axis=1) / teacher[drawn].sum(axis=1), [2.5, 97.5])
    assert [one["retention_low"], one["retention_high"]] == pytest.approx(list(plain), abs=0.006)
    # A student that errs where its teacher errs has a narrower interval than one that errs elsewhere as often.
    alike = teacher & (rng.random(500) < student.sum() / teacher.sum())
    two = against(right(*alike), right(*teacher), np.zeros(500, int))
    assert two["retention_high"] - two["retention_low"] < 0.8 * (one["retention_high"] - one["retention_low"])


def test_a_teacher_that_is_never_right_is_refused():
    with pytest.raises(InputError) as caught:
        against(right(True, True), right(False, False), np.zeros(2, int))
    assert caught.value.code == "DST-3325"


# --------------------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_predict_equals_one_row_at_a_time(tmp_path, batch_tokens):
    lengths = [int(n) for n in np.random.default_rng(0).integers(3, 40, 31)]
    folder, columns = save(tmp_path / "model"), rows(tmp_path, lengths)
    found = predict(folder, columns, TASK, LABELS, batch_tokens=batch_tokens, precision="fp32")
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    for i, ids in enumerate(columns.ragged("input_ids", np.arange(31))):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor(ids.astype(np.int64))[None]).logits[0].numpy()
        np.testing.assert_allclose(found[i], alone, atol=1e-5)
    assert found.dtype == np.float32
    assert found.std(axis=0).min() > 0.05, "rows differ, so a mixed-up order would show"


def test_bf16_is_close_to_fp32_and_not_the_same(tmp_path):
    folder, columns = save(tmp_path / "model"), rows(tmp_path, [5, 9, 3, 12])
    exact, short = (predict(folder, columns, TASK, LABELS, precision=precision) for precision in ("fp32", "bf16"))
    assert 0 < np.abs(exact - short).max() < 0.1


def test_answers_that_are_not_finite_are_refused(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(settings())
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="not finite") as caught:
        predict(tmp_path / "model", rows(tmp_path, [4, 4]), TASK, LABELS)
    assert caught.value.code == "DST-3322"


def test_a_model_without_padding_token_is_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        predict(save(tmp_path / "model", pad_token_id=None), rows(tmp_path, [4, 5]), TASK, LABELS)
    assert caught.value.code == "DST-3323"


# ------------------------------------------------------------------------------------------------------------------ cost


def test_cost_by_hand(tmp_path):
    folder, columns = save(tmp_path / "model"), rows(tmp_path, [30, 4, 10, 7, 40])
    threads = torch.get_num_threads()
    found = cost(folder, columns, TASK, LABELS, precision="fp32", threads=1, repeats=5)
    h, i, c = 16, 32, 3
    layer = 4 * (h * h + h) + 2 * h + (h * i + i) + (i * h + h) + 2 * h
    assert found["parameters"] == (50 + 64 + 2) * h + 2 * h + 2 * layer + (h * h + h) + (h * c + c)
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size > 4 * found["parameters"]
    n = 10  # the median of the lengths
    attention = 2 * (2 * n * n * h)  # queries times keys, weights times values, over all heads
    assert found["flops"] == 2 * (4 * 2 * n * h * h + 2 * 2 * n * h * i + attention) + 2 * h * h + 2 * h * c
    assert 0 < found["latency_ms_p50"] <= found["latency_ms_p95"]
    assert found["rows_per_second"] > 0
    assert found["threads"] == 1
    assert torch.get_num_threads() == threads


def test_ratios_by_hand():
    teacher = {"parameters": 100, "bytes": 400, "flops": 1000, "latency_ms_p50": 8.0}
    student = {"parameters": 47, "bytes": 100, "flops": 250, "latency_ms_p50": 4.0}
    assert ratios(student, teacher) == {"parameter_ratio": 0.47, "flops_ratio": 0.25, "bytes_ratio": 0.25, "speedup": 2.0}


# -------------------------------------------------------------------------------------------------------------- evaluate


def test_teacher_baseline_and_student_go_through_the_same_code(tmp_path):
    columns = rows(tmp_path, [int(n) for n in np.random.default_rng(0).integers(3, 30, 60)])
    teacher, student = save(tmp_path / "teacher"), save(tmp_path / "student", seed=1, num_hidden_layers=1)
    models = [
        Candidate("student", "small", student, "small-baseline"),
        Candidate("teacher", "teacher", teacher),
        Candidate("baseline", "small-baseline", teacher),
    ]
    found = evaluate(models, columns, TASK, LABELS, precision="fp32", threads=1, repeats=3)
    small, big, baseline = found
    assert [e.name for e in found] == ["small", "teacher", "small-baseline"]
    assert big.quality == baseline.quality
    assert big.against == {} == big.ratios
    assert baseline.against["retention"] == 1.0
    assert small.against["gain"] == pytest.approx(100 * (small.quality["accuracy"] - baseline.quality["accuracy"]))
    assert small.ratios["parameter_ratio"] == small.cost["parameters"] / big.cost["parameters"] < 1
    assert sum(map(sum, small.confusion)) == sum(b.rows for b in small.reliability) == 60
    assert np.trace(small.confusion) / 60 == pytest.approx(small.quality["accuracy"])
    assert len(small.disagreements) == 8
    assert all(d.answer != d.teacher for d in small.disagreements)
    assert big.disagreements == [] == baseline.disagreements
    assert Evaluation.model_validate(json.loads(small.model_dump_json())) == small


def test_outputs_are_matched_to_labels_by_name(tmp_path):
    columns = rows(tmp_path, [5, 6, 7, 8] * 5)
    folder = save(tmp_path / "model")
    plain = evaluate([Candidate("teacher", "t", folder)], columns, TASK, LABELS, precision="fp32", repeats=1)[0]
    answers = predict(folder, columns, TASK, LABELS, precision="fp32").argmax(axis=1)
    assert np.array(plain.confusion).sum(axis=0).tolist() == np.bincount(answers, minlength=3).tolist()
    turned = evaluate([Candidate("teacher", "t", folder)], columns, TASK, ("emu", "cat", "dog"), precision="fp32", repeats=1)[0]
    assert np.array(turned.confusion).sum(axis=0).tolist() == np.bincount(answers, minlength=3)[[2, 0, 1]].tolist()
    with pytest.raises(InputError) as caught:
        evaluate([Candidate("teacher", "t", folder)], columns, TASK, ("emu", "cat", "cow"))
    assert caught.value.code == "DST-3205"


def test_disagreements_name_label_and_both_answers(tmp_path):
    columns = rows(tmp_path, [3, 3, 3, 3], labels=[0, 0, -1, 1])
    found = disagreements(columns, ("yes", "no"), right(True, False, False, False), right(True, True, True, False))
    assert [(d.text, d.label, d.answer, d.teacher) for d in found] == [("text 1", "yes", "no", "yes"), ("text 2", None, "no", "yes")]
