"""Bytes from a URL, once: `http(s)://` by the standard library, `s3://` by s3fs. No shell, no pickle, no other scheme.

Every answer is watched: no connection, or a server that falls silent or creeps, is an error and never a long wait.
Trying again is for who asked (`remote.py`). No message holds more of a URL than its scheme, host and path.
"""

import base64
import contextlib
import errno
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
from collections.abc import Iterator
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
S3_BLOCK_S = 300.0
"""A block that takes longer is an error: S3 too may send a byte now and then."""
BUSY = (408, 425, 429)
"""HTTP's answers below 500 that ask for another try."""
COMPRESSED = ("br", "compress", "deflate", "gzip", "x-gzip", "zstd")
S3_REFUSALS = (errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG, errno.EREMCHG)
"""What s3fs makes of answers such as 400, which a HEAD with an expired login gets, and 301, that of another region."""


class Unavailable(Exception):
    """The server, or the way to it, failed; another try may succeed. The message says why, in a few words."""


class Answer(NamedTuple):
    """What a server sends: how many bytes it says it will, None if it does not say, and the bytes as they come."""

    length: int | None
    chunks: Iterator[bytes]


def parse_url(text: str) -> str | None:
    """Returns the URL of a folder, without slashes at its end, or None if the text is a path.

    Raises:
        Refused: The scheme is not read, its package is missing, no server can be there, or the URL holds credentials or
            a query.
    """
    found = re.match(r"([\w+.:-]+)://|(pipe):", text)
    if not found:
        return None
    scheme = (found[1] or found[2]).lower()
    if scheme not in SCHEMES:
        raise Refused(
            f"{scheme}: shards are not read from such URLs; give a folder, or an http://, https:// or s3:// URL"
        )
    parts = _parts_of(text, scheme)
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


def _parts_of(text: str, scheme: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(text)
        if scheme != "s3":  # whose buckets are no hosts
            (parts.hostname or "").encode("idna")
            if parts.port == 0 or (parts.netloc and not parts.hostname) or re.search(r"[\0- \x7f]", parts.netloc):
                raise ValueError
    except ValueError:  # what Python says of it may tell a part of a password
        raise Refused(
            f"{scheme}: the host or the port of this URL cannot be; give {scheme}://HOST/FOLDER or "
            f"{scheme}://HOST:PORT/FOLDER"
        ) from None
    return parts


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
        response = _opener().open(request, timeout=STALL_S)
    with response:
        encoding = response.headers.get("Content-Encoding", "").lower()
        if encoding in COMPRESSED:
            raise Refused(f"{url}: comes compressed ({encoding}); let the server send its files as they are")
        yield Answer(response.length, _chunks(url, response))


def _opener() -> urllib.request.OpenerDirector:
    """Returns an opener for HTTP and nothing else; the standard one follows a server to ftp:// too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


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
    way = _proxy_of(url)
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        told = " ".join(["HTTP", str(error.code), http.client.responses.get(error.code, "")]).strip() + way
        if error.code >= 500 or error.code in BUSY:
            raise Unavailable(told) from None
        if error.code in (401, 403, 407):
            raise _forbidden(url, told, f"a login for it into {_netrc_with_its_fault()}") from None
        raise _missing(url, told) from None
    except (http.client.InvalidURL, ValueError):
        raise _missing(url, f"it, or where its server sends us, is not the URL of a file{way}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Refused(
                f"{url}: its certificate cannot be trusted ({reason.verify_message}); set SSL_CERT_FILE to the "
                f"certificates of your site"
            ) from None
        if isinstance(reason, str):  # nobody was asked: of a scheme that it was sent to, or that a proxy has
            raise _missing(url, f"{reason}{way}") from None
        raise Unavailable(_in_words(reason) + way) from None


def _in_words(reason: BaseException) -> str:
    if isinstance(reason, TimeoutError):
        return f"it sent nothing for {STALL_S:g} s"
    if isinstance(reason, http.client.RemoteDisconnected | http.client.IncompleteRead):
        return "it closed the connection too early"
    if isinstance(reason, http.client.HTTPException):
        return f"its answer is not HTTP ({type(reason).__name__})"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _proxy_of(url: str) -> str:
    """Returns what to add to an error if a proxy stands between, which may be the one that is wrong."""
    scheme, host = urllib.parse.urlsplit(url)[:2]
    is_asked = scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    return f", through ${scheme}_proxy" if is_asked else ""


def _authorization(host: str) -> str | None:
    """Returns the header for a host that ~/.netrc knows."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, ValueError, netrc.NetrcParseError):
        return None
    if not found:
        return None
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def _netrc_with_its_fault() -> str:
    """Returns the name of the file of logins, and why it is not used if there is one; nothing of what it holds."""
    name = os.environ.get("NETRC") or "~/.netrc"
    try:
        netrc.netrc(os.environ.get("NETRC"))
    except netrc.NetrcParseError as error:
        fault = f"its line {error.lineno} cannot be read" if error.lineno else "nobody else may own or read it"
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            return name
        fault = "it cannot be read"
    else:
        return name
    return f"{name}, which is not used as it is: {fault}"


@contextlib.contextmanager
def _open_s3(url: str) -> Iterator[Answer]:
    limits = {"connect_timeout": STALL_S, "read_timeout": STALL_S, "retries": {"total_max_attempts": 1}}
    with _s3_errors(url):
        system = _import_s3fs(url).S3FileSystem(config_kwargs=limits)
        system.retries = S3_TRIES
        size_bytes = system.info(url, timeout=S3_BLOCK_S)["size"]
    yield Answer(size_bytes, _blocks(url, system, size_bytes))


def _blocks(url: str, system: Any, size_bytes: int) -> Iterator[bytes]:
    for start in range(0, size_bytes, S3_BLOCK_BYTES):
        with _s3_errors(url):
            end = min(start + S3_BLOCK_BYTES, size_bytes)
            block = system.cat_file(url, start=start, end=end, timeout=S3_BLOCK_S)
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
    except PermissionError as error:
        raise _forbidden(url, f"access denied: {error.strerror or error}", login) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise _forbidden(url, "no credentials", login) from None
    except exceptions.ParamValidationError:
        raise _missing(url, "not the name of a bucket and a key") from None
    except TimeoutError:
        raise Unavailable("it sent nothing, or next to nothing, for too long") from None
    except OSError as error:
        if error.errno in S3_REFUSALS:
            raise Refused(
                f"{url}: S3 refuses the request ({error.strerror}); check that the login has not expired, and the "
                f"bucket's region"
            ) from None
        raise Unavailable(error.strerror or type(error).__name__) from None
    except (
        aiohttp.ClientError,
        exceptions.ClientError,
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
    ) as error:
        raise Unavailable(type(error).__name__) from None
    except (exceptions.BotoCoreError, ValueError) as error:  # a profile, region or endpoint that cannot be
        reason = " ".join(str(error).split())
        raise Refused(f"{url}: S3 cannot be asked ({reason}); check the AWS environment variables and ~/.aws") from None


def _missing(url: str, reason: str) -> Refused:
    return Refused(f"{url}: is not there ({reason}); check the URL, and that the whole set was copied there")


def _forbidden(url: str, reason: str, login: str) -> Refused:
    return Refused(f"{url}: is not given to us ({reason}); put {login}")


def _import_s3fs(url: str) -> Any:
    try:
        return importlib.import_module("s3fs")
    except ImportError:
        raise Refused(f"{url}: reading from S3 needs the package s3fs; pip install 'tubelet[s3]'") from None
