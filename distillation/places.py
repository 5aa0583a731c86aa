"""From a path or URI to the file system it names. Credentials, endpoint and region of an object store come from the environment."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow.fs as pafs

from distillation.errors import ConfigError, SecurityError

SCHEMES = ("s3", "gs", "abfs", "hdfs")
"""What may stand before :// in a path, besides a plain local path."""

SECRET = re.compile(r"(?i)secret|password|token|access_key|credential|^sig$")
"""Options of a URI that would put a secret into logs and manifests."""

ATTEMPTS = 4
"""Of a request to S3, with growing pauses: pyarrow's own default for a URI tries for 6 s where nobody answers, and 99 s where a server hangs."""
CONNECT_SECONDS = 3.0
STALL_SECONDS = 5.0
"""Without a byte, after which a request is given up and tried again."""

_S3 = {
    "region": str, "scheme": str, "endpoint_override": str, "tls_ca_file_path": str, "allow_bucket_creation": bool,
    "allow_bucket_deletion": bool,
}  # fmt: skip
"""Options of a URI and what they are for pyarrow's S3FileSystem."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a path or URI, and the path inside it. Only `SCHEMES` and local paths are allowed."""
    scheme = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme[1].lower() not in SCHEMES:
        raise SecurityError(
            "DST-9001", "scheme of a path is not allowed", where=uri, expected="a local path or " + ", ".join(f"{s}://" for s in SCHEMES),
            found=f"{scheme[1]}://", do="Copy the data to one of these first",
        )  # fmt: skip
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    query = parse_qs(urlsplit(uri).query)
    # abfs://container@account.dfs.core.windows.net is how Azure names a container: no secret in it.
    if (at and (scheme[1].lower() != "abfs" or ":" in user)) or any(SECRET.search(key) for key in query):
        raise SecurityError("DST-9002", "a path must not carry a password", do="Give credentials through the environment of the nodes")
    system, root = None, ""
    try:
        system, root = _s3(uri, query) if scheme[1].lower() == "s3" else pafs.FileSystem.from_uri(uri)
        found = "no bucket"
    except (OSError, ValueError, NotImplementedError) as error:
        found = str(error)
    if system is None or not root.strip("/"):
        raise ConfigError("DST-2003", "path cannot be understood", where=uri, expected="scheme://bucket/path", found=found)
    return system, root


def _s3(uri: str, query: dict[str, list[str]]) -> tuple[pafs.FileSystem, str]:
    """As pyarrow reads the URI, with `AWS_ENDPOINT_URL_S3`, `AWS_REGION` and `AWS_MAX_ATTEMPTS`, and with an end to waiting."""
    given = {name: values[-1] for name, values in query.items()}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint and "endpoint_override" not in given:
        scheme, _, address = endpoint.rpartition("://")
        given |= {"endpoint_override": address.rstrip("/"), **({"scheme": scheme} if scheme else {})}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if "endpoint_override" in given else "")
    if region:  # without one pyarrow asks Amazon for the bucket's
        given.setdefault("region", region)
    plain = uri.partition("?")[0]
    system, root = pafs.FileSystem.from_uri(plain + ("?" if given else "") + "&".join(f"{name}={value}" for name, value in given.items()))
    if not given.keys() <= _S3.keys():
        return system, root
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "")
    options: dict[str, Any] = {name: value.lower() == "true" if _S3[name] is bool else value for name, value in given.items()}
    options["region"] = system.region
    retry = pafs.AwsStandardS3RetryStrategy(max_attempts=int(attempts) if attempts.isdecimal() and int(attempts) else ATTEMPTS)
    # A delayed open uploads a small file in one request instead of three.
    more = {"connect_timeout": CONNECT_SECONDS, "request_timeout": STALL_SECONDS, "retry_strategy": retry, "allow_delayed_open": True}
    return pafs.S3FileSystem(**options, **more), root
