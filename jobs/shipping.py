"""A job file on its way to a cluster: what of it would mean something else there, and how two of them differ. Loads settings only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cluster.package import code_fingerprint
from cluster.submit import Request
from distillation.errors import ConfigError, SecurityError
from jobs.config import JobConfig, flat, parse, read
from jobs.settings import read_settings

SECRET = re.compile(r"(?i)secret|password|token|access_key|credential|^sig$")


def request(
    source: str, overrides: list[str], verb: str, python: str = "python", labels: dict[str, str] | None = None, installed: bool = False
) -> tuple[Request, JobConfig]:
    """A job file as it travels, and what it says. Raises what a user can mend before anything leaves this machine."""
    text = read(source)
    job = parse(text, overrides, source)
    require_portable(job)
    if verb == "search" and job.search is None:
        raise ConfigError("DST-2018", "job has no search", where=job.name, expected="a section `search` with a space", found="none",
                          do="Add one: `distill recipes cp quickstart` shows how")  # fmt: skip
    if any("${" in part for part in (text, *overrides)):  # the variables of this machine are meant, not those of the head
        from omegaconf import OmegaConf

        text, overrides = OmegaConf.to_yaml(OmegaConf.create(read_settings(text, overrides, source))), []
    return Request(job.name, verb, text, tuple(overrides), python, labels or None, installed, code_fingerprint()), job


def require_portable(job: JobConfig) -> None:
    """Raise ConfigError for paths that mean something only on this machine, SecurityError for one that carries a password."""
    problems = []
    for setting, value in _paths(job):
        place = urlsplit(value)
        secret = "://" in value and (place.password or any(SECRET.search(key) for key in parse_qs(place.query)))
        if secret:
            raise SecurityError(
                "DST-9002", "a path must not carry a password", where=setting, do="Give credentials through the environment of the nodes"
            )
        if "://" not in value and not value.startswith("/"):
            problems.append(f"{setting}={value}")
    uri = job.tracking.uri
    if uri and uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        problems.append(f"tracking.uri={uri}")
    if problems:
        raise ConfigError(
            "DST-2061", "paths of this machine mean nothing on the cluster", where=job.name,
            expected="folders that every node sees, from / on, or URIs such as s3://bucket/distillery", found="; ".join(problems),
            do="Nothing but code travels with a job: put data and models where the nodes can read them",
        )  # fmt: skip


def _paths(job: JobConfig) -> Iterator[tuple[str, str]]:
    """Settings that name a place: (path of the setting, value). Names of a hub, of packages and of other jobs are no places."""
    yield "cluster.storage", job.cluster.storage
    if job.corpus.type in ("files", "text"):
        for split in ("train", "validation", "test"):
            value = getattr(job.corpus, split)
            for one in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
                yield f"corpus.{split}", one
    if job.corpus.type == "hub" and _is_folder(job.corpus.dataset):
        yield "corpus.dataset", job.corpus.dataset
    teachers = {"teacher": job.teacher} if job.teacher else {f"teachers.{name}": one for name, one in job.teachers.items()}
    students = {"student": job.student} if job.student else {f"students.{name}": one for name, one in job.students.items()}
    for path, model in {**teachers, **students}.items():
        name: Any = getattr(model, "model", None)
        if isinstance(name, str) and _is_folder(name):
            yield f"{path}.model", name


def _is_folder(name: str) -> bool:
    """As the models of a job are looked for: a folder if there is one or it is written as one."""
    return "://" in name or name.startswith((".", "/", "~")) or Path(name).is_dir()


def settings_of(made: Request) -> dict[str, Any]:
    """Every setting by its path, but for the address: each side of the cluster has its own."""
    settings = flat(parse(made.file, made.overrides, f"{made.name}.yaml").model_dump(mode="json"))
    settings.pop("cluster.address", None)
    return settings


def differences(old: Request, new: Request) -> list[str]:
    """Settings in which two jobs differ, as `path: old -> new`. Empty for the same job in other words."""
    try:
        before = settings_of(old)
    except ConfigError:
        return ["it was handed in by a version of Distillery with other settings"]
    after = settings_of(new)
    paths = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return [f"{path}: {_shown(before.get(path))} -> {_shown(after.get(path))}" for path in paths]


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
