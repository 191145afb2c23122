"""Downloads the shards that a run will read, before it reads them: the order is known, so nothing is guessed.

Threads of the training process walk the rank's own requests ahead of the loader, never by more than a few shards. They
change nothing that is read: they fill the cache, and whatever they fail at is fetched by the reader that needs it.
"""

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import ShardSet
from pretrain.errors import TubeletError

logger = logging.getLogger(__name__)

DOWNLOADS = 4
"""Shards that one training process downloads at a time."""
SHARE_OF_CACHE = 0.5
"""At most so much of the cache is taken by what one process does not need yet."""
BATCHES_AHEAD = 4096
"""Requests are looked at no further ahead than this, however few shards they read."""
END_WITHIN_S = 1.0

Place = tuple[int, int]
"""A shard: the number of its set, and its number in the set."""


class LookAhead:
    """Which shard to fetch next: the shards of batches to come, in the order of their first use.

    Attributes:
        reached: The number of the last batch that the loader was given, from 0; -1 before the first. A shard is ahead
            while this is smaller than the number of the first batch that reads it.
    """

    def __init__(self, batches: Iterable[Iterable[Place]], limit: int) -> None:
        """Takes the shards of each batch, and how many shards may be ahead."""
        self.reached = -1
        self._batches = enumerate(batches)
        self._limit = limit
        self._scanned = -1
        self._waiting: list[Place] = []
        self._uses: dict[Place, tuple[int, int]] = {}  # the first and the last batch known to read a shard

    def next(self) -> Place | None:
        """Returns the next shard to fetch, or None while enough are ahead, or when none is left."""
        self._uses = {place: use for place, use in self._uses.items() if use[1] >= self.reached}
        if sum(first > self.reached for first, _ in self._uses.values()) >= self._limit:
            return None
        while not self._waiting and self._scanned < self.reached + BATCHES_AHEAD:
            scanned = next(self._batches, None)
            if scanned is None:
                return None
            self._scan(*scanned)
        if not self._waiting:
            return None
        place = self._waiting.pop(0)
        self._uses[place] = self._scanned, self._scanned
        return place

    def _scan(self, number: int, places: Iterable[Place]) -> None:
        self._scanned = number
        for place in dict.fromkeys(places):
            if place in self._uses:
                self._uses[place] = self._uses[place][0], number
            else:
                self._waiting.append(place)


class Prefetcher:
    """Fetches shards in threads of its own while a loader takes batches from it, once."""

    def __init__(
        self, batches: Iterable[Any], look_ahead: LookAhead, fetch: Callable[[Place, threading.Event], None]
    ) -> None:
        """Starts the threads.

        Args:
            batches: What the loader takes.
            look_ahead: Knows the shards of these batches.
            fetch: Gets a shard, and an event that tells it to give up.
        """
        self._batches = batches
        self._look_ahead = look_ahead
        self._fetch = fetch
        self._scanning = threading.Lock()  # the loader never waits for it
        self._moved = threading.Condition()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(DOWNLOADS)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches and notes how far the loader is."""
        for number, batch in enumerate(self._batches):
            self._look_ahead.reached = number
            with self._moved:
                self._moved.notify_all()
            yield batch

    def stop(self) -> None:
        """Ends the threads; one that hangs in a download is left to end with the process."""
        self._stopped.set()
        with self._moved:
            self._moved.notify_all()
        for thread in self._threads:
            thread.join(END_WITHIN_S / DOWNLOADS)

    def _run(self) -> None:
        while (place := self._take()) is not None:
            try:
                self._fetch(place, self._stopped)
            except (TubeletError, OSError) as error:
                logger.debug("could not be fetched ahead: %s", error)

    def _take(self) -> Place | None:
        while not self._stopped.is_set():
            with self._scanning:
                reached = self._look_ahead.reached
                place = self._look_ahead.next()
            if place is not None:
                return place
            with self._moved:
                while self._look_ahead.reached == reached and not self._stopped.is_set():
                    self._moved.wait()
        return None


@contextlib.contextmanager
def prefetched(sets: Sequence[ShardSet], requests: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Yields requests to hand to a loader, while shards behind URLs are downloaded ahead of it.

    Args:
        sets: The sets that requests read.
        requests: A list of `Request` for each micro-batch. A copy of them is walked too.
    """
    limit = min(
        (_limit(shards, shards.folder) for shards in sets if isinstance(shards.folder, RemoteFolder)), default=0
    )
    if not limit:
        yield requests
        return

    def fetch(place: Place, stopped: threading.Event) -> None:
        shards = sets[place[0]]
        if isinstance(shards.folder, RemoteFolder):
            shards.folder.fetch_ahead(shards.shards[place[1]], stopped)

    # An order keeps the windows that it last shuffled, so a second walk needs an order of its own.
    places = (
        [
            (request.set_number, sets[request.set_number].locate(request.sample)[0])
            for request in batch
            if isinstance(sets[request.set_number].folder, RemoteFolder)
        ]
        for batch in copy.deepcopy(requests)
    )
    prefetcher = Prefetcher(requests, LookAhead(places, limit), fetch)
    try:
        yield prefetcher
    finally:
        prefetcher.stop()


def _limit(shards: ShardSet, folder: RemoteFolder) -> int:
    """Returns how many shards may be ahead: what the user allows, and what the cache can hold beside those in use."""
    cache = folder.cache
    largest_bytes = max((shard.bytes for shard in shards.shards), default=0) or 1
    return min(cache.prefetch_shards, int(SHARE_OF_CACHE * cache.max_bytes / largest_bytes))
