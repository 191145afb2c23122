"""Shards behind URLs: what a real server on loopback does to a download, and what a reader makes of it."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data import remote, transfer
from pretrain.data.contact_sheet import FrameTask, middle_frame
from pretrain.data.part_files import locked
from pretrain.data.remote import folder_of
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused, TubeletError
from tests import shard_server as tricks
from tests.runs import tiny_pretraining
from tests.shard_server import ShardServer, serving

TAR = "shard-000001.tar"
IDX = "shard-000001.idx"


@pytest.fixture
def quick(monkeypatch) -> None:
    """Pauses and time limits of hundredths of a second."""
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01, 0.02, 0.04, 0.08))
    monkeypatch.setattr(transfer, "STALL_S", 0.5)


@pytest.fixture
def server(packed_shards) -> ShardServer:
    with serving(packed_shards) as server:
        yield server


@pytest.fixture
def cache(tmp_path) -> CacheConfig:
    return CacheConfig(str(tmp_path / "cache"))


def content_of(shards: ShardSet) -> list:
    return [shards.read(number) for number in range(shards.samples)]


def cached_tars(cache: CacheConfig) -> list[Path]:
    return sorted(cache.path.glob("*.tar"))


def test_a_set_behind_a_url_is_the_one_in_the_folder(server, cache, packed_shards):
    local, shards = ShardSet.open(packed_shards), ShardSet.open(server.url + "/", cache=cache)
    assert (shards.fingerprint, shards.classes, shards.shards) == (local.fingerprint, local.classes, local.shards)
    assert server.asked == {"index.json": 1}, "opening fetches no shard, however many there are"
    assert content_of(shards) == content_of(local)
    assert shards.labels() == local.labels()
    assert (shards.cache_misses, shards.cache_hits) == (len(local.shards), local.samples - len(local.shards))
    assert set(server.sent.values()) == {1}
    assert (local.cache_misses, local.cache_hits) == (0, 0)


def test_a_second_process_finds_all_in_the_cache_and_counts_for_itself(server, cache):
    shards = ShardSet.open(server.url, cache=cache)
    content = content_of(shards)
    again = pickle.loads(pickle.dumps(shards))
    assert (again.cache_misses, again.cache_hits) == (0, 0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(content_of, (again,)) == content
    assert set(server.sent.values()) == {1}


SURVIVED = [
    tricks.status(500),
    tricks.status(503),
    tricks.status(429),
    tricks.stall(1.5),
    tricks.truncate,
    tricks.truncate_without_length,
    tricks.truncate_chunks,
    tricks.hang_up,
    tricks.reset,
    tricks.understate,
    tricks.overstate,
    tricks.lengthen,
    tricks.not_http,
    tricks.other,
    tricks.page,
]


@pytest.mark.parametrize("trick", SURVIVED, ids=lambda trick: trick.__qualname__.split(".")[0])
@pytest.mark.parametrize("name", [TAR, IDX, "index.json"])
def test_what_a_server_does_once_is_survived(quick, server, cache, packed_shards, name, trick, caplog):
    if trick is tricks.other and name == "index.json":
        return  # it is the identity of the set, so nothing says what it should be
    if trick is tricks.lengthen and name == "index.json":
        trick = tricks.truncate
    server.tricks[name] = [trick]
    shards = ShardSet.open(server.url, cache=cache)
    assert shards.read(4) == ShardSet.open(packed_shards).read(4)
    assert (server.asked[name], server.sent[name]) == (2, 1)
    (said,) = [message for message in caplog.messages if f"{server.url}/{name}" in message]
    assert re.search(r"127\.0\.0\.1:\d+/[\w.-]+: cannot be fetched \(.+\); trying again in", said)


def test_a_server_that_creeps_is_given_up_like_one_that_stalls(quick, server, cache, monkeypatch):
    monkeypatch.setattr(transfer, "SLOW_S", 0.2)
    server.tricks[TAR] = [tricks.creep(3)]
    started = time.monotonic()
    assert ShardSet.open(server.url, cache=cache).read(4)
    assert time.monotonic() - started < 2
    assert server.asked[TAR] == 2


@pytest.mark.parametrize(
    ("name", "trick", "words"),
    [
        (TAR, tricks.other, r"its SHA-256 is [0-9a-f]{64} where index\.json says [0-9a-f]{64}"),
        (TAR, tricks.page, r"it is 26 bytes long where index\.json says \d+"),
        (TAR, tricks.lengthen, r"it is longer than the \d+ bytes that index\.json says"),
        (TAR, tricks.understate, r"it is \d+ bytes long where index\.json says \d+"),
        (IDX, tricks.other, r"its SHA-256 is [0-9a-f]{64} where index\.json says [0-9a-f]{64}"),
        ("index.json", tricks.page, "no JSON: Expecting value"),
    ],
)
def test_another_file_is_asked_for_once_more_past_caches_and_then_named(quick, server, cache, name, trick, words):
    server.tricks[name] = [trick] * 9
    with pytest.raises(Refused, match=f"/{name}: {words}.*, also when asked again; copy the whole set") as caught:
        ShardSet.open(server.url, cache=cache).read(4)
    assert str(caught.value).startswith(server.url)
    assert server.asked[name] == 2
    assert server.headers[name]["Cache-Control"] == "no-cache"
    assert not [path for path in cache.path.glob("*") if TAR in path.name or path.suffix == ".part"]


def test_a_file_that_is_not_there_or_not_given_is_named_at_once(server, cache, packed_shards, tmp_path):
    with pytest.raises(Refused, match=rf"{server.url}/nowhere/index\.json: is not there \(HTTP 404 Not Found\)"):
        ShardSet.open(f"{server.url}/nowhere", cache=cache)
    server.tricks[TAR] = [tricks.status(403)] * 2
    with pytest.raises(Refused, match=rf"{TAR}: is not given to us \(HTTP 403 Forbidden\); put a login"):
        ShardSet.open(server.url, cache=cache).read(4)
    assert server.asked[TAR] == 1


def test_a_file_without_a_length_and_one_from_elsewhere_are_read(server, cache, packed_shards):
    server.tricks[TAR] = [tricks.chunked]
    with serving(packed_shards) as elsewhere:
        server.tricks["shard-000000.tar"] = [tricks.redirect(f"{elsewhere.url}/shard-000000.tar")]
        assert content_of(ShardSet.open(server.url, cache=cache)) == content_of(ShardSet.open(packed_shards))
    assert elsewhere.sent == {"shard-000000.tar": 1}
    assert server.asked[TAR] == 1


@pytest.mark.parametrize(
    ("trick", "words"),
    [
        (tricks.compress, r"comes compressed \(gzip\); let the server send"),
        (tricks.redirect("/index.json"), r"is not there \(HTTP 302 Found\); check"),
        (tricks.redirect("file:///etc/hosts?secret"), r"is not there \(HTTP 302 Found\); check"),
        (tricks.redirect("ftp://127.0.0.1/index.json"), r"is not there \(unknown url type: ftp\); check"),
        (tricks.redirect("http://[::1/secret"), r"is not there \(it, or where its server sends us, is not the URL"),
        (lambda request, content: tricks.send(request, b"[" * 100_000), r"its lists lie too deep in each other, also"),
        (lambda request, content: tricks.send(request, b""), r"no JSON: Expecting value"),
        (lambda request, content: tricks.send(request, b"[]"), r"holds \[\] in place of an object"),
    ],
)
def test_what_no_further_try_mends_is_told_at_once_in_one_line(quick, server, cache, trick, words):
    server.tricks["index.json"] = [trick] * 20
    started = time.monotonic()
    with pytest.raises(Refused, match=f"^{server.url}/index.json: {words}") as caught:
        ShardSet.open(server.url, cache=cache)
    assert time.monotonic() - started < 2
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_proxy_that_cannot_be_or_is_away_is_named(quick, cache, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(Refused, match=r"is not there \(unknown url type: socks5, through \$http_proxy\)"):
        ShardSet.open("http://shards.example/set", cache=cache)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(TubeletError, match=r"cannot be fetched \(Connection refused, through \$http_proxy\)"):
        ShardSet.open("http://shards.example/set", cache=cache)


def test_a_server_that_stays_away_is_one_line_and_that_comes_back_is_none(quick, cache, packed_shards, monkeypatch):
    with serving(packed_shards) as server:
        shards = ShardSet.open(server.url, cache=cache)
    with pytest.raises(
        TubeletError, match=r"index\.json: cannot be fetched \(Connection refused\), not even after 0\.15 s"
    ):
        ShardSet.open(server.url, cache=cache)
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.1, 0.2, 0.4, 0.8, 1.6))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(shards.read, 4)
        time.sleep(1)
        assert not reading.done()
        with serving(packed_shards, server.port):
            assert reading.result(timeout=5) == ShardSet.open(packed_shards).read(4)


def test_the_pauses_outlive_a_server_that_is_away_for_ten_seconds_twice_over():
    """Whatever the jitter adds, the last try comes after all pauses; connections may be refused at once."""
    assert sum(remote.RETRY_AFTER_S) > 20
    assert list(remote.RETRY_AFTER_S) == sorted(remote.RETRY_AFTER_S)
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(remote.RETRY_AFTER_S))


def test_two_processes_that_fill_one_cache_download_each_shard_once(server, cache):
    def slowly(request, content):
        time.sleep(0.3)
        tricks.send(request, content)

    server.tricks = {f"shard-00000{number}.tar": [slowly] for number in range(3)}
    shards = ShardSet.open(server.url, cache=cache)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.map(content_of, [shards, shards], chunksize=1)
    assert one == other
    assert {name: times for name, times in server.asked.items() if name.endswith(".tar")} == {
        f"shard-00000{number}.tar": 1 for number in range(3)
    }


def test_a_process_that_is_killed_while_it_downloads_leaves_nothing_that_hurts(server, cache, packed_shards):
    server.tricks[TAR] = [tricks.stall(30)]
    shards = ShardSet.open(server.url, cache=cache)
    killed = multiprocessing.get_context("spawn").Process(target=content_of, args=(shards,))
    killed.start()
    while not (parts := list(cache.path.glob("*.tar.part"))) or not server.asked[TAR]:
        time.sleep(0.01)
    assert len(parts) == 1
    killed.kill()
    killed.join()
    assert parts[0].exists()
    assert content_of(ShardSet.open(server.url, cache=cache)) == content_of(ShardSet.open(packed_shards))
    assert not list(cache.path.glob("*.part"))


def test_two_shards_of_one_name_in_different_folders_are_never_mixed_up(tmp_path, packed_shards, other_shards, cache):
    """Even where an index would have the cache believe that they are the same."""
    for name, folder in (("one", packed_shards), ("two", other_shards)):
        shutil.copytree(folder, tmp_path / "sets" / name)
    with serving(tmp_path / "sets") as server:
        sets = [ShardSet.open(f"{server.url}/{name}", cache=cache) for name in ("one", "two")]
        read = [sets[turn % 2].read(turn // 2).key for turn in range(10)]
    local = [ShardSet.open(folder) for folder in (packed_shards, other_shards)]
    assert read == [local[turn % 2].key(turn // 2) for turn in range(10)]
    assert sets[0].shards[0].name == sets[1].shards[0].name
    assert len(cached_tars(cache)) == 4


def test_a_copy_that_the_disk_cut_or_changed_is_fetched_again(server, cache, packed_shards, caplog):
    shards = ShardSet.open(server.url, cache=cache)
    content = content_of(shards)
    os.truncate(cached_tars(cache)[0], 100)
    assert content_of(shards) == content
    assert sorted(server.sent.values()) == [1] * 6 + [2]
    damaged = cached_tars(cache)[1]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert content_of(shards) == content
    assert any("is damaged; fetching it again" in message for message in caplog.messages)
    index = sorted(cache.path.glob("*.idx"))[0]
    index.write_bytes(index.read_bytes()[:-5])
    assert ShardSet.open(server.url, cache=cache).labels() == shards.labels()


def test_the_cache_never_exceeds_its_bound_while_all_is_read(server, tmp_path, packed_shards):
    sizes = [shard.bytes for shard in ShardSet.open(packed_shards).shards]
    cache = CacheConfig(str(tmp_path / "cache"), max_gb=(max(sizes) + sum(sizes) / 10) / 1e9)
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            sizes_now = []
            with locked(cache.path / "lock"):  # room is taken under this lock, so nothing moves in between
                for path in cache.path.glob("[0-9a-f]*"):
                    with contextlib.suppress(FileNotFoundError):
                        sizes_now.append(path.stat().st_size)
            most[0] = max(most[0], sum(sizes_now))

    cache.path.mkdir()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        shards = ShardSet.open(server.url, cache=cache)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            in_processes = pool.map(content_of, [shards, shards], chunksize=1)
    finally:
        over.set()
        watcher.join()
    assert in_processes == [content_of(ShardSet.open(packed_shards))] * 2
    assert 0 < most[0] <= cache.max_bytes


def test_a_cache_smaller_than_a_shard_is_refused(server, tmp_path):
    cache = CacheConfig(str(tmp_path / "cache"), max_gb=1e-5)
    with pytest.raises(Refused, match=r"data\.cache\.max_gb: 1e-05 is less than one shard of .* GB; use at least"):
        ShardSet.open(server.url, cache=cache).read(0)


def test_a_login_comes_from_netrc_and_is_told_to_nobody(server, cache, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server.tricks["index.json"] = [tricks.status(401)]
    with pytest.raises(Refused, match=r"is not given to us \(HTTP 401") as caught:
        ShardSet.open(server.url, cache=cache)
    ShardSet.open(server.url, cache=cache).read(0)
    assert server.headers[f"{TAR[:-5]}0.tar"]["Authorization"] == "Basic bWU6aHVudGVyMg=="
    told = str(caught.value) + caplog.text + " ".join(path.name for path in cache.path.glob("*"))
    assert "hunter2" not in told
    assert "bWU6" not in told


def test_a_netrc_that_is_not_used_is_told_without_what_it_holds(server, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2")
    netrc.chmod(0o644)
    server.tricks["index.json"] = [tricks.status(401)] * 2
    with pytest.raises(Refused, match=r"into ~/\.netrc, which is not used as it is: nobody else may own or read it"):
        ShardSet.open(server.url, cache=cache)
    netrc.write_text("machine 127.0.0.1\nlogin me password two words hunter2")
    netrc.chmod(0o600)
    with pytest.raises(Refused, match=r"which is not used as it is: its line 2 cannot be read$"):
        ShardSet.open(server.url, cache=cache)


def test_fetching_ahead_what_is_there_keeps_it_there(server, cache):
    shards = ShardSet.open(server.url, cache=cache)
    content_of(shards)
    for path in cached_tars(cache):
        os.utime(path, ns=(1, 1))
    shards.folder.fetch_ahead(shards.shards[1], threading.Event())
    assert sorted(path.stat().st_mtime_ns > 1 for path in cached_tars(cache)) == [False, False, True]
    assert set(server.sent.values()) == {1}


def test_commands_take_urls_and_fetch_what_they_read_once(server, cache, tmp_path, capsys, packed_shards):
    assert main(["inspect", server.url, "--cache.folder", cache.folder]) == 0
    assert ShardSet.open(packed_shards).fingerprint in capsys.readouterr().out
    assert not cached_tars(cache)
    assert middle_frame(FrameTask(folder_of(server.url, cache), 4)).shape == (48, 64, 3)
    options = ["--data.cache.folder", cache.folder, "--data.workers", "0", "--steps", "1:2", "--epochs", "2"]
    listed = []
    for place in (str(packed_shards), server.url):
        assert (
            main(
                ["order", "--config", str(tiny_pretraining(tmp_path, packed_shards)), "--data.shards", place, *options]
            )
            == 0
        )
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1]
    assert listed[0].count("key") == 8
    assert all(times == 1 for name, times in server.sent.items() if name != "index.json")


def test_check_names_what_a_server_lacks_or_changed_and_reads_the_rest(tmp_path, packed_shards, cache, capsys, quick):
    folder = Path(shutil.copytree(packed_shards, tmp_path / "set"))
    (folder / TAR).unlink()
    with open(folder / "shard-000002.tar", "r+b") as file:
        file.write(b"other")
    with serving(folder) as server:
        assert main(["check", server.url, "--cache.folder", cache.folder, "--jobs", "1"]) == 1
        assert server.asked["shard-000000.tar"] == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"{TAR}: is not there (HTTP 404 Not Found)" in said
    assert "shard-000002.tar: its SHA-256 is" in said
    content = json.loads((folder / "index.json").read_text())
    assert f"not reached {sum(shard['samples'] for shard in content['shards'][1:])}" in re.sub(r"[\s│]+", " ", said)
