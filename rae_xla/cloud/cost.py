"""What trainings cost: the chip-hours that ``tools/preflight.py --json`` found, times the prices of a table."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from rae_xla.errors import UserError
from rae_xla.topologies import topology

PRICES = Path(__file__).parent / "prices.yaml"
KINDS = ("on_demand", "spot")


def costs(found: str, prices: str | None = None) -> list[dict[str, Any]]:
    """Of each slice in a result of preflight: ``topology hours chip_hours``, and dollars ``on_demand`` and ``spot``.

    All phases of a training are added up. Dollars are ``None`` where the table has no price.

    Raises:
        UserError: a file that cannot be read, no training in it, or one that does not fit its slice.
    """
    table = _read_prices(prices)
    try:
        programs = json.loads(Path(found).read_text())["programs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{found}: is no result of tools/preflight.py RECIPE --topology NAME --json FILE") from error
    hours: defaultdict[str, float] = defaultdict(float)
    for program in programs:
        if program.get("run") is None:
            continue
        if not program["fits"]:
            raise UserError(f"{found}: {program['name']} does not fit {program['topology']}; mend that first")
        hours[program["topology"]] += program["run"]["hours"]
    if not hours:
        raise UserError(f"{found}: no program of a training is in it, so there are no hours to pay")
    return [_row(name, length, table) for name, length in hours.items()]


def _row(name: str, hours: float, table: dict[str, Any]) -> dict[str, Any]:
    slices = topology(name)
    chip_hours = hours * slices.num_chips
    row = table.get(slices.generation) or {}
    dollars = {kind: None if row.get(kind) is None else chip_hours * row[kind] for kind in KINDS}
    return {"topology": name, "hours": hours, "chip_hours": chip_hours, **dollars}


def _read_prices(prices: str | None) -> dict[str, Any]:
    path = PRICES if prices is None else Path(prices)
    try:
        table = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--prices: {path} cannot be read as YAML; {PRICES} shows how it looks") from error
    rows = table.values() if isinstance(table, dict) else [None]
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(kind), int | float | None) for kind in KINDS):
            raise UserError(f"--prices: {path}: a generation has on_demand and spot, in dollars or null; see {PRICES}")
    return dict(table)


def as_table(rows: list[dict[str, Any]]) -> str:
    """A line for each slice."""
    lines = [f"{'slice':16} {'hours':>8} {'chip-hours':>11} {'on demand, $':>13} {'spot, $':>9}"]
    for row in rows:
        dollars = ["-" if row[kind] is None else f"{row[kind]:,.0f}" for kind in KINDS]
        lines.append(
            f"{row['topology']:16} {row['hours']:8.1f} {row['chip_hours']:11,.0f} {dollars[0]:>13} {dollars[1]:>9}"
        )
    return "\n".join(lines)
