"""A compiled step: traced once, then replayed from torch_xla's graph cache, with the state updated in place.

Tracing a step of 30 blocks lazily costs the host hundreds of milliseconds; a replay costs a few. This file is the only
user of ``dynamo_bridge.extract_internal``, a private function of the pinned torch_xla 2.9.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten
from torch_xla._dynamo.dynamo_bridge import extract_internal

from rae_xla.xla.mesh import keep_sharding
from rae_xla.xla.products import exact_products

logger = logging.getLogger(__name__)

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
# The host may start so many steps before the first of them is done.
STEPS_IN_FLIGHT = 2


class CompiledStep:
    """Calls ``function(state, frozen, batch) -> (state, outputs)`` as one XLA program.

    The state's buffers are donated: after a call the old state is gone. The new state keeps the old one's sharding.
    Structure, shapes, types and shardings of all inputs are fixed by the first call. ``exact``: see
    `rae_xla.runtime.Runtime.compile`.
    """

    def __init__(self, function: Step, name: str, *, exact: bool = False) -> None:
        self.name = name
        self._exact = exact
        self.compile_seconds: float | None = None
        self.wait_seconds = 0.0
        self._function = function
        self._replay: Callable[..., Any] | None = None
        self._traced: _Inputs | None = None
        self._num_state = 0
        self._output_spec: Any = None
        # Tensors that need no check again: the last call's inputs, but the state that it returned.
        self._known: list[Tensor] = []
        # Destroying a donated buffer waits for the step that consumes it (torch_xla 2.9 on the CPU), and a host that
        # waits for each step never runs ahead. Consumed states hold no memory and are dropped when their step is over.
        self._consumed: deque[list[Tensor]] = deque()

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        """One step.

        Raises:
            RuntimeError: structure, shape, type or sharding of an input differs from the first call's; names the input.
        """
        inputs = {"state": state, "frozen": frozen, "batch": batch}
        tensors, spec = tree_flatten(inputs)
        first = not self._known
        if self._traced is None:
            self.prepare(state, frozen, batch)
        else:
            self._traced.check(self.name, inputs, tensors, spec, self._known)
        assert self._replay is not None and self._traced is not None
        compiled_before = num_compilations()
        results = self._replay(*tensors)
        results = [results] if isinstance(results, Tensor) else list(results)
        if num_compilations() != compiled_before:
            raise RuntimeError(f"{self.name}: compiled again although its inputs are those that it was traced with")
        if first:
            # The next call takes this state without looking.
            self._traced.check_shardings(self.name, results[: self._num_state])
        self._known = [*results[: self._num_state], *tensors[self._num_state :]]
        self._drop_consumed(tensors[: self._num_state])
        new_state, outputs = tree_unflatten(results, self._output_spec)
        return new_state, outputs

    def prepare(self, state: Any, frozen: Any, batch: Any) -> None:
        """See `rae_xla.runtime.CompiledStep`."""
        inputs = {"state": state, "frozen": frozen, "batch": batch}
        traced = _Inputs(inputs)
        self._trace(*tree_flatten(inputs))
        self._traced = traced

    def _drop_consumed(self, newest: list[Tensor]) -> None:
        self._consumed.append(newest)
        if len(self._consumed) > STEPS_IN_FLIGHT:
            start = time.perf_counter()
            self._consumed.popleft()
            self.wait_seconds += time.perf_counter() - start

    def _trace(self, tensors: list[Tensor], spec: Any) -> None:
        start = time.perf_counter()
        torch_xla.sync()
        xm.wait_device_ops()
        # The order of the leaves is that of the keys: state, frozen, batch.
        num_state = self._num_state = spec.children_specs[0].num_leaves

        def traced(*arguments: Tensor) -> list[Tensor]:
            for tensor in arguments[:num_state]:
                torch.ops.xla.dynamo_set_buffer_donor_(tensor, True)
            given = tree_unflatten(list(arguments), spec)
            new_state_and_outputs = self._function(given["state"], given["frozen"], given["batch"])
            results, self._output_spec = tree_flatten(new_state_and_outputs)
            if self._output_spec.children_specs[0] != spec.children_specs[0]:
                raise RuntimeError(f"{self.name}: the state that it returns is built otherwise than the one it takes")
            # An input that comes out as it is has no place in the program, and its replay would be a buffer short.
            given_ids = {id(argument) for argument in arguments}
            results = [result.clone() if id(result) in given_ids else result for result in results]
            for old, new in zip(arguments[:num_state], results[:num_state], strict=True):
                keep_sharding(old, new)
            return results

        try:
            with _known_by_their_data(tensors), exact_products(self._exact):
                self._replay = extract_internal(_Traceable(traced, tensors))  # type: ignore[arg-type]
        except BaseException:
            # What was traced so far hangs on placeholders, and the next synchronisation would try to compute it.
            torch_xla._XLAC._clear_pending_irs(str(torch_xla.device()))
            raise
        finally:
            # The program knows what it consumes; nothing else that is computed of these is to consume them.
            for tensor in tensors[:num_state]:
                torch_xla._XLAC._set_buffer_donation(tensor, False)
        self.compile_seconds = time.perf_counter() - start
        logger.info("%s: traced and compiled in %.1f s", self.name, self.compile_seconds)


class _Inputs:
    """What a step was traced with."""

    def __init__(self, inputs: Any) -> None:
        leaves, self._spec = tree_flatten_with_path(inputs)
        self._names = [_name(path) for path, _ in leaves]
        tensors = [tensor for _, tensor in leaves]
        self._kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._shardings = _shardings(tensors)

    def check(self, step: str, inputs: Any, tensors: list[Tensor], spec: Any, known: list[Tensor]) -> None:
        """Raises a RuntimeError that names what differs; tensors that are those in ``known``, if any, do not."""
        if spec != self._spec:
            names = {_name(path) for path, _ in tree_flatten_with_path(inputs)[0]}
            different = sorted(names.symmetric_difference(self._names)) or ["the order of the inputs"]
            raise RuntimeError(f"{step}: {different[0]} was not the same when this was traced")
        for index, (tensor, last) in enumerate(zip_longest(tensors, known)):
            if tensor is last:
                continue
            shape, dtype = self._kinds[index]
            if tensor.shape != shape or tensor.dtype != dtype:
                found, traced = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
                raise RuntimeError(f"{step}: {self._names[index]} is {found}, traced as {traced}")
            self._check_sharding(step, index, _shardings([tensor])[0])

    def check_shardings(self, step: str, tensors: list[Tensor]) -> None:
        """Raises a RuntimeError if the first inputs' shardings are not those of ``tensors``."""
        for index, sharding in enumerate(_shardings(tensors)):
            self._check_sharding(step, index, sharding)

    def _check_sharding(self, step: str, index: int, sharding: str) -> None:
        if sharding != self._shardings[index]:
            found, traced = sharding or "not sharded", self._shardings[index] or "not sharded"
            raise RuntimeError(f"{step}: {self._names[index]} lies as {found}, traced as {traced}")


class _Traceable:
    """What ``extract_internal`` asks of a module."""

    def __init__(self, function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> None:
        self.xla_args = inputs
        self._function = function

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        return self._function(*arguments)

    def parameters(self) -> list[Tensor]:
        return []


@contextmanager
def _known_by_their_data(tensors: list[Tensor]) -> Iterator[None]:
    """Within it torch_xla's numbers of these tensors are those that it will find at their data.

    A graph's inputs are matched with a step's arguments by number. Data carry the number of the tensor that was last
    made of them, and to trace a step is to make such tensors: in torch_xla 2.9 the next step to be traced with the same
    arguments would take them for constants.
    """
    private = torch_xla._XLAC
    # To ask for the data makes tensors of them too, whose numbers they carry from then on.
    made = [private._get_tensors_xla_device_data_node([tensor])[1][0] for tensor in tensors]
    number_of = private._xla_get_tensor_id
    numbers = {id(tensor): number_of(of_data) for tensor, of_data in zip(tensors, made, strict=True)}
    private._xla_get_tensor_id = lambda tensor: numbers[id(tensor)] if id(tensor) in numbers else number_of(tensor)
    try:
        yield
    finally:
        private._xla_get_tensor_id = number_of


def _name(path: Any) -> str:
    return f"{path[0].key}{keystr(path[1:])}"


def _shardings(tensors: list[Tensor]) -> list[str]:
    return torch_xla._XLAC._get_xla_sharding_specs(tensors)


def num_compilations() -> int:
    """Programs compiled in this process so far."""
    return int(xla_metrics.counter_value("UncachedCompile") or 0)
