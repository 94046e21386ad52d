"""Parameters and multiply-adds of every named model, counted by running it on the meta device.

A multiply-add is one operation, as the paper counts (arXiv 2510.11690, tables 2 and 6); a device's FLOP/s counts it as
two. ``gflops`` is every matrix product of one forward pass for one image, as the code runs it. The paper's figures
come from a narrower count, which ``gflops_as_paper`` repeats:

- decoders: without the two products inside attention (a fused kernel, which its counter does not see);
- heads of DiT^DH: the blocks and the last layer, without the second embedding and the projection of the condition, and
  with adaLN's modulation computed once an image. The released head computes it once a token, which costs half as much
  again.

Parameters include fixed position tables, which the released models hold as parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rae_xla.models.decoder import DECODER_SIZES, Decoder, DecoderConfig
from rae_xla.models.diffusion import create_diffusion_model
from rae_xla.models.dit import DIT_SIZES, DiTConfig
from rae_xla.models.dit_dh import DIT_DH_SIZES, DiTDH, DiTDHConfig
from rae_xla.models.encoders import ENCODERS, Encoder, EncoderConfig
from rae_xla.models.loading import on_meta

LATENT_SHAPE = (768, 16, 16)
NUM_CLASSES = 1000
# Figures of the paper: parameters in millions, and multiply-adds in billions.
PAPER_PARAMETERS = {"vit_b": 86.4, "vit_l": 304.2, "vit_xl": 415.4, "dit_xl": 676.0, "dit_dh_xl": 838.7}
PAPER_GFLOPS = {"vit_b": 22.2, "vit_l": 78.1, "vit_xl": 106.7}
PAPER_HEADS = {(6, 1152): 25.65, (4, 2048): 53.14, (2, 2048): 26.78}


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """A model's size and work for one image; ``None`` where the paper gives nothing."""

    name: str
    params_millions: float
    gflops: float
    gflops_as_paper: float | None = None
    paper_params_millions: float | None = None
    paper_gflops: float | None = None


def model_costs() -> list[ModelCost]:
    """Of every named encoder, decoder and diffusion transformer at 256 px, and of the paper's DiT^DH heads."""
    decoders = [_decoder_cost(name) for name in DECODER_SIZES]
    diffusion = [_diffusion_cost(name, DiTConfig.model_validate({"name": name})) for name in DIT_SIZES]
    diffusion += [_diffusion_cost(name, DiTDHConfig.model_validate({"name": name})) for name in DIT_DH_SIZES]
    heads = [_head_cost(depth, width) for depth, width in PAPER_HEADS]
    return [*(_encoder_cost(name) for name in ENCODERS), *decoders, *diffusion, *heads]


def parameters_millions(module: nn.Module) -> float:
    """Parameters and fixed position tables."""
    tables = sum(value.numel() for name, value in module.named_buffers() if name.endswith("positions"))
    return (sum(value.numel() for value in module.parameters()) + tables) / 1e6


def multiply_adds(module: nn.Module, *inputs: Tensor) -> dict[str, dict[Any, float]]:
    """Billions of multiply-adds by module (``Global`` is all of it) and operation; everything on the meta device."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module.to("meta")(*inputs)
    return {
        name: {operation: flops / 2e9 for operation, flops in operations.items()}
        for name, operations in counter.get_flop_counts().items()
    }


def _encoder_cost(name: str) -> ModelCost:
    module = on_meta(lambda: Encoder(EncoderConfig.model_validate({"name": name})))
    size = module.config.input_size
    counts = multiply_adds(module, torch.empty(1, 3, size, size, device="meta"))
    return ModelCost(name=name, params_millions=parameters_millions(module), gflops=_total(counts, "Global"))


def _decoder_cost(name: str) -> ModelCost:
    channels, grid, _ = LATENT_SHAPE
    module = on_meta(lambda: Decoder(DecoderConfig.model_validate({"name": name}), channels=channels, grid=grid))
    counts = multiply_adds(module, torch.empty(1, *LATENT_SHAPE, device="meta"))
    total = _total(counts, "Global")
    return ModelCost(
        name=name,
        params_millions=parameters_millions(module),
        gflops=total,
        gflops_as_paper=total - counts["Global"][torch.ops.aten.bmm],
        paper_params_millions=PAPER_PARAMETERS[name],
        paper_gflops=PAPER_GFLOPS[name],
    )


def _diffusion_cost(name: str, config: DiTConfig | DiTDHConfig) -> ModelCost:
    module, counts = _diffusion(config)
    return ModelCost(
        name=name,
        params_millions=parameters_millions(module),
        gflops=_total(counts, "Global"),
        paper_params_millions=PAPER_PARAMETERS.get(name),
    )


def _head_cost(depth: int, width: int) -> ModelCost:
    config = DiTDHConfig.model_validate({"name": "dit_dh_xl", "head_depth": depth, "head_width": width})
    module, counts = _diffusion(config)
    assert isinstance(module, DiTDH)
    blocks = [f"DiTDH.head.{index}" for index in range(depth)]
    inside = [*blocks, "DiTDH.output", "DiTDH.head_input", "DiTDH.condition"]
    modulation = sum(_total(counts, f"{block}.modulation") for block in [*blocks, "DiTDH.output"])
    per_token = 1 - 1 / (LATENT_SHAPE[1] * LATENT_SHAPE[2])
    as_paper = sum(_total(counts, name) for name in [*blocks, "DiTDH.output"]) - modulation * per_token
    parts: list[nn.Module] = [module.head, module.output, module.head_input, module.condition]
    return ModelCost(
        name=f"head {depth}x{width}",
        params_millions=sum(parameters_millions(part) for part in parts),
        gflops=sum(_total(counts, name) for name in inside),
        gflops_as_paper=as_paper,
        paper_gflops=PAPER_HEADS[depth, width],
    )


def _diffusion(config: DiTConfig | DiTDHConfig) -> tuple[nn.Module, dict[str, dict[Any, float]]]:
    module = on_meta(lambda: create_diffusion_model(config, LATENT_SHAPE, NUM_CLASSES))
    label = torch.zeros(1, dtype=torch.int64, device="meta")
    return module, multiply_adds(module, torch.empty(1, *LATENT_SHAPE, device="meta"), label.float(), label)


def _total(counts: dict[str, dict[Any, float]], name: str) -> float:
    return sum(counts.get(name, {}).values())
