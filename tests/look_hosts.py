"""Three hosts look at samples of an untrained model: ``python tests/look_hosts.py RECIPE override...``.

Each is a process forked from this one, with the eager runtime. Prints what each host has seen, a line for each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist

from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.training.tasks import task_of

NUM_HOSTS = 3


def host(rank: int, meeting: str, recipe: str, overrides: list[str]) -> None:
    """Does not return."""
    code = 1
    try:
        torch.set_num_threads(1)
        loaded = load_recipe(recipe, overrides)
        runtime = create("eager", loaded.mesh, loaded.precision)
        runtime.process_index, runtime.num_processes, runtime.num_devices = rank, NUM_HOSTS, NUM_HOSTS
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_HOSTS)
        task = task_of(loaded, runtime)
        [look] = task.looks
        look.prepare(task.state, task.frozen)
        seen = look(task.num_steps, task.state, task.frozen, lambda: False)
        sheet = int(seen.pictures["samples"].astype(int).sum())
        sys.stdout.write(json.dumps({"values": seen.values, "sheet": sheet}) + "\n")
        sys.stdout.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(NUM_HOSTS):
            child = os.fork()
            if not child:
                host(rank, f"{folder}/meeting", sys.argv[1], sys.argv[2:])
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.exit(max(map(abs, codes)))
