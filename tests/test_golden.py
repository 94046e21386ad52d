"""Parity with the released code at tiny sizes; needs the golden cases that lie beside the project."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from rae_xla.flow.guidance import AutoGuidance, ClassifierFreeGuidance, autoguidance, classifier_free
from rae_xla.flow.objective import interpolate, velocity_target
from rae_xla.flow.sampler import euler
from rae_xla.flow.schedule import dimension_shift, sampling_times
from rae_xla.models.convert import decoder_from_released, dit_dh_from_released
from rae_xla.models.decoder import Decoder, DecoderConfig
from rae_xla.models.dit_dh import DiTDH, DiTDHConfig

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases are not beside this checkout")
GUIDE = DiTDHConfig(width=16, depth=1, num_heads=2, head_width=64, head_depth=2, head_num_heads=2)
MODEL = DiTDHConfig(width=32, depth=2, num_heads=2, head_width=64, head_depth=2, head_num_heads=2)


@pytest.fixture(scope="module")
def cases() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


def load_dit_dh(name: str, config: DiTDHConfig) -> DiTDH:
    model = DiTDH(config, channels=16, grid=4, num_classes=10)
    released = load_file(GOLDEN / f"{name}.safetensors")
    model.load_state_dict(dit_dh_from_released(released, backbone_depth=config.depth))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> DiTDH:
    return load_dit_dh("dit_dh", MODEL)


@pytest.fixture(scope="module")
def guide() -> DiTDH:
    return load_dit_dh("dit_dh_guide", GUIDE)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < tolerance


def test_dit_dh(cases: dict[str, Tensor], model: DiTDH, guide: DiTDH) -> None:
    close(model(cases["x"], cases["t"], cases["y"]), cases["dit_dh"], 1e-5)
    close(guide(cases["x"], cases["t"], cases["y"]), cases["dit_dh_guide"], 1e-5)


def test_decoder(cases: dict[str, Tensor]) -> None:
    decoder = Decoder(DecoderConfig(patch_size=4, width=32, depth=3, num_heads=2, mlp_width=64), channels=24, grid=4)
    decoder.load_state_dict(decoder_from_released(load_file(GOLDEN / "decoder.safetensors")))
    features = cases["dec_tokens"].transpose(1, 2).unflatten(2, (4, 4))
    close(decoder(features), cases["dec_pixels"], 1e-5)


def test_objective_and_grid(cases: dict[str, Tensor]) -> None:
    close(interpolate(cases["x"], cases["eps"], cases["t"]), cases["obj_xt"], 1e-6)
    close(velocity_target(cases["x"], cases["eps"]), cases["obj_target"], 1e-6)
    grid = sampling_times(50, dimension_shift((768, 16, 16)), end_at_zero=False)
    torch.testing.assert_close(grid, cases["grid50_imagenet256"], rtol=1e-6, atol=1e-7)


def test_guidance(cases: dict[str, Tensor], model: DiTDH, guide: DiTDH) -> None:
    free = ClassifierFreeGuidance(method="classifier_free", scale=1.5, t_min=0.1, t_max=0.4)
    auto = AutoGuidance(method="autoguidance", scale=1.42, t_min=0.1, t_max=0.4, model=GUIDE, weights="")
    inputs = (cases["cfg_x"], cases["cfg_t"], cases["cfg_y"])
    close(classifier_free(model, free, 10)(*inputs), cases["cfg_out"], 1e-5)
    close(autoguidance(model, guide, auto)(*inputs), cases["ag_out"], 1e-5)


@pytest.mark.parametrize("case", ["sample_euler10", "sample_euler50", "sample_cfg50", "sample_ag50"])
@pytest.mark.parametrize("where", ["eager", "xla"])
def test_sampling(case: str, where: str, cases: dict[str, Tensor], model: DiTDH, guide: DiTDH) -> None:
    from rae_xla.runtime import MeshConfig, create

    runtime = create(where, MeshConfig(), "fp32")
    times = sampling_times(10 if case.endswith("10") else 50, float(cases["shift"]), end_at_zero=False)
    free = ClassifierFreeGuidance(method="classifier_free", scale=1.5, t_min=0.1, t_max=0.8)
    auto = AutoGuidance(method="autoguidance", scale=1.42, model=GUIDE, weights="")

    def program(state, frozen, batch):
        from rae_xla.models.functional import call

        def velocity(x, t, labels):
            return call(model, frozen["model"], torch.float32, x, t, labels)

        def weaker(x, t, labels):
            return call(guide, frozen["guide"], torch.float32, x, t, labels)

        guided = {
            "sample_cfg50": classifier_free(velocity, free, 10),
            "sample_ag50": autoguidance(velocity, weaker, auto),
        }.get(case, velocity)
        with torch.no_grad():
            latents = euler(guided, batch["noise"], batch["labels"], frozen["times"]["grid"], runtime.loop)
        return state, {"latents": latents}

    from rae_xla.models.functional import tensors_of

    frozen = {"model": tensors_of(model), "guide": tensors_of(guide), "times": {"grid": times}}
    batch = {"noise": cases["noise"], "labels": cases["labels"].int()}
    compiled = runtime.compile(program, case)
    _, outputs = compiled({}, runtime.place_state(frozen), runtime.place_batch(batch))
    close(runtime.to_host(outputs)["latents"], cases[case], 1e-4)
