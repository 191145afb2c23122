"""Arguments that stand without a name, and the parser of commands that have no configuration."""

import argparse
from collections.abc import Mapping
from typing import NoReturn

from pretrain.errors import Refused

PACK = {"source": "[VIDEOS]", "out": "SHARDS"}
"""The arguments of `tubelet pack` that may stand without their names."""


class ArgumentParser(argparse.ArgumentParser):
    """A parser of commands that have no configuration."""

    def error(self, message: str) -> NoReturn:
        """Raises `Refused` in place of printing the usage."""
        raise Refused(f"{self.prog.removeprefix('tubelet ')}: {message}; see {self.prog} --help")


def named(arguments: list[str], alone: Mapping[str, str]) -> list[str]:
    """Turns arguments without a name into named ones; jsonargparse's dataclasses know only these.

    With `--list`, a single one is the last of those that may stand alone.
    """
    positional, rest = without_names(arguments)
    from_list = any(argument.split("=")[0] == "--list" for argument in rest)
    names = list(alone)[-1:] if from_list and len(positional) == 1 else list(alone)
    if len(positional) > len(names):
        expected = " and ".join(name.strip("[]") for name in alone.values())
        raise Refused(f"{positional[len(names)]}: is one folder too many; give {expected}")
    return [part for name, value in zip(names, positional, strict=False) for part in (f"--{name}", value)] + rest


def without_names(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without a name, and the others with their values."""
    positional: list[str] = []
    rest: list[str] = []
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        if not argument.startswith("-"):
            positional.append(argument)
            continue
        rest.append(argument)
        if argument == "--unlabelled" and (not waiting or waiting[-1] not in ("true", "false")):
            rest.append("true")
        elif "=" not in argument and argument not in ("-h", "--help", "--print_config") and waiting:
            rest.append(waiting.pop())
    return positional, rest
