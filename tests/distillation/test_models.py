"""What a model folder must be before anything of it is used."""

import json
import sys

import pytest
import torch

from distillation import fit, models
from distillation.errors import InputError, SecurityError
from distillation.storage import Storage
from distillation.students import Tensors
from tests.tiny import LABELS, model_folder, tokenizer


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
    for read in (models.load_classifier, Tensors):
        with pytest.raises(InputError, match=r"DST-3206.*/m: .*incomplete"):
            read(folder)


def test_an_architecture_nobody_knows(tmp_path):
    folder = model_folder(tmp_path / "m")
    change_config(folder, model_type="nosuch")
    with pytest.raises(InputError, match=r"DST-3206.*nosuch"):
        models.load_classifier(folder)


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
    weights = models.load_classifier(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model = models.load_classifier(models.locate(str(folder), pickled_weights=True), pickled=True)
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
    fit.adopt(storage, source, LABELS, "teachers/x", "x", {})
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        its = models.load_classifier(source).eval()(input_ids=ids).logits
        adopted = models.load_classifier(fit.model_folder(storage, "teachers/x")).eval()
        mine = adopted(input_ids=ids).logits
    assert torch.equal(mine, its[:, [1, 2, 0]])
    assert adopted.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert (fit.model_folder(storage, "teachers/x") / "tokenizer.json").is_file()


def test_bf16_follows_the_setting():
    cpu = torch.device("cpu")
    assert models.use_bf16("bf16", cpu)
    assert not models.use_bf16("fp32", cpu)
    assert models.use_bf16("auto", cpu) == bool(torch.cpu.get_capabilities().get("amx_bf16"))
