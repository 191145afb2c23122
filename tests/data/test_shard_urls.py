"""What is a URL of shards, and what is refused before anything is asked of a server."""

import pickle
import sys
from pathlib import Path

import pytest

from pretrain.data.remote import RemoteFolder, folder_of
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:cat index.json", "pipe: shards are not read from such URLs; give a folder, or an http://"),
        ("ftp://host/shards", "ftp: shards are not read"),
        ("simplecache::s3://bucket/shards", "simplecache::s3: shards are not read"),
        ("file:///data/shards", "file: shards are not read"),
        ("http://host/shards?signature=secret", r"^http://host/shards: is not the URL of a folder of shards"),
        ("https:///shards", "is not the URL of a folder"),
        ("http://[::1/shards", "^http: the host or the port of this URL cannot be; give http://HOST/FOLDER"),
        ("http://host:99999/shards", "^http: the host or the port of this URL cannot be"),
        ("http://:80/shards", "^http: the host or the port of this URL cannot be"),
        ("https://my host/shards", "^https: the host or the port of this URL cannot be; give https://"),
        ("http://one..two/shards", "^http: the host or the port of this URL cannot be"),
        ("http://user:secret/word@host/shards", "^http: the host or the port of this URL cannot be"),
        ("http://user:secret@host/shards", r"^http://host/shards: its credentials .* put them into ~/\.netrc instead"),
        ("s3://key:secret@bucket/shards", r"^s3://bucket/shards: its credentials .* AWS environment variables"),
    ],
)
def test_urls_that_cannot_be_or_hold_secrets_are_refused_and_secrets_not_told(url, words):
    with pytest.raises(Refused, match=words) as caught:
        ShardSet.open(url)
    assert "secret" not in str(caught.value)
    assert ";" in str(caught.value)


def test_a_scheme_whose_package_is_missing_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(Refused, match=r"s3://bucket/shards: .* needs the package s3fs; pip install 'tubelet\[s3\]'"):
        ShardSet.open("s3://bucket/shards")


def test_paths_are_no_urls_and_urls_are_kept_as_one_writes_them(tmp_path):
    cache = CacheConfig(str(tmp_path / "cache"))
    for path in ("shards", "/data/a:b/shards", "C:/shards", "./http:/x"):
        assert folder_of(path) == Path(path)
    folder = folder_of("HTTP://host:80/my shards//", cache)
    assert folder == RemoteFolder("http://host:80/my%20shards", cache)
    assert folder / "a b.tar" == "http://host:80/my%20shards/a%20b.tar"
    assert folder / "caf\udce9 100%.tar" == "http://host:80/my%20shards/caf%E9%20100%25.tar"
    assert hash(folder) == hash(pickle.loads(pickle.dumps(folder)))
    assert folder_of("http://[::1]:8080/a b/", cache) == RemoteFolder("http://[::1]:8080/a%20b", cache)
    assert folder_of("s3://arn:aws:s3:eu-west-1:1:accesspoint/100% of it", cache).url.endswith("/100% of it")
