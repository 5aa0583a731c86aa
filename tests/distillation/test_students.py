"""Students: the start is the teacher's own tensors, and what cannot be built says why."""

import pytest
import torch
from safetensors.torch import load_file

from distillation import fit, models, store
from distillation.config import (
    CausalLM,
    ConvolutionalStudent,
    Features,
    ImageClassification,
    LayersStudent,
    MaskedLM,
    PatientKD,
    PretrainedStudent,
    ProbeStudent,
    ScratchStudent,
    TargetsConfig,
    TrainingConfig,
)
from distillation.errors import ConfigError, InputError
from distillation.loop import LocalSession
from distillation.network import Network
from distillation.rows import open_columns
from distillation.students import Probe, build_student, chosen_layers, flops, label, outline, parameter_ratio, require_buildable, size_of
from tests.tiny import LABELS, LOSSES, TASK, bert, model_folder, settings, world


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("teacher"))


def build(config, teacher, seed=0):
    return build_student(config, teacher, TASK, LABELS, dropout=0.0, seed=seed).eval()


def tokens():
    ids = torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def seen():
    """Scored positions, tokens and lengths of `tokens`."""
    return torch.tensor([0, 4]), torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.tensor([4, 3])


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
        its = models.load(teacher, TASK).eval()(**tokens()).logits
    assert torch.equal(mine, its)


def test_cut_layers_are_those_of_the_teacher(teacher):
    weights = load_file(teacher / "model.safetensors")
    model = build(LayersStudent(type="layers", layers=(1, 3)), teacher)
    assert model.config.num_hidden_layers == 2
    for place, layer in enumerate((1, 3)):
        name = "attention.self.query.weight"
        assert torch.equal(model.state_dict()[f"bert.encoder.layer.{place}.{name}"], weights[f"bert.encoder.layer.{layer}.{name}"])
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])


def test_reported_layers_are_the_first_token_of_the_layers_output(teacher):
    student = Network(build(LayersStudent(type="layers", layers=(0, 2, 3)), teacher), TASK, layers=(0, 2), pooled=True)
    with torch.no_grad():
        outputs = student(tokens(), *seen())
        whole = student.model(**tokens(), output_hidden_states=True).hidden_states
    assert outputs.hidden.shape == (2, 2, 16)
    assert torch.equal(outputs.hidden[:, 0], whole[1][:, 0])
    assert torch.equal(outputs.hidden[:, 1], whole[3][:, 0])
    assert torch.allclose(student.model.classifier(outputs.pooled), outputs.logits)


def test_a_loss_on_a_layer_that_the_student_has_not(storage):
    config = settings(storage, "deep", losses={"inner": PatientKD(type="pkd", layers={2: 1})})
    with pytest.raises(ConfigError, match=r"DST-2012.*layers 0 to 1 but found 2"):
        fit.train(config, LocalSession(), {})


def test_scratch_has_its_own_sizes_and_follows_the_seed(teacher):
    config = ScratchStudent(type="scratch", layers=1, hidden_size=8, heads=2, intermediate_size=12)
    one, again, other = build(config, teacher), build(config, teacher), build(config, teacher, seed=1)
    config = one.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (1, 8, 12)
    assert config.id2label == dict(enumerate(LABELS))
    weight = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(one.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])


def test_pretrained_gets_a_head_of_the_right_size(tmp_path, teacher):
    folder = tmp_path / "body"
    bert(layers=2, labels=("x", "y", "z", "w")).save_pretrained(folder)
    student = build(PretrainedStudent(type="pretrained", model=str(folder)), teacher)
    assert student.classifier.out_features == 3
    body = load_file(folder / "model.safetensors")
    assert torch.equal(student.bert.pooler.dense.weight, body["bert.pooler.dense.weight"])


def test_probe_is_one_linear_layer_and_exports_as_the_teacher_with_this_head(teacher):
    probe = build(ProbeStudent(type="probe"), teacher)
    assert isinstance(probe, Probe)
    assert sum(p.numel() for p in probe.parameters()) == 16 * 3 + 3
    pooled = torch.randn(2, 16)
    assert torch.allclose(probe({}, *seen(), pooled).logits, pooled @ probe.head.weight.T + probe.head.bias)
    whole = probe.whole_model()
    assert torch.equal(whole.classifier.weight, probe.head.weight)
    assert torch.equal(whole.bert.pooler.dense.weight, load_file(teacher / "model.safetensors")["bert.pooler.dense.weight"])


def test_dropout_is_set_everywhere(teacher):
    model = build_student(LayersStudent(type="layers", layers=(0,)), teacher, TASK, LABELS, dropout=0.0, seed=0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    kept = build_student(LayersStudent(type="layers", layers=(0,)), teacher, TASK, LABELS, dropout=None, seed=0)
    assert {m.p for m in kept.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_parameter_ratio():
    assert parameter_ratio(30, 120) == 0.25


def test_a_teacher_without_a_tensor_is_named(tmp_path):
    from safetensors.torch import save_file

    folder = model_folder(tmp_path / "t")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.2.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for broken in (lambda: models.load(folder, TASK), lambda: build(LayersStudent(type="layers", layers=(2,)), folder)):
        with pytest.raises(InputError, match=r"DST-3207.*layer.2.output.dense.weight"):
            broken()


SIZES = {
    "L2": LayersStudent(type="layers", layers=(1, 3)),
    "L1H8": ScratchStudent(type="scratch", layers=1, hidden_size=8, heads=2, intermediate_size=12),
    "probe": ProbeStudent(type="probe"),
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return world(tmp_path_factory.mktemp("world"), config=TargetsConfig(features=Features(pooled=True, layers=(1,))))


@pytest.mark.parametrize("name", [*SIZES, "own"])
def test_a_size_known_beforehand_is_that_of_the_trained_student(storage, tmp_path, name):
    own = model_folder(tmp_path / "own", layers=3, labels=("x", "y"))
    config = SIZES.get(name) or PretrainedStudent(type="pretrained", model=str(own))
    # What the teacher started from: its head is for other labels.
    start = model_folder(tmp_path / "start", labels=("x", "y", "z", "w", "v"))
    from distillation import inference

    training = TrainingConfig(steps=1, batch_tokens=256, precision="fp32")
    losses = {"soft": LOSSES["soft"]}
    fit.train(settings(storage, name, student=config, training=training, losses=losses), LocalSession(), {})
    manifest = store.find(storage, f"students/{name}")
    folder = fit.model_folder(storage, f"students/{name}")
    columns = open_columns(storage, "corpora/c", "corpus", "validation")
    cost = inference.cost(folder, columns, TASK, LABELS, repeats=1)
    lengths = sorted(columns.whole("length").tolist())
    found = size_of(config, start, TASK, LABELS, lengths[len(lengths) // 2])
    assert found["parameters"] == manifest.facts["parameters"] == cost["parameters"]
    assert found["flops"] == cost["flops"]
    assert found["bytes"] == sum(4 * tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_flops_by_hand(teacher):
    # One layer on 5 tokens: 4 squares of attention and 2 x 12 of feed forward, on 8 wide; scores and values; pooler and head on one token.
    by_hand = 2 * (5 * (4 * 8 * 8 + 2 * 8 * 12) + 2 * 5 * 5 * 8 + 8 * 8 + 8 * 3)
    assert size_of(SIZES["L1H8"], teacher, TASK, LABELS, 5)["flops"] == by_hand


def test_bytes_are_those_of_an_export_within_a_percent(tmp_path):
    start = model_folder(tmp_path / "start", layers=2)
    config = ScratchStudent(type="scratch", layers=3, hidden_size=128, heads=4, intermediate_size=512)
    build(config, start).save_pretrained(tmp_path / "export")
    written = (tmp_path / "export/model.safetensors").stat().st_size
    assert size_of(config, start, TASK, LABELS, 4)["bytes"] == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("albert", {"embedding_size": 8}),  # one layer's weights, used by all
        ("deberta-v2", {}),
        ("gpt2", {"n_layer": 2, "n_embd": 16, "n_head": 2}),
        ("longformer", {"attention_window": 8}),  # looks at values while it computes
        (
            "bart",
            {
                "d_model": 16,
                "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
            },
        ),  # one embedding under three names
    ],
)
def test_sizes_of_other_architectures(tmp_path, kind, sizes):
    from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32} | sizes
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    made = CONFIG_MAPPING[kind](vocab_size=40, num_labels=7, **ids, **sizes)
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    model = models.load(tmp_path, TASK, LABELS).eval()
    found = size_of(PretrainedStudent(type="pretrained", model=str(tmp_path)), tmp_path, TASK, LABELS, 6)
    ids = torch.tensor([[2, 5, 9, 7, 8, 3]])
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["flops"] == flops(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_an_architecture_that_does_not_take_the_sizes_is_an_error_of_ours(tmp_path):
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, pooler_hidden_size=16)).save_pretrained(tmp_path)
    smaller = ScratchStudent(type="scratch", layers=1, hidden_size=8, heads=2, intermediate_size=16)
    with pytest.raises(InputError, match=r"DST-3210.*architecture cannot be built at these sizes.*Use other sizes"):
        size_of(smaller, tmp_path, TASK, LABELS, 6)


def test_an_outline_reads_no_tensor_and_refuses_what_cannot_be_built(teacher, tmp_path):
    from safetensors.torch import save_file

    network = outline(SIZES["L2"], teacher, TASK, ("x", "y"))
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert network.classifier.out_features == 2
    folder = model_folder(tmp_path / "empty")
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
    assert size_of(ProbeStudent(type="probe"), folder, TASK, LABELS, 8) == size_of(ProbeStudent(type="probe"), teacher, TASK, LABELS, 8)
    with pytest.raises(ConfigError, match="DST-2011"):
        outline(LayersStudent(type="layers", count=5), teacher, TASK, LABELS)


def test_labels_of_sizes():
    def pretrained(model):
        return label(PretrainedStudent(type="pretrained", model=model), 12)

    assert label(LayersStudent(type="layers", count=6), 12) == "L6"
    assert label(LayersStudent(type="layers", layers=(0, 5, 11)), 12) == "L3"
    assert label(ScratchStudent(type="scratch", layers=4, hidden_size=312, heads=12, intermediate_size=1200), 12) == "L4H312"
    assert label(ProbeStudent(type="probe"), 12) == "probe"
    assert pretrained("google-bert/bert-base-uncased") == "bert-base-uncase"
    assert pretrained("package:weights/inner/mini lm/") == "mini-lm"
    assert pretrained("s3://bucket/") == "bucket"
    assert pretrained("~/\u00e4\u00f6") == "pretrained"


# ---------------------------------------------------------------------------------------------------- of models for other tasks


def test_a_language_model_is_cut_with_its_embedding_tied_to_its_head(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    task = CausalLM(type="causal_lm", max_length=16)
    whole = models.load(tmp_path, task).eval()
    same = build_student(LayersStudent(type="layers", count=3), tmp_path, task, (), dropout=0.0, seed=0).eval()
    cut = build_student(LayersStudent(type="layers", layers=(0, 2)), tmp_path, task, (), dropout=0.0, seed=0).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(same(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert cut.lm_head.weight is cut.transformer.wte.weight
    assert torch.equal(cut.transformer.h[1].mlp.c_fc.weight, whole.transformer.h[2].mlp.c_fc.weight)
    config = ScratchStudent(type="scratch", layers=1, hidden_size=8, heads=2, intermediate_size=12)
    new = build_student(config, tmp_path, task, (), dropout=0.0, seed=0)
    assert (new.config.n_embd, new.config.n_layer, new.config.n_inner, new.config.vocab_size) == (8, 1, 12, 40)
    # Of a layer: 4 squares of attention and 2 x 12 of feed forward, on 8 wide; scores and values; the head over 40 words.
    found = size_of(config, tmp_path, task, (), 5)
    assert found["flops"] == 2 * (5 * (4 * 8 * 8 + 2 * 8 * 12 + 8 * 40) + 2 * 5 * 5 * 8)
    assert found["parameters"] == sum(p.numel() for p in new.parameters())
    assert found["bytes"] == 4 * found["parameters"]  # the tied head is written once


def test_attention_and_its_heads_of_a_llama_from_scratch(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path)
    task = CausalLM(type="causal_lm", max_length=16)
    config = ScratchStudent(type="scratch", layers=1, hidden_size=24, heads=3, intermediate_size=12)
    new = build_student(config, tmp_path, task, (), dropout=0.0, seed=0, attention="eager")
    assert (new.config.num_key_value_heads, new.config.head_dim, new.config._attn_implementation) == (3, 8, "eager")
    assert new(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 40)


def test_a_masked_language_model_is_cut(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path)
    task = MaskedLM(type="masked_lm", max_length=16)
    cut = build_student(LayersStudent(type="layers", layers=(2,)), tmp_path, task, (), dropout=0.0, seed=0)
    whole = models.load(tmp_path, task)
    assert torch.equal(cut.bert.encoder.layer[0].output.dense.weight, whole.bert.encoder.layer[2].output.dense.weight)
    assert torch.equal(cut.cls.predictions.decoder.weight, whole.bert.embeddings.word_embeddings.weight)
    assert torch.equal(cut.cls.predictions.bias, whole.cls.predictions.bias)


def test_a_convolutional_student_has_stages_of_its_own(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    made = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3)
    ResNetForImageClassification(made).save_pretrained(tmp_path)
    task, config = ImageClassification(type="image_classification", size=16), ConvolutionalStudent(
        type="convolutional", depths=(1, 1, 1), hidden_sizes=(4, 8, 12)
    )  # fmt: skip
    require_buildable(config, tmp_path, task)
    student = build_student(config, tmp_path, task, LABELS, dropout=0.0, seed=0)
    assert [len(stage.layers) for stage in student.resnet.encoder.stages] == [1, 1, 1]
    assert student(pixel_values=torch.zeros(2, 3, 16, 16)).logits.shape == (2, 3)
    assert size_of(config, tmp_path, task, LABELS, 1)["parameters"] == sum(p.numel() for p in student.parameters())
    assert label(config, 2) == "D3W12"
    assert outline(config, tmp_path, task, LABELS).classifier[1].in_features == 12
