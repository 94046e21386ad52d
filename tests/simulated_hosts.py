"""Hosts of a slice as processes forked from this one, each with the eager runtime."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

from rae_xla.recipe import CommonRecipe
from rae_xla.runtime import Runtime, create


def start_host(rank: int, num_hosts: int, meeting: str, recipe: CommonRecipe, work: Callable[[Runtime], None]) -> int:
    """A process that does its part of ``work`` and ends; hosts meet in the file ``meeting``. Returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        runtime = create("eager", recipe.mesh, recipe.precision)
        runtime.process_index, runtime.num_processes, runtime.num_devices = rank, num_hosts, num_hosts
        if num_hosts > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_hosts)
        work(runtime)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_hosts(num_hosts: int, meeting: str, recipe: CommonRecipe, work: Callable[[Runtime], None]) -> int:
    """All of them, to their end: 0 if each has done its part."""
    hosts = [start_host(rank, num_hosts, meeting, recipe, work) for rank in range(num_hosts)]
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(host, 0)[1])) for host in hosts)
