"""``report.html`` of a quickstart: one file with the curves, pictures, scores and times of a run inside."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from rae_xla import storage
from rae_xla.evaluation.files import figure_png
from rae_xla.pages import data_url, page
from rae_xla.training.metrics import read_metrics

TEMPLATE = """\
<p>{{ summary }}</p>
<h2>Scores</h2>
<p>Recognised: share of generated digits that a classifier trained on real digits only takes for their label; it takes
{{ "%.1f"|format(100 * judge_accuracy) }}% of the real held-out digits for theirs. The Fréchet distance is in that
classifier's hidden layer against the held-out digits, and is not FID. Neighbour distance: mean over images of the
root-mean-square difference, in grey levels, to the nearest other one of the same class, at equal numbers of images;
real held-out digits stand beside. PSNR of held-out reconstructions: {{ "%.2f"|format(psnr) }} dB.</p>
<table><tr><th>guidance</th><th>recognised</th><th>Fréchet distance (judge)</th><th>identical images</th>
<th>neighbour distance</th><th>real digits</th></tr>
{% for row in scores %}<tr><td>{{ row.mode }}</td><td>{{ "%.1f"|format(100 * row.recognised_share) }}%</td>
<td>{{ "%.2f"|format(row.judge_frechet_distance) }}</td><td>{{ row.identical_images }} of {{ row.num_samples }}</td>
<td>{{ "%.1f"|format(row.neighbour_distance) }}</td><td>{{ "%.1f"|format(row.real_neighbour_distance) }}</td></tr>
{% endfor %}</table>
<h2>Samples</h2>
<div class="sheets">{% for name, image in sheets %}<figure><img src="{{ image }}" alt="samples, {{ name }}">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}</div>
<h2>Held-out digits above their reconstructions</h2>
<img src="{{ reconstructions }}" alt="reconstructions" style="width: 100%">
<h2>Loss</h2>
<img src="{{ curves }}" alt="loss curves" style="image-rendering: auto">
<h2>Time</h2>
<table><tr><th>step</th><th>seconds</th></tr>
{% for name, seconds in timings %}<tr><td>{{ name }}</td><td>{{ "%.1f"|format(seconds) }}</td></tr>{% endfor %}</table>
"""


def write_report(
    directory: str,
    *,
    title: str,
    summary: str,
    scores: list[dict[str, Any]],
    psnr: float,
    sheets: dict[str, str],
    reconstructions: str,
    metrics: dict[str, str],
    timings: dict[str, float],
) -> str:
    """Write ``report.html`` and return its path.

    ``sheets`` maps a guidance mode to a PNG, ``metrics`` a run's name to its ``metrics.jsonl``; ``timings`` in seconds.
    """
    path = storage.join(directory, "report.html")
    html = page(
        TEMPLATE,
        title,
        summary=summary,
        scores=scores,
        judge_accuracy=scores[0]["judge_heldout_accuracy"],
        psnr=psnr,
        sheets=[(name, data_url(storage.read_bytes(png))) for name, png in sheets.items()],
        reconstructions=data_url(storage.read_bytes(reconstructions)),
        curves=data_url(_loss_curves(metrics)),
        timings=list(timings.items()),
    )
    storage.write_text(path, html)
    return path


def _loss_curves(metrics: dict[str, str]) -> bytes:
    figure = Figure(figsize=(3.2 * len(metrics), 2.8))
    axes = figure.subplots(1, len(metrics), squeeze=False)
    for axis, (name, path) in zip(axes[0], metrics.items(), strict=True):
        lines = read_metrics(path)
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1)
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    return figure_png(figure)
