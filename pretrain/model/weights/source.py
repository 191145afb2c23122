"""A state dict of another implementation, read strictly: a key that nothing uses or that is missing is an error."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.errors import Refused

Weights = dict[str, Tensor]


class Source:
    """Weights to convert, with what their configuration says.

    Args:
        weights: The state dict.
        config: The source's `config.json`, or nothing.
        processor: Its `preprocessor_config.json`, or nothing.
        heads: Number of heads of the encoder, for sources that do not tell.
        name: What error messages call the weights.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        processor: Mapping[str, Any] | None = None,
        heads: int | None = None,
        name: str = "weights",
    ) -> None:
        """Notes that no key has been used."""
        self.weights = weights
        self.config = config or {}
        self.processor = processor or {}
        self.heads = heads
        self.name = name
        self.left_out: list[str] = []
        self._prefix = ""
        self._unused = dict.fromkeys(weights)

    def under(self, prefix: str) -> "Source":
        """Returns the part of the source whose keys begin with `prefix`; it counts uses together with the whole."""
        part = copy.copy(self)
        part._prefix = self._prefix + prefix
        return part

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self.weights

    def take(self, key: str) -> Tensor:
        """Returns a weight and counts it as used; raises `Refused` if it is missing."""
        key = self._prefix + key
        if key not in self.weights:
            raise Refused(f"{self.name}: lacks {key}; it is incomplete, or a variant that Tubelet does not know")
        self._unused.pop(key, None)
        return self.weights[key]

    def count(self, prefix: str) -> int:
        """Returns how many modules `PREFIX.0`, `PREFIX.1`, ... there are, without a gap."""
        start = f"{self._prefix}{prefix}."
        numbers = {key.removeprefix(start).split(".")[0] for key in self.weights if key.startswith(start)}
        count = 0
        while str(count) in numbers:
            count += 1
        return count

    def leave_out(self, *prefixes: str) -> None:
        """Counts weights as used that have no counterpart here; `left_out` tells of what there was."""
        for prefix in prefixes:
            keys = [key for key in self._unused if key.startswith(self._prefix + prefix)]
            for key in keys:
                del self._unused[key]
            if keys:
                self.left_out.append((self._prefix + prefix).rstrip("."))

    def setting(self, name: str) -> Any:
        """Returns a value of the source's configuration; raises `Refused` if it is not there."""
        if name not in self.config:
            raise Refused(f"{self.name}: config.json has no {name}; give the folder with the model's own config.json")
        return self.config[name]

    def finish(self) -> None:
        """Raises `Refused` if a key was not used."""
        if self._unused:
            first = next(iter(self._unused))
            raise Refused(
                f"{self.name}: nothing uses {first} ({len(self._unused)} such weights); "
                f"it is a variant that Tubelet does not know"
            )
