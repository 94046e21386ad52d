"""One update of any model here: loss, gradients, clipping, AdamW, EMA, as a pure function for `Runtime.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.models.functional import Tensors, call, parameters_of
from rae_xla.training.ema import update_ema
from rae_xla.training.optimizer import OptimizerConfig, adamw, clip_by_global_norm, learning_rate_at

Loss = Callable[[Callable[..., Tensor], Any, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""(model, frozen, batch) -> (scalar loss, metrics); ``model`` is called like the module."""


def initial_state(module: nn.Module) -> dict[str, Any]:
    """Parameters, EMA, AdamW moments, the step counter and the number of skipped updates, on the host."""
    parameters = parameters_of(module)
    return {
        "parameters": parameters,
        "ema": {name: value.clone() for name, value in parameters.items()},
        "first_moments": {name: torch.zeros_like(value) for name, value in parameters.items()},
        "second_moments": {name: torch.zeros_like(value) for name, value in parameters.items()},
        "step": torch.zeros((), dtype=torch.int32),
        "skipped": torch.zeros((), dtype=torch.int32),
    }


def make_update(
    module: nn.Module, loss: Loss, config: OptimizerConfig, steps_per_epoch: float, compute_dtype: torch.dtype
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """``(state, frozen, batch) -> (state, metrics)``.

    ``module`` gives the architecture only; its values come from ``state`` and its buffers from ``frozen["buffers"]``.
    Parameters, gradients, moments and EMA are float32; the model computes in ``compute_dtype``. A step whose loss or
    gradient is not finite changes nothing but the step counter and the count of such steps, and the host need not know.
    """

    def update(
        state: dict[str, Any], frozen: dict[str, Any], batch: dict[str, Tensor]
    ) -> tuple[dict[str, Any], Tensors]:
        leaves = {name: value.detach().requires_grad_() for name, value in state["parameters"].items()}

        def model(*arguments: Tensor) -> Tensor:
            return call(module, {**frozen["buffers"], **leaves}, compute_dtype, *arguments)

        with torch.enable_grad():
            value, metrics = loss(model, frozen, batch)
        gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        with torch.no_grad():
            gradients, norm = clip_by_global_norm(gradients, config.clip_norm)
            rate = learning_rate_at(state["step"], config, steps_per_epoch)
            parameters, first, second = adamw(
                state["parameters"],
                gradients,
                state["first_moments"],
                state["second_moments"],
                state["step"],
                rate,
                config,
            )
            finite = value.isfinite() & norm.isfinite()
            updated = {
                "parameters": parameters,
                "ema": update_ema(state["ema"], parameters, config.ema_decay),
                "first_moments": first,
                "second_moments": second,
            }
            new_state = {
                **{
                    part: {name: torch.where(finite, new, state[part][name]) for name, new in tensors.items()}
                    for part, tensors in updated.items()
                },
                "step": state["step"] + 1,
                "skipped": state["skipped"] + (~finite).to(torch.int32),
            }
        metrics = {"loss": value, **metrics, "gradient_norm": norm, "learning_rate": rate}
        # As another tensor than the state's own, which the next step consumes before this is read.
        metrics["skipped_updates"] = new_state["skipped"].float()
        return new_state, {name: metric.detach() for name, metric in metrics.items()}

    return update
