"""A loop on the device: one XLA while-op, its body lowered once.

Unrolled, 49 evaluations of a transformer take XLA many minutes to compile; as a loop the body compiles once.
`torch_xla.experimental.scan` does the same with gradients, but imports jax and counts in 64 bits, which a TPU emulates
in pairs of words, after which the compiler no longer knows the trip count. This one counts in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch_xla
import torch_xla.core.xla_builder as xb
from torch import Tensor
from torch.utils._pytree import tree_leaves


def device_loop(body: Callable[[Tensor, Tensor], Tensor], carry: Tensor, rows: Tensor) -> Tensor:
    """``carry = body(carry, row)`` for every row of ``rows`` [S, ...] in order; without gradients.

    ``body`` may use any other device tensor it can see; each becomes an invariant input of the loop. It keeps the
    carry's shape and dtype.
    """
    computation, parameters = _lower(body, carry, rows[0])
    loop_inputs = [carry, rows, *parameters.captured]
    builder = xb.create_builder("device_loop")
    operands = [xb.mkparam(builder, i, xb.tensor_shape(tensor)) for i, tensor in enumerate(loop_inputs)]
    num_rows = rows.shape[0]

    def condition(counter: xb.Op, *_: xb.Op) -> xb.Op:
        return counter < xb.Op.scalar(counter.builder(), num_rows, dtype=xb.Type.S32)

    def advance(counter: xb.Op, carry: xb.Op, rows: xb.Op, *captured: xb.Op) -> tuple[xb.Op, ...]:
        zero = xb.Op.scalar(counter.builder(), 0, dtype=xb.Type.S32)
        starts = [counter] + [zero] * (rows.shape().rank - 1)
        row = rows.dynamic_slice(starts, [1, *rows.shape().sizes[1:]]).reshape(rows.shape().sizes[1:])
        available = [carry, row, *captured]
        result = xb.Op.call(computation, [available[index] for index in parameters.order])
        one = xb.Op.scalar(counter.builder(), 1, dtype=xb.Type.S32)
        return counter + one, result.get_tuple_element(0), rows, *captured

    start = xb.Op.scalar(builder, 0, dtype=xb.Type.S32)
    loop = xb.Op.mkwhile((start, *operands), condition, advance)
    outputs = torch_xla._XLAC._xla_user_computation("rae_xla::device_loop", loop_inputs, loop.build("device_loop"))
    return outputs[1]


class _Parameters:
    """Which tensors the lowered body reads, in the order of its parameters.

    ``order`` holds indices into [carry, row, *captured].
    """

    def __init__(self, order: list[int], captured: list[Tensor]) -> None:
        self.order = order
        self.captured = captured


def _lower(body: Callable[[Tensor, Tensor], Tensor], carry: Tensor, row: Tensor) -> tuple[object, _Parameters]:
    placeholders = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in (carry, row)]
    # Sharding marks replace the data of a tensor that holds data; times one, these hold operations.
    output = body(*[placeholder * 1 for placeholder in placeholders])
    assert output.shape == carry.shape and output.dtype == carry.dtype, (output.shape, carry.shape)
    context = torch_xla._XLAC.lowering.LoweringContext("LoopBody")
    context.build(tree_leaves([output]))
    computation = xb.computation_from_module_proto("loop_body", context.hlo())
    by_parameter = dict(context.device_parameter_id_tensor_mapping())
    placeholder_ids = [context.tensor_parameter_id(placeholder) for placeholder in placeholders]
    captured: list[Tensor] = []
    order = []
    for parameter in sorted({*by_parameter, *[i for i in placeholder_ids if i >= 0]}):
        if parameter in placeholder_ids:
            order.append(placeholder_ids.index(parameter))
        else:
            order.append(2 + len(captured))
            captured.append(by_parameter[parameter])
    return computation, _Parameters(order, captured)
