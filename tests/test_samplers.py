"""Solvers on a velocity that is known exactly, and what they spare outside of guidance's interval."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import golden_cases
import pytest
import torch
from torch import Tensor

from rae_xla.benchmarks import sampler
from rae_xla.flow.guidance import AutoGuidance, ClassifierFreeGuidance, NoGuidance, Velocity
from rae_xla.flow.sampler import SamplerConfig, Solver
from rae_xla.flow.schedule import sampling_times
from rae_xla.models.dit import DiTConfig
from rae_xla.models.functional import tensors_of
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig

EAGER = create("eager", MeshConfig(), "fp32")
MEAN, DEVIATION = 1.5, 0.4


def of_a_gaussian(weights: Any, guided: bool) -> Velocity:
    """E[eps - x | x_t] for data that are N(MEAN, DEVIATION^2)."""

    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t = t.reshape(-1, 1, 1, 1)
        centred = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * DEVIATION**2 + t**2)
        return t * centred - (MEAN + (1 - t) * DEVIATION**2 * centred)

    return velocity


def solved(config: SamplerConfig, noise: Tensor, seed: int = 0, shift: float = 1.0) -> Tensor:
    times = sampling_times(config.num_grid_points, shift, end_at_zero=config.end_at_zero)
    solver = Solver(config, times, NoGuidance(), seed)
    rows = torch.arange(len(noise), dtype=torch.int32)
    batch = {"labels": torch.zeros_like(rows), "rows": rows}
    return solver(of_a_gaussian, {}, noise, batch, solver.intervals, EAGER.scan)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_errors_fall_as_the_method_s_order_says(method: str, order: int) -> None:
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    exact = MEAN + DEVIATION * noise
    errors = []
    for num_intervals in (20, 40):
        config = SamplerConfig(method=method, num_grid_points=num_intervals + 1, end_at_zero=True, batch_size=1)
        assert config.num_evaluations == num_intervals * order
        errors.append((solved(config, noise) - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_the_released_grid_ends_short_of_the_data_and_the_other_at_it() -> None:
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(method="heun", num_grid_points=200, batch_size=1)
    last = sampling_times(200, 6.928, end_at_zero=False)[-1].item()
    assert last == pytest.approx(6.928e-3 / (1 + 5.928e-3), rel=1e-3)
    # The state at time t is (1 - t) x + t eps, which here is known too.
    there = (1 - last) * MEAN + noise * math.sqrt((1 - last) ** 2 * DEVIATION**2 + last**2)
    torch.testing.assert_close(solved(config, noise, shift=6.928), there, atol=2e-4, rtol=0)
    all_the_way = config.model_copy(update={"end_at_zero": True})
    torch.testing.assert_close(solved(all_the_way, noise, shift=6.928), MEAN + DEVIATION * noise, atol=2e-4, rtol=0)


def test_noise_on_the_way_leaves_the_distribution_as_it_is() -> None:
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(method="euler_maruyama", num_grid_points=201, end_at_zero=True, diffusion=1.0, batch_size=1)
    found = solved(config, noise)
    # Four standard errors of 16,000 numbers, and what 200 intervals leave.
    assert found.mean().item() == pytest.approx(MEAN, abs=4 * DEVIATION / 126 + 2e-3)
    assert found.std().item() == pytest.approx(DEVIATION, rel=4 / 179 + 5e-3)
    # It has forgotten where it started, which an ordinary equation never does.
    kept = torch.corrcoef(torch.stack([found.flatten(), noise.flatten()]))[0, 1].item()
    assert kept < 0.8
    again, other = solved(config, noise[:100]), solved(config, noise[:100], seed=1)
    torch.testing.assert_close(again, found[:100])
    assert (other - again).abs().mean() > 0.05


def guided_counts(method: str, guidance: Any) -> tuple[Tensor, Counter[str]]:
    counts: Counter[str] = Counter()

    def velocity_of(weights: Any, guided: bool) -> Velocity:
        plain = of_a_gaussian(weights, guided)

        def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            counts["guided" if guided else "plain"] += 1
            acts = guided and guidance.t_min <= t[0].item() <= guidance.t_max
            return plain(x, t, labels) + (0.1 if acts else 0.0)

        return velocity

    config = SamplerConfig(method=method, num_grid_points=50, batch_size=1)
    times = sampling_times(50, 2.0, end_at_zero=False)
    solver, noise = Solver(config, times, guidance), torch.zeros(2, 1, 2, 2)
    batch = {"labels": torch.zeros(2, dtype=torch.int32), "rows": torch.zeros(2, dtype=torch.int32)}
    return solver(velocity_of, {}, noise, batch, solver.intervals, EAGER.scan), counts


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_outside_of_its_interval_guidance_costs_nothing(method: str) -> None:
    sizes = DiTConfig(width=32, depth=1, num_heads=2)
    within = AutoGuidance(method="autoguidance", scale=1.5, t_min=0.2, t_max=0.6, model=sizes)
    times = sampling_times(50, 2.0, end_at_zero=False)
    acts = (times >= 0.2) & (times <= 0.6)
    intervals = acts[:-1] if method == "euler" else acts[:-1] | acts[1:]
    found, counts = guided_counts(method, within)
    each = 1 if method == "euler" else 2
    assert counts == {"guided": each * int(intervals.sum()), "plain": each * int((~intervals).sum())}
    always = ClassifierFreeGuidance(method="classifier_free", scale=1.5)
    everywhere = Solver(SamplerConfig(method=method, num_grid_points=50, batch_size=1), times, always)
    assert [(span.begin, span.end, span.guided) for span in everywhere.spans] == [(0, 49, True)]
    if method == "euler":
        x = torch.zeros(2, 1, 2, 2)
        for now, then in itertools.pairwise(times):
            push = 0.1 if 0.2 <= now <= 0.6 else 0.0
            x = x + (then - now) * (of_a_gaussian({}, False)(x, now.expand(2), torch.zeros(2)) + push)
        torch.testing.assert_close(found, x)


@pytest.mark.parametrize("method", ["heun", "euler_maruyama"])
def test_xla_solves_as_eager_does(method: str) -> None:
    cases, models = golden_cases.golden_cases(), golden_cases.golden_models()
    config = SamplerConfig(method=method, num_grid_points=6, diffusion=0.5, batch_size=1)
    times = sampling_times(6, float(cases["shift"]), end_at_zero=True)
    guidance = golden_cases.guidance_of("cfg", 0.3, 0.8)
    solver = Solver(config, times, guidance, seed=3)
    assert {span.guided for span in solver.spans} == {False, True}

    def sample(given: Any, batch: Any) -> Tensor:
        def velocity_of(weights: Any, guided: bool) -> Velocity:
            return golden_cases.guided(guidance if guided else NoGuidance(), models, weights)

        runtime = batch["runtime"]
        return solver(velocity_of, given["models"], batch["noise"], batch, given["grid"]["intervals"], runtime.scan)

    labels = cases["labels"].int()
    batch = {"noise": cases["noise"], "labels": labels, "rows": torch.arange(len(labels), dtype=torch.int32)}
    frozen = {
        "models": {name: tensors_of(model) for name, model in models.items()},
        "grid": {"intervals": solver.intervals},
    }
    found = {}
    for name in ("eager", "xla"):
        runtime = create(name, MeshConfig(), "fp32")
        found[name] = golden_cases.compute(
            runtime, lambda given, b, runtime=runtime: sample(given, {**b, "runtime": runtime}), frozen, batch
        )
    assert golden_cases.difference(found["xla"], found["eager"]) < 1e-4


def test_a_batch_is_one_program_compiled_once_that_fetches_nothing_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "REPEATS", 1)
    found = sampler.sampler_overhead("dit_dh_s", depth_only=True, num_images=2)
    assert found["compilations"] == 1
    # The samples themselves.
    assert found["transfers_to_host_per_call"] == 1
    assert found["largest_difference"] < 1e-4
