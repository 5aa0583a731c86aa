"""What a network reports is what its model has inside: hidden states, head inputs, relations, logits."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from distillation.config import (
    CausalLM,
    CrossEntropy,
    Embedding,
    HiddenMSE,
    ImageClassification,
    MaskedLM,
    TextClassification,
    TokenClassification,
)
from distillation.errors import InputError
from distillation.losses import weigh
from distillation.network import Network, output_head, relation_modules
from distillation.signals import TeacherSignal
from distillation.tasks import build_task

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
TEXT, WORDS, MASKED = TextClassification(), CausalLM(type="causal_lm", max_length=16, pack=False), MaskedLM(type="masked_lm")
VECTOR = Embedding(type="embedding")


def made(name, **changes):
    """A model of transformers by the name of its class, small."""
    torch.manual_seed(0)
    kind = re.match("Bert|GPT2|Llama|ViT|ResNet", name)[0]
    sizes = {
        "Bert": SIZES, "Llama": SIZES | {"num_key_value_heads": 2},
        "GPT2": {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "initializer_range": 0.3},
        "ViT": {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
    }[kind]  # fmt: skip
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(pad_token_id=0, **sizes, **changes)).eval()


def rows(task, lengths=(5, 3, 7), last=False):
    """A batch of rows of these lengths, without padding token inside."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(4, 40, n).astype(np.int32) for n in lengths]
    places = [np.array([0, n - 1], np.int32) for n in lengths]
    columns = {
        "length": np.array(lengths, np.int32), "input_ids": ids, "label": np.zeros(len(lengths), np.int32), "places": places,
        "labels": [np.zeros(2, np.int32) for _ in lengths],
    }  # fmt: skip
    return build_task(task, 0, ("a", "b"), last=last).collate([str(i) for i in range(len(lengths))], columns, {})


def seen(network, batch):
    with torch.no_grad():
        return network(batch.inputs, batch.scored, batch.tokens, batch.lengths)


@pytest.mark.parametrize("at", ["scored", "tokens"])
@pytest.mark.parametrize(
    ("name", "task", "normed"),
    [
        ("BertForSequenceClassification", TEXT, False), ("BertForMaskedLM", MASKED, False), ("GPT2LMHeadModel", WORDS, True),
        ("LlamaForCausalLM", WORDS, True), ("GPT2ForSequenceClassification", TEXT, True), ("BertModel", VECTOR, False),
    ],
)  # fmt: skip
def test_hidden_states_are_those_of_the_model_before_its_last_norm(name, task, normed, at):
    model = made(name)
    batch = rows(task, last="GPT2ForS" in name)
    found = seen(Network(model, task, layers=(0, 2), at=at), batch).hidden
    with torch.no_grad():
        whole = model(**batch.inputs, output_hidden_states=True).hidden_states
    places = batch.scored if at == "scored" else batch.tokens
    first, last = (states.reshape(-1, 16)[places] for states in (whole[1], whole[3]))
    assert found.shape == (len(places), 2, 16)
    assert torch.equal(found[:, 0], first)
    if not normed:
        assert torch.equal(found[:, 1], last)
    else:
        body = model.base_model
        norm = body.ln_f if hasattr(body, "ln_f") else body.norm
        assert not torch.allclose(found[:, 1], last, atol=1e-2)
        with torch.no_grad():
            assert torch.allclose(norm(found[:, 1]), last, atol=1e-6)


def test_hidden_states_of_images():
    task = ImageClassification(type="image_classification", size=8)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows_ = torch.arange(2)
    for name, layers, widths in (("ViTForImageClassification", (0, 2), {16}), ("ResNetForImageClassification", (1,), {16})):
        model = made(name)
        network = Network(model, task, layers=layers, pooled=True)
        with torch.no_grad():
            found = network({"pixel_values": pixels}, rows_, rows_, torch.ones(2).long())
            whole = model(pixel_values=pixels, output_hidden_states=True)
        for place, layer in enumerate(layers):
            states = whole.hidden_states[layer + 1]
            its = states.mean((2, 3)) if states.dim() == 4 else states[:, 0]
            assert torch.allclose(found.hidden[:, place], its, atol=1e-6)
            assert {found.hidden.shape[-1]} == widths
        assert torch.equal(found.logits, whole.logits)
        with torch.no_grad():
            assert torch.allclose(network.head(found.pooled), found.logits, atol=1e-6)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_pooled_is_what_the_head_reads_at_the_scored_token(name):
    model, batch = made(name), rows(TEXT, last="GPT2" in name)
    network = Network(model, TEXT, pooled=True)
    found = seen(network, batch)
    with torch.no_grad():
        whole = model(**batch.inputs).logits
        assert torch.equal(found.logits, whole)
        assert torch.allclose(network.head(found.pooled), whole, atol=1e-6)
    assert seen(Network(model, TEXT), batch).pooled is None
    assert batch.scored.tolist() == ([4, 9, 20] if "GPT2" in name else [0, 7, 14])


@pytest.mark.parametrize(
    ("name", "task"),
    [("GPT2LMHeadModel", WORDS), ("LlamaForCausalLM", WORDS), ("BertForMaskedLM", MASKED),
     ("BertForTokenClassification", TokenClassification(type="token_classification"))],
)  # fmt: skip
def test_logits_made_in_pieces_are_those_of_the_model_at_the_scored_positions(name, task, monkeypatch):
    from distillation import signals

    model, batch = made(name), rows(task)
    network = Network(model, task, pooled=True)
    found = seen(network, batch)
    with torch.no_grad():
        whole = model(**batch.inputs).logits
    expected = whole.reshape(-1, whole.shape[-1])[batch.scored]
    assert found.logits is None
    assert torch.equal(found.pooled, found.states)
    for size in (1, 3 * whole.shape[-1], 1 << 22):
        monkeypatch.setattr(signals, "CHUNK_VALUES", size)
        with torch.no_grad():
            made_ = torch.cat([found.logits_of(part) for part in found.chunks()])
        assert torch.allclose(made_, expected, atol=1e-6)
    assert network.head is output_head(model)
    assert {name.split(".")[0] for name in network.state_dict()} == {"model"}  # the head is not there a second time


def test_relations_of_every_kind_of_attention():
    for name, task, kv in (("BertForMaskedLM", MASKED, 16), ("GPT2LMHeadModel", WORDS, 16), ("LlamaForCausalLM", WORDS, 8)):
        model, batch = made(name), rows(task)
        found = seen(Network(model, task, relations=1), batch).relations
        assert [tuple(value.shape) for value in found] == [(15, 16), (15, kv), (15, kv)], name
        states = seen(Network(model, task, layers=(0,), at="tokens"), batch).hidden[:, 0]
        with torch.no_grad():
            if "Bert" in name:
                its = model.bert.encoder.layer[1].attention.self
                expected = [its.query(states), its.key(states), its.value(states)]
            elif "GPT2" in name:
                block = model.transformer.h[1]
                expected = block.attn.c_attn(block.ln_1(states)).split(16, -1)
            else:
                layer = model.model.layers[1]
                normed = layer.input_layernorm(states)
                expected = [layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)]
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5), name
    with pytest.raises(InputError, match=r"DST-3230.*Linear"):
        relation_modules(torch.nn.Linear(2, 2))


def test_attention_maps_of_chosen_layers():
    model, batch = made("BertForSequenceClassification", attn_implementation="eager"), rows(TEXT)
    found = seen(Network(model, TEXT, layers=(0, 2), attentions=True), batch)
    with torch.no_grad():
        whole = model(**batch.inputs, output_attentions=True).attentions
    assert found.attentions.shape == (3, 2, 4, 7, 7)
    assert torch.equal(found.attentions[:, 1], whole[2])
    assert torch.allclose(found.attentions[1, :, :, :3, :3].sum(-1), torch.ones(2, 4, 3))


def test_an_embedding_is_the_mean_or_the_first_token_by_hand():
    model, batch = made("BertModel"), rows(VECTOR)
    with torch.no_grad():
        states = model(**batch.inputs).last_hidden_state
    mean = torch.stack([states[row, :n].mean(0) for row, n in enumerate((5, 3, 7))])
    found = seen(Network(model, VECTOR), batch)
    assert torch.allclose(found.pooled, mean, atol=1e-6)
    assert (found.logits, found.states) == (None, None)
    assert torch.equal(seen(Network(model, VECTOR.model_copy(update={"pooling": "first"})), batch).pooled, states[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert (seen(Network(model, VECTOR), batch).pooled - mean).abs().max() < 0.05


def test_projections_take_their_own_layers():
    model, batch = made("BertForSequenceClassification"), rows(TEXT)
    network = Network(model, TEXT, layers=(0, 1, 2), at="tokens", pooled=True, projections={"h": (2, 16, 24), "p": (1, 16, 5)})
    network.picks = {"h": [2, 0], "p": []}
    found = seen(network, batch)
    assert {name: tuple(value.shape) for name, value in found.projected.items()} == {"h": (15, 2, 24), "p": (3, 1, 5)}
    with torch.no_grad():
        assert torch.allclose(found.projected["h"][:, 0], found.hidden[:, 2] @ network.projections["h"][0].weight.T, atol=1e-6)
        assert torch.allclose(found.projected["h"][:, 1], found.hidden[:, 0] @ network.projections["h"][1].weight.T, atol=1e-6)
        assert torch.allclose(found.projected["p"][:, 0], found.pooled @ network.projections["p"][0].weight.T, atol=1e-6)
    assert not any(name.startswith("projections") for name in network.model.state_dict())


@pytest.mark.parametrize(
    ("name", "task"),
    [("BertModel", VECTOR), ("BertForSequenceClassification", TEXT), ("GPT2ForSequenceClassification", TEXT), ("GPT2LMHeadModel", WORDS),
     ("LlamaForCausalLM", WORDS), ("BertForMaskedLM", MASKED), ("BertForTokenClassification", TokenClassification(type="token_classification"))],
)  # fmt: skip
@pytest.mark.parametrize("only_states", [False, True])
def test_every_weight_that_is_trained_has_a_gradient_at_every_step(name, task, only_states):
    """Several workers wait for the gradient of each: one without would stop the run."""
    if task is VECTOR and not only_states:
        pytest.skip("an embedding has no classes")
    layers = (2,) if task is not VECTOR else ()
    network = Network(made(name), task, layers=layers, pooled=True, projections={"h": (1, 16, 8)})
    network.picks = {"h": [0] if layers else []}
    batch = rows(task, last="GPT2ForS" in name)
    outputs = network(batch.inputs, batch.scored, batch.tokens, batch.lengths)
    n = len(batch.scored)
    signal = TeacherSignal(hidden=torch.randn(n, 1, 8), layers=(0,), pooled=torch.randn(n, 8))
    terms = {"h": HiddenMSE(type="hidden_mse", layers={2: 0} if layers else None, projection=True)}
    terms |= {} if only_states else {"hard": CrossEntropy(type="cross_entropy")}
    value, _ = weigh(terms, outputs, replace(batch, signals={"t": signal}), dict.fromkeys(terms, n))
    value.backward()
    assert [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
