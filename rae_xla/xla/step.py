"""A compiled step: traced once, then replayed from torch_xla's graph cache, with the state updated in place.

Tracing a step of 30 blocks lazily costs the host hundreds of milliseconds; a replay costs a few. This file is the only
user of ``dynamo_bridge.extract_internal``, a private function of the pinned torch_xla 2.9.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten
from torch_xla._dynamo.dynamo_bridge import extract_internal

logger = logging.getLogger(__name__)

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class CompiledStep:
    """Calls ``function(state, frozen, batch) -> (state, outputs)`` as one XLA program.

    The state's buffers are donated: after a call the old state is gone. The new state keeps the old one's sharding.
    Shapes, types and shardings of all inputs are fixed by the first call.
    """

    def __init__(self, function: Step, name: str, keep_sharding: Callable[[Tensor, Tensor], None]) -> None:
        self.name = name
        self.compile_seconds: float | None = None
        self._function = function
        self._keep_sharding = keep_sharding
        self._replay: Callable[..., Any] | None = None
        self._inputs: list[tuple[str, torch.Size, torch.dtype]] = []
        self._output_spec: Any = None

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        """One step.

        Raises:
            RuntimeError: an input differs from the first call's, or something was compiled again.
        """
        tensors, input_spec = tree_flatten((state, frozen, batch))
        if self._replay is None:
            self._trace(state, frozen, batch, tensors, input_spec)
            assert self._replay is not None
            results = self._replay(*tensors)
        else:
            self._check_inputs(state, frozen, batch, tensors)
            compiled_before = num_compilations()
            results = self._replay(*tensors)
            if num_compilations() != compiled_before:
                raise RuntimeError(
                    f"{self.name}: compiled again after the first step; the sharding of an input changed"
                )
        return tree_unflatten([results] if isinstance(results, Tensor) else list(results), self._output_spec)

    def _trace(self, state: Any, frozen: Any, batch: Any, tensors: list[Tensor], input_spec: Any) -> None:
        start = time.perf_counter()
        torch_xla.sync()
        xm.wait_device_ops()
        paths, _ = tree_flatten_with_path((state, frozen, batch))
        self._inputs = [(_input_name(path), t.shape, t.dtype) for path, t in paths]
        num_state = len(tree_flatten(state)[0])

        def traced(*arguments: Tensor) -> list[Tensor]:
            for tensor in arguments[:num_state]:
                torch.ops.xla.dynamo_set_buffer_donor_(tensor, True)
            new_state, outputs = self._function(*tree_unflatten(list(arguments), input_spec))
            results, self._output_spec = tree_flatten((new_state, outputs))
            for old, new in zip(arguments[:num_state], results[:num_state], strict=True):
                self._keep_sharding(old, new)
            return results

        self._replay = extract_internal(_Traceable(traced, tensors))  # type: ignore[arg-type]
        self.compile_seconds = time.perf_counter() - start
        logger.info("%s: traced and compiled in %.1f s", self.name, self.compile_seconds)

    def _check_inputs(self, state: Any, frozen: Any, batch: Any, tensors: list[Tensor]) -> None:
        if len(tensors) != len(self._inputs):
            raise RuntimeError(f"{self.name}: {len(tensors)} inputs, but it was traced with {len(self._inputs)}")
        for tensor, (name, shape, dtype) in zip(tensors, self._inputs, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype:
                raise RuntimeError(
                    f"{self.name}: {name} is {tensor.dtype} {list(tensor.shape)}, traced as {dtype} {list(shape)}"
                )


class _Traceable:
    """What ``extract_internal`` asks of a module."""

    def __init__(self, function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> None:
        self.xla_args = inputs
        self._function = function

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        return self._function(*arguments)

    def parameters(self) -> list[Tensor]:
        return []


def _input_name(path: Any) -> str:
    return ("state", "frozen", "batch")[path[0].idx] + "".join(str(key) for key in path[1:])


def num_compilations() -> int:
    """Programs compiled in this process so far."""
    return int(xla_metrics.counter_value("UncachedCompile") or 0)
