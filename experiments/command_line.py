"""What the scripts have in common: options as key=value, a file of results, a line of JSON."""

import difflib
import json
import sys
from collections.abc import Callable
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


def report(
    arguments: list[str], config_class: type, measure: Callable[..., dict], path: Path
) -> int:
    """Measures with the config that key=value arguments make, writes the result to path and prints
    it. Exit code: 0, or 2 after a line on stderr that says what was wrong."""
    try:
        result = measure(config_class(**key_values(arguments, config_class)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))
    return 0
