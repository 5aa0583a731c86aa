"""What a model folder must be before anything of it is used."""

import json
import sys

import pytest
import torch

from distillation import fit, models
from distillation.config import CausalLM, Embedding, MaskedLM, MultiLabel, Regression, TokenClassification
from distillation.errors import InputError, SecurityError
from distillation.network import output_head
from distillation.storage import Storage
from distillation.students import Tensors
from tests.tiny import LABELS, TASK, model_folder, tokenizer


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_and_package(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "carrier" / "weights" / "model")
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('a package is never imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert models.locate(str(folder)) == folder
    assert models.locate("package:carrier/weights/model").resolve() == folder.resolve()
    with pytest.raises(InputError, match=r"DST-3208.*expected a Python package nowhere"):
        models.locate("package:nowhere/model")
    with pytest.raises(SecurityError, match="DST-9003"):
        models.locate("package:carrier/../../etc")


def test_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"DST-3001.*/nothing"):
        models.locate(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"DST-3201.*config.json"):
        models.locate(str(tmp_path / "empty"))
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"DST-3202.*no weights"):
        models.locate(str(folder))


def test_weights_that_were_cut_off_are_named(tmp_path):
    folder = model_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for read in (lambda folder: models.load(folder, TASK), Tensors):
        with pytest.raises(InputError, match=r"DST-3206.*/m: .*incomplete"):
            read(folder)


def test_an_architecture_nobody_knows(tmp_path):
    folder = model_folder(tmp_path / "m")
    change_config(folder, model_type="nosuch")
    with pytest.raises(InputError, match=r"DST-3206.*nosuch"):
        models.load(folder, TASK)


def test_labels_that_are_numbers_are_places():
    names = tuple(str(i) for i in [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9])
    assert models.label_order(None, 12, names, "m") == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(InputError, match=r"DST-3204"):
        models.label_order(None, 3, ("0", "1", "3"), "m")


def test_a_hub_that_cannot_be_reached_is_named():
    with pytest.raises(InputError, match=r"DST-3209.*nobody/nothing.*give a local folder"):
        models.locate("nobody/nothing")


def test_code_and_pickles_are_refused_unless_switched_on(tmp_path):
    folder = model_folder(tmp_path / "m")
    change_config(folder, auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(SecurityError, match=r"DST-9004.*auto_map for AutoModel.*never run"):
        models.locate(str(folder))
    change_config(folder, auto_map=None)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SecurityError, match=r"DST-9005.*pytorch_model.bin.*pickled_weights: true"):
        models.locate(str(folder))


def test_pickled_weights_are_read_when_switched_on(tmp_path):
    folder = model_folder(tmp_path / "m")
    weights = models.load(folder, TASK).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model = models.load(models.locate(str(folder), pickled_weights=True), TASK, pickled=True)
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    folder = model_folder(tmp_path / "m")
    models.require_tokenizer_fits(folder)
    tokenizer(folder, words=40)
    with pytest.raises(InputError, match=r"DST-3213.*token ids below 40.*ids up to 43"):
        models.require_tokenizer_fits(folder)


def test_a_student_with_another_vocabulary(tmp_path):
    one, other = model_folder(tmp_path / "one"), model_folder(tmp_path / "other")
    models.require_same_vocabulary(one, other)
    tokenizer(other, words=30)
    with pytest.raises(InputError, match=r"DST-3212.*the 34 tokens of .*found 40 tokens, 6 of them others"):
        models.require_same_vocabulary(one, other)


def test_labels_are_matched_by_name():
    assert models.label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None
    assert models.label_names({"id2label": {"1": "no", "0": "yes"}}) == ("yes", "no")
    assert models.label_order(("c", "a", "b"), 3, ("a", "b", "c"), "m") == [1, 2, 0]
    assert models.label_order(None, 2, ("a", "b"), "m") == [0, 1]
    with pytest.raises(InputError, match=r"DST-3204.*expected 2 .*found 3"):
        models.label_order(None, 3, ("a", "b"), "m")
    with pytest.raises(InputError, match=r"DST-3205.*expected a, b but found a, x"):
        models.label_order(("a", "x"), 2, ("a", "b"), "m")


def test_an_adopted_teacher_speaks_in_the_order_of_the_corpus(tmp_path):
    source = model_folder(tmp_path / "m", labels=("c", "a", "b"))
    storage = Storage(str(tmp_path / "s"))
    fit.adopt(storage, source, TASK, LABELS, "teachers/x", "x", {})
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        its = models.load(source, TASK).eval()(input_ids=ids).logits
        adopted = models.load(fit.model_folder(storage, "teachers/x"), TASK).eval()
        mine = adopted(input_ids=ids).logits
    assert torch.equal(mine, its[:, [1, 2, 0]])
    assert adopted.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert (fit.model_folder(storage, "teachers/x") / "tokenizer.json").is_file()


def test_bf16_follows_the_setting():
    cpu = torch.device("cpu")
    assert models.use_bf16("bf16", cpu)
    assert not models.use_bf16("fp32", cpu)
    assert models.use_bf16("auto", cpu) == bool(torch.cpu.get_capabilities().get("amx_bf16"))


def test_layers_of_and_their_number_and_width():
    from transformers import BertConfig, GPT2Config, LlamaConfig, ResNetConfig, ViTConfig

    for kind, depth, width in (
        (BertConfig, 12, 768),
        (GPT2Config, 12, 768),
        (LlamaConfig, 32, 4096),
        (ViTConfig, 12, 768),
        (ResNetConfig, 4, 2048),
    ):
        settings = kind().to_dict()
        assert (models.depth_of(settings), models.width_of(settings)) == (depth, width)
    assert [models.reads_last({"model_type": kind}) for kind in ("gpt2", "llama", "bert", "roberta", "distilbert", "vit")] == [
        True, True, False, False, False, False
    ]  # fmt: skip


def test_labels_of_a_configuration_by_task():
    from transformers import BertConfig

    def told(task, labels):
        config = BertConfig()
        models.set_labels(config, task, labels)
        return config.num_labels, config.problem_type, config.id2label[0]

    assert told(TASK, LABELS) == (3, None, "a")
    assert told(MultiLabel(type="multi_label"), LABELS) == (3, "multi_label_classification", "a")
    assert told(Regression(type="regression"), ()) == (1, "regression", "LABEL_0")
    assert told(CausalLM(type="causal_lm"), ()) == told(Embedding(type="embedding"), LABELS) == (2, None, "LABEL_0")


def test_a_body_of_a_language_model_serves_every_task_with_a_head_of_its_own(tmp_path):
    folder = model_folder(tmp_path / "m")
    for task, labels, outputs in (
        (MultiLabel(type="multi_label"), ("x", "y", "z", "w"), 4), (Regression(type="regression"), (), 1),
        (TokenClassification(type="token_classification"), ("O", "B-X"), 2),
    ):  # fmt: skip
        assert output_head(models.load(folder, task, labels)).out_features == outputs
    assert models.load(folder, Embedding(type="embedding"), ()).config.model_type == "bert"
    with pytest.raises(InputError, match=r"DST-3207.*cls.predictions"):
        models.load(folder, MaskedLM(type="masked_lm"))
