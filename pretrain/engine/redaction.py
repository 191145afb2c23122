"""Removing secrets from what a run notes of its environment and tells W&B.

Secrets are credentials in URLs, tokens, and the values of secret variables and options.

Nothing here decides what is worth writing; `environment.py` takes only variables that it knows. This is the second net,
for command lines and values in which a secret may stand all the same.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

REMOVED = "[removed]"
SHORTEST_SECRET = 6
"""Shorter values of secret variables are not looked for: they would tear holes into ordinary words."""

_SECRET_PART = re.compile(
    r"secret|passw|passphrase|credential|authorization|webhook|apikey|accesskey|(?:auth|access|session)_?tokens?"
    r"|_(?:pwd|pw|creds?|sas)\b",
    re.I,
)
_SECRET_WORD = re.compile(r"(?<![a-z])(?:key|token|auth|jwt|pass|pat|dsn|cookie|signature)(?![a-z])", re.I)
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*)://[^\s\"<>]+", re.I)
_OPTION = re.compile(r"--?[\w.-]+\Z")
_ASSIGNMENT = re.compile(r"\A(-{0,2}[\w.-]+)=(.+)\Z", re.S)
_TOKEN = re.compile(
    r"\b(?:"
    r"hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|sk-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|wandb_v\d_\w{20,}|local-[0-9a-f]{40}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r")|\bBearer\s+\S+|\bBasic\s+[A-Za-z0-9+/]{8,}=*|(?<=Authorization: )(?:token|key)\s+\S+"
    r"|\b(?:AccountKey|SharedAccessKey)=[^\s;]+"
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option of this name holds a secret: `HF_TOKEN` does, `packing.tokens` does not."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # accessToken, as access_token
    return _SECRET_PART.search(apart) is not None or _SECRET_WORD.search(apart) is not None


def without_secrets(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Returns a value of dictionaries, lists and texts with every secret in its texts replaced.

    Args:
        value: Anything; what is no text is returned as it is.
        environment: Variables whose secret ones are looked for in all texts; by default this process's.
    """
    known = sorted(_secrets_of(os.environ if environment is None else environment), key=len, reverse=True)
    return _cleaned(value, known)


def arguments_without_secrets(arguments: list[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Returns a command line without secrets: as `without_secrets`, and no value of an option with a secret's name."""
    result: list[str] = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        assigned = _ASSIGNMENT.match(argument)
        if _OPTION.match(before) and is_secret_name(before) and not argument.startswith("--"):
            result.append(REMOVED)
        elif assigned and is_secret_name(assigned[1]):
            result.append(f"{assigned[1]}={REMOVED}")
        else:
            result.append(argument)
    return without_secrets(result, environment)


def _secrets_of(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        names_a_file = "/" in value and os.path.exists(value)
        if is_secret_name(name) and len(value) >= SHORTEST_SECRET and not names_a_file:
            yield value


def _cleaned(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, REMOVED)
        return _TOKEN.sub(REMOVED, _URL.sub(lambda found: _without_credentials(found[0]), value))
    if isinstance(value, Mapping):
        return {_cleaned(name, known): _cleaned(one, known) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(one, known) for one in value]
    return value


def _without_credentials(url: str) -> str:
    """Returns a URL without user, password, query and fragment; by text, since a secret may make a URL that none is."""
    scheme, _, rest = url.partition("://")
    _, credentials, rest = rest.rpartition("@")
    path, *query = re.split(r"[?#]", rest, maxsplit=1)
    return f"{scheme}://{REMOVED + '@' if credentials else ''}{path}{'?' + REMOVED if query else ''}"
