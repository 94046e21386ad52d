"""What preflight shows: a table, ``report.html`` with the step's course, and traces for ui.perfetto.dev."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rae_xla.preflight.cost import Cost
from rae_xla.preflight.counts import kind_of
from rae_xla.preflight.run import Compiled

HEADINGS = (
    "program", "slice", "images a chip", "HBM GiB", "of", "step ms", "waiting", "images/s", "MFU", "FLOPs x model",
    "run h", "chip h",
)  # fmt: skip
BASIS = (
    "Facts, from the TPU's compiler: HBM, FLOPs, the schedule. Estimates: the length of each operation (the compiler's "
    "own cycles), of transfers (bytes over the bandwidth of the links used); nothing was run on a TPU."
)
QUICK = (
    "Compiled with the compiler's least effort (--quick): how arrays are split is as it will be; HBM and times are "
    "rough, mostly above what full effort gives."
)
_COLOURS = {"products": "#2a6f97", "other": "#a9d6e5", "moves": "#e76f51", "waiting": "#dddddd"}
_COLUMNS = 600

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Preflight</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child, td.text { text-align: left } svg { width: 100%; height: auto; background: #fff }
.key span { display: inline-block; width: 1em; height: 1em; vertical-align: middle; margin: 0 .3em 0 1em }
</style></head><body>
<h1>Preflight: {{ recipe }}</h1>
<p>{{ basis }}</p>
<table><tr>{% for h in headings %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% for part in parts %}
<h2>{{ part.title }}</h2>
{% if part.told %}<p><b>Does not fit.</b> {{ part.told }}</p>{% endif %}
{% if part.timeline %}
<p class="key">The core's time, from the start of a step to its end:
{% for name, colour in colours.items() %}<span style="background: {{ colour }}"></span>{{ name }}{% endfor %};
below: the links between chips.</p>
{{ part.timeline }}
<table><tr><th>operation</th><th>made by</th><th>ms</th><th>share</th></tr>
{% for row in part.operations %}<tr><td>{{ row.operation or "(the compiler's own)" }}</td>
<td class="text">{{ row.source }}</td><td>{{ "%.2f"|format(row.milliseconds) }}</td>
<td>{{ "%.1f"|format(100 * row.share) }}%</td></tr>{% endfor %}</table>
<table><tr><th>transfers between chips</th><th>MiB a chip</th><th>ms</th></tr>
{% for row in part.collectives %}<tr><td>{{ row.kind }}</td>
<td>{{ "%.1f"|format(row.mib) }}</td>
<td>{{ "%.2f"|format(row.milliseconds) }}</td></tr>{% endfor %}</table>
{% endif %}{% endfor %}
</body></html>
"""


def row_of(result: dict[str, Any]) -> tuple[str, ...]:
    """A program's row under `HEADINGS`."""
    hbm = result["hbm_gib"]
    start = (result["name"], result["topology"], f"{result['images_per_chip']:g}")
    peak = f"{hbm['peak']:.1f}"
    if not result["fits"]:
        return (*start, peak, f"{hbm['capacity']:g}", "does not fit", "", "", "", "", "", "")
    seconds, run = result["seconds"], result.get("run")
    waiting = seconds["exposed_communication"] + seconds["exposed_memory_transfers"]
    return (
        *start,
        peak,
        f"{hbm['capacity']:g}",
        f"{1e3 * seconds['step']:.1f}",
        f"{100 * waiting / seconds['step']:.0f}%",
        f"{result['images_per_second']:,.0f}",
        f"{100 * result['mfu']:.1f}%",
        f"{result['flops_per_chip']['compiled_per_model']:.2f}",
        f"{run['hours']:.1f}" if run else "",
        f"{run['chip_hours']:,.0f}" if run else "",
    )


def table(rows: list[tuple[str, ...]], headings: tuple[str, ...] = HEADINGS) -> str:
    """Columns of text."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [headings, *rows]
    )


def explained(result: dict[str, Any]) -> str:
    """Why a program does not fit, or not while a checkpoint is saved, in a line or two; empty if it does."""
    hbm = result["hbm_gib"]
    if result["fits"]:
        needed = hbm.get("while_saving", 0.0)
        if needed <= hbm["capacity"]:
            return ""
        return (
            f"{title_of(result)} fits, but not beside the copy that a save makes of its state: {needed:.1f} of "
            f"{hbm['capacity']:g} GiB a chip. Use checkpoint.copy_on=host, or checkpoint.asynchronous=false"
        )
    over = hbm["peak"] - hbm["capacity"]
    largest = "; ".join(
        f"{a['gib']:.2f} GiB {a['shape'].split('{')[0]} ({_made_by(a)})" for a in result["largest_allocations"][:4]
    )
    return (
        f"{title_of(result)} needs {hbm['peak']:.1f} of {hbm['capacity']:g} GiB a chip, {over:.1f} too much. "
        f"Largest: {largest}. Try {', '.join(result['remedies'])}"
    )


def _made_by(allocation: dict[str, Any]) -> str:
    factor = allocation["padding_factor"]
    parts = [allocation["operation"], allocation["source"]]
    parts.append(f"{factor:g} times its size by padding" if factor > 1 else "")
    return ", ".join(part for part in parts if part)


def write_html(directory: Path, recipe: str, costs: list[Cost], basis: str) -> Path:
    """``report.html`` in ``directory``, with what its figures rest on; returns its path."""
    parts = [
        {
            "title": title_of(cost.result),
            "told": explained(cost.result),
            "timeline": Markup("" if cost.compiled.refusal else _timeline(cost.compiled)),
            "operations": cost.result.get("top_operations", []),
            "collectives": cost.result.get("collectives", []),
        }
        for cost in costs
    ]
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    html = page.render(
        recipe=recipe,
        basis=basis,
        headings=HEADINGS,
        rows=[row_of(cost.result) for cost in costs],
        parts=parts,
        colours=_COLOURS,
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    path.write_text(html)
    return path


def title_of(result: dict[str, Any]) -> str:
    """Program, slice, and the settings that were laid over the recipe's, for people."""
    return " ".join([f"{result['name']} on {result['topology']}", *result["settings"]])


def file_name(result: dict[str, Any]) -> str:
    """The same, for a file."""
    return "_".join([result["name"], result["topology"], *result["settings"]])


def write_trace(directory: Path, cost: Cost) -> Path | None:
    """``PROGRAM_SLICE[_SETTINGS].trace.json.gz`` in ``directory``, in Chrome's format; none if it does not fit."""
    if cost.compiled.refusal is not None:
        return None
    lanes = {"core": 1, "links": 2, "slices": 3, "memory": 4}
    named = {"core": "core", "links": "links", "slices": "between slices", "memory": "HBM to core memory"}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": lanes[lane], "args": {"name": name}}
        for lane, name in named.items()
    ]
    for event in cost.compiled.estimate.events:
        made = event.instruction
        about = {"source": made.source, "operation": made.operation, "shape": made.shape[:200]}
        times = {"ts": 1e6 * event.start, "dur": 1e6 * event.seconds}
        events.append({"ph": "X", "name": made.name, "pid": 1, "tid": lanes[event.lane], **times, "args": about})
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{file_name(cost.result)}.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return path


def _timeline(compiled: Compiled) -> str:
    """The core's time in columns, each stacked by what it was spent on, and below that of transfers between chips."""
    estimate = compiled.estimate
    width = estimate.seconds / _COLUMNS
    core: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(_COLUMNS)]
    links = [0.0] * _COLUMNS
    kinds: dict[int, str] = {}
    for event in estimate.events:
        if event.lane == "memory":
            continue
        made = id(event.instruction)
        if made not in kinds:
            kinds[made] = kind_of(compiled.module, event.instruction)
        column = int(event.start / width)
        start, end = event.start, event.start + event.seconds
        while column < _COLUMNS and column * width < end:
            part = min(end, (column + 1) * width) - max(start, column * width)
            if event.lane == "core":
                core[column][kinds[made]] += part / width
            else:
                links[column] += part / width
            column += 1
    bars = []
    for column, spent in enumerate(core):
        top = 100.0
        spent["waiting"] = max(0.0, 1.0 - sum(spent.values()))
        for kind, colour in _COLOURS.items():
            height = 100 * min(spent[kind], 1.0)
            if height > 0:
                top -= height
                bars.append(f'<rect x="{column}" y="{top:.1f}" width="1.02" height="{height:.1f}" fill="{colour}"/>')
        height = 30 * min(links[column], 1.0)
        if height > 0:
            bars.append(
                f'<rect x="{column}" y="{135 - height:.1f}" width="1.02" height="{height:.1f}" fill="#6d597a"/>'
            )
    milliseconds = (
        f'<text x="{_COLUMNS}" y="148" font-size="9" text-anchor="end">{1e3 * estimate.seconds:.1f} ms</text>'
    )
    zero = '<text x="0" y="148" font-size="9">0</text>'
    return f'<svg viewBox="0 0 {_COLUMNS} 150">{"".join(bars)}{zero}{milliseconds}</svg>'
