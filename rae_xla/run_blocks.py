"""How alike blocks run: one after the other or as a scan, and what is kept for the backward pass.

The backward pass of a block needs what its forward pass computed. ``none`` keeps it, ``block`` keeps the block's input
and computes the rest again (arXiv 1604.06174), ``matmuls`` also keeps the outputs of matrix products, the dear part,
and computes again what is cheap: norms, softmaxes, activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from rae_xla.config import Config
from rae_xla.models.blocks import Blocks, RunBlocks, Values
from rae_xla.runtime import Runtime

Tensors = list[Tensor]
Function = Callable[..., Tensor]

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class ComputeConfig(Config):
    """How a step is computed. What it computes stays the same, to rounding.

    But for one thing: with ``num_microbatches`` the adaptive weight of an adversarial loss is that of each part.
    ``blocks``: ``list`` unrolls them, ``scan`` compiles one block and loops over it. ``remat``: see the module.
    ``num_microbatches``: gradients are summed over so many parts of the batch, one after the other.
    """

    blocks: Literal["list", "scan"] = "list"
    remat: Literal["none", "block", "matmuls"] = "none"
    num_microbatches: int = Field(default=1, ge=1)


def make_run_blocks(config: ComputeConfig, runtime: Runtime) -> RunBlocks:
    """The way that ``config`` says, for `rae_xla.models.functional.call`.

    What blocks have done ahead of them is done first. Parameters of a state, in as many parts as there are devices, are
    then gathered to the parts of a step: each block could not gather its own from so many.
    Block outputs, and shared inputs that need a gradient, which tables do not, are marked as lying like the batch: left
    to itself the compiler gathers them in a scan. A block's parameters are made whole inside it, so that what is
    computed again gathers them again.
    """

    def run(blocks: Blocks, prefix: str, values: Values, x: Tensor, shared: tuple[Tensor, ...]) -> Tensor:
        left, own, shared = blocks.ahead(values, runtime.multiplied, *shared)
        if torch.is_grad_enabled():
            # Those of a state only: frozen ones lie so already, and rules are not about them.
            left = {name: runtime.as_used(prefix + name, value) for name, value in left.items()}
        names, rows, num_given = list(left), [*own, *left.values()], len(shared) + len(own)

        def function(x: Tensor, *others: Tensor) -> Tensor:
            given = [runtime.split_batch(t) if t.requires_grad else t for t in others[:num_given]]
            whole = {n: runtime.whole(value) for n, value in zip(names, others[num_given:], strict=True)}
            inputs = x, *given[len(shared) :], *given[: len(shared)]
            return runtime.split_batch(functional_call(blocks[0], whole, inputs))

        x = runtime.split_batch(x)
        if config.blocks == "scan" and not torch.is_grad_enabled():

            def body(x: Tensor, row: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
                return function(x, *shared, *row), []

            return runtime.scan(body, x, rows, list(shared))[0]
        if config.blocks == "scan":
            return _Scanned.apply(function, _KEEPERS[config.remat](), runtime, len(shared), x, *shared, *rows)
        for row in zip(*[tensor.unbind(0) for tensor in rows], strict=True):
            if config.remat == "none" or not torch.is_grad_enabled():
                x = function(x, *shared, *row)
            else:
                x = _Recomputed.apply(function, _KEEPERS[config.remat](), runtime, x, *shared, *row)
        return x

    return run


class _Keeper(Protocol):
    """What of a function's forward pass is kept for its backward pass."""

    def forward(self, function: Function, inputs: Tensors, needed: list[bool]) -> tuple[Tensor, Tensors]:
        """Output and what is kept of computing it. ``needed``: which inputs will need a gradient."""

    def backward(
        self, function: Function, inputs: Tensors, needed: list[bool], kept: Tensors, gradient: Tensor
    ) -> Tensors:
        """Gradients of the needed inputs."""


class _KeepProducts:
    """Keeps the outputs of operations in ``products`` and computes all else again."""

    def __init__(self, products: tuple[Any, ...]) -> None:
        self._products = products

    def forward(self, function: Function, inputs: Tensors, needed: list[bool]) -> tuple[Tensor, Tensors]:
        kept: Tensors = []
        # With gradients as in the backward pass: PyTorch chooses other products without.
        with _Products(self._products, kept.append, None):
            output, _ = _with_gradients(function, inputs, needed)
        return output.detach(), kept

    def backward(
        self, function: Function, inputs: Tensors, needed: list[bool], kept: Tensors, gradient: Tensor
    ) -> Tensors:
        remaining = iter(kept)
        with _Products(self._products, None, remaining):
            output, leaves = _with_gradients(function, inputs, needed)
        assert next(remaining, None) is None, "the second forward pass had fewer products than the first"
        return list(torch.autograd.grad(output, leaves, gradient))


class _Products(TorchDispatchMode):
    """Hands the results of some operations to ``keep``, or takes them from ``kept`` in place of computing them."""

    def __init__(
        self, products: tuple[Any, ...], keep: Callable[[Tensor], None] | None, kept: Iterator[Tensor] | None
    ) -> None:
        super().__init__()
        self._products = products
        self._keep = keep
        self._kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation not in self._products:
            return operation(*args, **(kwargs or {}))
        if self._kept is not None:
            kept = next(self._kept)
            # XLA tensors come wrapped, and an operation's result is wrapped again on its way out.
            return torch._from_functional_tensor(kept) if torch._is_functional_tensor(kept) else kept
        result = operation(*args, **(kwargs or {}))
        if self._keep is not None:
            self._keep(result)
        return result


class _KeepEverything:
    """Keeps what autograd would, but for views of the inputs, which are there anyway."""

    def forward(self, function: Function, inputs: Tensors, needed: list[bool]) -> tuple[Tensor, Tensors]:
        kept: Tensors = []
        output, _ = _with_gradients(function, inputs, needed, keep=kept.append)
        return output.detach(), kept

    def backward(
        self, function: Function, inputs: Tensors, needed: list[bool], kept: Tensors, gradient: Tensor
    ) -> Tensors:
        remaining = iter(kept)
        # The graph is made again and what it saves is replaced, so that nothing of this forward pass is computed.
        output, leaves = _with_gradients(function, inputs, needed, replace=lambda _: next(remaining))
        assert next(remaining, None) is None, "the second forward pass saved less than the first"
        return list(torch.autograd.grad(output, leaves, gradient))


_KEEPERS: dict[str, Callable[[], _Keeper]] = {
    "none": _KeepEverything,
    "block": lambda: _KeepProducts(()),
    "matmuls": lambda: _KeepProducts(_PRODUCTS),
}


def _with_gradients(
    function: Function,
    inputs: Tensors,
    needed: list[bool],
    keep: Callable[[Tensor], None] | None = None,
    replace: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensors]:
    """Output, and the inputs that need gradients as leaves of its graph.

    ``keep`` sees what the graph saves, ``replace`` puts another tensor in its place; inputs and their views apart.
    """
    with torch.enable_grad():
        detached = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
        leaves = [tensor for tensor, need in zip(detached, needed, strict=True) if need]

        def pack(saved: Tensor) -> Tensor:
            if any(saved is tensor or saved._base is tensor for tensor in detached):
                return saved
            if keep is not None:
                keep(saved.detach())
            return saved if replace is None else replace(saved)

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)
        with hooks if keep or replace else _nothing():
            return function(*detached), leaves


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Recomputed(torch.autograd.Function):
    """A block that is computed again in the backward pass.

    The barrier keeps the compiler from finding that the first results would do.
    """

    @staticmethod
    def forward(ctx: Any, function: Function, keeper: _Keeper, runtime: Runtime, *inputs: Tensor) -> Tensor:
        ctx.needed = list(ctx.needs_input_grad[3:])
        output, kept = keeper.forward(function, list(inputs), ctx.needed)
        ctx.call = function, keeper, runtime, len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        function, keeper, runtime, num_inputs = ctx.call
        gradient, *saved = runtime.barrier([gradient, *ctx.saved_tensors])
        inputs, kept = saved[:num_inputs], saved[num_inputs:]
        gradients = keeper.backward(function, inputs, ctx.needed, kept, gradient)
        return None, None, None, *_spread(gradients, ctx.needed)


class _Scanned(torch.autograd.Function):
    """All blocks as a scan, and their backward pass as another one, from the last to the first."""

    @staticmethod
    def forward(
        ctx: Any, function: Function, keeper: _Keeper, runtime: Runtime, num_shared: int, x: Tensor, *inputs: Tensor
    ) -> Tensor:
        # x always gets a gradient, to hand to the block before.
        ctx.needed = [True, *ctx.needs_input_grad[5:]]
        shared, values = list(inputs[:num_shared]), list(inputs[num_shared:])

        def body(x: Tensor, own: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
            output, kept = keeper.forward(function, [x, *shared, *own], ctx.needed)
            # Left to itself the compiler splits what is stacked like the parameters, and moves it for each block.
            like_batch = [runtime.split_batch(t) if t.ndim and len(t) == len(x) else t for t in kept]
            return output, [x, *like_batch]

        output, saved = runtime.scan(body, x, values, shared)
        ctx.call = function, keeper, runtime, num_shared, len(inputs)
        ctx.save_for_backward(*inputs, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        function, keeper, runtime, num_shared, num_inputs = ctx.call
        inputs, saved = list(ctx.saved_tensors[:num_inputs]), list(ctx.saved_tensors[num_inputs:])
        shared, values = inputs[:num_shared], inputs[num_shared:]
        needed = ctx.needed
        num_shared_needed = sum(needed[1 : 1 + num_shared])

        def body(carry: Any, row: Any, shared: Tensors) -> tuple[Any, Tensors]:
            gradient, sums = carry
            own, (x, *kept) = row
            found = keeper.backward(function, [x, *shared, *own], needed, kept, gradient)
            of_shared, of_own = found[1 : 1 + num_shared_needed], found[1 + num_shared_needed :]
            return (found[0], [total + part for total, part in zip(sums, of_shared, strict=True)]), of_own

        sums = [torch.zeros_like(t) for t, need in zip(shared, needed[1 : 1 + num_shared], strict=True) if need]
        (gradient, sums), of_values = runtime.scan(body, (gradient, sums), (values, saved), shared, reverse=True)
        return None, None, None, None, *_spread([gradient, *sums, *of_values], needed)


def _spread(gradients: Tensors, needed: list[bool]) -> list[Tensor | None]:
    """``None`` in the places of inputs that need none."""
    remaining = iter(gradients)
    return [next(remaining) if need else None for need in needed]
