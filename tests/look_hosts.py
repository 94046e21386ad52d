"""Three hosts look at samples while a model trains: ``python tests/look_hosts.py FOLDER RECIPE override...``.

Each is a process forked from this one, with the eager runtime. Prints the scores of each, a line for each; FOLDER gets
the sheets of samples that they have seen.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import numpy as np
import torch
import torch.distributed as dist

from rae_xla.recipe import DiffusionRecipe, load_recipe
from rae_xla.runtime import Runtime, create
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


def host(rank: int, folder: str, recipe: str, overrides: list[str]) -> None:
    """Does not return."""
    code = 1
    try:
        torch.set_num_threads(1)
        loaded = load_recipe(recipe, overrides)
        runtime = create("eager", loaded.mesh, loaded.precision)
        runtime.process_index, runtime.num_processes, runtime.num_devices = rank, NUM_HOSTS, NUM_HOSTS
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_HOSTS)
        seen = looked(loaded, runtime)
        np.save(f"{folder}/{rank}.npy", seen.pictures["samples"])
        sys.stdout.write(json.dumps(seen.values) + "\n")
        sys.stdout.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    children = []
    for rank in range(NUM_HOSTS):
        child = os.fork()
        if not child:
            host(rank, sys.argv[1], sys.argv[2], sys.argv[3:])
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))
