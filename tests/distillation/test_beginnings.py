"""Models that begin with random weights: the same bytes again, whole folders, and what does not suit."""

import pytest
import torch
from transformers import AutoTokenizer

from distillation import models
from distillation.beginnings import make, require_suits
from distillation.config import CausalLM, ImageClassification, MaskedLM, NewModel, TextClassification
from distillation.errors import ConfigError

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "the end"] * 20
SIZES = {"layers": 1, "hidden_size": 16, "heads": 2, "vocabulary": 300}
CAUSAL, MASKED = CausalLM(type="causal_lm", max_length=16), MaskedLM(type="masked_lm", max_length=16)
TEXT, IMAGE = (
    TextClassification(type="text_classification", max_length=16),
    ImageClassification(type="image_classification", size=32, channels=1),
)


@pytest.mark.parametrize(("architecture", "task"), [("gpt2", CAUSAL), ("llama", CAUSAL), ("bert", MASKED), ("bert", TEXT), ("llama", TEXT)])
def test_a_model_of_text_reads_what_its_tokenizer_writes(tmp_path, architecture, task):
    config = NewModel(architecture=architecture, **SIZES)
    for name in ("one", "again"):
        make(config, task, TEXTS, tmp_path / name)
    assert models.weights_fingerprint(tmp_path / "one") == models.weights_fingerprint(tmp_path / "again")
    assert models.tokenizer_fingerprint(tmp_path / "one") == models.tokenizer_fingerprint(tmp_path / "again")
    models.require_tokenizer_fits(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    text = "the quick \u20ac dog"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text  # bytes: nothing is unknown
    model = models.load(tmp_path / "one", task, ("a", "b") if task is TEXT else ()).eval()
    rows = tokenizer(["the end", "the quick brown fox"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    assert logits.shape[-1] == (2 if task is TEXT else len(tokenizer))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "config",
    [
        NewModel(architecture="resnet", depths=(1, 1), hidden_sizes=(8, 12)),
        NewModel(architecture="vit", layers=1, hidden_size=16, heads=2),
    ],
)
def test_a_model_of_images_reads_them_in_their_size(tmp_path, config):
    make(config, IMAGE, (), tmp_path)
    model = models.load(tmp_path, IMAGE, tuple("abc")).eval()
    with torch.no_grad():
        assert model(pixel_values=torch.zeros(2, 1, 32, 32)).logits.shape == (2, 3)


def test_what_does_not_suit_is_refused():
    with pytest.raises(ConfigError, match=r"DST-2035.*expected gpt2, llama but found bert for causal_lm"):
        require_suits(NewModel(architecture="bert", **SIZES), CAUSAL)
    with pytest.raises(ConfigError, match=r"expected resnet, vit but found gpt2 for image_classification"):
        require_suits(NewModel(architecture="gpt2", **SIZES), IMAGE)
    with pytest.raises(ValueError, match="a resnet has depths and hidden_sizes"):
        NewModel(architecture="resnet", layers=2, hidden_size=8, heads=2)
    with pytest.raises(ValueError, match="hidden_size 15 is not a multiple of heads 2"):
        NewModel(architecture="gpt2", layers=1, hidden_size=15, heads=2)
