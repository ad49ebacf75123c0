"""What the command lines have in common: options, errors in one line, files of results."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from data import printable


class Parser(argparse.ArgumentParser):
    """Options like --this VALUE. Mistakes are raised as ValueError, for `exit_code` to tell;
    argparse would print all options and exit."""

    def error(self, message: str) -> None:
        """Raises ValueError with argparse's message."""
        raise ValueError(message)

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """Raises ValueError for what is no option, and names the nearest one, if one is near."""
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists all options"
            raise ValueError(f"unknown argument {unknown[0]}{hint}")
        return given


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory, for which torch has several wordings."""
    words = "out of memory", "can't allocate memory", "Cannot allocate memory"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def exit_code(work: Callable[[], int | None], advice: str = "") -> int:
    """Does the work of a script, and returns its exit code: what the work returns, or 0; 2 after a
    line on stderr that says what was wrong; 130 after Ctrl-C. advice: what to do if memory is
    short. Errors that are no user's mistake pass through."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        told = printable(" ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = f"out of memory; {advice or 'close other programs'}"
    print(f"error: {told}", file=sys.stderr)
    return 2


def key_values(arguments: list[str], config_class: type) -> dict:
    """key=value pairs as values for the fields of a config, each of its field's type. Raises
    ValueError for what no field takes."""
    types = {field.name: field.type for field in fields(config_class)}
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in types or not equals:
            near = difflib.get_close_matches(key.lstrip("-"), types, 1, 0.0)[0]
            raise ValueError(f"{argument}: no such option; did you mean {near}=...?")
        try:
            given[key] = {"1": True, "0": False}[value] if types[key] is bool else types[key](value)
        except (ValueError, KeyError):
            kind = "1 or 0" if types[key] is bool else f"of type {types[key].__name__}"
            raise ValueError(f"{argument}: {value!r} is not {kind}") from None
    return given


def check_device(device: str, option: str = "device=") -> None:
    """Raises ValueError for a device that torch can't compute on here. option: what stands before
    it on the command line."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"{option}{device}: torch sees no GPU here; leave it out to use the CPU")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):  # the last two: torch was built without it
        told = f"{option}{device}: torch can't compute on that here; say cpu, cuda or mps"
        raise ValueError(told) from None


def unusual(config: object, names: Iterable[str]) -> list[str]:
    """Those of the options that differ from their defaults, as parts of a file's name."""
    return [f"{name}-{getattr(config, name)}" for name in names
            if getattr(config, name) != getattr(type(config), name)]  # fmt: skip


def other_weights(weights: str, usual: str) -> list[str]:
    """The same for a folder of weights, by its name alone: [] for the usual one."""
    folder = Path(weights).resolve()
    return [] if folder == Path(usual).resolve() else [f"weights-{folder.name}"]


def print_and_save(result: dict, path: Path) -> None:
    """Prints a result as a line of JSON, the last one of a script, and writes it to a file. Raises
    OSError if that can't be written; what was measured is printed all the same."""
    print(json.dumps(result), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def report(
    arguments: list[str], config_class: type, measure: Callable[..., dict], path: Path,
    places: Sequence[str] = (),
) -> int:  # fmt: skip
    """Measures with the config that key=value arguments make, and keeps the result in `path`, whose
    name gets every option that is not at its default, so that a try does not replace what the
    README shows. places: options that name places and do not change what is measured. Returns the
    exit code."""

    def work() -> None:
        config = config_class(**key_values(arguments, config_class))
        names = [field.name for field in fields(config) if field.name not in places]
        name = "_".join([path.stem, *unusual(config, names)])
        print_and_save(measure(config), path.with_stem(name))

    return exit_code(work)
