"""A depth of alike blocks, each on the result of the one before."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Values = dict[str, Tensor]
"""Parameters of a block by name, those of all blocks stacked along a new first dimension."""
Multiply = Callable[[Tensor, Tensor], Tensor | None]
"""x [B, D] by each of the weights [S, E, D] -> [S, B, E], or nothing; see `rae_xla.runtime.Runtime.multiplied`."""


class Blocks(nn.ModuleList):
    """Blocks (x, *shared) -> x, run in order, unless a call of the model has them run another way."""

    run: Callable[..., Tensor] | None = None
    """(x, *shared) -> x, for the length of a call; see `rae_xla.models.functional.call`."""

    def ahead(
        self, values: Values, multiply: Multiply, *shared: Tensor
    ) -> tuple[Values, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What is better done for all blocks at once than in each; by default nothing.

        Returns the values left for the blocks, inputs of their own, stacked like values, and those that they share: a
        block is then called with (x, *own, *shared).
        """
        return values, (), shared

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        """x [B, N, D] through all blocks."""
        if self.run is not None:
            return self.run(x, *shared)
        for block in self:
            x = block(x, *shared)
        return x


RunBlocks = Callable[[Blocks, str, Values, Tensor, tuple[Tensor, ...]], Tensor]
"""(blocks, prefix, values, x, shared) -> x after all blocks.

``blocks`` give the architecture, ``values`` the parameters, cast, as they lie between steps; a ``prefix`` makes their
names those in the model."""
