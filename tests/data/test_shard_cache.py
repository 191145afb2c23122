"""The cache of a node without a network: who goes first, what stays, and what a folder may hold besides."""

import contextlib
import errno
import math
import os
import pwd
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.data.part_files import Busy, locked, locked_part
from pretrain.data.shard_cache import LOCK, PART, CacheConfig, ShardCache, cache_name
from pretrain.errors import DiskFull, Refused

SIZE_BYTES = 1000


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    """Room for three files."""
    return ShardCache(CacheConfig(str(tmp_path / "cache"), max_gb=3 * SIZE_BYTES / 1e9))


def name_of(number: int) -> str:
    return cache_name(f"http://host/{number}", "checksum", ".tar")


def fetch(cache: ShardCache, number: int, wait: bool = True, fill=None) -> tuple[bytes, bool]:
    def write(part) -> None:
        part.reserve(SIZE_BYTES)
        part.write(bytes([number]) * SIZE_BYTES)

    def is_whole(descriptor: int) -> bool:
        return os.fstat(descriptor).st_size == SIZE_BYTES

    descriptor, was_there = cache.open(name_of(number), is_whole, fill or write, wait)
    with open(descriptor, "rb") as file:
        return file.read(), was_there


def held(cache: ShardCache) -> list[int]:
    return [number for number in range(9) if (cache.folder / name_of(number)).exists()]


def test_what_was_used_longest_ago_goes_first(cache):
    for number in (0, 1, 2):
        assert fetch(cache, number) == (bytes([number]) * SIZE_BYTES, False)
        os.utime(cache.folder / name_of(number), ns=(number, number))
    assert fetch(cache, 0)[1]
    fetch(cache, 3)
    assert held(cache) == [0, 2, 3]
    fetch(cache, 4)
    assert held(cache) == [0, 3, 4]


def test_a_file_that_is_read_while_it_goes_can_be_read_to_its_end(cache):
    fetch(cache, 0)
    descriptor, _ = cache.open(name_of(0), lambda descriptor: True, lambda part: None)
    for number in (1, 2, 3):
        fetch(cache, number)
    assert held(cache) == [1, 2, 3]
    with open(descriptor, "rb") as file:
        assert file.read() == bytes(SIZE_BYTES)


def test_files_of_others_in_the_folder_are_neither_counted_nor_removed(cache):
    precious = [cache.folder / name for name in ("thesis.tex", "shard-000000.tar", "thesis.part")]
    for path in precious:
        path.write_bytes(bytes(10 * SIZE_BYTES))
    for number in range(5):
        fetch(cache, number)
    assert all(path.exists() for path in precious)
    assert len(held(cache)) == 3


def test_parts_that_a_dead_process_left_make_room_and_those_of_a_living_one_do_not(cache):
    abandoned = cache.folder / (name_of(7) + PART)
    abandoned.write_bytes(bytes(2 * SIZE_BYTES))
    with locked_part(cache.folder / (name_of(8) + PART), wait=True) as descriptor:
        os.truncate(descriptor, 2 * SIZE_BYTES)
        fetch(cache, 0)
        assert not abandoned.exists()
        with pytest.raises(Busy):
            fetch(cache, 8, wait=False)
        fetch(cache, 1)
        assert held(cache) == [1]


def test_room_that_cannot_be_had_costs_no_file(cache):
    fetch(cache, 0)
    with locked_part(cache.folder / (name_of(8) + PART), wait=True) as descriptor:
        os.truncate(descriptor, 2 * SIZE_BYTES)
        with pytest.raises(Busy):
            fetch(cache, 1, wait=False, fill=lambda part: part.reserve(2 * SIZE_BYTES))
        assert held(cache) == [0]


def test_a_file_gets_its_name_while_nobody_counts_what_is_there(cache):
    """Or its bytes would be missed by who makes room in that moment, and the bound broken."""
    counting = threading.Event()

    def fill(part) -> None:
        part.reserve(SIZE_BYTES)
        part.write(bytes(SIZE_BYTES))
        assert counting.wait(5)

    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(fetch, cache, 0, fill=fill)
        while not (cache.folder / LOCK).exists():
            time.sleep(0.01)
        with locked(cache.folder / LOCK):
            counting.set()
            time.sleep(0.1)
            assert held(cache) == []
        fetching.result(timeout=5)
    assert held(cache) == [0]


def test_a_folder_that_is_emptied_while_a_file_is_written_is_filled_again(cache):
    emptied = []

    def fill(part) -> None:
        part.reserve(SIZE_BYTES)
        if not emptied:
            shutil.rmtree(cache.folder)
            emptied.append(part)
        part.write(bytes(SIZE_BYTES))

    assert fetch(cache, 0, fill=fill) == (bytes(SIZE_BYTES), False)
    assert held(cache) == [0]


def test_the_part_of_another_is_never_taken_for_ones_own(cache):
    """After somebody emptied the folder, another process may have begun the same file."""
    with contextlib.ExitStack() as of_another:

        def fill(part) -> None:
            part.reserve(SIZE_BYTES)
            part.path.unlink()
            of_another.enter_context(locked_part(part.path, wait=True))
            part.write(bytes(SIZE_BYTES))

        with pytest.raises(Busy):
            fetch(cache, 0, wait=False, fill=fill)
        assert held(cache) == []


def test_a_file_that_took_the_place_of_a_damaged_one_stays(cache):
    fetch(cache, 0)
    descriptor, _ = cache.open(name_of(0), lambda descriptor: True, lambda part: None)
    with open(descriptor, "rb"):
        cache.remove(name_of(0), descriptor)
        assert held(cache) == []
        fetch(cache, 0)
        cache.remove(name_of(0), descriptor)
        assert held(cache) == [0]


def test_a_cache_on_a_disk_that_is_read_only_gives_what_it_holds(cache, monkeypatch):
    fetch(cache, 0)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert fetch(cache, 0) == (bytes(SIZE_BYTES), True)


def test_a_disk_that_fills_while_a_file_is_written_costs_the_oldest_and_ends_in_one_line(cache):
    fetch(cache, 0)
    fetch(cache, 1)
    tries = []

    def fill(part) -> None:
        part.reserve(SIZE_BYTES)
        tries.append(held(cache))
        if len(tries) < 3:
            Path("/dev/full").write_bytes(bytes(SIZE_BYTES))
        part.write(bytes(SIZE_BYTES))

    assert fetch(cache, 2, fill=fill) == (bytes(SIZE_BYTES), False)
    assert tries == [[0, 1], [1], []]
    with pytest.raises(DiskFull, match=r"cache: the disk of the cache is full: No space left on device; free some"):
        fetch(cache, 3, fill=lambda part: Path("/dev/full").write_bytes(bytes(SIZE_BYTES)) and None)
    assert held(cache) == []
    assert not list(cache.folder.glob("*.part"))


def test_names_tell_urls_and_checksums_apart_and_nothing_else():
    names = {cache_name(url, checksum, ".tar") for url in ("http://a/x.tar", "http://b/x.tar") for checksum in "12"}
    assert len(names) == 4
    assert names == {
        cache_name(url, checksum, ".tar") for url in ("http://a/x.tar", "http://b/x.tar") for checksum in "12"
    }


def test_a_folder_that_cannot_be_and_numbers_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Refused, match=r"file/cache: cannot hold the cache \(Not a directory\); give another"):
        ShardCache(CacheConfig(str(tmp_path / "file" / "cache")))
    for fields in ({"max_gb": 0}, {"max_gb": math.nan}, {"prefetch_shards": -1}, {"folder": ""}):
        with pytest.raises(Refused, match=rf"data\.cache\.{next(iter(fields))}"):
            CacheConfig(**fields).validate()
    with pytest.raises(Refused, match=r"data\.cache\.max_gb: inf must be finite"):
        ShardCache(CacheConfig(str(tmp_path), max_gb=math.inf))


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch):
    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for config in (CacheConfig(), CacheConfig("~/cache")):
        with pytest.raises(Refused, match=r"data\.cache\.folder: this user has no home folder .*; give a folder"):
            ShardCache(config)


def test_the_cache_lies_on_the_disk_of_the_job_or_else_of_the_user(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/scratch/job")
    assert CacheConfig().path == Path(f"/scratch/job/tubelet-{os.getuid()}")
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert CacheConfig().path == Path("/var/cache/me/tubelet")
    assert CacheConfig("~/x").path == Path.home() / "x"
