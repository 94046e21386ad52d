"""When a decoder gets its adversarial loss, and an update of decoder and discriminator as one program.

Source: arXiv 2510.11690, appendix on decoder training; the order of things is that of the released code. The
discriminator learns after the decoder, from reconstructions by the decoder's new weights, of latents without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rae_xla.losses.adversarial import AdversarialConfig
from rae_xla.models.discriminator import DiscriminatorHeads, spectral_vectors
from rae_xla.models.functional import Tensors, buffers_of
from rae_xla.training.optimizer import OptimizerConfig, learning_rate_at
from rae_xla.training.update import MeanGradients, StepFunction, committed, optimized, optimizer_state, updated_model

PhaseName = Literal["reconstruction", "discriminator", "adversarial"]
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)


@dataclass(frozen=True)
class Begin:
    """A phase of a run: what it trains, and the steps that are done before it."""

    name: PhaseName
    after: int


def phases_of(config: AdversarialConfig | None, steps_per_epoch: float, num_steps: int) -> list[Begin]:
    """The phases of a run in their order, those without a step left out.

    Raises:
        ValueError: the loss would begin before the discriminator.
    """
    if config is None:
        return [Begin("reconstruction", 0)]
    begins = [0, config.discriminator_from.in_steps(steps_per_epoch), config.loss_from.in_steps(steps_per_epoch)]
    if begins[2] < begins[1]:
        raise ValueError(
            f"loss_from: step {begins[2]} is before the discriminator's first, {begins[1]}; name a later one"
        )
    ends = [*begins[1:], num_steps]
    return [Begin(n, begin) for n, begin, end in zip(PHASES, begins, ends, strict=True) if begin < min(end, num_steps)]


def discriminator_state(heads: DiscriminatorHeads) -> dict[str, Any]:
    """Parameters and AdamW moments, the spectral norm's vectors, and how many updates there were; on the host."""
    return {
        **optimizer_state(heads),
        "vectors": buffers_of(heads),
        "updates": torch.zeros((), dtype=torch.int32),
    }


def used_discriminator(state: dict[str, Any]) -> Tensors:
    """The values that the heads are called with, of a whole state."""
    return {**state["discriminator"]["vectors"], **state["discriminator"]["parameters"]}


def make_adversarial_update(
    prepare: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
    decoder_gradients: MeanGradients,
    discriminator_gradients: MeanGradients,
    config: OptimizerConfig,
    begins_after: int,
    steps_per_epoch: float,
) -> StepFunction:
    """One step of AdamW for the decoder, then one for the discriminator; both or, if either is not finite, none.

    The state has `discriminator_state` beside the decoder's. ``decoder_gradients`` finds it in what is frozen, as
    ``discriminator``; ``discriminator_gradients`` so finds the ``decoder``. ``prepare``: adds to a batch what both need
    of it. ``begins_after``: steps that were done before the discriminator's first. Its gradients are not clipped.
    """
    unclipped = config.model_copy(update={"clip_norm": None})

    def update(
        state: dict[str, Any], frozen: dict[str, Any], batch: dict[str, Tensor]
    ) -> tuple[dict[str, Any], Tensors]:
        heads = state["discriminator"]
        batch = prepare(frozen, batch)
        given = {**frozen, "discriminator": used_discriminator(state)}
        gradients, metrics = decoder_gradients(state["parameters"], given, batch)
        with torch.no_grad():
            updated, measured = updated_model(state, gradients, config, steps_per_epoch)
            vectors = spectral_vectors(heads["parameters"], heads["vectors"])
        given = {**frozen, "buffers": vectors, "decoder": {**frozen["buffers"], **updated["parameters"]}}
        gradients, of_heads = discriminator_gradients(heads["parameters"], given, batch)
        with torch.no_grad():
            heads_rate = learning_rate_at(state["step"] - begins_after, config, steps_per_epoch)
            new_heads, heads_norm = optimized(heads, gradients, heads["updates"], heads_rate, unclipped)
            updated["discriminator"] = {**new_heads, "vectors": vectors, "updates": heads["updates"] + 1}
            numbers = torch.stack([metrics["loss"], measured["gradient_norm"], of_heads["loss"], heads_norm])
            new_state, skipped = committed(state, updated, numbers.isfinite().all())
        named = {f"discriminator_{name}": value for name, value in of_heads.items()}
        named |= {"discriminator_gradient_norm": heads_norm, "discriminator_learning_rate": heads_rate}
        return new_state, {**metrics, **measured, **named, **skipped}

    return update
