"""Train what a recipe describes: a decoder, a diffusion transformer, a linear probe, or the quickstart's classifiers.

The recipe's task is classifier, autoencoder, diffusion or linear_probe. Running the same command again resumes from the
newest complete checkpoint. A run that is told to end (SIGTERM, Google Cloud's notice) saves itself and exits with 75.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the report of the run."""
    from rae_xla import runtime
    from rae_xla.recipe import load_recipe
    from rae_xla.training.tasks import TRAINING_TASKS, explain_mesh, train

    recipe = load_recipe(arguments.recipe, arguments.overrides, *TRAINING_TASKS)
    where = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    if arguments.explain_mesh:
        explained = explain_mesh(recipe, where)
        print(explained)
        return {"mesh": explained}
    return train(recipe, where)


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--explain-mesh", action="store_true", help="print how every tensor is split and its GiB a chip, and end"
    )
    cli.run(main, parser)
