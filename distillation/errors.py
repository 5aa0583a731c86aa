"""Every error a user can cause: one line that says what, where, what was expected, what was found and what to do.

The first digit of a code is the exit code of the command (docs/errors.md lists them all). Errors cross process borders inside Ray, so
they pickle.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DistilleryError(Exception):
    """Base of the errors below. `str(error)` is the line a user sees; `as_dict()` the same for machines."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: str = "",
        expected: str = "",
        found: str = "",
        do: str = "",
    ) -> None:
        assert code.startswith(f"DST-{self.exit_code}"), f"{code} does not belong to exit code {self.exit_code}"
        super().__init__(code, what)
        self.code, self.what, self.where = code, what, where
        self.expected, self.found, self.do = expected, found, do

    def __str__(self) -> str:
        text = f"error[{self.code}]: {self.what}"
        if self.where:
            text += f": {self.where}"
        if self.expected or self.found:
            text += f": expected {self.expected or 'nothing'} but found {self.found or 'nothing'}"
        if self.do:
            text += f". {self.do}"
        # Names, texts and labels come from data: control characters must not forge lines or colours in a log.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def as_dict(self) -> dict[str, Any]:
        fields = ("code", "what", "where", "expected", "found", "do")
        return {"exit_code": self.exit_code, **{name: getattr(self, name) for name in fields}}

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (type(self), self.as_dict())


def rebuild(kind: type[DistilleryError], fields: dict[str, Any]) -> DistilleryError:
    """An error from what `as_dict` gave."""
    return kind(fields.pop("code"), fields.pop("what"), **{k: v for k, v in fields.items() if k != "exit_code"})


class ConfigError(DistilleryError):
    """A job file or a command line that cannot be carried out as written."""

    exit_code = 2


class InputError(DistilleryError):
    """A corpus, model or stored artifact that is missing, damaged or does not fit the job."""

    exit_code = 3


class DivergedError(DistilleryError):
    """A loss or gradient that is no longer finite."""

    exit_code = 4


class StorageError(DistilleryError):
    """Storage that is full, read-only or out of reach."""

    exit_code = 5


class ClusterError(DistilleryError):
    """Workers that could not be had, or died more often than the job allows."""

    exit_code = 6


class TrackingError(DistilleryError):
    """An MLflow server that refused, where the job asked for strict tracking."""

    exit_code = 7


class ConflictError(DistilleryError):
    """Two things that cannot both hold: a second driver of one run, two artifacts under one fingerprint."""

    exit_code = 8


class SecurityError(DistilleryError):
    """Something that would run code or leak a secret, and was not switched on by name."""

    exit_code = 9
