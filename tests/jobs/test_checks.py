"""Models that do not fit a job, told by their config.json alone; and ladders with a rung missing."""

import json
import time

import pytest

from distillation.config import CausalLM
from distillation.errors import ConfigError, InputError
from jobs.checks import PACKS, check_student, check_teacher, locate, require_rungs, with_students_found
from jobs.config import JobConfig
from tests.distillation import test_storage

BERT = {"model_type": "bert", "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 40}
GPT = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 64}
RESNET = {"model_type": "resnet", "depths": [1, 1], "hidden_sizes": [8, 16], "num_channels": 3}
TEXT, IMAGE = {"type": "text_classification", "max_length": 16}, {"type": "image_classification", "size": 16, "channels": 3}
SOFT = {"soft": {"type": "forward_kl", "temperature": 1.0}}
LIVE = {"teacher": {"model": "m", "live": True, "targets": {"logits": {"type": "dense"}}}}


s3, s3_server = test_storage.s3, test_storage.s3_server
"""Fixtures."""


def job(task, **changes):
    training = {"epochs": 1, **changes.pop("training", {})}
    settings = {
        "name": "j", "task": task, "corpus": {"type": "files", "train": "x.parquet"}, "teacher": {"model": "m"},
        "student": {"type": "layers", "count": 1}, "losses": SOFT, "training": training,
    }  # fmt: skip
    return JobConfig.model_validate({**settings, **changes})


def folder(tmp_path, config, **tokens):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": t, "id": i} for i, t in enumerate(tokens.values())]}))
    return tmp_path


def test_packing_is_for_architectures_that_keep_rows_apart(tmp_path):
    lm = {"type": "causal_lm", "max_length": 16}
    assert "gpt2" in PACKS
    assert CausalLM(type="causal_lm").pack
    check_teacher(job(lm), "teacher", folder(tmp_path, GPT))
    opt = folder(tmp_path, {**GPT, "model_type": "opt"})
    with pytest.raises(ConfigError, match=r"DST-2036.*found opt. Set task.pack: false"):
        check_teacher(job(lm), "teacher", opt)
    check_teacher(job({**lm, "pack": False}), "teacher", opt)


@pytest.mark.parametrize("scale", [{"logit_scale": 0.25}, {"logits_scaling": 8}, {"final_logit_softcapping": 30.0}])
def test_logits_that_are_scaled_behind_the_head_are_refused_for_vocabularies(tmp_path, scale):
    made = folder(tmp_path, {**GPT, **scale})
    with pytest.raises(InputError, match=rf"DST-3232.*found {next(iter(scale))}"):
        check_teacher(job({"type": "causal_lm", "max_length": 16}), "teacher", made)
    check_teacher(job({"type": "causal_lm", "max_length": 16}), "teacher", folder(tmp_path, {**GPT, **dict.fromkeys(scale, 1)}))


def test_images_of_another_size_or_colour(tmp_path):
    with pytest.raises(ConfigError, match=r"DST-2033.*task.channels.*expected 1,.*found 3"):
        check_teacher(job(IMAGE), "teacher", folder(tmp_path, {**RESNET, "num_channels": 1}))
    with pytest.raises(ConfigError, match=r"DST-2033.*task.size.*expected 32,.*found 16"):
        check_teacher(job(IMAGE), "teacher", folder(tmp_path, {**BERT, "model_type": "vit", "image_size": 32}))


def test_masked_and_mixed_rows_need_models_for_them(tmp_path):
    masked = job(TEXT, **LIVE, training={"augment": {"type": "mask_tokens"}})
    with pytest.raises(ConfigError, match="DST-2037"):
        check_teacher(masked, "teacher", folder(tmp_path, BERT, pad_token="[PAD]"))
    check_teacher(masked, "teacher", folder(tmp_path, BERT, mask_token="[MASK]"))
    mixed = job(TEXT, **LIVE, training={"augment": {"type": "mixup"}})
    with pytest.raises(ConfigError, match=r"DST-2038.*found gpt2"):
        check_teacher(mixed, "teacher", folder(tmp_path, GPT))
    check_teacher(mixed, "teacher", folder(tmp_path, BERT))


def test_students_that_cannot_be():
    with pytest.raises(ConfigError, match="DST-2039"):
        check_student(job(IMAGE), "small", job(IMAGE).student, {"teacher": RESNET})
    attention = job(TEXT, **LIVE, losses={"a": {"type": "attention_kl", "layers": {0: 3}}})
    check_student(attention, "small", attention.student, {"teacher": BERT})
    scratch = attention.model_copy(update={"student": None}).model_validate(
        {**attention.model_dump(), "student": {"type": "scratch", "layers": 1, "hidden_size": 16, "heads": 4, "intermediate_size": 16}}
    )
    with pytest.raises(ConfigError, match=r"DST-2040.*expected 2 heads.*found 4 of small"):
        check_student(scratch, "small", scratch.student, {"teacher": BERT})
    deep = job(TEXT, **LIVE, losses={"a": {"type": "attention_kl", "layers": {0: 4}}})
    with pytest.raises(ConfigError, match=r"DST-2011.*layers 0 to 3 but found \[4\]"):
        check_student(deep, "small", deep.student, {"teacher": BERT})


def test_a_student_of_another_job_is_found_in_remote_storage(s3, tmp_path):
    settings = {"cluster": {"storage": s3.uri}, "tracking": {"uri": "http://127.0.0.1:1"}}
    for run, width in (("11111111", 8), ("22222222", 12)):
        s3.write(f"runs/first/{run}/students/small/config.json", json.dumps({**BERT, "hidden_size": width}).encode())
        s3.write(f"runs/first/{run}/students/small/model.safetensors", b"weights")
        time.sleep(1.1)  # times are in seconds there
    s3.write("runs/first/33333333/students/half/model.safetensors", b"weights")  # an upload that was not finished
    taught = job(TEXT, **settings, teacher={"model": "student:first/small"})
    assert json.loads((locate(taught.lead, taught) / "config.json").read_text())["hidden_size"] == 12
    begun = with_students_found(job(TEXT, **settings, student={"type": "pretrained", "model": "student:first/small"}))
    assert begun.student.model == s3.uri.replace("?", "/runs/first/22222222/students/small?")
    assert (locate(begun.student) / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(InputError, match=r"DST-3231.*student:first/half.*found small"):
        with_students_found(job(TEXT, **settings, student={"type": "pretrained", "model": "student:first/half"}))


def test_a_ladder_is_whole_before_its_first_job_runs(tmp_path):
    storage = {"cluster": {"storage": str(tmp_path)}}
    first = job(TEXT, **storage)
    second = job(TEXT, **storage, name="k", teacher={"model": "student:j/student"})
    require_rungs([first, second])
    with pytest.raises(InputError, match=r"DST-3231.*student:j/student"):
        require_rungs([second, first])
    with pytest.raises(InputError, match=r"DST-3231.*student:j/other"):
        require_rungs([first, job(TEXT, **storage, name="k", teacher={"model": "student:j/other"})])
    with pytest.raises(InputError, match=r"DST-3231.*student:j/other"):
        require_rungs([first, job(TEXT, **storage, name="k", student={"type": "pretrained", "model": "student:j/other"})])
