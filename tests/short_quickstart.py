"""The quickstart with every training cut to 24 steps: ``python tests/short_quickstart.py ROOT``."""

import os
import sys

from rae_xla import quickstart
from rae_xla.recipe import load_recipe as load_full_recipe

SHORT = ["log.every_steps=1", "checkpoint.every_steps=10"]
EPOCHS_OF_24_STEPS = {32: 24 * 32 / 1437, 64: 24 * 64 / 1437}


def load_short_recipe(path, overrides):
    recipe = load_full_recipe(path, overrides)
    if not hasattr(recipe, "train"):
        return recipe
    epochs = f"train.num_epochs={EPOCHS_OF_24_STEPS[recipe.data.batch_size]}"
    return load_full_recipe(path, [*overrides, *SHORT, epochs, "train.warmup_epochs=0.1"])


if __name__ == "__main__":
    quickstart.load_recipe = load_short_recipe
    # A relative root, as users give it.
    result = quickstart.run_quickstart(os.path.relpath(sys.argv[1]), sys.argv[2:], num_images=30)
    print(result["report"])
