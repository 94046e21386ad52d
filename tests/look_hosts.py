"""Three hosts look at samples while a model trains: ``python tests/look_hosts.py FOLDER RECIPE override...``.

Each is a process forked from this one, with the eager runtime. Prints the scores of each, a line for each; FOLDER gets
the sheets of samples that they have seen.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from simulated_hosts import run_hosts

from rae_xla.recipe import DiffusionRecipe, load_recipe
from rae_xla.runtime import Runtime
from rae_xla.training.looks import Seen
from rae_xla.training.tasks import task_of

NUM_HOSTS = 3


def looked(recipe: DiffusionRecipe, runtime: Runtime) -> Seen:
    """At weights that make something of every label and all noise."""
    task = task_of(recipe, runtime)
    [look] = task.looks
    generator = torch.Generator().manual_seed(0)
    shaken = {n: value + 0.1 * torch.randn(value.shape, generator=generator) for n, value in task.state["ema"].items()}
    state = {**task.state, "ema": shaken}
    look.prepare(state, task.frozen)
    seen = look(task.num_steps, state, task.frozen, lambda: False)
    assert seen is not None
    return seen


if __name__ == "__main__":
    folder, loaded = sys.argv[1], load_recipe(sys.argv[2], sys.argv[3:])

    def look(runtime: Runtime) -> None:
        seen = looked(loaded, runtime)
        np.save(f"{folder}/{runtime.process_index}.npy", seen.pictures["samples"])
        sys.stdout.write(json.dumps(seen.values) + "\n")

    sys.exit(run_hosts(NUM_HOSTS, f"{folder}/meeting", loaded, look))
