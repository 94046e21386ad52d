"""What the command-line tools share: arguments, the exit contract, ``--json``.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from rae_xla.errors import UserError


def parser(description: str, *, recipe: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--json``, and with RECIPE and overrides unless ``recipe`` is false."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if recipe:
        add_recipe_arguments(made)
    made.add_argument("--json", metavar="FILE", help="write the result as one JSON object")
    return made


def add_recipe_arguments(made: argparse.ArgumentParser) -> None:
    """RECIPE and ``key.sub=value`` overrides."""
    made.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    made.add_argument("overrides", metavar="key.sub=value", nargs="*", help="values laid over the recipe, read as YAML")


def run(main: Callable[[argparse.Namespace], dict[str, Any]], made: argparse.ArgumentParser) -> None:
    """Parse, run, write ``--json``, exit: 0, or 2 with one line on stderr for a user's mistake."""
    # Options may stand between the overrides.
    arguments = made.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        result = main(arguments)
        if arguments.json:
            from rae_xla import storage

            storage.write_json(arguments.json, result)
    except UserError as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
