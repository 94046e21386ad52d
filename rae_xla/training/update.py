"""One update of any model here: loss, gradients, clipping, AdamW, EMA, as a pure function for `Runtime.compile`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rae_xla.errors import UserError
from rae_xla.models.blocks import Blocks
from rae_xla.models.functional import Tensors, call, parameters_of
from rae_xla.recipe import TrainingRecipe
from rae_xla.run_blocks import ComputeConfig, make_run_blocks
from rae_xla.runtime import Runtime
from rae_xla.training.ema import averages, decay_at, update_ema
from rae_xla.training.optimizer import OptimizerConfig, adamw, clip_by_global_norm, learning_rate_at


@dataclass(frozen=True)
class Model:
    """A module with values: called like the module, with ``parameters``, packed, that gradients are taken of."""

    forward: Callable[..., Tensor]
    parameters: Tensors

    def __call__(self, *arguments: Tensor) -> Tensor:
        """What the module gives."""
        return self.forward(*arguments)


Loss = Callable[[Model, Any, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""(model, frozen, batch) -> (scalar loss, metrics), means over the batch. What it reads of other tensors it takes from
``frozen`` and ``batch``. A ``loss`` among the metrics is shown in place of the scalar that gradients are taken of."""
StepFunction = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(state, frozen, batch) -> (state, what it measured)"""
MeanGradients = Callable[[Tensors, Any, dict[str, Tensor]], tuple[Tensors, Tensors]]
"""(parameters, frozen, batch) -> (gradients, metrics)"""


# Metrics, and the parts of the state that they are: how many updates were skipped, how many of them up to this one, one
# after the other, how many so at most, and at which step that row began.
SKIPPED = {
    "skipped_updates": "skipped",
    "skipped_in_row": "skipped_in_row",
    "skipped_longest_row": "longest_row",
    "skipped_longest_row_began": "longest_row_began",
}


def initial_state(module: nn.Module, config: OptimizerConfig) -> dict[str, Any]:
    """Parameters, their averages, AdamW moments, the step counter and what `SKIPPED` names, on the host."""
    state = optimizer_state(module)
    return {
        **state,
        **{part: {name: value.clone() for name, value in state["parameters"].items()} for part in averages(config)},
        "step": torch.zeros((), dtype=torch.int32),
        "skipped": torch.zeros((), dtype=torch.int32),
        "skipped_in_row": torch.zeros((), dtype=torch.int32),
        "longest_row": torch.zeros((), dtype=torch.int32),
        "longest_row_began": torch.zeros((), dtype=torch.int32),
    }


def optimizer_state(module: nn.Module) -> dict[str, Any]:
    """Parameters and AdamW moments, on the host."""
    parameters = parameters_of(module)
    return {
        "parameters": parameters,
        "first_moments": {name: torch.zeros_like(value) for name, value in parameters.items()},
        "second_moments": {name: torch.zeros_like(value) for name, value in parameters.items()},
    }


def make_mean_gradients(module: nn.Module, loss: Loss, compute: ComputeConfig, runtime: Runtime) -> MeanGradients:
    """Gradients of the mean loss of a batch, and its metrics, in as many parts as ``compute`` says.

    Raises:
        UserError: see `make_update`.
    """
    if not any(isinstance(part, Blocks) for part in module.modules()):
        for key in ("blocks", "remat"):
            if getattr(compute, key) != getattr(ComputeConfig(), key):
                raise UserError(f"compute.{key}: this model has no blocks that it could be about; leave it out")
    num_parts = compute.num_microbatches
    run_blocks = make_run_blocks(compute, runtime)

    def gradients_of(parameters: Tensors, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensors, Tensors]:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}

        def forward(*arguments: Tensor) -> Tensor:
            values = {**frozen["buffers"], **leaves}
            return call(module, values, runtime, *arguments, run_blocks=run_blocks)

        with torch.enable_grad():
            value, metrics = loss(Model(forward, leaves), frozen, batch)
        gradients = torch.autograd.grad(value, list(leaves.values()))
        measured = {"loss": value, **metrics}
        return dict(zip(leaves, gradients, strict=True)), {name: m.detach() for name, m in measured.items()}

    def mean_gradients_of(parameters: Tensors, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensors, Tensors]:
        if num_parts == 1:
            return gradients_of(parameters, frozen, batch)

        def add_part(sums: Tensors, part: dict[str, Tensor], given: Any) -> tuple[Tensors, Tensors]:
            parameters, frozen = given
            gradients, metrics = gradients_of(parameters, frozen, part)
            return tree_map(operator.add, sums, gradients), metrics

        zeros = {name: torch.zeros_like(value) for name, value in parameters.items()}
        parts = {name: split_in_parts(value, num_parts) for name, value in batch.items()}
        sums, metrics = runtime.scan(add_part, zeros, parts, (parameters, frozen))
        means = {name: values.mean(dim=0) for name, values in metrics.items()}
        return {name: value / num_parts for name, value in sums.items()}, means

    return mean_gradients_of


def make_update(
    module: nn.Module,
    loss: Loss,
    config: OptimizerConfig,
    compute: ComputeConfig,
    steps_per_epoch: float,
    runtime: Runtime,
) -> StepFunction:
    """One step of AdamW on the mean loss of a batch.

    ``module`` gives the architecture only; its values come from ``state`` and its buffers from ``frozen["buffers"]``.
    Parameters, gradients, moments and EMA are float32; the model computes in the runtime's dtype. A step whose loss or
    gradient is not finite changes nothing but the step counter and the count of such steps, and the host need not know.

    Raises:
        UserError: ``compute`` says how blocks run, of a model that has none.
    """
    mean_gradients_of = make_mean_gradients(module, loss, compute, runtime)

    def update(
        state: dict[str, Any], frozen: dict[str, Any], batch: dict[str, Tensor]
    ) -> tuple[dict[str, Any], Tensors]:
        gradients, metrics = mean_gradients_of(state["parameters"], frozen, batch)
        with torch.no_grad():
            updated, measured = updated_model(state, gradients, config, steps_per_epoch)
            finite = metrics["loss"].isfinite() & measured["gradient_norm"].isfinite()
            new_state, skipped = committed(state, updated, finite)
        return new_state, {**metrics, **measured, **skipped}

    return update


def updated_model(
    state: dict[str, Any], gradients: Tensors, config: OptimizerConfig, steps_per_epoch: float
) -> tuple[dict[str, Any], Tensors]:
    """The parts of an `initial_state` that one more update changes, and ``gradient_norm`` and ``learning_rate``."""
    rate = learning_rate_at(state["step"], config, steps_per_epoch)
    # The learning rate follows the run, bias correction and EMA the updates that were made.
    done = state["step"] - state["skipped"]
    updated, norm = optimized(state, gradients, done, rate, config)
    for part, decay in averages(config).items():
        updated[part] = update_ema(state[part], updated["parameters"], decay_at(done, decay, config))
    return updated, {"gradient_norm": norm, "learning_rate": rate}


def optimized(
    state: dict[str, Any], gradients: Tensors, done: Tensor, rate: Tensor, config: OptimizerConfig
) -> tuple[dict[str, Any], Tensor]:
    """An `optimizer_state` after one more update than the ``done`` ones, and the gradients' norm before clipping."""
    gradients, norm = clip_by_global_norm(gradients, config.clip_norm)
    moments = state["first_moments"], state["second_moments"]
    parameters, first, second = adamw(state["parameters"], gradients, *moments, done, rate, config)
    return {"parameters": parameters, "first_moments": first, "second_moments": second}, norm


def committed(state: dict[str, Any], updated: dict[str, Any], finite: Tensor) -> tuple[dict[str, Any], Tensors]:
    """The state with these of its parts, if they are finite, and its counters moved on; the metrics in `SKIPPED`."""
    parts = {part: state[part] for part in updated}
    in_row = torch.where(finite, 0, state["skipped_in_row"] + 1).to(torch.int32)
    step = state["step"] + 1
    longer, began = in_row > state["longest_row"], step - in_row + 1
    new_state = {
        **tree_map(lambda new, old: torch.where(finite, new, old), updated, parts),
        "step": step,
        "skipped": state["skipped"] + (~finite).to(torch.int32),
        "skipped_in_row": in_row,
        "longest_row": torch.where(longer, in_row, state["longest_row"]),
        "longest_row_began": torch.where(longer, began, state["longest_row_began"]).to(torch.int32),
    }
    new_state = {part: new_state[part] for part in state}
    # As other tensors than the state's own, which the next step consumes before these are read.
    return new_state, {name: new_state[part].float() for name, part in SKIPPED.items()}


def split_in_parts(tensor: Tensor, num_parts: int) -> Tensor:
    """[B, ...] -> [num_parts, B / num_parts, ...]; part i is rows i, i + num_parts, ...

    Strided, so that each device has a share of every part without moving a row.
    """
    return tensor.unflatten(0, (-1, num_parts)).transpose(0, 1)


def check_microbatches(recipe: TrainingRecipe, runtime: Runtime) -> None:
    """Raises a `UserError` if the parts of the batch are not equal, or do not divide over the devices."""
    parts, batch_size, devices = recipe.compute.num_microbatches, recipe.data.batch_size, runtime.num_devices
    if batch_size % (parts * devices):
        raise UserError(
            f"compute.num_microbatches: data.batch_size {batch_size} does not divide into {parts} parts for "
            f"{devices} devices; use a batch_size that is a multiple of {parts * devices}"
        )
