"""A depth of alike blocks, each on the result of the one before."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

RunBlocks = Callable[[nn.Module, dict[str, Tensor], Tensor, tuple[Tensor, ...]], Tensor]
"""(block, values, x, shared) -> x after all blocks.

``block`` gives the architecture, ``values`` its parameters by name, those of all blocks stacked along a new first
dimension."""


class Blocks(nn.ModuleList):
    """Blocks (x, *shared) -> x, run in order, unless a call of the model has them run another way."""

    run: Callable[..., Tensor] | None = None
    """(x, *shared) -> x, for the length of a call; see `rae_xla.models.functional.call`."""

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        """x [B, N, D] through all blocks."""
        if self.run is not None:
            return self.run(x, *shared)
        for block in self:
            x = block(x, *shared)
        return x
