"""Export and model card of every task: the folder loads with plain transformers, and the card's Python runs."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from distillation.cards import ABOUT, METRICS, Facts, card, show, usage
from distillation.config import Embedding, ImageClassification
from distillation.errors import InputError
from distillation.evaluate import Evaluation
from distillation.export import _require_same_answers, export
from distillation.inference import load_trained
from distillation.tasks import TASKS as KNOWN
from tests.kinds import LABELS, TASKS, save

QUALITY = {
    "text_classification": {"accuracy": 0.9, "macro_f1": 0.87654, "nll": 0.3, "ece": 0.031},
    "multi_label": {"f1": 0.8, "exact_match": 0.7, "nll": 0.4},
    "regression": {"pearson": 0.81234, "spearman": 0.8, "mse": 0.2, "mae": 0.3},
    "token_classification": {"f1": 0.8, "accuracy": 0.95, "nll": 0.2},
    "causal_lm": {"perplexity": 12.345, "bits_per_byte": 1.1, "accuracy": 0.4, "nll": 2.51},
    "masked_lm": {"perplexity": 5.4, "accuracy": 0.6, "nll": 1.7},
    "image_classification": {"accuracy": 0.9, "macro_f1": 0.87, "nll": 0.3, "ece": 0.03},
    "embedding": {"recall_at_1": 0.7, "probe_accuracy": 0.75},
}


def evaluation(kind, name, role):
    quality = QUALITY[kind]
    headline = next(iter(quality))
    beside = {"retention": 0.981, "retention_low": 0.972, "retention_high": 0.99, "gain": 3.2, "gain_low": 1.0, "gain_high": 5.0}
    beside |= {"mse_to_teacher": 0.03} if kind == "regression" else {"agreement": 0.938, "kl_to_teacher": 0.1}
    cost = {
        "parameters": 5e6,
        "bytes": 2e7,
        "flops": 1e9,
        "latency_ms_p50": 4.0,
        "latency_ms_p95": 5.5,
        "rows_per_second": 900,
        "threads": 2,
    }
    return Evaluation(
        role=role, name=name, task=kind, headline=headline, better="min" if headline == "perplexity" else "max", labels=LABELS.get(kind, ()),
        rows=900, labelled=800, positions=900, precision="fp32", device="cpu", cost=cost, against={} if role == "teacher" else beside,
        quality={**quality, f"{headline}_low": 0.9 * quality[headline], f"{headline}_high": 1.1 * quality[headline]},
    )  # fmt: skip


def evaluations(kind):
    return [evaluation(kind, "teacher", "teacher"), evaluation(kind, "small", "student")]


def facts(kind, **changes):
    task = TASKS[kind].model_copy(update=changes)
    return Facts(teacher="a/b", corpus="files", max_length=task.max_length, task=task, config="name: x")


def run(code, folder, picture):
    """The last line's value."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(picture)
    *lines, last = code.replace("path/to/this/folder", str(folder)).replace("picture.png", str(picture)).splitlines()
    name = re.match(r"(\w+) = ", last)
    places = {}
    exec("\n".join([*lines, last if name else f"value = {last}"]), places)
    return places[name[1] if name else "value"]


def test_every_task_has_a_card():
    assert set(ABOUT) == set(KNOWN) == set(TASKS)
    assert {key for about in ABOUT.values() for key in about.columns} <= set(METRICS)


@pytest.mark.filterwarnings("ignore:.*sequentially on GPU")
@pytest.mark.parametrize("kind", TASKS)
def test_the_exported_folder_is_used_as_its_card_says(tmp_path, kind):
    source, out = save(tmp_path / "model", kind), tmp_path / "out"
    export(source, out, evaluations(kind), facts(kind), name="small", verdict="It is good.")
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["pipeline_tag"] == ABOUT[kind].pipeline
    headline = next(iter(QUALITY[kind]))
    assert meta["model-index"][0]["results"][0]["metrics"][0]["value"] == round(QUALITY[kind][headline], 4)
    wanted = ("It is good.", METRICS[headline].title, show(headline, QUALITY[kind][headline]), "98.1% [97.2%, 99.0%]")
    assert all(each in body for each in wanted)
    assert ("93.8% of the held-out rows" in body) == (kind != "regression")
    assert ("lower is better" in body) == (headline == "perplexity")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    said = run(code.strip(), out, tmp_path / "picture.png")
    model = load_trained(source, TASKS[kind], ())
    if kind == "regression":
        assert isinstance(said, float)
    elif kind == "multi_label":
        assert set(said) <= set(LABELS[kind])
    elif kind == "causal_lm":
        assert said[0]["generated_text"].startswith("some text")
    elif kind == "masked_lm":
        assert {"token_str", "score"} <= said[0].keys()
    elif kind == "embedding":
        ids = torch.tensor([[2, 5, 6, 3]])  # [CLS] some text [SEP]
        with torch.no_grad():
            assert torch.allclose(said[0], model(ids).last_hidden_state[0].mean(0), atol=1e-5)
    elif kind == "image_classification":
        pixels = torch.tensor(np.array(Image.open(tmp_path / "picture.png"))).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            p = model(pixel_values=(pixels / 255 - 0.5) / 0.5).logits.softmax(-1)[0]
        assert {each["label"]: each["score"] for each in said} == pytest.approx(dict(zip(LABELS[kind], p.tolist(), strict=True)), abs=1e-5)
    elif kind == "text_classification":
        said = said if isinstance(said, dict) else said[0]
        ids, types = torch.tensor([[2, 5, 6, 3, 7, 8, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
        with torch.no_grad():
            p = model(ids, token_type_ids=types).logits.softmax(-1)[0]
        assert said["score"] == pytest.approx(float(p.max()), abs=1e-5)


def test_an_image_of_one_channel_is_served_without_pipeline(tmp_path):
    source = save(tmp_path / "model", "image_classification", num_channels=1)
    its = facts("image_classification", channels=1)
    export(source, tmp_path / "out", evaluations("image_classification"), its, name="small")
    said = run(usage(its.task, 1), tmp_path / "out", tmp_path / "picture.png")
    pixels = torch.tensor(np.array(Image.open(tmp_path / "picture.png").convert("L")))[None, None].float()
    with torch.no_grad():
        wanted = load_trained(source, its.task, ())(pixel_values=(pixels / 255 - 0.5) / 0.5).logits.argmax()
    assert said == LABELS["image_classification"][int(wanted)]
    assert "does not serve it" in (tmp_path / "out" / "README.md").read_text()


def test_a_preprocessor_of_the_source_is_kept(tmp_path):
    source = save(tmp_path / "model", "image_classification")
    mine = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (source / "preprocessor_config.json").write_text(json.dumps(mine))
    export(source, tmp_path / "out", evaluations("image_classification"), facts("image_classification"), name="small")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == mine


def test_vectors_of_the_first_token_are_taken_from_there(tmp_path):
    source = save(tmp_path / "model", "embedding")
    its = Embedding(type="embedding", max_length=32, pooling="first")
    said = run(usage(its, 32), source, tmp_path / "picture.png")
    with torch.no_grad():
        assert torch.allclose(said[0], load_trained(source, its, ())(torch.tensor([[2, 5, 6, 3]])).last_hidden_state[0, 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["causal_lm", "token_classification", "image_classification", "embedding"])
def test_a_copy_that_answers_differently_is_refused(tmp_path, kind):
    """The second source's weights come from another seed."""
    one, other = save(tmp_path / "one", kind), save(tmp_path / "other", kind)
    (other / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    _require_same_answers(one, other, facts(kind), LABELS.get(kind, ()))
    weights = {name: value + 0.1 if value.is_floating_point() else value for name, value in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        _require_same_answers(one, other, facts(kind), LABELS.get(kind, ()))
    assert caught.value.code == "DST-3313"


def test_sizes_and_limits_of_images_are_said():
    text = card(evaluations("image_classification")[1], evaluations("image_classification"), facts("image_classification"))
    assert "images of 8 by 8 pixels" in text
    assert isinstance(TASKS["image_classification"], ImageClassification)
