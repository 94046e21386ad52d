"""``tools/preflight.py``: from its arguments to its result."""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.preflight import report
from rae_xla.preflight.calibration import CALIBRATIONS, SMALLEST_SLICE
from rae_xla.preflight.cost import Cost, cost_of
from rae_xla.preflight.programs import flops_per_image, num_steps_of, phases_of_training, programs_of
from rae_xla.preflight.run import DEFAULT_CACHE, Compiled, Job, compile_all
from rae_xla.recipe import CommonRecipe, TrainingRecipe, load_recipe
from rae_xla.topologies import Topology, topology

logger = logging.getLogger(__name__)


def preflight(arguments: argparse.Namespace, topologies: list[Topology]) -> tuple[dict[str, Any], str]:
    """The result, and what people are shown of it; see the tool's help.

    Raises:
        UserError: an unknown slice or program, a recipe that does not fit the slice, no compiler.
    """
    if arguments.jobs < 1:
        raise UserError(f"--jobs: at least 1, got {arguments.jobs}")
    for option, path in (("--out", arguments.out), ("--dump-hlo", arguments.dump_hlo), ("--cache", arguments.cache)):
        if path and Path(path).is_file():
            raise UserError(f"{option}: {path} is a file; give a directory")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    programs = _chosen(recipe, arguments.program)
    settings: list[tuple[str, ...]] = [()]
    if arguments.search:
        # Of a training's phases the last, which is the dearest.
        programs = list(phases_of_training(recipe))[-1:]
        settings = [(), *_alternatives(recipe, topologies)]
    for where in topologies:
        try:
            recipe.mesh.shape_for(where.num_chips)
        except UserError as error:
            raise UserError(f"{where.name} has {where.num_chips} chips: {error}") from error
        if recipe.mesh.slices != where.num_slices:
            raise UserError(f"mesh.slices: {where.name} has {where.num_slices}, the recipe says {recipe.mesh.slices}")
    jobs = [
        Job(
            recipe=arguments.recipe,
            overrides=(*arguments.overrides, *extra),
            program=program,
            topology=where,
            quick=arguments.quick,
        )
        for program in programs
        for where in topologies
        for extra in settings
    ]
    cache = Path(arguments.cache) if arguments.cache else DEFAULT_CACHE
    chips = sorted({where.generation for where in topologies})
    compiled = compile_all([*_calibration_jobs(chips), *([job] for job in jobs)], cache, arguments.jobs)
    calibration, compiled = _calibration(compiled[: -len(jobs)]), compiled[-len(jobs) :]
    flops = {program: flops_per_image(recipe, program) for program in programs}
    costs = []
    for found in compiled:
        of_run = _images_of_run(recipe, found.job.program)
        cost = cost_of(found, flops[found.job.program], of_run)
        cost.result["settings"] = list(found.job.overrides[len(arguments.overrides) :])
        cost.result["remedies"] = _remedies(recipe, found.job)
        if of_run is not None and _copies_on_devices(recipe) and cost.result["fits"]:
            # What a step replaces in place is the state.
            hbm = cost.result["hbm_gib"]
            hbm["while_saving"] = hbm["peak"] + hbm["aliased"]
        costs.append(cost)
    basis = f"{report.BASIS} {report.QUICK}" if arguments.quick else report.BASIS
    shown = _shown(costs, calibration, basis, search=arguments.search)
    if arguments.dump_hlo:
        _dump(Path(arguments.dump_hlo), costs)
    if arguments.out:
        directory = Path(arguments.out)
        for cost in costs:
            report.write_trace(directory, cost)
        logger.info("wrote %s", report.write_html(directory, arguments.recipe, costs, basis))
    programs_found = [cost.result for cost in costs]
    return {"recipe": arguments.recipe, "programs": programs_found, "calibration": calibration}, shown


def _calibration_jobs(generations: list[str]) -> list[list[Job]]:
    slices = [topology(f"{generation}-{SMALLEST_SLICE}") for generation in generations]
    return [[Job(recipe=None, program=name, topology=where) for name in CALIBRATIONS] for where in slices]


def _calibration(compiled: list[Compiled]) -> list[dict[str, Any]]:
    """Estimate and ideal of each program of known cost, in milliseconds, and the first over the second."""
    rows = []
    for found in compiled:
        where, name = found.job.topology, found.job.program
        estimate = found.estimate.seconds
        ideal = CALIBRATIONS[name].ideal_seconds(where.chip)
        rows.append(
            {
                "program": name,
                "generation": where.generation,
                "ideal_ms": 1e3 * ideal,
                "estimated_ms": 1e3 * estimate,
                "ratio": estimate / ideal,
            }
        )
    return rows


def _chosen(recipe: CommonRecipe, wanted: list[str] | None) -> list[str]:
    known = list(programs_of(recipe))
    for program in wanted or []:
        if program not in known:
            raise UserError(f"--program: this recipe has no {program!r}; use {' or '.join(known)}")
    return wanted or known


def _alternatives(recipe: CommonRecipe, topologies: list[Topology]) -> list[tuple[str, ...]]:
    """A handful of settings that trade memory for time and that every slice admits; of a training only."""
    if not isinstance(recipe, TrainingRecipe):
        raise UserError("--search: tries settings of a training; this recipe has none")
    chips = [where.num_chips for where in topologies]
    settings: list[tuple[str, ...]] = []
    settings += [(f"compute.remat={kind}",) for kind in ("none", "matmuls", "block") if kind != recipe.compute.remat]
    sizes = sorted({1, 8, min(chips)} - {recipe.mesh.fsdp})
    settings += [(f"mesh.fsdp={size}",) for size in sizes if not any(count % size for count in chips)]
    parts = 2 * recipe.compute.num_microbatches
    if not any(recipe.data.batch_size % (parts * count) for count in chips):
        settings.append((f"compute.num_microbatches={parts}",))
    return settings


def _remedies(recipe: CommonRecipe, job: Job) -> list[str]:
    """What may make a program fit that does not, of what is not done already."""
    if not isinstance(recipe, TrainingRecipe) or job.program not in phases_of_training(recipe):
        return ["a smaller batch", "a larger slice"]
    found = [] if recipe.compute.remat == "block" else ["compute.remat=block"]
    parts = 2 * recipe.compute.num_microbatches
    if recipe.data.batch_size % (parts * job.topology.num_chips) == 0:
        found.append(f"compute.num_microbatches={parts}")
    if recipe.mesh.fsdp < job.topology.chips_per_slice:
        found.append(f"mesh.fsdp={job.topology.chips_per_slice}")
    return [*found, "a smaller data.batch_size", "a larger slice", "or --search, which tries settings"]


def _copies_on_devices(recipe: CommonRecipe) -> bool:
    assert isinstance(recipe, TrainingRecipe)
    return recipe.checkpoint.asynchronous and recipe.checkpoint.copy_on == "devices"


def _images_of_run(recipe: CommonRecipe, program: str) -> int | None:
    """Trained on by a training's program; none if it is another."""
    if not isinstance(recipe, TrainingRecipe) or program not in phases_of_training(recipe):
        return None
    return num_steps_of(recipe, program) * recipe.data.batch_size


def _shown(costs: list[Cost], calibration: list[dict[str, Any]], basis: str, *, search: bool) -> str:
    results = [cost.result for cost in costs]
    if search:
        fast = [r for r in results if r["fits"]]
        ranked = sorted(fast, key=lambda r: r["seconds"]["step"]) + [r for r in results if not r["fits"]]
        rows = [(*report.row_of(r), " ".join(r["settings"]) or "(as it is)") for r in ranked]
        lines = [report.table(rows, (*report.HEADINGS, "settings"))]
    else:
        lines = [report.table([report.row_of(r) for r in results])]
    for result in results:
        where = report.title_of(result)
        lines += [f"{where}: {problem}" for problem in result.get("layout_problems", [])]
        told = report.explained(result)
        lines += [told] if told else []
        if result["fits"] and not search:
            lines.append(f"\n{where}: where the core's time goes")
            shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in result["shares"].items())
            lines.append(f"  {shares}; {100 * result['padding_share']:.0f}% of what is written pads tiles")
            for row in result["collectives"]:
                lines.append(
                    f"  {row['milliseconds']:8.2f} ms on the links, {row['mib']:.0f} MiB a chip: {row['kind']}"
                )
            for row in result["top_operations"][:8]:
                made = f"{row['operation'] or 'compiler'} {row['source']}"
                lines.append(f"  {row['milliseconds']:8.2f} ms {100 * row['share']:5.1f}%  {made}")
    known = ", ".join(f"{row['program']} on {row['generation']} {row['ratio']:.2f}" for row in calibration)
    return "\n".join([*lines, f"\n{basis}", f"Estimate over ideal where that is known: {known}."])


def _dump(directory: Path, costs: list[Cost]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for cost in costs:
        if cost.compiled.refusal is None:
            path = directory / f"{report.file_name(cost.result)}.hlo.txt"
            shutil.copyfile(cost.compiled.hlo_file, path)
            logger.info("wrote %s", path)
