"""A narrower student is the teacher without the units that did least: nothing cut changes nothing, nothing dead is kept."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn

from distillation.errors import ConfigError, InputError
from distillation.families import FAMILIES, Places
from distillation.width import Importance, Widths, cut_width, measure, settings_for

BERT_SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 24, "initializer_range": 0.4, "num_labels": 2,
}  # fmt: skip
LLAMA_SIZES = {**BERT_SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2_SIZES = {
    "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 24, "initializer_range": 0.4, "num_labels": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT_SIZES = {**BERT_SIZES, "image_size": 8, "patch_size": 4}
del VIT_SIZES["vocab_size"], VIT_SIZES["max_position_embeddings"]
SIZES = {"Bert": BERT_SIZES, "Roberta": BERT_SIZES, "XLMRoberta": BERT_SIZES, "Camembert": BERT_SIZES, "GPT2": GPT2_SIZES, "ViT": VIT_SIZES}
MODELS = [
    "BertModel", "BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM", "BertForPreTraining",
    "BertForQuestionAnswering", "RobertaForSequenceClassification", "RobertaForMaskedLM", "XLMRobertaForSequenceClassification",
    "CamembertForSequenceClassification", "GPT2Model", "GPT2ForSequenceClassification", "GPT2LMHeadModel", "LlamaModel",
    "LlamaForSequenceClassification", "LlamaForCausalLM", "LlamaForTokenClassification", "Qwen2ForSequenceClassification",
    "Qwen2ForCausalLM", "MistralForSequenceClassification", "ViTModel", "ViTForImageClassification",
]  # fmt: skip
ONE_EACH = ["BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM", "ViTForImageClassification"]


def build(name, seed=0, **changes):
    """A small random model whose biases and norms are random too, so that a mistake with them shows."""
    kind = name.replace("Model", "For").split("For")[0].removesuffix("LMHead")
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**{**SIZES.get(kind, LLAMA_SIZES), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def inputs(model, seed=1, rows=4):
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, 40, (rows, 10), generator=generator)
    mask = (torch.arange(10) < torch.tensor([10, 7, 4, 10])[:rows, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, model.config.pad_token_id or 0), "attention_mask": mask}


def answers(model, seed=1):
    """The outputs of real tokens, as one tensor."""
    with torch.no_grad():
        found = model(**inputs(model, seed), return_dict=True)
    return torch.cat([value.flatten() for value in found.values() if isinstance(value, torch.Tensor)])


def body(model):
    return getattr(model, model.base_model_prefix, model)


# ------------------------------------------------------------------------------------------------------------ all families


@pytest.mark.parametrize("name", MODELS)
def test_nothing_cut_changes_nothing(name):
    model = build(name)
    same = cut_width(model, Widths(), measure(model, [inputs(model)]))
    assert torch.equal(answers(same), answers(model))
    assert type(same) is type(model)
    assert same.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_is_the_configurations_and_the_folder_loads(name, tmp_path):
    model = build(name)
    widths = Widths(hidden_size=8, heads=2, intermediate_size=10)
    small = cut_width(model, widths, measure(model, [inputs(model)]))
    assert small.config.hidden_size == 8
    assert small.config.num_attention_heads == 2
    assert all(torch.isfinite(value).all() for value in small.state_dict().values())
    with torch.device("meta"):
        outline = type(model)(settings_for(model.config, widths))
    assert {n: t.shape for n, t in outline.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answers(loaded), answers(small))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_others_apart(name, tied):
    model = build(name, tie_word_embeddings=tied)
    small = cut_width(model, Widths(hidden_size=8, heads=2), measure(model, [inputs(model)]))
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", MODELS)
def test_measuring_leaves_the_model_alone(name):
    model = build(name).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure(model, [inputs(model)])
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    cut_width(model, Widths(intermediate_size=4), measure(model, [inputs(model)]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [name for name in MODELS if "ViT" not in name])
def test_padding_does_not_count(name):
    model = build(name)
    batch = inputs(model)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 39)}
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        other["position_ids"] = batch["position_ids"] = torch.arange(2, 12).expand(4, 10)  # else counted from the padding
    one, two = measure(model, [batch]), measure(model, [other])
    for a, b in zip([one.hidden, *one.heads, *one.intermediate], [two.hidden, *two.heads, *two.intermediate], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_cut_of_the_batches_does_not_matter():
    model = build("BertForSequenceClassification")
    whole = inputs(model)
    one, two = measure(model, [whole]), measure(model, [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}])
    for a, b in zip(vars(one).values(), vars(two).values(), strict=True):
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("name", ONE_EACH)
def test_heads_count_as_the_length_of_what_they_add(name):
    """Against the contributions written out: one head's slice of the context times its slice of the outgoing weights."""
    model, batch = build(name), inputs(build(name))
    found = measure(model, [batch]).heads[1]
    places, seen = Places(model), []
    module = model.get_submodule(places.in_layer(1, places.family.attention))
    handle = module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
    context = seen[0][batch["attention_mask"].bool()] if "attention_mask" in batch else seen[0].flatten(0, 1)
    wanted = [(context[:, h * 4 : h * 4 + 4] @ weight[h * 4 : h * 4 + 4]).norm(dim=1).mean() for h in range(4)]
    torch.testing.assert_close(found.float(), torch.stack(wanted).detach(), rtol=1e-4, atol=1e-6)


def test_units_count_as_their_activation_times_their_outgoing_weights():
    """Unit u of the first layer always fires with u, its bias, and leaves through a weight of 2 or 3."""
    model = build("BertModel", hidden_act="relu", intermediate_size=4)
    layer = model.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight.zero_()
        layer.intermediate.dense.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        layer.output.dense.weight.zero_()
        layer.output.dense.weight[0] = torch.tensor([2.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(measure(model, [inputs(model)]).intermediate[0], torch.tensor([0.0, 2.0, 6.0, 6.0]).double())


def test_hidden_dimensions_count_as_the_output_of_the_norms():
    """All five norms of two layers put out their bias alone: |1|, |-2|, 0, ... in every one."""
    model = build("BertModel")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.zero_()
                module.bias.copy_(torch.tensor([1.0, -2.0] + [0.0] * 14))
    torch.testing.assert_close(measure(model, [inputs(model)]).hidden, torch.tensor([1.0, 2.0] + [0.0] * 14).double())


# ------------------------------------------------------------------------------------------------------------- what is cut


def silence(model, layer, units=(), heads=()):
    """Outgoing weights of these units and heads (4 wide) to zero."""
    places = Places(model)
    for name, dead in (
        (places.family.feed_forward, list(units)),
        (places.family.attention, [h * 4 + i for h in heads for i in range(4)]),
    ):
        module = model.get_submodule(places.in_layer(layer, name))
        with torch.no_grad():
            (module.weight.T if isinstance(module, nn.Linear) else module.weight)[dead] = 0.0


@pytest.mark.parametrize("name", MODELS)
def test_dead_units_of_each_layer_go_and_nothing_changes(name):
    model = build(name)
    dead = ([0, 5, 7, 23], [1, 2, 3, 20])
    for layer, units in enumerate(dead):
        silence(model, layer, units)
    small = cut_width(model, Widths(intermediate_size=20), measure(model, [inputs(model)]))
    torch.testing.assert_close(answers(small), answers(model), rtol=1e-4, atol=1e-5)
    places = Places(model)
    for layer, units in enumerate(dead):
        name = places.in_layer(layer, places.family.feed_forward)
        old, new = model.get_submodule(name), small.get_submodule(name)
        rows = [i for i in range(24) if i not in units]
        assert torch.equal(new.weight, old.weight[:, rows] if isinstance(old, nn.Linear) else old.weight[rows])


@pytest.mark.parametrize(
    ("name", "changes", "dead", "kv_heads"),
    [
        ("ViTForImageClassification", {}, ([0, 2], [1, 2]), None),
        ("LlamaForCausalLM", {}, ([0, 1], [2, 3]), 1),  # groups 0 1 and 2 3: one of them goes, with its key-value head
        ("Qwen2ForCausalLM", {}, ([2, 3], [0, 1]), 1),
        ("MistralForSequenceClassification", {"num_key_value_heads": 4}, ([0, 2], [1, 2]), 2),
        ("LlamaForCausalLM", {"num_attention_heads": 6, "hidden_size": 24}, ([0, 5], [1, 3]), 2),  # 0 1 2 and 3 4 5: one of each goes
    ],
)
def test_dead_heads_of_each_layer_go_and_nothing_changes(name, changes, dead, kv_heads):
    model = build(name, **changes)
    for layer, heads in enumerate(dead):
        silence(model, layer, heads=heads)
    heads = model.config.num_attention_heads - 2
    small = cut_width(model, Widths(heads=heads), measure(model, [inputs(model)]))
    assert small.config.num_attention_heads == heads
    if kv_heads is not None:
        assert small.config.num_key_value_heads == kv_heads
        assert body(small).layers[0].self_attn.k_proj.weight.shape[0] == 4 * kv_heads
    torch.testing.assert_close(answers(small), answers(model), rtol=1e-4, atol=1e-5)


def deaden(model, dimensions):
    """Nothing is ever written into these residual dimensions of a Llama-like model."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, dimensions] = 0.0
        for layer in body(model).layers:
            layer.self_attn.o_proj.weight[dimensions] = 0.0
            layer.mlp.down_proj.weight[dimensions] = 0.0


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_dead_hidden_dimensions_go_and_nothing_changes_under_an_rms_norm(name):
    """The norm divides by the mean square of fewer dimensions, all of the energy in them: its weight makes up for that."""
    model = build(name, hidden_size=32, head_dim=4, rms_norm_eps=1e-12)
    dead = [0, 3, 4, 9, 10, 17, 30, 31]
    deaden(model, dead)
    importance = measure(model, [inputs(model)])
    assert (importance.hidden == 0).nonzero().flatten().tolist() == dead
    small = cut_width(model, Widths(hidden_size=24), importance)
    torch.testing.assert_close(answers(small), answers(model), rtol=1e-3, atol=1e-4)
    alive = [i for i in range(32) if i not in dead]
    norm = body(model).norm.weight
    torch.testing.assert_close(body(small).norm.weight, norm[alive] * (32 / 24) ** 0.5)  # sqrt(mean of the shares, 32/24 each)


def test_one_set_of_hidden_dimensions_in_their_old_order():
    """Chosen by hand: the three largest of each kind, ties to the first."""
    model = build("GPT2LMHeadModel")
    hidden = torch.zeros(16).double()
    hidden[[1, 2, 5, 6, 8, 11, 12, 15]] = torch.tensor([1.0, 9.0, 2.0, 1.0, 7.0, 1.0, 3.0, 1.0]).double()
    importance = Importance(
        hidden, (torch.tensor([0.0, 5, 1, 5]), torch.tensor([9.0, 0, 0, 0])), (torch.arange(24.0), -torch.arange(24.0)), None, {}
    )
    small = cut_width(model, Widths(hidden_size=8, intermediate_size=3), importance)
    rows = [1, 2, 5, 6, 8, 11, 12, 15]
    old, new = model.transformer, small.transformer
    assert torch.equal(new.wte.weight, old.wte.weight[:, rows])
    assert torch.equal(new.wpe.weight, old.wpe.weight[:, rows])
    assert torch.equal(new.ln_f.bias, old.ln_f.bias[rows])
    for layer, heads, units in ((0, [1, 3], [21, 22, 23]), (1, [0, 1], [0, 1, 2])):
        columns = [h * 4 + i for h in heads for i in range(4)]
        fused = [part * 16 + column for part in range(3) for column in columns]
        assert torch.equal(new.h[layer].attn.c_attn.weight, old.h[layer].attn.c_attn.weight[rows][:, fused])
        assert torch.equal(new.h[layer].attn.c_attn.bias, old.h[layer].attn.c_attn.bias[fused])
        assert torch.equal(new.h[layer].attn.c_proj.weight, old.h[layer].attn.c_proj.weight[columns][:, rows])
        assert torch.equal(new.h[layer].mlp.c_fc.weight, old.h[layer].mlp.c_fc.weight[rows][:, units])
        assert torch.equal(new.h[layer].mlp.c_proj.bias, old.h[layer].mlp.c_proj.bias[rows])


def test_a_pooler_keeps_what_its_classifier_reads():
    model = build("BertForSequenceClassification")
    read = [2, 3, 6, 7, 9, 10, 13, 14]
    with torch.no_grad():
        model.classifier.weight[:, [i for i in range(16) if i not in read]] = 0.0
    small = cut_width(model, Widths(hidden_size=8), measure(model, [inputs(model)]))
    assert torch.equal(small.classifier.weight, model.classifier.weight[:, read])
    assert torch.equal(small.bert.pooler.dense.bias, model.bert.pooler.dense.bias[read])


def trained(name):
    """Taught for a moment to tell how often token 7 comes (or a bright image), with units of very different size."""
    model = build(name, num_labels=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = inputs(model, seed=step)
        key = "pixel_values" if "pixel_values" in batch else "input_ids"
        labels = (batch[key].flatten(1).float().mean(1) > (0 if key == "pixel_values" else 17)).long()
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "name",
    ["BertForSequenceClassification", "GPT2ForSequenceClassification", "LlamaForSequenceClassification", "ViTForImageClassification"],
)
def test_more_cut_is_further_away_and_the_least_important_hurt_least(name):
    model = trained(name)
    importance = measure(model, [inputs(model, seed) for seed in range(100, 104)])
    upside_down = Importance(-importance.hidden, importance.heads, tuple(-i for i in importance.intermediate), importance.pooled, {})

    def error(widths, by):
        small = cut_width(model, widths, by)
        return sum(float((answers(small, s) - answers(model, s)).square().mean()) for s in range(1, 9)) ** 0.5

    errors = [error(Widths(intermediate_size=size), importance) for size in (24, 20, 12, 4)]
    assert errors[0] == 0
    assert all(a < b * 1.1 for a, b in itertools.pairwise(errors)), errors
    assert errors[2] < error(Widths(intermediate_size=12), upside_down)


def test_bf16_is_measured_and_comes_out_in_fp32():
    model = build("LlamaForCausalLM").bfloat16()
    model.config.dtype = torch.bfloat16
    small = cut_width(model, Widths(intermediate_size=12), measure(model, [inputs(model)]))
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert small.config.dtype == torch.float32
    assert all(i.dtype == torch.float64 for i in measure(model, [inputs(model)]).heads)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "widths", "sizes"),
    [
        ("BertModel", Widths(hidden_size=12), (12, 3, 24)),  # heads of 4 dimensions
        ("BertModel", Widths(heads=1), (4, 1, 24)),
        ("BertModel", Widths(intermediate_size=7), (16, 4, 7)),
        ("GPT2Model", Widths(hidden_size=8, heads=2), (8, 2, 24)),
        ("LlamaModel", Widths(hidden_size=12), (12, 4, 24)),
        ("LlamaModel", Widths(heads=2), (16, 2, 24)),
        ("ViTModel", Widths(hidden_size=10, heads=3), (10, 3, 24)),
    ],
)
def test_sizes(name, widths, sizes):
    config = build(name).config
    before = config.to_dict()
    settings = settings_for(config, widths)
    inner = settings.n_inner if name == "GPT2Model" else settings.intermediate_size
    assert (settings.hidden_size, settings.num_attention_heads, inner) == sizes
    assert config.to_dict() == before


def test_gpt2_without_an_inner_size_has_four_times_the_hidden_one():
    config = build("GPT2Model", n_inner=None).config
    assert settings_for(config, Widths(hidden_size=8)).n_inner == 64
    assert settings_for(config, Widths(intermediate_size=8)).n_inner == 8


@pytest.mark.parametrize(
    ("name", "changes", "widths", "line"),
    [
        ("BertModel", {}, Widths(hidden_size=20), "DST-2021.*student.hidden_size: expected 1 to 16, as in the teacher but found 20"),
        ("BertModel", {}, Widths(heads=0), "DST-2021.*student.heads: expected 1 to 4"),
        ("ViTModel", {}, Widths(intermediate_size=25), "DST-2021.*student.intermediate_size: expected 1 to 24"),
        ("BertModel", {}, Widths(hidden_size=10), "DST-2023.*4 for each head, as in the teacher: 16 with 4 heads but found 10"),
        ("BertModel", {}, Widths(hidden_size=8, heads=3), "DST-2023.*12 with 3 heads but found 8"),
        ("GPT2Model", {}, Widths(hidden_size=16, heads=2), "DST-2023.*8 with 2 heads but found 16"),
        ("LlamaModel", {}, Widths(hidden_size=10), "DST-2023.*a multiple of the 4 heads but found 10"),
        ("Qwen2Model", {}, Widths(heads=1), r"DST-2022.*multiple of 2 \(whole groups\) or of 2 .*but found 1"),
    ],
)
def test_sizes_that_cannot_be(name, changes, widths, line):
    with pytest.raises(ConfigError, match=line):
        settings_for(build(name, **changes).config, widths)


def test_qwen_and_vit_take_a_hidden_size_that_heads_do_not_divide():
    for name in ("Qwen2ForCausalLM", "ViTForImageClassification"):
        model = build(name)
        small = cut_width(model, Widths(hidden_size=10), measure(model, [inputs(model)]))
        assert small.config.head_dim == 4
        assert torch.isfinite(answers(small)).all()


def test_other_architectures_are_refused():
    config = transformers.DistilBertConfig(dim=16, n_heads=2, hidden_dim=32, n_layers=1)
    with pytest.raises(InputError, match=r"DST-3220.*distilbert: expected one of bert, .*but found distilbert"):
        settings_for(config, Widths())
    with pytest.raises(InputError, match=r"DST-3220.*with cross-attention"):
        settings_for(transformers.BertConfig(**BERT_SIZES, is_decoder=True, add_cross_attention=True), Widths())
    with pytest.raises(InputError, match=r"DST-3220.*multiple_choice_head"):
        measure(transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**{**GPT2_SIZES, "num_labels": 1})), [])


def test_every_family_is_tried_here():
    assert {build(name).config.model_type for name in MODELS} == set(FAMILIES)
