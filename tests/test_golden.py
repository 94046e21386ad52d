"""Parity with the released code at tiny sizes, in both runtimes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from rae_xla.flow.guidance import AutoGuidance, ClassifierFreeGuidance, autoguidance, classifier_free
from rae_xla.flow.objective import flow_matching_loss, interpolate, velocity_target
from rae_xla.flow.sampler import euler
from rae_xla.flow.schedule import dimension_shift, sampling_times
from rae_xla.models.decoder import Decoder, DecoderConfig
from rae_xla.models.diffusion import DiffusionModel, load_diffusion_model
from rae_xla.models.dit import DiTConfig
from rae_xla.models.dit_dh import DiTDHConfig
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.loading import load_weights
from rae_xla.runtime import Runtime, create
from rae_xla.sharding import MeshConfig

# The cases' own precision, on whichever runtime.
FLOAT32 = create("eager", MeshConfig(), "fp32")
NUM_CLASSES = 10
HEAD = {"head_width": 64, "head_depth": 2, "head_num_heads": 2}
CONFIGS = {
    "dit": DiTConfig(width=32, depth=2, num_heads=2),
    "dit_dh": DiTDHConfig(width=32, depth=2, num_heads=2, **HEAD),
    "dit_dh_guide": DiTDHConfig(width=16, depth=1, num_heads=2, **HEAD),
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def models() -> dict[str, DiffusionModel]:
    return {
        name: load_diffusion_model(config, (16, 4, 4), NUM_CLASSES, str(GOLDEN / f"{name}.safetensors"), "weights")
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="module", params=["eager", "xla"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return create(request.param, MeshConfig(), "fp32")


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < tolerance


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


@pytest.fixture(scope="module")
def frozen(models: dict[str, DiffusionModel]) -> dict[str, Any]:
    return {name: tensors_of(model) for name, model in models.items()}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_models(
    name: str, cases: dict[str, Tensor], models: dict[str, DiffusionModel], frozen: Any, runtime: Runtime
) -> None:
    batch = {"x": cases["x"], "t": cases["t"], "y": cases["y"].int()}
    assert NUM_CLASSES in cases["y"]  # The null class is among the labels.
    found = compute(runtime, lambda f, b: velocity(models, f, name)(b["x"], b["t"], b["y"]), frozen, batch)
    close(found, cases[name], 1e-5)


def test_decoder(cases: dict[str, Tensor], runtime: Runtime) -> None:
    decoder = Decoder(DecoderConfig(patch_size=4, width=32, depth=3, num_heads=2, mlp_width=64), channels=24, grid=4)
    load_weights(decoder, str(GOLDEN / "decoder.safetensors"), "weights")
    batch = {"features": cases["dec_tokens"].transpose(1, 2).unflatten(2, (4, 4))}
    found = compute(runtime, lambda f, b: call(decoder, f, FLOAT32, b["features"]), tensors_of(decoder), batch)
    close(found, cases["dec_pixels"], 1e-5)


def test_objective(cases: dict[str, Tensor], runtime: Runtime) -> None:
    batch = {name: cases[name] for name in ("x", "eps", "t")}
    close(compute(runtime, lambda _, b: interpolate(b["x"], b["eps"], b["t"]), {}, batch), cases["obj_xt"], 1e-6)
    close(compute(runtime, lambda _, b: velocity_target(b["x"], b["eps"]), {}, batch), cases["obj_target"], 1e-6)


def test_objective_loss(
    cases: dict[str, Tensor], models: dict[str, DiffusionModel], frozen: Any, runtime: Runtime
) -> None:
    def loss(frozen: Any, batch: dict[str, Tensor]) -> Tensor:
        noisy = interpolate(batch["x"], batch["eps"], batch["t"])
        predicted = velocity(models, frozen, "dit_dh")(noisy, batch["t"], batch["y"])
        return flow_matching_loss(predicted, batch["x"], batch["eps"])

    batch = {"x": cases["x"], "eps": cases["eps"], "t": cases["t"], "y": cases["y"].int()}
    close(compute(runtime, loss, frozen, batch), cases["obj_loss"], 1e-5)


def test_grid(cases: dict[str, Tensor]) -> None:
    grid = sampling_times(50, dimension_shift((768, 16, 16)), end_at_zero=False)
    torch.testing.assert_close(grid, cases["grid50_imagenet256"], rtol=1e-6, atol=1e-7)


def guided(case: str, models: dict[str, DiffusionModel], frozen: Any, t_min: float, t_max: float) -> Any:
    model, guide = velocity(models, frozen, "dit_dh"), velocity(models, frozen, "dit_dh_guide")
    if "cfg" in case:
        free = ClassifierFreeGuidance(method="classifier_free", scale=1.5, t_min=t_min, t_max=t_max)
        return classifier_free(model, free, NUM_CLASSES)
    if "ag" in case:
        config = CONFIGS["dit_dh_guide"]
        auto = AutoGuidance(method="autoguidance", scale=1.42, t_min=t_min, t_max=t_max, model=config)
        return autoguidance(model, guide, auto)
    return model


@pytest.mark.parametrize("case", ["cfg_out", "ag_out"])
def test_guidance(
    case: str, cases: dict[str, Tensor], models: dict[str, DiffusionModel], frozen: Any, runtime: Runtime
) -> None:
    batch = {"x": cases["cfg_x"], "t": cases["cfg_t"], "y": cases["cfg_y"].int()}
    found = compute(runtime, lambda f, b: guided(case, models, f, 0.1, 0.4)(b["x"], b["t"], b["y"]), frozen, batch)
    close(found, cases[case], 1e-5)


@pytest.mark.parametrize("case", ["sample_euler10", "sample_euler50", "sample_cfg50", "sample_ag50"])
def test_sampling(
    case: str, cases: dict[str, Tensor], models: dict[str, DiffusionModel], frozen: Any, runtime: Runtime
) -> None:
    times = sampling_times(10 if case.endswith("10") else 50, float(cases["shift"]), end_at_zero=False)
    interval = (0.1, 0.8) if "cfg" in case else (0.0, 1.0)

    def sample(given: Any, batch: dict[str, Tensor]) -> Tensor:
        def field(weights: Any) -> Any:
            return guided(case, models, weights, *interval)

        return euler(field, given["models"], batch["noise"], batch["labels"], given["times"], runtime.scan)

    batch = {"noise": cases["noise"], "labels": cases["labels"].int()}
    found = compute(runtime, sample, {"models": frozen, "times": times}, batch)
    close(found, cases[case], 1e-4)
