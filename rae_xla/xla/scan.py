"""A scan on the device: one XLA while-op, its body lowered once.

Unrolled, 49 evaluations of a transformer take XLA many minutes to compile; as a loop the body compiles once.
`torch_xla.experimental.scan` imports jax and counts in 64 bits, which a TPU emulates in pairs of words, after which the
compiler no longer knows the trip count. This one counts in 32 bits. Gradients are the caller's business: a backward
pass is another scan, see `rae_xla.run_blocks`.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch_xla
import torch_xla.core.xla_builder as xb
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from rae_xla.runtime import ScanBody, Tree


def device_scan(
    body: ScanBody, carry: Tree, rows: Tree, invariants: Tree, *, reverse: bool = False
) -> tuple[Tree, Tree]:
    """See `Runtime.scan`.

    Raises:
        RuntimeError: ``body`` reads a tensor that it was not handed. What it closes over would become a constant of the
            compiled step: the first batch's labels, for ever. A number (no dimensions) cannot be told from those in the
            body's code, and does become one.
    """
    carries, carry_spec = tree_flatten(carry)
    all_rows, row_spec = tree_flatten(rows)
    others, other_spec = tree_flatten(invariants)
    lowered = _Body(body, (carries, [tensor[0] for tensor in all_rows], others), (carry_spec, row_spec, other_spec))
    num_rows = all_rows[0].shape[0]
    made = [shape.new_zeros(()).expand(num_rows, *shape.shape) * 1 for shape in lowered.made]
    groups = [carries, all_rows, [*others, *lowered.constants], made]
    ends = list(accumulate([len(group) for group in groups], initial=0))
    loop_inputs = [tensor for group in groups for tensor in group]
    builder = xb.create_builder("device_scan")
    operands = [xb.mkparam(builder, index, xb.tensor_shape(tensor)) for index, tensor in enumerate(loop_inputs)]

    def condition(counter: xb.Op, *_: xb.Op) -> xb.Op:
        return counter < xb.Op.scalar(counter.builder(), num_rows, dtype=xb.Type.S32)

    def advance(counter: xb.Op, *values: xb.Op) -> tuple[xb.Op, ...]:
        carries, rows, others, made = [values[start:end] for start, end in pairwise(ends)]
        one = xb.Op.scalar(counter.builder(), 1, dtype=xb.Type.S32)
        last = xb.Op.scalar(counter.builder(), num_rows - 1, dtype=xb.Type.S32)
        index = last - counter if reverse else counter
        results = lowered.call([*carries, *[_row(tensor, index) for tensor in rows], *others])
        new = [_with_row(all_made, row, index) for all_made, row in zip(made, results[len(carries) :], strict=True)]
        return counter + one, *results[: len(carries)], *rows, *others, *new

    start = xb.Op.scalar(builder, 0, dtype=xb.Type.S32)
    loop = xb.Op.mkwhile((start, *operands), condition, advance)
    results = torch_xla._XLAC._xla_user_computation("rae_xla::device_scan", loop_inputs, loop.build("device_scan"))
    outputs = results[1:]
    return tree_unflatten(outputs[: ends[1]], carry_spec), tree_unflatten(outputs[ends[3] :], lowered.made_spec)


class _Body:
    """The body as a computation on placeholders of its inputs.

    ``made``: its outputs for one row, besides the carry. ``constants``: numbers in the body's code.
    """

    def __init__(
        self, body: ScanBody, inputs: tuple[list[Tensor], ...], specs: tuple[TreeSpec, TreeSpec, TreeSpec]
    ) -> None:
        num_carries, num_rows = len(inputs[0]), len(inputs[1])
        placeholders = [xb.create_placeholder_tensor(t.shape, t.dtype) for group in inputs for t in group]
        # Sharding marks replace the data of a tensor that holds data; times one, these hold operations.
        operations = [placeholder * 1 for placeholder in placeholders[: num_carries + num_rows]]
        groups = operations[:num_carries], operations[num_carries:], placeholders[num_carries + num_rows :]
        carry, made = body(*[tree_unflatten(group, spec) for group, spec in zip(groups, specs, strict=True)])
        carries, carry_spec = tree_flatten(carry)
        assert carry_spec == specs[0], (carry_spec, specs[0])
        for new, old in zip(carries, inputs[0], strict=True):
            assert new.shape == old.shape and new.dtype == old.dtype, (new.shape, new.dtype, old.shape, old.dtype)
        self.made, self.made_spec = tree_flatten(made)
        context = torch_xla._XLAC.lowering.LoweringContext("ScanBody")
        context.build([tensor * 1 for tensor in (*carries, *self.made)])
        self._computation = xb.computation_from_module_proto("scan_body", context.hlo())
        position = {context.tensor_parameter_id(placeholder): index for index, placeholder in enumerate(placeholders)}
        self.constants: list[Tensor] = []
        for parameter, tensor in sorted(dict(context.device_parameter_id_tensor_mapping()).items()):
            if parameter in position:
                continue
            if tensor.ndim:
                raise RuntimeError(f"the scan's body reads a tensor {list(tensor.shape)} that it was not handed")
            position[parameter] = len(placeholders) + len(self.constants)
            self.constants.append(tensor)
        # A placeholder that the body does not read has parameter -1.
        self._order = [position[parameter] for parameter in sorted(position) if parameter >= 0]
        self._num_results = len(carries) + len(self.made)

    def call(self, available: list[xb.Op]) -> list[xb.Op]:
        """Carries, then outputs, for [*carries, *rows, *invariants, *constants]."""
        result = xb.Op.call(self._computation, [available[index] for index in self._order])
        return [result.get_tuple_element(index) for index in range(self._num_results)]


def _row(tensor: xb.Op, index: xb.Op) -> xb.Op:
    sizes = tensor.shape().sizes
    return tensor.dynamic_slice(_starts(tensor, index), [1, *sizes[1:]]).reshape(sizes[1:])


def _with_row(tensor: xb.Op, row: xb.Op, index: xb.Op) -> xb.Op:
    return tensor.dynamic_update_slice(row.reshape([1, *tensor.shape().sizes[1:]]), _starts(tensor, index))


def _starts(tensor: xb.Op, index: xb.Op) -> list[xb.Op]:
    zero = xb.Op.scalar(index.builder(), 0, dtype=xb.Type.S32)
    return [index] + [zero] * (tensor.shape().rank - 1)
