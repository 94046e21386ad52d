"""Host time of sampling: as the released loop does it, one lazy graph for each step, and as one compiled program."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from rae_xla.benchmarks.overhead import NUM_CLASSES, created_model
from rae_xla.flow.guidance import NoGuidance, Velocity
from rae_xla.flow.sampler import SamplerConfig, Solver
from rae_xla.flow.schedule import sampling_times
from rae_xla.models.functional import call, tensors_of
from rae_xla.run_blocks import ComputeConfig, make_run_blocks
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig

REPEATS = 5


def sampler_overhead(name: str, *, depth_only: bool, num_images: int) -> dict[str, Any]:
    """Host milliseconds per image of both ways, on an idle device, and what our samples compiled and fetched.

    ``compilations``: of all our calls, the first one's among them. Each call is timed until it returns; the released
    loop's steps are timed one by one, and waited for in between. Both draw the same samples of the same model,
    ``num_images`` at a time, without a decoder.
    """
    # The engine's rival and the counters are torch_xla's own: no part of a runtime.
    from rae_xla.xla.lazy import LazyStep, num_transfers_to_host, wait_for_devices
    from rae_xla.xla.step import num_compilations

    runtime: Any = create("xla", MeshConfig(), "fp32")
    module, latent_shape = created_model(name, depth_only=depth_only)
    with torch.no_grad():
        for parameter in module.parameters():
            # What starts at zero would leave the noise as it is.
            parameter.add_(0.02 * torch.randn(parameter.shape))
    config = SamplerConfig(batch_size=num_images)
    solver = Solver(config, sampling_times(config.num_grid_points, 1.0, end_at_zero=False), NoGuidance())

    run_blocks = make_run_blocks(ComputeConfig(blocks="scan"), runtime)

    def velocity_of(weights: Any, guided: bool) -> Velocity:
        return lambda x, t, labels: call(module, weights, runtime, x, t, labels, run_blocks=run_blocks)

    def whole(state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, Tensor]]:
        with torch.no_grad():
            intervals = frozen["grid"]["intervals"]
            latents = solver(velocity_of, frozen["model"], batch["noise"], batch, intervals, runtime.scan)
            return state, {"latents": latents}

    def one_step(state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, Tensor]]:
        with torch.no_grad():
            x, times = state["x"], batch["now"].expand(num_images)
            velocity = call(module, frozen["model"], runtime, x, times, batch["labels"])
            return {"x": x + (batch["then"] - batch["now"]) * velocity}, {}

    frozen = runtime.place_frozen({"model": tensors_of(module), "grid": {"intervals": solver.intervals}})
    labels = torch.arange(num_images, dtype=torch.int32) % NUM_CLASSES
    given = {"noise": torch.randn(num_images, *latent_shape), "labels": labels, "rows": labels}
    batch = runtime.place_batch(given)
    compiled, lazy = runtime.compile(whole, "sampler"), LazyStep(one_step)
    intervals = [[runtime.place_frozen({"t": t})["t"] for t in interval[:2]] for interval in solver.intervals.unbind()]

    def ours() -> tuple[float, Tensor]:
        started = time.perf_counter()
        _, outputs = compiled({}, frozen, batch)
        return time.perf_counter() - started, runtime.to_host(outputs["latents"])

    def released() -> tuple[float, Tensor]:
        seconds, state = 0.0, {"x": batch["noise"].clone()}
        for now, then in intervals:
            started = time.perf_counter()
            state, _ = lazy(state, frozen, {"now": now, "then": then, "labels": batch["labels"]})
            seconds += time.perf_counter() - started
            wait_for_devices()
        return seconds, runtime.to_host(state["x"])

    _, first = released()
    compilations = num_compilations()
    _, second = ours()
    fetched = num_transfers_to_host()
    own = [ours()[0] for _ in range(REPEATS)]
    compilations, fetched = num_compilations() - compilations, num_transfers_to_host() - fetched
    others = [released()[0] for _ in range(REPEATS)]
    host_ms = 1e3 * statistics.median(own) / num_images
    released_ms = 1e3 * statistics.median(others) / num_images
    return {
        "model": name,
        "num_images": num_images,
        "evaluations": config.num_evaluations,
        "released_host_ms_per_image": released_ms,
        "host_ms_per_image": host_ms,
        "ratio": released_ms / host_ms,
        "compilations": compilations,
        # One a call: the samples themselves.
        "transfers_to_host_per_call": fetched / REPEATS,
        "largest_difference": float((second - first).abs().max() / first.abs().max()),
        "runtime": runtime.describe(),
    }
