"""When the journal goes to MLflow: a thread beside the job, or all at once afterwards. What goes there: cluster/tracking.py."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from cluster.journal import Journal
from cluster.links import Recorded, compare_url, experiment_url, run_url
from cluster.outages import Away, prepare_process
from cluster.tracking import Delivery, Target
from distillation.errors import TrackingError

_log = logging.getLogger(__name__)

STRICT_SECONDS, AWAY_SECONDS, CLOSE_SECONDS = 9.0, 8.0, 120.0


class Tracker:
    """Delivers a journal to MLflow for as long as the block lasts, in a thread.

    Raises TrackingError within 10 s if tracking is strict and the server cannot be used; else it goes on trying and says so once.
    """

    def __init__(self, target: Target, journal: Journal) -> None:
        self.uri, self._strict, self._journal = target.uri, target.config.strict, journal
        self._delivery = Delivery(target, journal)
        self._closing, self._tried = threading.Event(), threading.Event()
        self._away: str | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def __enter__(self) -> Tracker:
        prepare_process()
        self._thread.start()
        if self._strict and (not self._tried.wait(STRICT_SECONDS) or self._away):
            self._delivery.abandoned = True
            self._closing.set()
            raise _unreachable(self.uri, self._away or "no answer")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._journal.finish_unfinished("FAILED" if issubclass(kind, Exception) else "KILLED")
        waiting = self.close()
        if waiting and self._strict and kind is None:
            raise _unreachable(self.uri, self._away or "no answer in time")

    def close(self) -> int:
        """Deliver the rest: for 2 minutes at most, and 8 seconds if the server is away. Returns how many events still wait."""
        self._closing.set()
        started = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - started < (AWAY_SECONDS if self._away else CLOSE_SECONDS):
            self._thread.join(0.05)
        self._delivery.abandoned = True
        waiting = self._journal.count - self._delivery.delivered
        if waiting:
            _log.warning('tracking incomplete: %d events wait in %s; run "distill sync"', waiting, self._journal.path)
        return waiting

    def experiment_url(self) -> str | None:
        """Page of all runs, best first. None until the server was reached; so are the next ones."""
        return experiment_url(self.uri, self._delivery.experiment_id) if self._delivery.experiment_id else None

    def recorded(self) -> Recorded | None:
        """What of the journal is in MLflow by now. None until the server was reached."""
        where = self._delivery.experiment_id
        return Recorded(self.uri, where, dict(self._delivery.runs)) if where else None

    def run_url(self, key: str) -> str | None:
        run_id, experiment_id = self._delivery.runs.get(key), self._delivery.experiment_id
        return run_url(self.uri, experiment_id, run_id) if run_id and experiment_id else None

    def compare_url(self, keys: Sequence[str]) -> str | None:
        """Page that sets these runs side by side."""
        runs, experiment_id = [self._delivery.runs.get(key) for key in keys], self._delivery.experiment_id
        return compare_url(self.uri, experiment_id, [run for run in runs if run]) if all(runs) and experiment_id else None

    def _work(self) -> None:
        delay = 1.0
        while not self._delivery.abandoned:
            closing, started = self._closing.is_set(), time.monotonic()
            try:
                more = self._delivery.step()
            except Away as error:
                if self._away is None:
                    _log.warning(
                        "tracking: %s cannot be used, training goes on and events wait in %s: %s", self.uri, self._journal.path, error
                    )
                self._away = str(error)
                self._tried.set()
                if self._closing.wait(delay):
                    time.sleep(0.5)
                delay = min(2 * delay, 15.0)
                continue
            if self._away is not None:
                _log.warning("tracking: %s is back", self.uri)
            self._away, delay = None, 1.0
            self._tried.set()
            if not more:
                if closing:
                    return
                took = time.monotonic() - started
                self._closing.wait(min(max(0.5, 4 * took), 10.0))  # what is recorded meanwhile goes out together; a fifth of a core at most


def deliver(target: Target, journal: Journal) -> int:
    """Deliver all that waits in a journal that no job writes any more; returns the number of events. Runs left open become KILLED.

    Raises TrackingError if the server cannot be used.
    """
    prepare_process()
    journal.finish_unfinished("KILLED")
    delivery = Delivery(target, journal)
    try:
        before = delivery.connect()
        while delivery.step():
            pass
    except Away as error:
        raise _unreachable(target.uri, str(error)) from error
    return delivery.delivered - before


def _unreachable(uri: str, found: str) -> TrackingError:
    return TrackingError(
        "DST-7001", "MLflow cannot be used", where=uri, expected="an answer", found=found,
        do='Start it, or set tracking.strict=false: what waits is delivered by "distill sync"',
    )  # fmt: skip
