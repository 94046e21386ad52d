"""Parity with the released code at tiny sizes, in both runtimes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import (
    CONFIGS,
    FLOAT32,
    GOLDEN,
    NUM_CLASSES,
    SAMPLED,
    compute,
    difference,
    golden_cases,
    golden_models,
    guidance_of,
    guided,
    sampled,
    velocity,
)
from torch import Tensor

from rae_xla.flow.objective import flow_matching_loss, interpolate, velocity_target
from rae_xla.flow.schedule import dimension_shift, sampling_times
from rae_xla.models.decoder import Decoder, DecoderConfig
from rae_xla.models.diffusion import DiffusionModel
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.loading import load_weights
from rae_xla.runtime import Runtime, create
from rae_xla.sharding import MeshConfig


@pytest.fixture(scope="module")
def cases() -> dict[str, Tensor]:
    return golden_cases()


@pytest.fixture(scope="module")
def models() -> dict[str, DiffusionModel]:
    return golden_models()


@pytest.fixture(scope="module", params=["eager", "xla"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return create(request.param, MeshConfig(), "fp32")


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert difference(ours, theirs) < tolerance


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


@pytest.mark.parametrize("case", ["cfg_out", "ag_out"])
def test_guidance(
    case: str, cases: dict[str, Tensor], models: dict[str, DiffusionModel], frozen: Any, runtime: Runtime
) -> None:
    batch = {"x": cases["cfg_x"], "t": cases["cfg_t"], "y": cases["cfg_y"].int()}
    found = compute(
        runtime, lambda f, b: guided(guidance_of(case, 0.1, 0.4), models, f)(b["x"], b["t"], b["y"]), frozen, batch
    )
    close(found, cases[case], 1e-5)


@pytest.mark.parametrize("case", SAMPLED)
def test_sampling(case: str, cases: dict[str, Tensor], models: dict[str, DiffusionModel], runtime: Runtime) -> None:
    assert difference(sampled(case, models, cases, runtime), cases[case]) < 1e-4
