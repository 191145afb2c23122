"""A state dict of another implementation, read strictly: a key that nothing uses or that is missing is an error."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from pretrain.errors import Refused

Weights = dict[str, Tensor]

Setting = TypeVar("Setting", int, float, str)


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
        """Returns how many modules `PREFIX.0`, `PREFIX.1`, ... there are, without a gap; raises `Refused` if none."""
        start = f"{self._prefix}{prefix}."
        numbers = {key.removeprefix(start).split(".")[0] for key in self.weights if key.startswith(start)}
        count = 0
        while str(count) in numbers:
            count += 1
        if not count:
            raise Refused(f"{self.name}: lacks {start}0; it is incomplete, or a variant that Tubelet does not know")
        return count

    def leave_out(self, *prefixes: str) -> None:
        """Counts weights as used that have no counterpart here; `left_out` tells of what there was."""
        for prefix in prefixes:
            keys = [key for key in self._unused if key.startswith(self._prefix + prefix)]
            for key in keys:
                del self._unused[key]
            if keys:
                self.left_out.append((self._prefix + prefix).rstrip("."))

    def setting(self, name: str, kind: type[Setting], default: Setting | None = None) -> Setting:
        """Returns a value of the source's configuration.

        Args:
            name: Its name.
            kind: What it must be; a number must be greater than 0.
            default: What is returned if it is not there; None if it must be there.

        Raises:
            Refused: It is not there, or something else than it must be.
        """
        value = self.config.get(name, default)
        if value is None:
            raise Refused(f"{self.name}: config.json has no {name}; give the folder with the model's own config.json")
        if not _is_setting(value, kind):
            what = "no text" if kind is str else f"no {'whole ' if kind is int else ''}number greater than 0"
            raise Refused(f"{self.name}: config.json has {name} {value!r}, which is {what}; download it again")
        return value

    def image_size(self) -> tuple[int, int]:
        """Returns height and width in pixels, from one number or two of the configuration."""
        value = self.config.get("image_size")
        if not isinstance(value, list | tuple):
            return (self.setting("image_size", int),) * 2
        if len(value) != 2 or not all(_is_setting(one, int) for one in value):
            raise Refused(f"{self.name}: config.json has image_size {value!r}; download it again")
        return value[0], value[1]

    def finish(self) -> None:
        """Raises `Refused` if a key was not used."""
        if self._unused:
            first = next(iter(self._unused))
            raise Refused(
                f"{self.name}: nothing uses {first} ({len(self._unused)} such weights); "
                f"it is a variant that Tubelet does not know"
            )


def _is_setting(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    numbers = int if kind is int else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and value > 0
