"""What the scripts have in common: options as key=value, a file of results, a line of JSON."""

import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path


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


def unusual(config: object, names: Iterable[str]) -> list[str]:
    """Of these options those that do not have their defaults, as parts of a file's name."""
    return [f"{name}-{getattr(config, name)}" for name in names
            if getattr(config, name) != getattr(type(config), name)]  # fmt: skip


def keep(result: dict, path: Path, config: object, places: Sequence[str] = ()) -> None:
    """Prints a result as a line of JSON, and writes it to a file: `path`, with every option in its
    name that is not as usual, so that a try does not replace what README shows. places: options
    that say where something is, and not what is measured."""
    names = [field.name for field in fields(config) if field.name not in places]
    path = path.with_stem("_".join([path.stem, *unusual(config, names)]))
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


def report(
    arguments: list[str], config_class: type, measure: Callable[..., dict], path: Path,
    places: Sequence[str] = (),
) -> int:  # fmt: skip
    """Measures with the config that key=value arguments make; `keep` tells what becomes of it. Exit
    code: 0, or 2 after a line on stderr that says what was wrong."""
    try:
        config = config_class(**key_values(arguments, config_class))
        result = measure(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep(result, path, config, places)
    return 0
