"""From text to nested settings: a YAML file, overrides of single settings, `${oc.env:NAME}`. Refuses what would grow, run or leak."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from distillation.errors import ConfigError, SecurityError

MAX_BYTES = 100_000
MAX_NODES = 10_000
"""Keys and values, with every alias written out: ten lines of aliases can stand for more than fits into memory."""
MAX_DEPTH = 32

ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*\w+\s*(?:,[^${}]*)?\}")
SECRET = re.compile(r"oc\.env\s*:\s*['\"]?(\w*(?:TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|KEY|CREDENTIAL)\w*)", re.I)


def read_settings(text: str, overrides: Sequence[str], source: str) -> dict[Any, Any]:
    """Settings as plain dicts, lists and values, not yet checked. Raises ConfigError or SecurityError, whatever the text is."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        _inspect(text, source, mapping=True)
        merged = OmegaConf.create(text or "{}")
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise _unreadable(source, "YAML", " ".join(str(error).split())) from error
    for override in overrides:
        if not re.match(r"[A-Za-z_][\w-]*(\.[\w/-]+)*=", override):
            raise ConfigError(
                "DST-2004", "override cannot be understood", where=repr(override), expected="path.to.setting=value", found=override
            )
        try:
            _inspect(override.partition("=")[2], repr(override), mapping=False)
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            found = " ".join(str(error).split())
            raise ConfigError(
                "DST-2004", "override cannot be understood", where=repr(override), expected="a value in YAML", found=found
            ) from error
    try:
        content: dict[Any, Any] = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise _unreadable(source, "values", " ".join(str(error).split())) from error
    return content


def _inspect(text: str, where: str, *, mapping: bool) -> None:
    """Look at a text event by event, before anything is built from it, and stop at the first that is not allowed."""
    import yaml

    sizes: dict[str, int] = {}
    inside: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor or "", 0)
        elif isinstance(event, yaml.NodeEvent):
            if mapping and total == 0 and not isinstance(event, yaml.MappingStartEvent):
                raise _unreadable(where, "settings by name", "a list" if isinstance(event, yaml.SequenceStartEvent) else "a single value")
            total += 1
            if (tag := getattr(event, "tag", None)) is not None:
                raise _unreadable(where, "plain values", f"the tag {tag}")
            if isinstance(event, yaml.ScalarEvent):
                _refuse_expressions(event.value, where)
                size = 1
            else:
                inside.append((event.anchor, total - 1))
                size = MAX_NODES  # until it ends: an alias inside of it would have no end
            if event.anchor is not None:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if total > MAX_NODES or len(inside) > MAX_DEPTH:
            raise _unreadable(where, f"at most {MAX_NODES} values, {MAX_DEPTH} deep", "more, aliases written out")


def _refuse_expressions(value: str, where: str) -> None:
    if secret := SECRET.search(value):
        raise SecurityError(
            "DST-9007", "a job file must not read secrets", where=where, found=f"${{oc.env:{secret[1]}}}",
            do="Programs read credentials from the environment themselves: leave it out",
        )  # fmt: skip
    if "${" in ENVIRONMENT.sub("", value):
        raise ConfigError(
            "DST-2008", "expression is not allowed", where=where, expected="${oc.env:NAME} or ${oc.env:NAME,default}", found=value[:200],
            do="Write the value itself",
        )  # fmt: skip


def _unreadable(where: str, expected: str, found: str) -> ConfigError:
    return ConfigError("DST-2002", "job file cannot be read", where=where, expected=expected, found=found)
