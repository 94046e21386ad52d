"""Three processes write a tensor in three parts, read other parts of it, then one of them fails to write.

Last they step, and one of them hears that its machine goes away: all have to leave after the same step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rae_xla.runtime import Parts
from rae_xla.training import stored_parts
from rae_xla.training.recovery import HEARD_AFTER_STEPS, Agreement
from rae_xla.training.stored_index import StoredIndex
from rae_xla.training.stored_parts import read_parts, write_parts

WHOLE = torch.arange(24.0).reshape(6, 4)


def process(rank: int, directory: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=3)
    group = dist.new_group(backend="gloo")
    own = Parts((6, 4), torch.float32, {(2 * rank, 0): WHOLE[2 * rank : 2 * rank + 2].clone()})
    write_parts(str(directory / "step"), {"w": own}, {}, group)
    # Columns, and all of it once.
    wanted = {(0, rank): torch.zeros(6, 1), (0, 0): torch.zeros(6, 4)} if rank else {(0, 0): torch.zeros(6, 4)}
    read_parts(StoredIndex(str(directory / "step")), {"w": Parts((6, 4), torch.float32, wanted)}, group)
    assert torch.equal(wanted[0, 0], WHOLE) and torch.equal(wanted[0, rank][:, :1], WHOLE[:, rank : rank + 1])

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        stored_parts.storage.write_pieces = fails
    try:
        write_parts(str(directory / "failed"), {"w": own}, {}, group)
        complaint = ""
    except OSError as error:
        complaint = str(error.strerror)
    complaints = [None] * 3
    dist.all_gather_object(complaints, complaint, group)
    if rank == 0:
        (directory / "complaints.json").write_text(json.dumps(complaints))
    agreement = Agreement(cast(Any, SimpleNamespace(num_processes=3)))
    # Hosts are at different steps when one of them hears it.
    for step in range(20):
        time.sleep(0.01 * rank)
        if agreement.on(rank == 1 and step >= 4):
            break
    left_after: list[Any] = [None] * 3
    dist.all_gather_object(left_after, step, group)
    assert left_after == [4 + HEARD_AFTER_STEPS] * 3, left_after
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(process, (Path(sys.argv[1]),), nprocs=3)
