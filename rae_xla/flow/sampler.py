"""Solvers on an explicit grid of times. The state stays float32 whatever the model computes in.

Sources: Heun's method as in EDM (arXiv 2206.00364, algorithm 1; flow matching needs no special last step); the
stochastic differential equation of SiT (arXiv 2401.08740, equations 4 and 7) by the method of Euler and Maruyama.
The scan is handed in, so that a runtime can make it one program on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rae_xla.config import Config
from rae_xla.flow.guidance import GuidanceConfig, Velocity, acts_at
from rae_xla.random import Purpose, normal

Scan = Callable[..., tuple[Any, Any]]
"""See `Runtime.scan`."""
VelocityOf = Callable[[Any, bool], Velocity]
"""From weights, and whether guidance has a part in it, to a velocity."""


class SamplerConfig(Config):
    """``num_grid_points`` times; the released grid stops short of t = 0, ``end_at_zero`` goes all the way.

    ``euler`` evaluates the model once an interval, and so does ``euler_maruyama``, ``heun`` twice. ``diffusion``, of
    ``euler_maruyama`` only: the noise that it adds has variance ``diffusion`` * t a unit of time. ``labels``: see
    `rae_xla.evaluation.generation.labels_of`.
    """

    method: Literal["euler", "heun", "euler_maruyama"] = "euler"
    num_grid_points: int = Field(default=50, ge=2)
    end_at_zero: bool = False
    diffusion: float = Field(default=1.0, gt=0)
    batch_size: int = Field(gt=0)
    labels: Literal["balanced", "random", "unconditional"] = "balanced"

    @property
    def num_evaluations(self) -> int:
        """Of the model, for a sample."""
        return (self.num_grid_points - 1) * (2 if self.method == "heun" else 1)


@dataclass(frozen=True)
class Span:
    """Intervals ``begin`` to ``end`` of a grid, and whether guidance acts in any of them."""

    begin: int
    end: int
    guided: bool


def intervals_of(times: Tensor) -> Tensor:
    """Float32 [S - 1, 3] for times [S]: when an interval begins, when it ends, and which one it is."""
    numbers = torch.arange(len(times) - 1, dtype=times.dtype)
    return torch.stack([times[:-1], times[1:], numbers], dim=1)


class Solver:
    """A sampler's method on a grid of times, float32 [S] on the host, falling.

    The grid is cut where guidance begins or ends to act, so that outside nobody computes what is not used.
    ``intervals``: `intervals_of` the times, for the devices. ``seed``: of the noise of ``euler_maruyama``.
    """

    def __init__(self, config: SamplerConfig, times: Tensor, guidance: GuidanceConfig, seed: int = 0) -> None:
        self._config, self._seed = config, seed
        self.intervals = intervals_of(times)
        acts = acts_at(guidance, times)
        guided = acts[:-1] | acts[1:] if config.method == "heun" else acts[:-1]
        cuts = [0, *[i for i in range(1, len(guided)) if guided[i] != guided[i - 1]], len(guided)]
        self.spans = [Span(begin, end, bool(guided[begin])) for begin, end in pairwise(cuts)]

    def __call__(
        self, velocity_of: VelocityOf, weights: Any, noise: Tensor, batch: Any, intervals: Tensor, scan: Scan
    ) -> Tensor:
        """Latents [B, C, h, w] at the last time, from ``noise`` at the first.

        ``velocity_of`` is called inside the scan, with the weights that the scan hands in. ``batch``: int32 [B]
        ``labels``, and ``rows``, the samples' indices, of which ``euler_maruyama`` takes its noise. ``intervals``: the
        solver's, on the devices.
        """
        x = noise.float()
        for span in self.spans:
            step = self._step(velocity_of, span.guided)
            x, _ = scan(step, x, intervals[span.begin : span.end], (weights, batch["labels"], batch["rows"]))
        return x

    def _step(self, velocity_of: VelocityOf, guided: bool) -> Callable[[Tensor, Tensor, Any], tuple[Tensor, tuple[()]]]:
        def step(x: Tensor, interval: Tensor, given: Any) -> tuple[Tensor, tuple[()]]:
            weights, labels, rows = given
            velocity = velocity_of(weights, guided)

            def v(x: Tensor, t: Tensor) -> Tensor:
                return velocity(x, t.expand(x.shape[0]), labels).float()

            now, then, number = interval.unbind()
            if self._config.method == "heun":
                return _heun(v, x, now, then), ()
            if self._config.method == "euler_maruyama":
                drawn = normal(self._seed, Purpose.SAMPLER_NOISE, rows, tuple(x.shape[1:]), number.to(torch.int32))
                # The last interval adds none: nothing would take it out again.
                share = (len(self.intervals) - 1 - number).clamp(max=1.0)
                return _euler_maruyama(v, x, now, then, self._config.diffusion, share * drawn), ()
            return x + (then - now) * v(x, now), ()

        return step


def _heun(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, then: Tensor) -> Tensor:
    first = v(x, now)
    return x + (then - now) * 0.5 * (first + v(x + (then - now) * first, then))


def _euler_maruyama(
    v: Callable[[Tensor, Tensor], Tensor], x: Tensor, now: Tensor, then: Tensor, diffusion: float, noise: Tensor
) -> Tensor:
    """dx = (v - w s / 2) dt + sqrt(w) dW, backwards in time.

    With w = diffusion t and the score s = -(x + (1 - t) v) / t, in whose product nothing is divided by.
    """
    velocity = v(x, now)
    drift = velocity + 0.5 * diffusion * (x + (1.0 - now) * velocity)
    return x + (then - now) * drift + (diffusion * now * (now - then)).sqrt() * noise
