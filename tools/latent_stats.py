"""Exact mean and variance of the encoder's features at every position, over the training split.

Writes latent_stats.safetensors (mean, variance) into the run directory. The result depends neither on the batch size
nor on the number of devices. A pass that was stopped goes on where it was when the same command is run again, and one
that is finished is not repeated.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns where the statistics are, and their averages."""
    from rae_xla import runtime
    from rae_xla.evaluation.latent_stats import write_latent_stats
    from rae_xla.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, "latent_stats")
    report = write_latent_stats(recipe, runtime.create(recipe.runtime, recipe.mesh, recipe.precision))
    print(f"mean and variance of {report['num_images']} images: {report['path']}")
    return report


if __name__ == "__main__":
    cli.run(main, cli.parser(__doc__))
