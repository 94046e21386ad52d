"""How long a save holds up the training loop: written while training goes on, and before it does."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from rae_xla.benchmarks.overhead import created_model
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training.checkpoint import CheckpointConfig, Checkpoints, Progress
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.update import initial_state

NUM_SAVES = 2
NUM_STEPS = 3


def checkpoint_stall(name: str, fsdp: int) -> dict[str, Any]:
    """Seconds by which the step after a save ends later than after none, the best of each way.

    The state is that of a training of this model; a step reads and replaces all of it, as an optimizer does, and does
    nothing else. While a state is written steps go on; how much slower they are is told too: here they share the
    processor with the writing, which they do not on a TPU.
    """
    runtime = create("xla", MeshConfig(fsdp=fsdp), "fp32")
    module, _ = created_model(name, depth_only=False)
    state = runtime.place_state(initial_state(module, OptimizerConfig(num_epochs=1, learning_rate=1e-3, ema_decay=0.9)))
    frozen, batch = runtime.place_frozen({}), runtime.place_batch({"x": torch.ones(runtime.num_devices)})

    def decay(state: Any, _: Any, batch: Any) -> tuple[Any, Any]:
        return tree_map(lambda value: value * 0.5 if value.is_floating_point() else value + 1, state), batch["x"].sum()

    step = runtime.compile(decay, "decay")

    def seconds_of_a_step() -> float:
        nonlocal state
        started = time.perf_counter()
        state, total = step(state, frozen, batch)
        runtime.to_host((total, state["step"]))
        return time.perf_counter() - started

    usual = min(seconds_of_a_step() for _ in range(1 + NUM_STEPS))
    later: dict[bool, list[float]] = {False: [], True: []}
    meanwhile: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = str(Path(folder) / "checkpoints")
        for _ in range(NUM_SAVES):
            for asynchronous in (False, True):
                config = CheckpointConfig(every_steps=1, asynchronous=asynchronous)
                checkpoints = Checkpoints(directory, config, runtime, {}, {})
                started = time.perf_counter()
                checkpoints.save(Progress(1), state)
                seconds_of_a_step()
                later[asynchronous].append(time.perf_counter() - started - usual)
                while checkpoints.is_writing:
                    meanwhile.append(seconds_of_a_step())
                checkpoints.wait()
                size = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
                shutil.rmtree(directory)
    synchronous, asynchronous_seconds = min(later[False]), min(later[True])
    return {
        "model": name,
        "gigabytes": size / 1e9,
        "synchronous_seconds": synchronous,
        "asynchronous_seconds": asynchronous_seconds,
        "ratio": synchronous / asynchronous_seconds,
        "seconds_of_a_step": usual,
        "seconds_of_a_step_meanwhile": statistics.median(meanwhile or [usual]),
        "runtime": runtime.describe(),
    }
