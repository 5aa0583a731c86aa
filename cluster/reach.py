"""The way to the head of a cluster from outside: its address, how one logs in, and what to do where nobody answers."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from distillation.errors import ClusterError, ConfigError

SECONDS = 10
"""How long the head may take to say how one logs in."""

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's own command line looks at, in this order."""


def address_of(option: str | None, configured: str | None = None) -> str:
    """Of the job server: the option, the environment, the job file. Raises ConfigError where none of them names one."""
    named = {"--address": option, **{name: os.environ.get(name) for name in ADDRESSES}, "cluster.address": configured}
    for name, value in named.items():
        if value and value.startswith(("http://", "https://")):
            return value
        if value and name == "--address":
            break
    raise ConfigError(
        "DST-2060", "no address of a cluster's job server", where="--address", expected="http://HEAD:8265", found=option or "none",
        do="Name it, or set RAY_API_SERVER_ADDRESS; through a tunnel (ray dashboard cluster.yaml) it is http://127.0.0.1:8265",
    )  # fmt: skip


def authentication_mode(address: str) -> str:
    """token or disabled. Needs no login."""
    try:
        with urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=SECONDS) as answer:
            return str(json.loads(answer.read())["authentication_mode"])
    except urllib.error.HTTPError as error:
        error.close()
        raise unreachable(address, OSError(f"HTTP {error.code}; is this the dashboard of Ray 2.60?")) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreachable(address, error) from error


def unreachable(address: str, error: BaseException) -> ClusterError:
    found = str(getattr(error, "reason", None) or error)
    return ClusterError(
        "DST-6020", "the head cannot be reached", where=address, found=found,
        do="Check the address and that the head runs; from outside open a tunnel: ray dashboard cluster.yaml, or ssh -L 8265:127.0.0.1:8265 HEAD",
    )  # fmt: skip


def is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def token() -> str:
    """As Ray looks for it: RAY_AUTH_TOKEN, the file in RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. Raises ClusterError where there is none."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return value
    with contextlib.suppress(OSError):
        if value := token_file().read_text(encoding="utf-8").strip():
            return value
    raise ClusterError(
        "DST-6021", "cluster asks for a token", expected="one in RAY_AUTH_TOKEN or a file", found=f"none in {token_file()}",
        do=f"Copy that of the head to {token_file()}, then chmod 600 it",
    )  # fmt: skip
