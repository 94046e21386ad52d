"""The golden sampling cases, for tests on one device and for a process with eight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rae_xla.flow.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    GuidanceConfig,
    NoGuidance,
    Velocity,
    autoguidance,
    classifier_free,
)
from rae_xla.flow.sampler import SamplerConfig, Solver
from rae_xla.flow.schedule import sampling_times
from rae_xla.models.diffusion import DiffusionModel, load_diffusion_model
from rae_xla.models.dit import DiTConfig
from rae_xla.models.dit_dh import DiTDHConfig
from rae_xla.models.functional import call, tensors_of
from rae_xla.runtime import Runtime, create
from rae_xla.sharding import MeshConfig

GOLDEN = Path(__file__).parent / "golden"
# The cases' own precision, on whichever runtime.
FLOAT32 = create("eager", MeshConfig(), "fp32")
NUM_CLASSES = 10
HEAD = {"head_width": 64, "head_depth": 2, "head_num_heads": 2}
CONFIGS = {
    "dit": DiTConfig(width=32, depth=2, num_heads=2),
    "dit_dh": DiTDHConfig(width=32, depth=2, num_heads=2, **HEAD),
    "dit_dh_guide": DiTDHConfig(width=16, depth=1, num_heads=2, **HEAD),
}


SAMPLED = ("sample_euler10", "sample_euler50", "sample_cfg50", "sample_ag50")


def golden_cases() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


def golden_models() -> dict[str, DiffusionModel]:
    return {
        name: load_diffusion_model(config, (16, 4, 4), NUM_CLASSES, str(GOLDEN / f"{name}.safetensors"), "weights")
        for name, config in CONFIGS.items()
    }


def compute(
    runtime: Runtime, function: Callable[[Any, Any], Tensor], frozen: dict[str, Any], batch: dict[str, Tensor]
) -> Tensor:
    """``function(frozen, batch)`` as a step of the runtime."""

    def step(state: Any, frozen: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        with torch.no_grad():
            return state, {"result": function(frozen, batch)}

    _, outputs = runtime.compile(step, "case")({}, runtime.place_frozen(frozen), runtime.place_batch(batch))
    return runtime.to_host(outputs)["result"]


def velocity(models: dict[str, DiffusionModel], frozen: Any, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, labels: call(models[name], frozen[name], FLOAT32, x, t, labels)


def guidance_of(case: str, t_min: float, t_max: float) -> GuidanceConfig:
    if "cfg" in case:
        return ClassifierFreeGuidance(method="classifier_free", scale=1.5, t_min=t_min, t_max=t_max)
    if "ag" in case:
        config = CONFIGS["dit_dh_guide"]
        return AutoGuidance(method="autoguidance", scale=1.42, t_min=t_min, t_max=t_max, model=config)
    return NoGuidance()


def guided(guidance: GuidanceConfig, models: dict[str, DiffusionModel], frozen: Any) -> Velocity:
    model, guide = velocity(models, frozen, "dit_dh"), velocity(models, frozen, "dit_dh_guide")
    if isinstance(guidance, ClassifierFreeGuidance):
        return classifier_free(model, guidance, NUM_CLASSES)
    return autoguidance(model, guide, guidance) if isinstance(guidance, AutoGuidance) else model


def sampled(
    case: str, models: dict[str, DiffusionModel], cases: dict[str, Tensor], runtime: Runtime, copies: int = 1
) -> Tensor:
    """The case's latents, each sample as often as ``copies`` says, so that a batch divides over devices."""
    config = SamplerConfig(num_grid_points=10 if case.endswith("10") else 50, batch_size=1)
    times = sampling_times(config.num_grid_points, float(cases["shift"]), end_at_zero=False)
    guidance = guidance_of(case, *((0.1, 0.8) if "cfg" in case else (0.0, 1.0)))

    solver = Solver(config, times, guidance)

    def sample(given: Any, batch: dict[str, Tensor]) -> Tensor:
        def field(weights: Any, is_guided: bool) -> Velocity:
            return guided(guidance if is_guided else NoGuidance(), models, weights)

        return solver(field, given["models"], batch["noise"], batch, given["grid"]["intervals"], runtime.scan)

    frozen = {name: tensors_of(model) for name, model in models.items()}
    batch = {"noise": cases["noise"], "labels": cases["labels"].int(), "rows": cases["labels"].int()}
    batch = {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    return compute(runtime, sample, {"models": frozen, "grid": {"intervals": solver.intervals}}, batch)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
