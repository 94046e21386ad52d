"""What a compiled program costs on its slice: facts of the compiler, and what follows from them by estimate."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rae_xla.preflight.counts import kind_of, origin, padding_share, total_flops
from rae_xla.preflight.hlo import Module, operation_in, source_in
from rae_xla.preflight.layout import layout_of
from rae_xla.preflight.run import Compiled

GIB = 2**30
_TOP = 20
_LARGEST = 6


@dataclass(frozen=True)
class Cost:
    """``result`` is what ``--json`` holds of it."""

    result: dict[str, Any]
    compiled: Compiled


def cost_of(compiled: Compiled, flops_per_image: float, num_images_of_run: int | None = None) -> Cost:
    """``flops_per_image``: the model's own. ``num_images_of_run``: trained on in the recipe's whole run."""
    topology, chip = compiled.job.topology, compiled.job.topology.chip
    num_images = compiled.traced["num_images"]
    model_flops = flops_per_image * num_images / topology.num_chips
    result: dict[str, Any] = {
        "name": compiled.job.program,
        "topology": topology.name,
        "quick": compiled.job.quick,
        "num_chips": topology.num_chips,
        "num_images": num_images,
        "images_per_chip": num_images / topology.num_chips,
    }
    arguments = _arguments(compiled.traced)
    held = sum(argument["gib"] for argument in arguments)
    if compiled.refusal is not None:
        # What the compiler says that a program needs is without its arguments.
        temporaries, largest = refused(compiled.refusal)
        result |= {
            "fits": False,
            "hbm_gib": {
                "peak": temporaries + held,
                "arguments": held,
                "temporaries": temporaries,
                **dict.fromkeys(("outputs", "aliased"), None),
                "capacity": chip.hbm_gib,
            },
            "largest_allocations": _largest([*largest, *arguments]),
            "flops_per_chip": {"model": model_flops, "compiled": None},
            "seconds": {
                **dict.fromkeys(("compute", "exposed_communication", "step"), None),
                "compile": compiled.compiled["seconds"],
            },
            "mfu": None,
        }
        return Cost(result, compiled)
    module, estimate = compiled.module, compiled.estimate
    sizes = {name: size / GIB for name, size in compiled.compiled["bytes"].items()}
    peak = sizes["arguments"] + sizes["temporaries"] + sizes["outputs"] - sizes["aliased"] + sizes["code"]
    flops = total_flops(module)
    images_per_second = num_images / estimate.seconds
    result |= {
        "fits": peak <= chip.hbm_gib,
        "hbm_gib": {"peak": peak, **sizes, "capacity": chip.hbm_gib},
        "flops_per_chip": {"model": model_flops, "compiled": flops, "compiled_per_model": flops / model_flops},
        "seconds": {
            "compute": estimate.compute,
            "exposed_communication": estimate.waits,
            "exposed_memory_transfers": estimate.memory_waits,
            "step": estimate.seconds,
            "compile": compiled.compiled["seconds"],
        },
        "mfu": model_flops / (estimate.seconds * chip.peak_flops),
        "images_per_second": images_per_second,
        "collectives": [
            {"kind": kind, "mib": num_bytes / 2**20, "milliseconds": 1e3 * estimate.seconds_by_collective[kind]}
            for kind, num_bytes in sorted(estimate.bytes_by_collective.items())
        ],
        "largest_allocations": _largest(arguments),
        "layout_problems": layout_of(
            module, compiled.traced, compiled.compiled["bytes"], topology.num_chips
        ).problems(),
        **_where_time_goes(module, chip.clock),
    }
    if num_images_of_run is not None:
        hours = num_images_of_run / images_per_second / 3600
        result["run"] = {"hours": hours, "chip_hours": hours * topology.num_chips}
    return Cost(result, compiled)


def _arguments(traced: dict[str, Any]) -> list[dict[str, Any]]:
    """What each argument takes on a chip, without padding, like an allocation of `refused`."""
    return [
        {
            "gib": a["bytes"] / GIB,
            "shape": f"{a['dtype']}{a['shape']}",
            "operation": a["name"],
            "source": f"an input in {a['parts']} parts",
            "padding_factor": 1.0,
        }
        for a in traced["arguments"]
    ]


def _largest(allocations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(allocations, key=lambda allocation: -allocation["gib"])[:_LARGEST]


def _where_time_goes(module: Module, clock: float) -> dict[str, Any]:
    cycles_by_kind: Counter[str] = Counter()
    by_source: Counter[tuple[str, str]] = Counter()
    for instruction, times in module.runs():
        if instruction.cycles:
            cycles_by_kind[kind_of(module, instruction)] += times * instruction.cycles
            by_source[origin(module, instruction)] += times * instruction.cycles
    total = sum(cycles_by_kind.values()) or 1
    return {
        "shares": {kind: cycles / total for kind, cycles in cycles_by_kind.most_common()},
        "padding_share": padding_share(module),
        "top_operations": [
            {"source": source, "operation": operation, "milliseconds": 1e3 * cycles / clock, "share": cycles / total}
            for (source, operation), cycles in by_source.most_common(_TOP)
        ],
    }


def refused(message: str) -> tuple[float, list[dict[str, Any]]]:
    """GiB that the compiler says a program needs besides its arguments, and the largest allocations that it names."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    if used is None:
        raise ValueError(f"the compiler refused without saying what is needed: {message[:300]}")
    largest = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(r"([\d.]+)([KMGT])", part)
        shape = re.search(r"Shape: (\S+)", part)
        padding = re.search(r"\(([\d.]+)x expansion\)", part)
        label = re.search(r"XLA label: \S+ = ([\w\-]+)\(", part)
        if size is None:
            continue
        largest.append(
            {
                "gib": _gib(*size.groups()),
                "shape": shape[1] if shape else "",
                "operation": operation_in(part) or (f"the compiler's {label[1]}" if label else "the compiler's own"),
                "source": source_in(part),
                "padding_factor": float(padding[1]) if padding else 1.0,
            }
        )
    return _gib(*used.groups()), largest


def _gib(number: str, unit: str) -> float:
    return float(number) * {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}[unit]
