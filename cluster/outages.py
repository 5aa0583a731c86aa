"""What goes wrong between us and an MLflow server: what is worth trying again later, what is not, and what to say about it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported

from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

_log = logging.getLogger(__name__)

ABOUT_DATA = ("9h9h", "gkpj")
"""What SQLAlchemy calls an error that lies in what was sent, DataError and IntegrityError, in the address it puts behind a message."""


class Away(Exception):
    """The server cannot be used now; says why and what to do."""


def prepare_process() -> None:
    """Short time-outs, and silence where MLflow talks about itself. At its defaults one call waits 246 s for a server that is down."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for every retry


@contextlib.contextmanager
def upload_timeout() -> Iterator[None]:
    """120 s: a server answers an upload when it has passed the file on. MLflow reads the variable at every request."""
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "120"
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


@contextlib.contextmanager
def away_on(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (*kinds, RequestException, SQLAlchemyError, OSError) as error:
        raise Away(_explain(error)) from error


@contextlib.contextmanager
def refusals(key: str) -> Iterator[None]:
    """Away if the server cannot be used now; what it refuses for good is left out with a warning, so that the rest gets through."""
    with away_on():
        try:
            yield
        except MlflowException as error:
            status = error.get_http_status_code()
            if status >= 500 or status in (401, 403, 408, 429) or _database_is_away(error):
                raise Away(_explain(error)) from error
            _log.warning("tracking: the server refused a part of %s: %s", key, _explain(error))


def _database_is_away(error: MlflowException) -> bool:
    """MLflow answers 400 to most of what its database complains of: that it has become a replica, that all connections are taken."""
    found = re.search(r"sqlalche\.me/e/\w+/(\w+)", str(error))
    return found is not None and found[1] not in ABOUT_DATA


def _explain(error: Exception) -> str:
    """One line without secrets that says what is wrong and what to set."""
    text = str(error)
    status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
    if "CERTIFICATE" in text.upper():
        return "its certificate is not trusted: set MLFLOW_TRACKING_SERVER_CERT_PATH"
    if status == 401:
        return "401, it wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status == 403:
        return "403, the user may not do this, or the server does not answer to this host name: start it with --allowed-hosts"
    lines = [line for line in text.split("Caused by", 1)[-1].strip().splitlines() if not line.startswith("(raised as a result of")]
    text = lines[0] if lines else ""
    return re.sub(r"//[^/@\s]*@", "//", text)[:200] or type(error).__name__
