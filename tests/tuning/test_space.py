"""The points of a space, by hand and by property: order, conditions, values, names."""

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from distillation.errors import ConfigError
from tuning.config import KnobConfig
from tuning.space import Space, identity, nearest, paths, sample, trial_name, values

KNOBS = TypeAdapter(dict[str, KnobConfig])

BASE = {
    "student": {"type": "layers", "layers": None, "count": 6},
    "losses": {
        "hard": {"type": "cross_entropy", "weight": 0.3},
        "soft": {"type": "forward_kl", "temperature": 2.0, "weight": 0.7},
    },
    "training": {"learning_rate": 2e-4, "epochs": 3},
}


def space(knobs, base=BASE):
    return Space(KNOBS.validate_python(knobs), base)


def first(path, knob):
    found = values(knob, 2)
    return found.at(0)


def last(path, knob):
    found = values(knob, 2)
    return found.at(found.size - 1)


# ------------------------------------------------------------------------------------------------------------------ order


def test_knobs_come_after_what_they_lie_under_and_look_at_and_otherwise_as_in_the_file():
    knobs = {
        "student.count": {"integer": [1, 6], "when": {"student.type": "layers"}},
        "training.epochs": {"integer": [1, 3], "when": {"losses.soft": 1}},  # above losses.soft.weight
        "training.learning_rate": {"uniform": [0, 1]},
        "losses.soft.weight": {"uniform": [0, 1], "when": {"losses.hard.weight": [0.0, 0.5]}},
        "student": {"choice": [{"type": "layers"}, {"type": "probe"}]},
        "losses.hard.weight": {"choice": [0.0, 0.5]},
    }
    assert list(space(knobs).knobs) == [
        "training.learning_rate", "student", "student.count", "losses.hard.weight", "losses.soft.weight", "training.epochs",
    ]  # fmt: skip
    plain = {"b": {"choice": [1]}, "a": {"choice": [1]}, "ab": {"choice": [1]}}
    assert list(space(plain, {"a": 0, "b": 0, "ab": 0}).knobs) == ["b", "a", "ab"]


def test_knobs_that_wait_for_each_other_are_refused():
    circle = {
        "x": {"choice": [1], "when": {"a": 1}},
        "a": {"choice": [1], "when": {"b.c": 1}},
        "b": {"choice": [1], "when": {"a": 1}},
    }
    with pytest.raises(ConfigError) as error:
        space(circle)
    assert error.value.code == "DST-2015"
    assert error.value.found == "a waits for b waits for a"
    with pytest.raises(ConfigError, match="DST-2015"):  # student.count lies under student, which looks at it
        space({"student": {"choice": [1], "when": {"student.count": 2}}, "student.count": {"choice": [2]}})


# ------------------------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ({}, True),
        ({"losses.soft.type": "forward_kl"}, True),
        ({"losses.soft.type": "logit_mse"}, False),
        ({"losses.soft.type": ["logit_mse", "forward_kl"]}, True),
        ({"losses.soft.temperature": 2}, True),  # 2 is 2.0
        ({"losses.soft.type": "forward_kl", "training.epochs": 4}, False),  # all of them
        ({"losses.soft.beta": 1}, False),  # not there
        ({"losses.soft.beta": None}, False),
        ({"student.layers": None}, True),
        ({"training.epochs": True}, False),
        ({"losses.hard": {"weight": 0.3, "type": "cross_entropy"}}, True),
    ],
)
def test_a_condition_looks_at_the_settings_of_the_job(when, holds):
    point = space({"training.learning_rate": {"choice": [1.0], "when": when}}).draw(first)
    assert point == ({"training.learning_rate": 1.0} if holds else {})


def test_a_condition_looks_at_what_was_drawn_before():
    knobs = {
        "losses.soft": {"choice": [{"type": "forward_kl", "weight": 1.0}, {"type": "jsd", "beta": 0.5}]},
        "losses.soft.beta": {"choice": [0.1, 0.9], "when": {"losses.soft.type": "jsd"}},
        "losses.soft.temperature": {"choice": [3.0, 4.0], "when": {"losses.soft.type": "forward_kl"}},
        "training.epochs": {"choice": [1, 2], "when": {"losses.soft.beta": 0.9}},
    }
    assert space(knobs).draw(first) == {"losses.soft": {"type": "forward_kl", "weight": 1.0}, "losses.soft.temperature": 3.0}
    assert space(knobs).draw(last) == {"losses.soft": {"type": "jsd", "beta": 0.5}, "losses.soft.beta": 0.9, "training.epochs": 2}


def test_a_knob_that_does_not_fit_what_was_drawn_stays_so_that_the_job_refuses_it():
    knobs = {"student": {"choice": [{"type": "layers", "count": 2}]}, "student.hidden_size": {"choice": [64]}}
    point = space(knobs).draw(first)
    assert point == {"student": {"type": "layers", "count": 2}, "student.hidden_size": 64}
    assert space(knobs).apply(point)["student"] == {"type": "layers", "count": 2, "hidden_size": 64}


# ------------------------------------------------------------------------------------------------------------------ apply


def test_apply_sets_what_lies_above_first_and_shares_nothing():
    student = {"type": "layers", "layers": [0, 5]}
    over = space({"student": {"choice": [student]}, "student.layers": {"choice": [[1, 2]]}})
    point = {"student.layers": [1, 2], "student": student}
    made = over.apply(point)
    assert made == {**BASE, "student": {"type": "layers", "layers": [1, 2]}}
    made["student"]["layers"].append(9)
    made["losses"]["soft"]["weight"] = 9
    assert (point, student) == ({"student.layers": [1, 2], "student": student}, {"type": "layers", "layers": [0, 5]})
    assert over.apply({}) == BASE
    point = over.draw(first)
    point["student"]["layers"].append(7)
    assert over.draw(first) == {"student": {"type": "layers", "layers": [0, 5]}, "student.layers": [1, 2]}


@pytest.mark.parametrize(
    ("path", "found"), [("losses.extra.weight", "none"), ("training.epochs.most", "3"), ("student.layers.0", "None"), ("a.b.c", "none")]
)
def test_a_knob_without_a_place_is_refused_with_its_path(path, found):
    over = space({path: {"choice": [1]}})
    with pytest.raises(ConfigError) as error:
        over.apply(over.draw(first))
    assert (error.value.code, error.value.where, error.value.found) == ("DST-2016", f"search.space.{path}", found)


def test_names_may_hold_dots():
    base = {"losses": {"soft.v2": {"weight": 0.5}, "soft": 1}}
    over = space({"losses.soft.v2.weight": {"choice": [0.1], "when": {"losses.soft.v2.weight": 0.5}}}, base)
    assert "losses.soft.v2.weight" in paths(base)
    assert over.apply(over.draw(first)) == {"losses": {"soft.v2": {"weight": 0.1}, "soft": 1}}


# ----------------------------------------------------------------------------------------------------------- grid and size


def test_a_grid_goes_through_all_combinations_in_order_and_respects_conditions():
    knobs = {
        "losses.soft": {"choice": [{"type": "forward_kl"}, {"type": "jsd"}]},
        "losses.soft.beta": {"uniform": [0.0, 1.0], "when": {"losses.soft.type": "jsd"}},
        "training.epochs": {"integer": [1, 2]},
    }
    over = space(knobs)
    kl, jsd = {"type": "forward_kl"}, {"type": "jsd"}
    assert list(over.grid(3)) == [
        {"losses.soft": kl, "training.epochs": 1},
        {"losses.soft": kl, "training.epochs": 2},
        *({"losses.soft": jsd, "losses.soft.beta": beta, "training.epochs": epochs} for beta in (0.0, 0.5, 1.0) for epochs in (1, 2)),
    ]


@pytest.mark.parametrize(
    ("knob", "expected"),
    [
        ({"uniform": [1, 2]}, [1.0, 1.25, 1.5, 1.75, 2.0]),
        ({"log_uniform": [0.01, 100]}, [0.01, 0.1, 1.0, 10.0, 100.0]),
        ({"integer": [-1, 2]}, [-1, 0, 1, 2]),
        ({"quantized": [0.1, 0.45, 0.1]}, [0.1, 0.2, 0.3, 0.4]),  # and not 0.30000000000000004
        ({"quantized": [0, 0.3, 0.1]}, [0.0, 0.1, 0.2, 0.3]),  # 0.3 / 0.1 is 2.9999999999999996
        ({"choice": ["b", "a", "b"]}, ["b", "a"]),
        ({"choice": [1, True, 1.0, [1], {"x": 1}, {"x": 1.0}]}, [1, True, [1], {"x": 1}]),
        ({"choice": [None]}, [None]),
    ],
)
def test_the_values_of_a_knob(knob, expected):
    found = [point["training.epochs"] for point in space({"training.epochs": knob}).grid(5)]
    assert found == pytest.approx(expected) if "log_uniform" in knob else found == expected
    assert (found[0], found[-1]) == (expected[0], expected[-1])


def test_the_size_of_a_space_by_hand():
    knobs = {
        "losses.soft": {"choice": [{"type": "forward_kl"}, {"type": "jsd"}, {"type": "logit_mse"}]},
        "losses.soft.beta": {"quantized": [0, 1, 0.25], "when": {"losses.soft.type": "jsd"}},  # 5 values
        "losses.soft.temperature": {"choice": [1, 2], "when": {"losses.soft.type": ["jsd", "forward_kl"]}},
        "training.epochs": {"integer": [1, 4]},
        "student.count": {"choice": [1, 2, 3]},
    }
    over = space(knobs)
    assert len({identity(point) for point in over.grid(2)}) == len(list(over.grid(2))) == (2 + 5 * 2 + 1) * 4 * 3 == 156
    del knobs["losses.soft"]  # forward_kl, as the job says
    assert len(list(space(knobs).grid(2))) == 2 * 4 * 3


def test_a_big_grid_is_made_as_it_is_asked_for():
    start = time.monotonic()
    many = {f"training.a{i}": {"integer": [1, 1000]} for i in range(20)}
    for knobs in (many, {"training.epochs": {"quantized": [0, 1e9, 0.1]}}):
        assert len(list(itertools.islice(space(knobs).grid(2), 1000))) == 1000
    assert time.monotonic() - start < 1
    chained = {f"training.a{i}": {"choice": [1, 2], "when": {f"training.a{i - 1}": 1} if i else {}} for i in range(30)}
    assert len(list(space(chained).grid(2))) == 31  # 2, 12, 112, ..., and all ones


# ---------------------------------------------------------------------------------------------------------------- sampling


def test_samples_follow_their_domain():
    generator = random.Random(0)
    knobs = KNOBS.validate_python(
        {"u": {"uniform": [2, 4]}, "l": {"log_uniform": [1e-4, 1]}, "i": {"integer": [1, 3]}, "q": {"quantized": [0, 1, 0.5]},
         "c": {"choice": ["a", [1]]}}
    )  # fmt: skip
    drawn = {name: [sample(knob, generator) for _ in range(4000)] for name, knob in knobs.items()}
    assert sum(drawn["u"]) / 4000 == pytest.approx(3, abs=0.05)
    assert sum(map(math.log10, drawn["l"])) / 4000 == pytest.approx(-2, abs=0.1)  # a uniform draw would have -0.43
    for name, expected in {"i": [1, 2, 3], "q": [0.0, 0.5, 1.0], "c": ["a", [1]]}.items():
        for value in expected:
            assert drawn[name].count(value) / 4000 == pytest.approx(1 / len(expected), abs=0.03)


NUMBERS = st.floats(-1e6, 1e6)
PAIRS = st.tuples(NUMBERS, NUMBERS).map(sorted).filter(lambda pair: pair[1] - pair[0] > 1e-6)
DOMAINS = st.one_of(
    PAIRS.map(lambda pair: {"uniform": pair}),
    PAIRS.map(lambda pair: {"log_uniform": [10 ** (p / 1e6) for p in pair]}).filter(lambda k: k["log_uniform"][0] < k["log_uniform"][1]),
    st.tuples(st.integers(-9, 9), st.integers(1, 99)).map(lambda p: {"integer": [p[0], p[0] + p[1]]}),
    st.tuples(st.integers(-99, 99), st.integers(1, 20), st.integers(1, 99)).map(
        lambda p: {"quantized": [p[0] / 10, p[0] / 10 + p[1] * p[2] / 7, p[2] / 7 / 2]}
    ),
    st.lists(st.sampled_from([0, 1, True, "x", None, [1, 2], {"c": 1}, {"d": 0, "c": [1, 2]}]), min_size=1).map(lambda v: {"choice": v}),
)
TREE = {"a": 0, "b": {"c": 1, "d": "x"}, "e": {"f": {"g": None}}}
WISHES = st.sampled_from([0, 1, "x", None, [0, 1], ["x", None, 1], [[1, 2]], {"c": 1}])
SPACES = st.dictionaries(
    st.sampled_from(sorted(paths(TREE))),
    st.tuples(DOMAINS, st.dictionaries(st.sampled_from(sorted(paths(TREE))), WISHES, max_size=2)),
    min_size=1,
).map(lambda knobs: {path: {**domain, "when": when} for path, (domain, when) in knobs.items()})


def lies_in(value, knob):
    match knob:
        case {"uniform": [low, high]} | {"log_uniform": [low, high]}:
            return low <= value <= high
        case {"integer": [low, high]}:
            return low <= value <= high and isinstance(value, int)
        case {"quantized": [low, high, step]}:
            steps = (value - low) / step
            return low <= value <= high and abs(steps - round(steps)) < 1e-6
        case {"choice": options}:
            return any(value == option and type(value) is type(option) for option in options)


def seen(settings, path):
    for part in path.split("."):
        if not isinstance(settings, dict) or part not in settings:
            return "not there"
        settings = settings[part]
    return settings


def check_point(over, knobs, point):
    """Every value lies in its domain, and a knob is there if and only if its condition holds under those before it."""
    for i, path in enumerate(over.knobs):
        before = {p: point[p] for p in list(over.knobs)[:i] if p in point}
        try:
            there = over.apply(before)
        except ConfigError:
            return  # a knob without a place: the point is refused as a whole
        wishes = {p: wish if isinstance(wish, list) else [wish] for p, wish in knobs[path]["when"].items()}
        holds = all(any(seen(there, p) == w and (seen(there, p) is True) == (w is True) for w in wish) for p, wish in wishes.items())
        assert (path in point) == holds
        assert path not in point or lies_in(point[path], knobs[path])


@settings(max_examples=200, deadline=None)
@given(SPACES, st.randoms(use_true_random=False))
def test_every_draw_lies_in_its_domains_and_its_conditions_hold(knobs, generator):
    try:
        over = space(knobs, TREE)
    except ConfigError as error:
        assert error.code == "DST-2015"  # noqa: PT017
        return
    for _ in range(5):
        check_point(over, knobs, over.draw(lambda _, knob: sample(knob, generator)))
    drawn = [point for point, _ in zip(over.grid(3), range(50), strict=False)]
    for point in drawn:
        check_point(over, knobs, point)
    assert len({identity(point) for point in drawn}) == len(drawn)


# ------------------------------------------------------------------------------------------------------- paths and names


def test_paths_hold_inner_nodes_and_the_nearest_one_is_found():
    known = paths(BASE)
    assert paths({"a": {"b": {"c": 1}}, "d": [1], "e": {}}) == {"a", "a.b", "a.b.c", "d", "e"}
    assert nearest("losses.soft.temprature", known) == "losses.soft.temperature"
    assert nearest("traning.lr", known) == "training"
    assert nearest("x", set()) == ""


ANY = {"choice": [0]}


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ({"losses.soft.weight": 0.637, "losses.soft.temperature": 2, "student": {"type": "layers"}}, "L2-T2.0-w0.64"),
        ({"losses.soft.weight": 0.637, "losses.hard.weight": 0.3}, "L2-hard.w0.30-soft.w0.64"),
        ({"training.learning_rate": 4e-4}, "L2-lr4e-4"),
        ({"training.learning_rate": 0.000372}, "L2-lr3.7e-4"),
        ({"losses.jsd.beta": 0.5, "student.layers": [0, 5], "training.epochs": 2}, "L2-b0.50-ep2"),
        ({"losses.soft.weight": 0.0004}, "L2-w4e-4"),
        ({"losses.soft.weight": 0}, "L2-w0.00"),
        ({"training.weight_decay": 0.0}, "L2-wd0"),
        ({"training.batch_tokens": 4096, "training.clip": 0.125, "losses.hard.label_smoothing": 0.1}, "L2-ls0.1-bt4096-clip0.125"),
        ({"training.decay": "cosine", "training.dropout": None, "baseline": False}, "L2-baselineoff-cosine-donone"),
        ({"training.learning_rate": 1e-3, "teacher.training.learning_rate": 1e-5}, "L2-teacher.training.lr1e-5-training.lr1e-3"),
        ({"teacher.model": "org/größe base/"}, "L2-gr_e_base"),
        ({"losses.pkd.layers": [0, 3]}, "L2-layers0+3"),
        ({"student.count": 3}, "L2"),
    ],
)
def test_names_of_trials(point, name):
    for order in (point, dict(reversed(point.items()))):
        assert trial_name("L2", order, KNOBS.validate_python(dict.fromkeys(order, ANY))) == name


def test_names_of_whole_sub_objects_are_their_types():
    options = [{"type": "forward_kl"}, {"type": "jsd", "beta": 0.1}, {"type": "jsd", "beta": 0.9}, {"weight": 1}]
    knobs = KNOBS.validate_python({"losses.soft": {"choice": options}, "losses.soft.weight": {"uniform": [0, 1]}})
    names = [trial_name("L2", {"losses.soft": option, "losses.soft.weight": 1.0}, knobs) for option in options]
    assert names == ["L2-forward_kl-w1.00", "L2-jsd.1-w1.00", "L2-jsd.2-w1.00", "L2-soft3-w1.00"]
    assert trial_name("L2", {"losses.soft": options[0]}, knobs) == "L2-forward_kl"  # a knob that its condition left out
