"""The one form of an error: one line for a person, the same for machines, unharmed by a trip through pickle."""

from __future__ import annotations

import pickle

import pytest

from distillation.errors import (
    ClusterError,
    ConfigError,
    ConflictError,
    DistilleryError,
    DivergedError,
    InputError,
    SecurityError,
    StorageError,
    TrackingError,
)

EXIT_CODES = {
    ConfigError: 2,
    InputError: 3,
    DivergedError: 4,
    StorageError: 5,
    ClusterError: 6,
    TrackingError: 7,
    ConflictError: 8,
    SecurityError: 9,
}


def test_every_class_is_listed_here():
    assert set(DistilleryError.__subclasses__()) == set(EXIT_CODES)


@pytest.mark.parametrize(("kind", "exit_code"), EXIT_CODES.items())
def test_pickle_keeps_everything(kind, exit_code):
    fields = {"what": "what", "where": "a/b:3", "expected": "7", "found": "8", "do": "Do this"}
    error = kind(f"DST-{exit_code}999", **fields)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.as_dict() == {"exit_code": exit_code, "code": f"DST-{exit_code}999", **fields}
    assert str(copy) == f"error[DST-{exit_code}999]: what: a/b:3: expected 7 but found 8. Do this"


@pytest.mark.parametrize(("kind", "exit_code"), EXIT_CODES.items())
def test_a_code_of_another_exit_code_is_our_own_mistake(kind, exit_code):
    with pytest.raises(AssertionError, match=f"does not belong to exit code {exit_code}"):
        kind(f"DST-{exit_code - 1}999", "what")


def test_what_is_not_known_is_left_out():
    assert str(InputError("DST-3999", "file is missing")) == "error[DST-3999]: file is missing"
    assert str(InputError("DST-3999", "file is missing", where="x")) == "error[DST-3999]: file is missing: x"
    assert str(InputError("DST-3999", "label", found="cat")) == "error[DST-3999]: label: expected nothing but found cat"


def test_data_cannot_forge_lines_or_colours():
    error = InputError("DST-3999", "label", found="a\nerror[DST-9999]: \x1b[31mred\r\u2028\u202e\0")
    line = str(error)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert line.endswith("a\\nerror[DST-9999]: \\x1b[31mred\\r\\u2028\\u202e\\x00")


def test_texts_in_other_scripts_stay_as_they_are():
    assert "蒸馏 é" in str(InputError("DST-3999", "label", found="蒸馏 é"))
