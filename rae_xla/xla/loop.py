"""A loop on the device: one XLA while-op, its body lowered once.

Unrolled, 49 evaluations of a transformer take XLA many minutes to compile; as a loop the body compiles once.
`torch_xla.experimental.scan` does the same with gradients, but imports jax and counts in 64 bits, which a TPU emulates
in pairs of words, after which the compiler no longer knows the trip count. This one counts in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_xla
import torch_xla.core.xla_builder as xb
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Body = Callable[[Tensor, Tensor, Any], Tensor]


def device_loop(body: Body, carry: Tensor, rows: Tensor, invariants: Any) -> Tensor:
    """``carry = body(carry, row, invariants)`` for every row of ``rows`` [S, ...] in order; without gradients.

    ``body`` keeps the carry's shape and dtype.

    Raises:
        RuntimeError: ``body`` reads a tensor that it was not handed. What it closes over would become a constant of the
            compiled step: the first batch's labels, for ever.
    """
    leaves, spec = tree_flatten(invariants)
    computation, order, constants = _lower(body, [carry, rows[0], *leaves], spec)
    loop_inputs = [carry, rows, *leaves, *constants]
    builder = xb.create_builder("device_loop")
    operands = [xb.mkparam(builder, i, xb.tensor_shape(tensor)) for i, tensor in enumerate(loop_inputs)]
    num_rows = rows.shape[0]

    def condition(counter: xb.Op, *_: xb.Op) -> xb.Op:
        return counter < xb.Op.scalar(counter.builder(), num_rows, dtype=xb.Type.S32)

    def advance(counter: xb.Op, carry: xb.Op, rows: xb.Op, *others: xb.Op) -> tuple[xb.Op, ...]:
        zero = xb.Op.scalar(counter.builder(), 0, dtype=xb.Type.S32)
        starts = [counter] + [zero] * (rows.shape().rank - 1)
        row = rows.dynamic_slice(starts, [1, *rows.shape().sizes[1:]]).reshape(rows.shape().sizes[1:])
        available = [carry, row, *others]
        result = xb.Op.call(computation, [available[index] for index in order])
        one = xb.Op.scalar(counter.builder(), 1, dtype=xb.Type.S32)
        return counter + one, result.get_tuple_element(0), rows, *others

    start = xb.Op.scalar(builder, 0, dtype=xb.Type.S32)
    loop = xb.Op.mkwhile((start, *operands), condition, advance)
    outputs = torch_xla._XLAC._xla_user_computation("rae_xla::device_loop", loop_inputs, loop.build("device_loop"))
    return outputs[1]


def _lower(body: Body, inputs: list[Tensor], spec: Any) -> tuple[object, list[int], list[Tensor]]:
    """The body as a computation on placeholders of ``inputs`` (carry, row, leaves of the invariants).

    Also which of [*inputs, *constants] its parameters are, in order, and the constants: numbers in the body's code.
    """
    placeholders = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in inputs]
    # Sharding marks replace the data of a tensor that holds data; times one, these hold operations.
    carry, row = [placeholder * 1 for placeholder in placeholders[:2]]
    output = body(carry, row, tree_unflatten(placeholders[2:], spec))
    assert output.shape == carry.shape and output.dtype == carry.dtype, (output.shape, carry.shape)
    context = torch_xla._XLAC.lowering.LoweringContext("LoopBody")
    context.build([output])
    computation = xb.computation_from_module_proto("loop_body", context.hlo())
    position = {context.tensor_parameter_id(placeholder): index for index, placeholder in enumerate(placeholders)}
    constants: list[Tensor] = []
    for parameter, tensor in sorted(dict(context.device_parameter_id_tensor_mapping()).items()):
        if parameter in position:
            continue
        if tensor.ndim:
            raise RuntimeError(f"the loop's body reads a tensor {list(tensor.shape)} that it was not handed")
        position[parameter] = len(inputs) + len(constants)
        constants.append(tensor)
    # A placeholder that the body does not read has parameter -1.
    return computation, [position[parameter] for parameter in sorted(position) if parameter >= 0], constants
