"""From a command line to a configuration, and from an error to one line and an exit code.

jsonargparse reads dataclasses, YAML recipes and overrides of any field. Added here: a recipe is found by its name, and
an unknown field is refused together with the name that comes nearest.
"""

import contextlib
import dataclasses
import difflib
import logging
import re
import sys
from argparse import Action
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from pretrain.engine.devices import host_name
from pretrain.engine.distributed import launched_rank
from pretrain.errors import EXIT_DONE, EXIT_INTERRUPTED, DiskFull, Refused, TubeletError
from pretrain.files import is_out_of_space

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config", bound="DataclassInstance")


class Parser(ArgumentParser):
    """A parser that raises `Refused` with one line instead of printing its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raises `Refused`, with the nearest field where a field is unknown."""
        message = " ".join(str(ex or message).split())
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if unknown:
            name = unknown[1] or f"{self._group_in(message)}{unknown[2]}"
            raise Refused(f"{name}: there is no such field; {self._nearest(name)}")
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing:
            raise Refused(f"{self._called(missing[1])}: missing; see {self.prog} --help")
        field = re.search(r'Parser key "([\w.]+)": (.*)', message)
        if field:
            raise Refused(self._in_optional_group(*field.groups()) or f"{field[1]}: {_plain(field[2])}")
        raise Refused(message)

    def _in_optional_group(self, group: str, problem: str) -> str | None:
        """Returns what is wrong with a field of a group that may be null; None if that is not what is wrong."""
        found = re.search(r"Errors: - (?:Option '(\w+)' is not accepted|(\w+): (.*?)) - .*NoneType", problem)
        if not found:
            return None
        unknown, name, reason = found.groups()
        if name:
            return f"{group}.{name}: {_plain(reason)}"
        hints = [getattr(action, "_typehint", None) for action in self._actions if action.dest == group]
        kinds = [kind for hint in hints for kind in get_args(hint) if dataclasses.is_dataclass(kind)]
        fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
        near = difflib.get_close_matches(unknown, fields, n=1, cutoff=0.5)
        remedy = f"did you mean {group}.{near[0]}?" if near else f"its fields are {', '.join(fields)}"
        return f"{group}.{unknown}: there is no such field; {remedy}"

    def _called(self, names: str) -> str:
        alone = {action.dest: str(action.metavar) for action in self._actions if hasattr(action, "stands_alone")}
        return ", ".join(alone.get(name, name) for name in names.split(", "))

    def _group_in(self, message: str) -> str:
        group = re.search(r"Group '([\w.]+)'", message)
        return f"{group[1]}." if group else ""

    def _nearest(self, name: str) -> str:
        fields = [action.dest for action in self._actions if action.dest not in ("help", "config", "print_config")]
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        near = near or [field for field in fields if field.split(".")[-1] == name.split(".")[-1]]
        return f"did you mean {near[0]}?" if near else "see --help for all fields"


class HelpFormatter(DefaultHelpFormatter):
    """Tells of a field what a person needs: its default if it has one, and the name it has where it stands alone."""

    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        return None if text is None or text.startswith("Literal[") else text.replace(" | null", "")

    def _expand_help(self, action: Action) -> str:
        return re.sub(r"(, |(?<=\())default: null(?=\))", "", super()._expand_help(action)).removesuffix(" ()")

    def _format_action_invocation(self, action: Action) -> str:
        alone = f"{action.metavar}, " if getattr(action, "stands_alone", False) else ""
        return alone + super()._format_action_invocation(action)


def recipes_folder() -> Path:
    """Returns the folder of recipes: inside the package in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


def find_recipe(name: str, stage: str, suffix: str = ".yaml") -> Path:
    """Returns the file of a recipe.

    Args:
        name: A file, or the name of a recipe without its suffix.
        stage: Folder of `configs/` to look in.
        suffix: Ending of the recipes' names.

    Raises:
        Refused: There is no such file and no such recipe.
    """
    if Path(name).is_file():
        return Path(name)
    folder = recipes_folder() / stage
    recipe = folder / f"{name}{suffix}"
    if recipe.is_file():
        return recipe
    names = sorted(path.stem for path in folder.glob(f"*{suffix}"))
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(names)}"
    raise Refused(f"{name}: is no file and no recipe of configs/{stage}; {remedy}")


def parse(config_class: type[Config], stage: str, arguments: list[str]) -> Config:
    """Reads a configuration from a recipe and command-line overrides.

    Args:
        config_class: The configuration; its `EITHER_OR` names pairs of fields of which a recipe or a command line gives
            one, and what the command line gives wins.
        stage: `pretrain` or `finetune`.
        arguments: The command line; the `--local_rank` that `deepspeed` adds is passed over.

    Raises:
        Refused: A field is unknown or ill-typed, or a recipe does not exist.
    """
    with met_by_every_rank():
        arguments = [argument for argument in arguments if not re.fullmatch(r"--local[_-]rank=\d+", argument)]
        cleared = _others_of_pairs(getattr(config_class, "EITHER_OR", ()), with_underscores(arguments))
        return parse_plain(config_class, stage, _with_recipe_files(arguments, stage) + cleared)


@contextlib.contextmanager
def met_by_every_rank() -> Iterator[None]:
    """Lets rank 0 alone tell an error that is raised inside: every rank meets it alike."""
    try:
        yield
    except TubeletError as error:
        error.told = True
        raise


def parse_plain(
    config_class: type[Config], command: str, arguments: list[str], alone: Mapping[str, str] | None = None
) -> Config:
    """Reads a configuration from `--config FILE` and command-line overrides, without looking up recipes.

    Args:
        config_class: The configuration.
        command: The subcommand of `tubelet`.
        arguments: The command line; every value of it follows the name of its field.
        alone: For the help, the fields whose values may stand without their names, and what a user calls them.
    """
    parser = _parser(config_class, command, alone or {})
    try:
        parsed = parser.parse_args(with_underscores(arguments))
    except UnicodeDecodeError as error:
        raise Refused(f"config: not a YAML file ({error}); name a recipe, or a text file of fields") from error
    _refuse_values_of_groups(config_class, parsed)
    values = parser.instantiate(parsed)
    return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})


def _parser(config_class: type[Config], command: str, alone: Mapping[str, str]) -> Parser:
    usage = " ".join([f"tubelet {command}", *alone.values(), "[--FIELD VALUE ...]"])
    parser = Parser(prog=f"tubelet {command}", usage=usage, allow_abbrev=False, formatter_class=HelpFormatter)
    recipe = ", or the name of a recipe in configs/" + command if (recipes_folder() / command).is_dir() else ""
    parser.add_argument("--config", action=ActionConfigFile, help=f"YAML file of fields{recipe}")
    parser.add_class_arguments(config_class)
    for action in parser._actions:
        if action.dest == "print_config":
            action.help = "Print the configuration that would run, and exit."
        elif action.dest in alone:
            action.metavar, action.stands_alone = alone[action.dest].strip("[]"), True  # type: ignore[attr-defined]
    return parser


def with_underscores(arguments: list[str]) -> list[str]:
    """Returns arguments with the names of options as fields are written: `--short-side` is `--short_side`."""
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        result.append((name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name) + equals + value)
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as plain dictionaries and lists, as YAML and JSON hold it."""
    return yaml.safe_load(to_yaml(config))


def to_yaml(config: Any) -> str:
    """Returns a configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(_plain_value(dataclasses.asdict(config)), sort_keys=False)


def run_command(command: Callable[[], Any], go_on: str = "start the same command again to go on") -> int:
    """Runs a command and returns its exit code; an expected error becomes one line.

    Rank 0 prints it. Another rank prints, with its number and host, what rank 0 does not tell.

    Args:
        command: The command.
        go_on: How somebody goes on who has interrupted it.
    """
    try:
        command()
    except TubeletError as error:
        return _tell(error)
    except OSError as error:
        if not is_out_of_space(error):
            raise
        return _tell(DiskFull(f"{error.filename}: no space left on the disk; free some and start again"))
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print(f"tubelet: interrupted; {go_on}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


def _tell(error: TubeletError) -> int:
    """Prints an error unless rank 0 does; returns its exit code."""
    logging.getLogger(__name__).debug("traceback", exc_info=error)
    rank = launched_rank()
    if rank == 0 or not error.told:
        speaker = f"rank {rank} on {host_name()}: " if rank else ""
        print(f"tubelet: {speaker}{' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def _refuse_values_of_groups(config_class: Any, parsed: Any, above: str = "") -> None:
    """Raises `Refused` where a recipe gives one value to a group of fields."""
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            if not isinstance(parsed[field.name], Namespace):
                raise Refused(f"{above}{field.name}: holds fields of its own, got {parsed[field.name]}; see --help")
            _refuse_values_of_groups(field.type, parsed[field.name], f"{above}{field.name}.")


def _with_recipe_files(arguments: list[str], stage: str) -> list[str]:
    result = list(arguments)
    for number, argument in enumerate(result):
        if argument == "--config" and number + 1 < len(result):
            result[number + 1] = str(find_recipe(result[number + 1], stage))
        elif argument.startswith("--config="):
            result[number] = f"--config={find_recipe(argument.removeprefix('--config='), stage)}"
    return result


def _others_of_pairs(pairs: tuple[tuple[str, str], ...], arguments: list[str]) -> list[str]:
    """Returns options that clear, for each field of a pair that the command line sets, the other of the pair."""
    given = set()
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and (value if equals else following) != "null":
            given.add(name[2:])
    exchanged = [pair for pair in pairs if len(given & set(pair)) == 1]
    return [f"--{name}=null" for pair in exchanged for name in pair if name not in given]


def _plain(text: str) -> str:
    """Rewrites Python's names of types as a person would say them."""
    union = re.search(r"Union subtypes.*? Errors: (- [Ee]xpected .*) Given value type.*Given value: (.*)", text)
    if union:
        kinds = [kind for kind in re.split(r" ?- [Ee]xpected a? ?", union[1])[1:] if "NoneType" not in kind]
        text = f"expected {' or '.join(kinds)}, got {union[2]}"
    group = re.search(r"Unable to load config '(.*?)'|dot import path string: (.*?), got", text)
    if group:
        return f"holds fields of its own, got {group[1] or group[2]}; see --help"
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("Expected a ", "expected ")
    return text.replace(". Got value:", ", got").replace("Got value:", "got")


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_value(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(one) for one in value]
    return value
