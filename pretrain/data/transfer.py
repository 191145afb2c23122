"""Bytes from a URL, once: `http(s)://` by the standard library, `s3://` by s3fs. No shell, no pickle, no other scheme.

Every answer is watched: no connection, or a server that falls silent or creeps, is an error and never a long wait.
Trying again is for who asked (`remote.py`). No message holds more of a URL than its scheme, host and path.
"""

import base64
import contextlib
import http.client
import importlib
import netrc
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pretrain.errors import Refused

SCHEMES = ("http", "https", "s3")
STALL_S = 20.0
"""No connection, or no byte, for so long is an error."""
SLOW_S = 60.0
SLOWEST_BYTES_PER_S = 1024
"""Less than this over `SLOW_S` seconds is an error too: a server that sends a byte now and then never stalls."""
CHUNK_BYTES = 1 << 20
S3_BLOCK_BYTES = 8 << 20
S3_TRIES = 2
"""Of s3fs for each block, before the whole file is tried again."""
BUSY = (408, 425, 429)
"""HTTP's answers below 500 that ask for another try."""


class Unavailable(Exception):
    """The server, or the way to it, failed; another try may succeed. The message says why, in a few words."""


class Answer(NamedTuple):
    """What a server sends: how many bytes it says it will, None if it does not say, and the bytes as they come."""

    length: int | None
    chunks: Iterator[bytes]


def parse_url(text: str) -> str | None:
    """Returns the URL of a folder, without slashes at its end, or None if the text is a path.

    Raises:
        Refused: The scheme is not read, its package is missing, or the URL holds credentials or a query.
    """
    found = re.match(r"([\w+.:-]+)://|(pipe):", text)
    if not found:
        return None
    scheme = (found[1] or found[2]).lower()
    if scheme not in SCHEMES:
        raise Refused(
            f"{scheme}: shards are not read from such URLs; give a folder, or an http://, https:// or s3:// URL"
        )
    parts = urllib.parse.urlsplit(text)
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc:
        remedy = "the AWS environment variables or ~/.aws/credentials" if scheme == "s3" else "~/.netrc"
        raise Refused(f"{shown}: its credentials would be written to config.yaml; put them into {remedy} instead")
    if parts.query or parts.fragment or not parts.netloc:
        raise Refused(
            f"{shown}: is not the URL of a folder of shards: it needs a host and takes no query (a signed URL names "
            f"one file and expires); give {scheme}://HOST/FOLDER"
        )
    if scheme == "s3":
        _import_s3fs(shown)
        return shown.rstrip("/")
    return urllib.parse.quote(shown.rstrip("/"), safe=":/%~!$&'()*+,;=@[]")


def opened(url: str, fresh: bool = False) -> contextlib.AbstractContextManager[Answer]:
    """Opens a URL for reading; what goes wrong between its bytes is raised by `Answer.chunks`.

    Args:
        url: A file.
        fresh: Whether caches on the way (of HTTP) are asked for the server's own copy.

    Raises:
        Unavailable: Another try may succeed.
        Refused: There is no such file, or it is not given to us.
    """
    return _open_s3(url) if url.startswith("s3:") else _open_http(url, fresh)


@contextlib.contextmanager
def _open_http(url: str, fresh: bool) -> Iterator[Answer]:
    request = urllib.request.Request(url, headers={"User-Agent": "tubelet"})
    if fresh:
        request.add_header("Cache-Control", "no-cache")
    authorization = _authorization(urllib.parse.urlsplit(url).hostname or "")
    if authorization:
        request.add_unredirected_header("Authorization", authorization)
    with _http_errors(url):
        response = urllib.request.urlopen(request, timeout=STALL_S)
    with response:
        yield Answer(response.length, _chunks(url, response))


def _chunks(url: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
    length = response.length
    received, since, until_then = 0, time.monotonic(), 0
    while True:
        with _http_errors(url):
            chunk = response.read1(CHUNK_BYTES)
        if not chunk:
            break
        yield chunk
        received += len(chunk)
        passed_s = time.monotonic() - since
        if passed_s >= SLOW_S:
            if received - until_then < SLOWEST_BYTES_PER_S * passed_s:
                raise Unavailable(f"it sent {received - until_then} bytes in {passed_s:.0f} s")
            since, until_then = time.monotonic(), received
    if length is not None and received < length:
        raise Unavailable(f"the connection closed after {received} of {length} bytes")


@contextlib.contextmanager
def _http_errors(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        told = f"HTTP {error.code} {error.reason}"
        if error.code >= 500 or error.code in BUSY:
            raise Unavailable(told) from None
        if error.code in (401, 403, 407):
            raise _forbidden(url, told, "a login for it into ~/.netrc") from None
        raise _missing(url, told) from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Refused(
                f"{url}: its certificate cannot be trusted ({reason.verify_message}); set SSL_CERT_FILE to the "
                f"certificates of your site"
            ) from None
        raise Unavailable(_in_words(reason)) from None


def _in_words(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return f"it sent nothing for {STALL_S:g} s"
    if isinstance(reason, http.client.HTTPException):
        return f"its answer is not HTTP ({type(reason).__name__})"
    return getattr(reason, "strerror", None) or type(reason).__name__


def _authorization(host: str) -> str | None:
    """Returns the header for a host that ~/.netrc knows."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    if not found:
        return None
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


@contextlib.contextmanager
def _open_s3(url: str) -> Iterator[Answer]:
    limits = {"connect_timeout": STALL_S, "read_timeout": STALL_S, "retries": {"total_max_attempts": 1}}
    with _s3_errors(url):
        system = _import_s3fs(url).S3FileSystem(config_kwargs=limits)
        system.retries = S3_TRIES
        file = system.open(url, "rb", block_size=S3_BLOCK_BYTES, cache_type="none")
    with file:
        yield Answer(file.size, _blocks(url, lambda: file.read(S3_BLOCK_BYTES)))


def _blocks(url: str, read: Callable[[], bytes]) -> Iterator[bytes]:
    while True:
        with _s3_errors(url):
            block = read()
        if not block:
            break
        yield block


@contextlib.contextmanager
def _s3_errors(url: str) -> Iterator[None]:
    import aiohttp
    from botocore import exceptions

    login = "the key of an account that may read it into the AWS environment variables or ~/.aws/credentials"
    try:
        yield
    except FileNotFoundError:
        raise _missing(url, "no such key or bucket") from None
    except (PermissionError, exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise _forbidden(url, "no credentials" if not isinstance(error, OSError) else "access denied", login) from None
    except exceptions.ParamValidationError:
        raise _missing(url, "not the name of a bucket and a key") from None
    except (OSError, exceptions.BotoCoreError, exceptions.ClientError, aiohttp.ClientError) as error:
        raise Unavailable(getattr(error, "strerror", None) or type(error).__name__) from None


def _missing(url: str, reason: str) -> Refused:
    return Refused(f"{url}: is not there ({reason}); check the URL, and that the whole set was copied there")


def _forbidden(url: str, reason: str, login: str) -> Refused:
    return Refused(f"{url}: is not given to us ({reason}); put {login}")


def _import_s3fs(url: str) -> Any:
    try:
        return importlib.import_module("s3fs")
    except ImportError:
        raise Refused(f"{url}: reading from S3 needs the package s3fs; pip install 'tubelet[s3]'") from None
