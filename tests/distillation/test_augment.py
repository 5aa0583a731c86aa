"""Mixed and masked rows: what becomes of inputs and labels, and that it does not depend on the cut."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from distillation.augment import PARTNER, SHARE, augment
from distillation.config import CrossEntropy, DrawMasks, MaskedLM, MaskTokens, Mixup
from distillation.documents import hide
from distillation.losses import CLASS_TERMS
from distillation.network import Network
from distillation.signals import UNLABELLED
from distillation.tasks import build_task
from tests.tiny import TASK, bert, rows_of, world

MIXUP, MASKED = Mixup(type="mixup", alpha=0.4), MaskTokens(type="mask_tokens", share=0.5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rows_of(world(tmp_path_factory.mktemp("world"), labelled=0.5), with_targets=False)


def test_masks_are_drawn_anew_and_as_many():
    task, generator = MaskedLM(type="masked_lm", max_length=64), np.random.default_rng(0)
    ordinary, originals, columns = np.arange(5, 40), [], {"input_ids": [], "places": [], "labels": []}
    for i in range(6):
        row = np.array([2, *generator.integers(5, 40, 10 + i), 3])
        hidden, places = hide(row, np.arange(1, 11 + i), 0.3, f"{i:032x}", 4, ordinary)
        originals.append(row)
        columns = {
            "input_ids": [*columns["input_ids"], hidden],
            "places": [*columns["places"], places],
            "labels": [*columns["labels"], row[places]],
        }
    columns["length"] = np.array([len(row) for row in originals])
    ids = [f"{i:032x}" for i in range(6)]
    batch = build_task(task).collate(ids, columns, {})
    drawn = [augment(batch, DrawMasks(type="draw_masks"), 4, 0, step, ordinary) for step in range(40)]
    for one in drawn:
        assert one.positions.tolist() == batch.positions.tolist() == [3, 3, 4, 4, 4, 4]  # 0.3 of 10 to 15, rounded
        flat = one.inputs["input_ids"].flatten().clone()
        assert not torch.equal(flat[one.scored], one.labels)  # something is hidden
        flat[one.scored] = one.labels  # what was hidden put back
        ends = np.cumsum(columns["length"])
        assert [flat[batch.tokens][e - len(row) : e].tolist() for e, row in zip(ends, originals, strict=True)] == [
            row.tolist() for row in originals
        ]
    first = [frozenset(one.scored[:3].tolist()) for one in drawn]
    assert len(set(first)) > 20  # of 120
    assert set().union(*first) == set(range(1, 11))  # every token of the first row, never its frame
    again = augment(
        build_task(task).collate(ids[:2], {n: v[:2] for n, v in columns.items()}, {}), DrawMasks(type="draw_masks"), 4, 0, 7, ordinary
    )
    assert again.labels.tolist() == drawn[7].labels[:6].tolist()  # however the batch is cut


def test_neighbours_are_mixed_and_one_left_over_stays_alone(rows):
    batch = augment(rows.batch(np.arange(5)), MIXUP, 0, seed=0, step=3)
    assert batch.inputs[PARTNER].tolist() == [1, 0, 3, 2, 4]
    share = batch.inputs[SHARE].tolist()
    assert share[0] == share[1] != share[2] == share[3]  # a pair draws one number
    assert share[4] == 1.0
    assert all(0.5 <= s <= 1 for s in share)
    assert batch.partner_labels.tolist() == batch.labels[[1, 0, 3, 2, 4]].tolist()


@pytest.mark.parametrize("config", [MIXUP, MASKED])
def test_the_same_row_at_the_same_step_however_the_batch_is_cut(rows, config):
    whole = augment(rows.batch(np.arange(6)), config, 1, seed=0, step=3)
    piece = augment(rows.batch(np.arange(2, 6)), config, 1, seed=0, step=3)
    later = augment(rows.batch(np.arange(6)), config, 1, seed=0, step=4)
    if config is MIXUP:
        assert whole.inputs[SHARE][2:].tolist() == piece.inputs[SHARE].tolist()
        assert whole.inputs[SHARE].tolist() != later.inputs[SHARE].tolist()
    else:
        width = piece.inputs["input_ids"].shape[1]
        assert torch.equal(whole.inputs["input_ids"][2:, :width], piece.inputs["input_ids"])
        assert not torch.equal(whole.inputs["input_ids"], later.inputs["input_ids"])


def test_masked_tokens_are_about_the_share_and_never_the_frame(rows):
    plain = rows.batch(np.arange(100))
    ids = augment(plain, MASKED, 39, seed=0, step=0).inputs["input_ids"]
    changed = ids != plain.inputs["input_ids"]
    assert (ids[changed] == 39).all()
    assert not changed[:, 0].any()
    assert not changed[torch.arange(100), plain.lengths - 1].any()
    assert not changed[plain.inputs["attention_mask"] == 0].any()
    inner = int((plain.lengths - 2).sum())
    assert abs(int(changed.sum()) / inner - 0.5) < 4 * math.sqrt(0.25 / inner)


def test_a_mixed_row_is_the_mixed_embedding(rows):
    model = bert().eval()
    network = Network(model, TASK)
    batch = rows.batch(np.arange(4))
    mixed = augment(batch, MIXUP, 0, seed=1, step=0)
    share, partner = mixed.inputs[SHARE][:, None, None], mixed.inputs[PARTNER]
    words = model.get_input_embeddings()(batch.inputs["input_ids"])
    mask = batch.inputs["attention_mask"]
    with torch.no_grad():
        found = network(mixed.inputs, mixed.scored, mixed.tokens, mixed.lengths).logits
        by_hand = model(inputs_embeds=share * words + (1 - share) * words[partner], attention_mask=mask | mask[partner]).logits
    assert torch.equal(found, by_hand)


def test_labels_are_mixed_in_the_same_shares(rows):
    batch = replace(rows.batch(np.arange(3)), labels=torch.tensor([0, 1, UNLABELLED]))
    batch = replace(batch, partner_labels=torch.tensor([1, 0, UNLABELLED]), share=torch.tensor([0.75, 0.75, 1.0]))
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]))
    values = CLASS_TERMS["cross_entropy"](CrossEntropy(type="cross_entropy"), logits, batch).tolist()
    expected = 0.75 * math.log(2) + 0.25 * math.log(4)
    assert values == pytest.approx([expected, expected, 0.0])
