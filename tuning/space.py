"""The space of a search: the points there are, the settings that a point makes, and what a point is called. Plain Python."""

from __future__ import annotations

import copy
import difflib
import math
import random
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from distillation.errors import ConfigError
from tuning.config import Choice, Integer, KnobConfig, LogUniform, Quantized, Uniform

Point = dict[str, Any]
"""Values of the knobs by dotted path. A knob that does not exist under the others' values is left out."""

Settings = Mapping[str, Any]
"""Nested, as a job file dumps to."""

_NOWHERE = object()


# ------------------------------------------------------------------------------------------------------------ one knob


class Values(NamedTuple):
    """The values of a knob in order, made when asked for: a whole number has as many as it likes."""

    size: int
    at: Callable[[int], Any]


def values(knob: KnobConfig, points: int | None = None) -> Values | None:
    """Every value a knob can have, each once. uniform and log_uniform: `points` of them, ends included; None where that is not given."""
    match knob:
        case Choice():
            first_of: dict[Hashable, Any] = {}
            for value in knob.choice:
                first_of.setdefault(identity(value), value)
            return Values(len(first_of), list(first_of.values()).__getitem__)
        case Integer():
            first, last = knob.integer
            return Values(last - first + 1, lambda i: first + i)
        case Quantized():
            # In fractions of what was written: 0.1 + 2 * 0.1 is 0.3, and 0.3 is not lost where (0.3 - 0.1) / 0.1 is a little below 2.
            low, high, step = (Fraction(str(number)) for number in knob.quantized)
            return Values((high - low) // step + 1, lambda i: float(low + i * step))
        case _ if points is None:
            return None
        case Uniform() | LogUniform():
            return Values(points, lambda i: _between(knob, i / (points - 1)))


def sample(knob: KnobConfig, generator: random.Random) -> Any:
    """One draw from a domain; the values of a finite one are equally likely."""
    if isinstance(knob, Uniform | LogUniform):
        return _between(knob, generator.random())
    finite = values(knob)
    assert finite is not None
    return finite.at(generator.randrange(finite.size))


def _between(knob: Uniform | LogUniform, share: float) -> float:
    """The value that so large a share of the domain lies below."""
    if isinstance(knob, Uniform):
        low, high = knob.uniform
        value = low + (high - low) * share
    else:
        low, high = knob.log_uniform
        value = math.exp(math.log(low) + (math.log(high) - math.log(low)) * share)
    return low if share == 0 else high if share == 1 else min(max(value, low), high)


def identity(value: Any) -> Hashable:
    """Equal for two values that mean the same in a job file: 2 and 2.0, a list and a tuple, keys 1 and "1"; but not for 1 and true."""
    if isinstance(value, Mapping):
        return frozenset((str(key), identity(inner)) for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(identity(inner) for inner in value)
    return (bool, value) if isinstance(value, bool) else value


# -------------------------------------------------------------------------------------------------------------- all knobs


class Space:
    """Knobs over the settings of a job. Raises ConfigError (DST-2015) where knobs wait for each other."""

    def __init__(self, knobs: Mapping[str, KnobConfig], base: Settings) -> None:
        self.knobs = {path: knobs[path] for path in _order(knobs)}
        """In the order of drawing: what a path lies under and what a condition looks at come first, otherwise as in the file."""
        self.base = copy.deepcopy(dict(base))

    def draw(self, choose: Callable[[str, KnobConfig], Any]) -> Point:
        """A point, knob by knob: `choose` is asked for those whose `when` holds under what was chosen before.

        A knob may turn out to lie in settings that were not chosen (student.hidden_size of {type: layers}). It stays: validating the job
        refuses the point and says why, where leaving the knob out would quietly make another search of it.
        """
        point: Point = {}
        settings: Settings = self.base
        for path, knob in self.knobs.items():
            if _holds(knob.when, settings):
                point[path] = copy.deepcopy(choose(path, knob))
                settings = _replaced(settings, path, point[path]) or settings
        return point

    def apply(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with the values of a point; shares nothing with either. Raises ConfigError (DST-2016)."""
        settings: dict[str, Any] = copy.deepcopy(self.base)
        for path in sorted(point, key=lambda path: path.count(".")):
            changed = _replaced(settings, path, copy.deepcopy(point[path]))
            if changed is None:
                above = path.rpartition(".")[0]
                there = _look_up(settings, above)
                raise ConfigError(
                    "DST-2016", "knob has no place in the job", where=f"search.space.{path}", expected=f"settings at {above}",
                    found="none" if there is _NOWHERE else repr(there)[:80], do="Write them into the job, or give the knob a `when`",
                )  # fmt: skip
            settings = changed
        return settings

    def grid(self, points: int) -> Iterator[Point]:
        """All combinations, the last knob turning fastest, each once. uniform and log_uniform knobs have `points` values."""
        cut = {path: values(knob, points) for path, knob in self.knobs.items()}
        script: list[int] = []
        while True:
            taken: list[tuple[int, int]] = []  # (which value, of how many), for each knob that exists

            def choose(path: str, _: KnobConfig, script: list[int] = script, taken: list[tuple[int, int]] = taken) -> Any:
                found = cut[path]
                assert found is not None
                which = script[len(taken)] if len(taken) < len(script) else 0
                taken.append((which, found.size))
                return found.at(which)

            yield self.draw(choose)
            while taken and taken[-1][0] + 1 == taken[-1][1]:
                taken.pop()
            if not taken:
                return
            script = [which for which, _ in taken]
            script[-1] += 1


def _order(knobs: Mapping[str, KnobConfig]) -> list[str]:
    waits = {
        path: [p for p in knobs if p != path and (path.startswith(f"{p}.") or any(_touches(p, seen) for seen in knob.when))]
        for path, knob in knobs.items()
    }
    order: list[str] = []
    while rest := [path for path in knobs if path not in order]:
        ready = next((path for path in rest if set(waits[path]) <= set(order)), None)
        if ready is None:
            circle = [rest[0]]
            while (after := next(p for p in waits[circle[-1]] if p in rest)) not in circle:
                circle.append(after)
            circle = [*circle[circle.index(after) :], after]
            raise ConfigError(
                "DST-2015", "knobs wait for each other", where="search.space", expected="conditions that can be looked up one after another",
                found=" waits for ".join(circle), do="Take one of these `when` out",
            )  # fmt: skip
        order.append(ready)
    return order


def _touches(path: str, other: str) -> bool:
    """Whether setting one path changes what is found at the other: the same, above or below."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _holds(when: Mapping[str, Any], settings: Settings) -> bool:
    for path, wish in when.items():
        allowed = wish if isinstance(wish, list | tuple) else [wish]
        if identity(_look_up(settings, path)) not in {identity(value) for value in allowed}:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------------ paths


def _below(settings: Settings, path: str) -> Iterator[tuple[str, Settings, str]]:
    """Where a path goes on: (key, settings at it, rest of the path). Names may hold dots, so there can be several."""
    for key, inner in settings.items():
        if isinstance(inner, Mapping) and path.startswith(f"{key}."):
            yield key, inner, path.removeprefix(f"{key}.")


def _look_up(settings: Settings, path: str) -> Any:
    if path in settings:
        return settings[path]
    deeper = (_look_up(inner, rest) for _, inner, rest in _below(settings, path))
    return next((found for found in deeper if found is not _NOWHERE), _NOWHERE)


def _replaced(settings: Settings, path: str, value: Any) -> dict[str, Any] | None:
    """Settings with another value at a path, which share all the rest; None where the settings that would hold it are not there."""
    if path in settings:
        return {**settings, path: value}
    for key, inner, rest in _below(settings, path):
        if (changed := _replaced(inner, rest, value)) is not None:
            return {**settings, key: changed}
    return None if "." in path else {**settings, path: value}


def paths(settings: Settings) -> set[str]:
    """Every dotted path there is, inner ones included."""
    found: set[str] = set()
    for key, inner in settings.items():
        found.add(str(key))
        if isinstance(inner, Mapping):
            found |= {f"{key}.{path}" for path in paths(inner)}
    return found


def nearest(path: str, known: set[str]) -> str:
    """The known path most like another one; empty where none is known."""
    return next(iter(difflib.get_close_matches(path, sorted(known), n=1, cutoff=0)), "")


# ------------------------------------------------------------------------------------------------------------------ names

SHORT = {
    "temperature": "T", "weight": "w", "learning_rate": "lr", "beta": "b", "epochs": "ep", "weight_decay": "wd", "dropout": "do",
    "warmup": "wu", "steps": "st",
}  # fmt: skip
DECIMALS = {"temperature": 1, "weight": 2, "beta": 2}
SCIENTIFIC = {"learning_rate", "weight_decay"}


def trial_name(student_label: str, point: Point, knobs: Mapping[str, KnobConfig]) -> str:
    """What a run is called: L2-T2.0-w0.64. Knobs in the order of their paths; those of the student are in its label. Not unique."""
    shown = sorted(path for path in knobs if path.split(".")[0] != "student")
    pieces = [_piece(_label(path, shown), path, point[path], knobs[path]) for path in shown if path in point]
    return "-".join([student_label, *pieces])


def _label(path: str, shown: Sequence[str]) -> str:
    """Short name of a knob, with as many names before it as tell it from the others: w, or hard.w and soft.w."""

    def name(path: str, depth: int) -> str:
        *above, last = path.split(".")
        words = last.split("_")
        short = SHORT.get(last) or ("".join(word[:1] for word in words) if len(words) > 1 else last[:8])
        return ".".join([*above[max(0, len(above) - depth) :], short])

    depth = 0
    while depth < path.count(".") and any(name(path, depth) == name(other, depth) for other in shown if other != path):
        depth += 1
    return name(path, depth)


def _piece(label: str, path: str, value: Any, knob: KnobConfig) -> str:
    """One knob of a name. Words speak for themselves and stand instead of the short name."""
    if not isinstance(value, str | Mapping):
        return f"{label}{_plain(value, path.rpartition('.')[2])}"
    before = label.rpartition(".")[0]
    if isinstance(value, Mapping):
        options = values(knob)
        alike = [options.at(i) for i in range(options.size)] if options else []
        which = [identity(option) for option in alike].index(identity(value))
        if "type" not in value:
            return f"{label}{which}"
        several = sum(isinstance(option, Mapping) and option.get("type") == value["type"] for option in alike) > 1
        value = f"{value['type']}.{which}" if several else value["type"]
    return ".".join(part for part in (before, _plain(value, "")) if part)


def _plain(value: Any, setting: str) -> str:
    """A value in few characters of ASCII."""
    if isinstance(value, list | tuple):
        return "+".join(_plain(inner, "") for inner in value)
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if not isinstance(value, int | float):
        return re.sub(r"[^A-Za-z0-9._]+", "_", str(value).rstrip("/").rpartition("/")[2])[:24]
    decimals = DECIMALS.get(setting)
    tiny = decimals is not None and abs(value) < 10**-decimals
    text = str(value) if isinstance(value, int) else f"{value:.3g}"
    if value and (tiny or setting in SCIENTIFIC or "e" in text):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return text if decimals is None else f"{value:.{decimals}f}"
