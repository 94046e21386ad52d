"""Which tensor of a training step is the first that is not finite, once updates are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.models.functional import Tensors, by_module_names, call
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import Runtime
from rae_xla.training.update import Loss, Model, StepFunction, make_mean_gradients


def make_diagnosis(module: nn.Module, loss: Loss, compute: ComputeConfig, runtime: Runtime) -> StepFunction:
    """Measures whether each tensor is finite, in the order in which they are computed.

    Parameters, the batch, what every module gives, the loss, the gradients. Blocks run one after the other, so that
    each can be told from the next. There is no state: ``parameters`` are in what is frozen.
    """
    mean_gradients_of = make_mean_gradients(module, loss, compute, runtime)

    def diagnosis(state: Any, frozen: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensors]:
        parameters = frozen["parameters"]
        with torch.no_grad():
            found = {f"parameter {n}": _finite(v) for n, v in by_module_names(module, parameters).items()}
            found |= {f"batch: {name}": _finite(v) for name, v in batch.items() if v.is_floating_point()}

            def forward(*arguments: Tensor) -> Tensor:
                given = [argument for argument in arguments if argument.is_floating_point()]
                found.update({f"input {number} of the model": _finite(value) for number, value in enumerate(given)})
                with _outputs_of(module, found):
                    return call(module, {**frozen["buffers"], **parameters}, runtime, *arguments)

            found["loss"] = _finite(loss(Model(forward, parameters), frozen, batch)[0])
        gradients, _ = mean_gradients_of(parameters, frozen, batch)
        with torch.no_grad():
            # Backwards: the first that is computed belongs to the last that was used.
            named = reversed(by_module_names(module, gradients).items())
            found |= {f"gradient of {name}": _finite(value) for name, value in named}
        return state, found

    return diagnosis


def first_not_finite(found: Tensors) -> str | None:
    """The name of the first, of values on the host; ``None`` if all are finite."""
    return next((name for name, finite in found.items() if not bool(finite)), None)


@contextmanager
def _outputs_of(module: nn.Module, found: Tensors) -> Iterator[None]:
    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                found[f"output of {name or 'the model'}"] = _finite(output)

        return hook

    hooks = [part.register_forward_hook(note(name)) for name, part in module.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().all()
