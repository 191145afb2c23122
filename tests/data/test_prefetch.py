"""Shards fetched ahead: which and how many, that nothing read depends on it, and that it never fails or holds a run."""

import threading
import time

import pytest

from pretrain.data import prefetch, remote
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches, training_batches
from pretrain.data.order import Order
from pretrain.data.prefetch import LookAhead, Prefetcher
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips
from pretrain.errors import TubeletError
from tests import shard_server as tricks
from tests.shard_server import serving

A, B, C, D = ((0, number) for number in range(4))


def test_shards_are_fetched_in_the_order_of_their_first_use_and_few_ahead():
    look_ahead = LookAhead([[A], [A, B], [C, B], [D]], limit=2)
    assert [look_ahead.next() for _ in range(3)] == [A, B, None]
    look_ahead.reached = 0
    assert [look_ahead.next() for _ in range(2)] == [C, None]
    look_ahead.reached = 1
    assert [look_ahead.next() for _ in range(2)] == [D, None]
    look_ahead.reached = 3
    assert look_ahead.next() is None


def test_a_shard_that_comes_round_again_is_fetched_again():
    look_ahead = LookAhead([[A], [B], [A], [B]], limit=1)
    fetched = [look_ahead.next()]
    for look_ahead.reached in range(4):
        fetched.append(look_ahead.next())
    assert fetched == [A, B, A, B, None]


def test_few_shards_do_not_make_it_walk_a_whole_run(monkeypatch):
    monkeypatch.setattr(prefetch, "BATCHES_AHEAD", 10)
    walked = []
    look_ahead = LookAhead((walked.append(number) or [A] for number in range(10**9)), limit=8)
    assert [look_ahead.next(), look_ahead.next()] == [A, None]
    assert len(walked) == 10
    look_ahead.reached = 5
    assert look_ahead.next() is None
    assert len(walked) == 16


def test_a_fetch_that_fails_or_hangs_neither_fails_nor_holds_what_it_serves():
    hanging = threading.Event()

    def fetch(place, stopped):
        if place == B:
            hanging.set()
            time.sleep(60)
        raise TubeletError("the server is away")

    prefetcher = Prefetcher([0, 1, 2, 3], LookAhead([[A], [B], [C], [D]], 4), fetch)
    assert hanging.wait(5)
    assert list(prefetcher) == [0, 1, 2, 3]
    started = time.monotonic()
    prefetcher.stop()
    assert time.monotonic() - started < 1.5


@pytest.fixture
def read(packed_shards):
    """Reads 8 steps of 4 samples from a place, and returns the keys of each micro-batch and the set."""

    def read(place, cache=None, workers=0):
        shards = ShardSet.open(place, cache=cache)
        config = DataConfig(clip=ClipConfig(frames=2, stride=1, size=16), workers=workers)
        order = Order(shards.samples_per_shard, 3, lanes=2, shards_per_window=1, global_batch=4)
        requests = MicroBatches(order, range(8), 2, 1, 0)
        return [batch.keys for batch in training_batches(TrainingClips(shards, config, 3), requests)], shards

    return read


def test_what_is_read_is_the_same_with_and_without_and_from_the_folder(read, packed_shards, tmp_path):
    expected, _ = read(packed_shards)
    with serving(packed_shards) as server:
        for ahead in (0, 1, 8):
            keys, shards = read(server.url, CacheConfig(str(tmp_path / f"cache-{ahead}"), prefetch_shards=ahead))
            assert keys == expected
            assert shards.cache_hits + shards.cache_misses == 32
            assert shards.cache_misses == 3 or ahead
        keys, _ = read(server.url, CacheConfig(str(tmp_path / "worker")), workers=1)
        assert keys == expected


def test_shards_are_there_before_the_reader_comes(packed_shards, tmp_path):
    with serving(packed_shards) as server:
        shards = ShardSet.open(server.url, cache=CacheConfig(str(tmp_path)))
        config = DataConfig(clip=ClipConfig(frames=2, stride=1, size=16), workers=0)
        order = Order(shards.samples_per_shard, 3, lanes=1, shards_per_window=1, global_batch=1)
        batches = training_batches(TrainingClips(shards, config, 3), MicroBatches(order, range(11), 1, 1, 0))
        next(batches)
        deadline = time.monotonic() + 5
        while len(list(tmp_path.glob("*.tar"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(batches)) == 10
        assert shards.cache_misses <= 1
        assert all(times == 1 for times in server.sent.values())


def test_shards_in_folders_of_a_mixture_take_no_share_of_what_may_be_ahead(packed_shards, other_shards, tmp_path):
    with serving(other_shards) as server:
        sets = [ShardSet.open(packed_shards), ShardSet.open(server.url, cache=CacheConfig(str(tmp_path), 1, 1))]
        requests = [[Request(sample, 0, 0)] for sample in range(11)] + [[Request(0, 0, 0, set_number=1)]]
        with prefetch.prefetched(sets, requests):
            deadline = time.monotonic() + 5
            while not list(tmp_path.glob("*.tar")) and time.monotonic() < deadline:
                time.sleep(0.01)
        assert len(list(tmp_path.glob("*.tar"))) == 1


def test_the_reader_fetches_what_could_not_be_fetched_ahead(read, packed_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01,) * 3)
    expected, _ = read(packed_shards)
    with serving(packed_shards) as server:
        server.tricks["shard-000001.tar"] = [tricks.status(503)] * 4
        keys, _ = read(server.url, CacheConfig(str(tmp_path / "cache")))
        assert keys == expected
        assert server.asked["shard-000001.tar"] == 5


def test_a_run_that_ends_while_a_server_stalls_does_not_wait_for_it(packed_shards, tmp_path):
    with serving(packed_shards) as server:
        shards = ShardSet.open(server.url, cache=CacheConfig(str(tmp_path)))
        config = DataConfig(clip=ClipConfig(frames=2, stride=1, size=16), workers=0)
        order = Order(shards.samples_per_shard, 3, lanes=1, shards_per_window=1, global_batch=1)
        first, *later = dict.fromkeys(shards.locate(number)[0] for number in order.epoch_order(0).tolist())
        for shard in later:
            server.tricks[shards.shards[shard].name] = [tricks.stall(8)] * 9
        steps = range(shards.samples_per_shard[first] + 5)
        batches = training_batches(TrainingClips(shards, config, 3), MicroBatches(order, steps, 1, 1, 0))
        next(batches)
        while not any(server.asked[shards.shards[shard].name] for shard in later):
            time.sleep(0.01)
        started = time.monotonic()
        batches.close()
        assert time.monotonic() - started < 2


def test_starting_on_a_huge_set_is_not_held_up(tmp_path):
    """20,000 shards of 500 samples: what prefetching adds before the first batch."""
    content = {"classes": [], "frame_rate": None, "short_side": 48, "resampled": False}
    entry = {"bytes": 1, "sha256": "", "samples": 500, "index_sha256": ""}
    entries = [entry | {"name": f"shard-{number}.tar"} for number in range(20_000)]
    folder = remote.RemoteFolder("http://127.0.0.1:9", CacheConfig(str(tmp_path)))
    shards = ShardSet(folder, content | {"shards": entries}, "")
    order = Order(shards.samples_per_shard, 3, lanes=1024, shards_per_window=8, global_batch=2048)
    requests = MicroBatches(order, range(10_000), 8, 64, 0)
    next(iter(requests))
    started = time.process_time()
    with prefetch.prefetched([shards], requests) as followed:
        next(iter(followed))
        assert time.process_time() - started < 1
