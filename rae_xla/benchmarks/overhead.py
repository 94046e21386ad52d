"""Host time of a training step: traced lazily every time, and traced once and replayed.

On a pod the chips wait for whatever the host needs before it has started a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from rae_xla.errors import UserError
from rae_xla.flow.objective import flow_matching_loss, interpolate
from rae_xla.models.diffusion import DiffusionModel, create_diffusion_model
from rae_xla.models.dit_dh import DIT_DH_SIZES, DiTDHConfig
from rae_xla.models.functional import buffers_of, parameters_of
from rae_xla.models.loading import initialised
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.update import initial_state, make_update

NUM_CLASSES = 1000
WARMUP_STEPS = 3


def created_model(name: str, *, depth_only: bool) -> tuple[DiffusionModel, tuple[int, int, int]]:
    """A named DiT^DH and the shape of its latents.

    ``depth_only``: with its true number of blocks and tensors, at a width that a CPU runs.

    Raises:
        UserError: no such DiT^DH.
    """
    if name not in DIT_DH_SIZES:
        raise UserError(f"--model: {name!r} is not known; use {', '.join(DIT_DH_SIZES)}")
    narrow = {"width": 16, "num_heads": 2, "head_width": 32, "head_num_heads": 2}
    config = DiTDHConfig.model_validate({"name": name, **(narrow if depth_only else {})})
    latent_shape = (8, 2, 2) if depth_only else (768, 16, 16)
    return initialised(lambda: create_diffusion_model(config, latent_shape, NUM_CLASSES), 0), latent_shape


def step_overhead(
    name: str, mesh: MeshConfig, compute: ComputeConfig, *, depth_only: bool, num_steps: int, num_lazy_steps: int
) -> dict[str, Any]:
    """Median host milliseconds per step of both ways, and what the replayed steps compiled and fetched.

    Each call is timed until it returns, on an idle device; the wait for it and the next batch are outside. Fetches are
    counted over a loop of as many steps that reads nothing.
    """
    # The engine's rival and the counters are torch_xla's own: no part of a runtime.
    from rae_xla.xla.lazy import LazyStep, num_transfers_to_host
    from rae_xla.xla.step import num_compilations

    runtime: Any = create("xla", mesh, "fp32")
    module, latent_shape = created_model(name, depth_only=depth_only)
    # The rate changes at every step.
    optimizer = OptimizerConfig(num_epochs=1, learning_rate=1e-3, schedule="cosine", ema_decay=0.99)

    def loss(model: Callable[..., torch.Tensor], _: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        predicted = model(interpolate(batch["x"], batch["noise"], batch["t"]), batch["t"], batch["labels"])
        return flow_matching_loss(predicted, batch["x"], batch["noise"]).mean(), {}

    update = make_update(module, loss, optimizer, compute, float(num_steps), runtime)
    frozen = runtime.place_frozen({"buffers": buffers_of(module)})

    def batch(index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        size = runtime.num_devices
        return runtime.place_batch(
            {
                "x": torch.randn(size, *latent_shape, generator=generator),
                "noise": torch.randn(size, *latent_shape, generator=generator),
                "t": torch.rand(size, generator=generator),
                "labels": torch.randint(NUM_CLASSES, (size,), generator=generator, dtype=torch.int32),
            }
        )

    def run(step: Callable[[Any, Any, Any], tuple[Any, Any]], count: int) -> dict[str, float]:
        state = runtime.place_state(initial_state(module, optimizer))
        times, compiled = [], 0
        for index in range(WARMUP_STEPS + count):
            placed = batch(index)
            if index == WARMUP_STEPS:
                compiled = num_compilations()
            started = time.perf_counter()
            state, outputs = step(state, frozen, placed)
            times.append(time.perf_counter() - started)
            runtime.to_host(outputs["loss"])
        fetched = num_transfers_to_host()
        for index in range(count):
            state, outputs = step(state, frozen, batch(index))
        fetched = num_transfers_to_host() - fetched
        # The device is to be idle for who comes next.
        runtime.to_host(outputs["loss"])
        return {
            "milliseconds": 1e3 * statistics.median(times[WARMUP_STEPS:]),
            "compilations": num_compilations() - compiled,
            "host_syncs_per_step": fetched / count,
        }

    engine = run(runtime.compile(update, "engine"), num_steps)
    lazy = run(LazyStep(update), num_lazy_steps)
    return {
        "model": name,
        "num_devices": runtime.num_devices,
        "tensors": len(list(module.parameters())),
        "stacked_tensors": len(parameters_of(module)),
        "lazy_ms": lazy["milliseconds"],
        "engine_ms": engine["milliseconds"],
        "ratio": lazy["milliseconds"] / engine["milliseconds"],
        "compilations_after_warmup": engine["compilations"],
        "host_syncs_per_step": engine["host_syncs_per_step"],
        "steps": num_steps,
        "runtime": runtime.describe(),
    }
