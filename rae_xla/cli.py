"""What the command-line tools share: arguments, the exit contract, ``--json``.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rae_xla.errors import StoppedError, UserError


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        # Optional, but argparse lists it among what is required.
        message = message.replace(", key.sub=value", "")
        if message.startswith("unrecognized arguments: --") and "=" in message:
            message += " (a key of the recipe is written without --)"
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def parser(description: str, *, recipe: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--json``, and with RECIPE and overrides unless ``recipe`` is false."""
    made = _OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if recipe:
        add_recipe_arguments(made)
    made.add_argument("--json", metavar="FILE", help="write the result as one JSON object")
    return made


# What scores are in if no recipe says so.
INCEPTION_RECIPE = Path(__file__).parent.parent / "recipes" / "evaluation" / "inception.yaml"


def inception_override(weights: str | None) -> list[str]:
    """Of a recipe whose features are Inception's, by ``--inception-weights``, a path as on any command line."""
    if weights is None:
        return []
    path = weights if "://" in weights else str(Path(weights).absolute())
    return [f"features.weights={json.dumps(path)}"]


def check_inception(weights: str | None, recipe: Any) -> None:
    """Raises a `UserError` if ``--inception-weights`` are given for other features."""
    if weights is not None and recipe.features.name != "inception":
        raise UserError(f"--inception-weights: the recipe's features are {recipe.features.name}; leave it out")


def print_scores(scores: dict[str, Any]) -> None:
    """A line for each."""
    for name, value in scores.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {'-' if value is None else value}")


def recipe_and_overrides(given: list[str], default: Path) -> tuple[str, list[str]]:
    """Where the recipe may be left out: the first that is no ``key=value``, or ``default``; and the others."""
    if given and "=" not in given[0]:
        return given[0], given[1:]
    return str(default), given


def add_recipe_arguments(made: argparse.ArgumentParser) -> None:
    """RECIPE and ``key.sub=value`` overrides."""
    made.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    made.add_argument("overrides", metavar="key.sub=value", nargs="*", help="values laid over the recipe, read as YAML")


def set_up_logging(line: str = "%(message)s") -> None:
    """To stderr, from this project."""
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stderr)
    # Their exceptions are told in one line; their logs tell them again with tracebacks, and each file that is opened.
    for library in ("gcsfs", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def run(main: Callable[[argparse.Namespace], dict[str, Any]], made: argparse.ArgumentParser) -> None:
    """Parse, run, write ``--json``, exit: 0, or with one line on stderr 2 for a user's mistake, 1 for anything else.

    A run that was told to stop and has saved itself exits with 75, see `rae_xla.errors.PreemptedError`.
    """
    # Options may stand between the overrides.
    arguments = made.parse_intermixed_args()
    set_up_logging()
    try:
        if arguments.json and Path(arguments.json).is_dir():
            raise UserError(f"--json: {arguments.json} is a directory; give a file")
        result = main(arguments)
        if arguments.json:
            from rae_xla import storage

            storage.write_json(arguments.json, result)
    except KeyboardInterrupt:
        print(f"{made.prog}: interrupted; the same command again goes on from the last checkpoint", file=sys.stderr)
        sys.exit(1)
    except (StoppedError, UserError) as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)
