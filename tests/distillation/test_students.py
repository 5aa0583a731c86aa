"""Students: the start is the teacher's own tensors, and what cannot be built says why."""

import pytest
import torch
from safetensors.torch import load_file

from distillation import models
from distillation.config import LayersStudent, PretrainedStudent, ProbeStudent, ScratchStudent
from distillation.errors import ConfigError, InputError
from distillation.students import Probe, build_student, chosen_layers, parameter_ratio
from tests.tiny import LABELS, bert, model_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("teacher"))


def build(config, teacher, layers=(), seed=0):
    return build_student(config, teacher, LABELS, report_layers=layers, dropout=0.0, seed=seed).eval()


def tokens():
    ids = torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"count": 6}, [0, 2, 4, 7, 9, 11]),  # DistilBERT's choice out of 12
        ({"count": 3, "choose": "even"}, [0, 5, 11]),
        ({"count": 1}, [0]),
        ({"count": 12}, list(range(12))),
        ({"count": 4, "choose": "first"}, [0, 1, 2, 3]),
        ({"count": 4, "choose": "last"}, [8, 9, 10, 11]),
        ({"layers": (1, 7)}, [1, 7]),
    ],
)
def test_named_strategies_out_of_twelve_layers(choice, expected):
    assert chosen_layers(LayersStudent(type="layers", **choice), 12) == expected


def test_layers_the_teacher_does_not_have():
    for choice in ({"layers": (0, 12)}, {"count": 13}):
        with pytest.raises(ConfigError, match=r"DST-2011.*layers 0 to 11 but found 12"):
            chosen_layers(LayersStudent(type="layers", **choice), 12)


def test_nothing_cut_is_the_teacher_exactly(teacher):
    student = build(LayersStudent(type="layers", layers=(0, 1, 2, 3)), teacher)
    with torch.no_grad():
        mine = student(**tokens()).logits
        its = models.load_classifier(teacher).eval()(**tokens()).logits
    assert torch.equal(mine, its)


def test_cut_layers_are_those_of_the_teacher(teacher):
    weights = load_file(teacher / "model.safetensors")
    model = build(LayersStudent(type="layers", layers=(1, 3)), teacher).model
    assert model.config.num_hidden_layers == 2
    for place, layer in enumerate((1, 3)):
        name = "attention.self.query.weight"
        assert torch.equal(model.state_dict()[f"bert.encoder.layer.{place}.{name}"], weights[f"bert.encoder.layer.{layer}.{name}"])
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])


def test_reported_layers_are_the_first_token_of_the_layers_output(teacher):
    student = build(LayersStudent(type="layers", layers=(0, 2, 3)), teacher, layers=(0, 2))
    student.pooled = True
    with torch.no_grad():
        outputs = student(**tokens())
        whole = student.model(**tokens(), output_hidden_states=True).hidden_states
    assert outputs.hidden.shape == (2, 2, 16)
    assert torch.equal(outputs.hidden[:, 0], whole[1][:, 0])
    assert torch.equal(outputs.hidden[:, 1], whole[3][:, 0])
    assert torch.allclose(student.model.classifier(outputs.pooled), outputs.logits)
    with pytest.raises(ConfigError, match=r"DST-2012.*layers 0 to 2 but found 3"):
        build(LayersStudent(type="layers", layers=(0, 2, 3)), teacher, layers=(3,))


def test_scratch_has_its_own_sizes_and_follows_the_seed(teacher):
    config = ScratchStudent(type="scratch", layers=1, hidden_size=8, heads=2, intermediate_size=12)
    one, again, other = build(config, teacher), build(config, teacher), build(config, teacher, seed=1)
    settings = one.model.config
    assert (settings.num_hidden_layers, settings.hidden_size, settings.intermediate_size) == (1, 8, 12)
    assert settings.id2label == dict(enumerate(LABELS))
    weight = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(one.model.state_dict()[weight], again.model.state_dict()[weight])
    assert not torch.equal(one.model.state_dict()[weight], other.model.state_dict()[weight])


def test_pretrained_gets_a_head_of_the_right_size(tmp_path, teacher):
    folder = tmp_path / "body"
    bert(layers=2, labels=("x", "y", "z", "w")).save_pretrained(folder)
    student = build(PretrainedStudent(type="pretrained", model=str(folder)), teacher)
    assert student.model.classifier.out_features == 3
    body = load_file(folder / "model.safetensors")
    assert torch.equal(student.model.bert.pooler.dense.weight, body["bert.pooler.dense.weight"])


def test_probe_is_one_linear_layer_and_exports_as_the_teacher_with_this_head(teacher):
    probe = build(ProbeStudent(type="probe"), teacher)
    assert isinstance(probe, Probe)
    assert sum(p.numel() for p in probe.parameters()) == 16 * 3 + 3
    pooled = torch.randn(2, 16)
    assert torch.allclose(probe(None, None, pooled).logits, pooled @ probe.head.weight.T + probe.head.bias)
    whole = probe.whole_model()
    assert torch.equal(whole.classifier.weight, probe.head.weight)
    assert torch.equal(whole.bert.pooler.dense.weight, load_file(teacher / "model.safetensors")["bert.pooler.dense.weight"])


def test_dropout_is_set_everywhere(teacher):
    model = build_student(LayersStudent(type="layers", layers=(0,)), teacher, LABELS, report_layers=(), dropout=0.0, seed=0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    kept = build_student(LayersStudent(type="layers", layers=(0,)), teacher, LABELS, report_layers=(), dropout=None, seed=0)
    assert {m.p for m in kept.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_parameter_ratio():
    assert parameter_ratio(30, 120) == 0.25


def test_a_teacher_without_a_tensor_is_named(tmp_path):
    from safetensors.torch import save_file

    folder = model_folder(tmp_path / "t")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.2.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for broken in (lambda: models.load_classifier(folder), lambda: build(LayersStudent(type="layers", layers=(2,)), folder)):
        with pytest.raises(InputError, match=r"DST-3207.*layer.2.output.dense.weight"):
            broken()
