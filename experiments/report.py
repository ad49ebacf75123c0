"""The frame of a script that measures: options in, a file of results and a line of JSON out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from train import key_values


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
