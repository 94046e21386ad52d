"""Train what a recipe describes: a decoder, a diffusion transformer, or the quickstart's encoder and judge.

The recipe's task is classifier, autoencoder or diffusion. Running the same command again resumes from the newest
complete checkpoint.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the report of the run."""
    from rae_xla import runtime
    from rae_xla.recipe import load_recipe
    from rae_xla.training.tasks import TRAINING_TASKS, train

    recipe = load_recipe(arguments.recipe, arguments.overrides, *TRAINING_TASKS)
    return train(recipe, runtime.create(recipe.runtime, recipe.mesh, recipe.precision))


if __name__ == "__main__":
    cli.run(main, cli.parser(__doc__))
