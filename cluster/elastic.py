"""Groups of workers that follow the nodes there are: how many can start, and when to ask them to save and make way for another group.

Ray Train resizes groups too, but stops the workers where they stand, counts nodes that are about to go, and sees a lost one up to 20 seconds
late. Here placement groups are the measure: they count what is free, leave out nodes that are going, and are demand to an autoscaler.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cluster.config import Group

WATCH_SECONDS = 0.5
GROW_SECONDS = 30.0
"""How long a group is left alone before it makes way for a larger one: a start costs seconds, and nodes seldom come alone."""
SETTLE_SECONDS = 1.0
"""For which the number of workers that fit has to stay the same before a group starts."""
TELL_SECONDS = 10.0
NOTICE_SECONDS = 3.0

_log = logging.getLogger(__name__)


class Places:
    """Room for workers of a group, held as soon as it is there until `release`."""

    def __init__(self, group: Group, resources: Mapping[str, float]) -> None:
        self._bundle, self._labels = dict(resources), group.labels
        self._asked: list[tuple[PlacementGroup, int]] = []
        self._there: set[PlacementGroup] = set()

    def ask(self, workers: int) -> None:
        """For room for so many, all together or not at all: two jobs never hold half a group each and wait for the rest."""
        selector = [self._labels] * workers if self._labels else None
        self._asked.append((placement_group([self._bundle] * workers, bundle_label_selector=selector), workers))

    def held(self) -> int:
        """Workers there is room for."""
        for place, _ in self._asked:
            if place not in self._there and placement_group_table(place)["state"] == "CREATED":
                self._there.add(place)
        return sum(workers for place, workers in self._asked if place in self._there)

    def release(self) -> None:
        for place, _ in self._asked:
            remove_placement_group(place)


@contextlib.contextmanager
def _places(group: Group, resources: Mapping[str, float]) -> Iterator[Places]:
    places = Places(group, resources)
    try:
        yield places
    finally:
        places.release()


def wait_for_room(group: Group, resources: Mapping[str, float]) -> int:
    """Workers to start with, from group.least to group.most: as many as there is room for. Waits where it is for fewer, and says so.

    resources: of a worker.
    """
    with _places(group, resources) as places:
        places.ask(group.least)
        since = time.monotonic()
        while (count := places.held()) < group.least:
            if since is not None and time.monotonic() - since > TELL_SECONDS:
                since = None
                _log.warning(
                    "cluster.%s: waiting for nodes for %d workers, each with %s", group.role, group.least, _shown(group, resources)
                )
            time.sleep(0.1)
        for _ in range(group.most - group.least):
            places.ask(1)
        changed = time.monotonic()
        while count < group.most and time.monotonic() - changed < SETTLE_SECONDS:
            time.sleep(0.1)
            if (found := places.held()) != count:
                count, changed = found, time.monotonic()
        return count


def _shown(group: Group, resources: Mapping[str, float]) -> str:
    labels = f" on nodes labelled {', '.join(f'{k}={v}' for k, v in group.labels.items())}" if group.labels else ""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) + labels


@contextlib.contextmanager
def watching(box: Any, group: Group, count: int, resources: Mapping[str, float]) -> Iterator[None]:
    """While a group of `count` workers runs: ask it to leave when one of its nodes is about to go, or when more workers could start."""
    done = threading.Event()

    def watch() -> None:
        started = None
        with _places(group, resources) as places:
            while not done.wait(WATCH_SECONDS):
                begun = ray.get(box.begun.remote())
                if started is None and len(begun) == count:  # asked for earlier, more room would be the room of these
                    started = time.monotonic()
                    for _ in range(group.most - count):
                        places.ask(1)
                going = set(begun.values()) & state.get_draining_nodes().keys()
                if going or (started is not None and places.held() and time.monotonic() - started > GROW_SECONDS):
                    ray.get(box.ask.remote())
                    done.wait()

    def run() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone; the call that runs the workers says why
            watch()

    thread = threading.Thread(target=run, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Notice:
    """Whether the node of this process is about to go, as a cloud says some time before it takes a machine back."""

    def __init__(self) -> None:
        self._node, self._given, self._asked = ray.get_runtime_context().get_node_id(), False, time.monotonic()

    def given(self) -> bool:
        """Looks up now and then only: to be called in every step."""
        if not self._given and time.monotonic() - self._asked > NOTICE_SECONDS:
            self._asked = time.monotonic()
            self._given = self._node in state.get_draining_nodes()
        return self._given
