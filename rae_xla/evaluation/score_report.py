"""``report.html`` of scores: beside the paper's, with the samples, their labels, and what real images they are like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rae_xla.config import flattened
from rae_xla.evaluation.distances import nearest_of
from rae_xla.evaluation.files import as_png, contact_sheet, figure_png
from rae_xla.evaluation.measured import Measured
from rae_xla.evaluation.stored_images import images_at
from rae_xla.pages import data_url, page

# arXiv 2510.11690: figures 1 and 5 and tables 8 and 9; 50,000 class-balanced samples.
PUBLISHED = {
    "adm_imagenet256": [
        {"name": "DiT^DH-XL, 20 epochs", "fid": 3.71},
        {"name": "DiT^DH-XL, 80 epochs", "fid": 2.16},
        {"name": "DiT^DH-XL, 800 epochs", "fid": 1.51},
        {
            "name": "DiT^DH-XL, 800 epochs, AutoGuidance",
            "fid": 1.13,
            "inception_score": 262.6,
            "precision": 0.78,
            "recall": 0.67,
        },
        {"name": "unconditional, AutoGuidance", "fid": 4.96, "inception_score": 123.1},
    ],
    "adm_imagenet512": [
        {"name": "DiT^DH-XL, 1,024 tokens, guided", "fid": 1.13},
        {"name": "DiT^DH-XL, 256 tokens, decoder of 512 px, guided", "fid": 1.61},
    ],
    "imagenet_val_256_rfid": [
        {"name": "DINOv2-B, ViT-XL decoder", "rfid": 0.49},
        {"name": "DINOv2-B, ViT-XL decoder, trained with noise", "rfid": 0.57},
        {"name": "SigLIP2-B, ViT-XL decoder, trained with noise", "rfid": 0.82},
        {"name": "MAE-B, ViT-XL decoder, trained with noise", "rfid": 0.28},
        {"name": "SD-VAE", "rfid": 0.62},
    ],
}
TEMPLATE = """\
<p>{{ summary }}</p>
<h2>Scores</h2>
<table><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.name }}</td>{% for name in names %}<td>{{ shown(row.get(name)) }}</td>{% endfor %}
</tr>{% endfor %}</table>
{% if not published %}<p>The paper's scores are against other references, and are not shown beside.</p>{% endif %}
{% if sheet %}<h2>{{ images_are }}</h2><img src="{{ sheet }}" alt="the first images">{% endif %}
{% if labels %}<h2>Labels</h2>
<img src="{{ labels }}" alt="images of each class" style="image-rendering: auto">{% endif %}
{% if pairs %}<h2>Nearest in the reference</h2>
<p>The first images, and below each the image of the reference whose features are nearest to its.</p>
<img src="{{ pairs }}" alt="images above their neighbours">{% endif %}
<h2>What decides the scores</h2>
<table class="plain">{% for key, value in settings %}
<tr><td>{{ key }}</td><td>{{ "-" if value is none else value }}</td></tr>{% endfor %}</table>
"""
NUM_SHOWN, NUM_PAIRED = 60, 10


def score_report(manifest: Mapping[str, Any], made: Measured, reference: Measured, images_are: str) -> str:
    """A page of HTML. ``made``: what ``images_are``, samples or reconstructions."""
    scores, features = manifest["scores"], manifest["features"]["name"]
    published = PUBLISHED.get(str(manifest["reference"].get("name")), [])
    rows = [{"name": "this", **scores}, *[{**row, "name": f"paper: {row['name']}"} for row in published]]
    images, labels = made.images, made.labels
    sheet = None
    if images is not None:
        first = np.arange(min(NUM_SHOWN, len(images)))
        sheet = data_url(as_png(contact_sheet(images_at(images, first), min(10, len(first)))))
    reference_name = manifest["reference"].get("name") or manifest["reference"]["path"]
    return page(
        TEMPLATE,
        "Scores",
        summary=f"Features: {features}. Reference: {reference_name}. {_protocol(manifest)}",
        names=[name for name, value in scores.items() if not isinstance(value, str)],
        rows=rows,
        published=published,
        shown=_shown,
        images_are=images_are,
        sheet=sheet,
        labels=None if labels is None else data_url(_histogram(labels)),
        pairs=_neighbours(made, reference),
        settings=list(flattened({key: value for key, value in manifest.items() if key != "scores"})),
    )


def _protocol(manifest: Mapping[str, Any]) -> str:
    if manifest["features"].get("is_published"):
        return "ADM's protocol."
    if manifest["features"]["name"] == "inception":
        return "The weights of Inception are not the published ones: these numbers are nobody else's FID."
    return "This is not FID."


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _histogram(labels: np.ndarray) -> bytes:
    figure = Figure(figsize=(9.0, 2.4))
    axis = figure.subplots()
    classes, counts = np.unique(labels, return_counts=True)
    axis.bar(classes, counts, width=1.0)
    axis.set(xlabel="label", ylabel="images", ylim=(0, None))
    return figure_png(figure)


def _neighbours(made: Measured, reference: Measured) -> str | None:
    if made.images is None or made.seen is None or reference.images is None or reference.seen is None:
        return None
    few = np.arange(min(NUM_PAIRED, len(made.images)))
    nearest = nearest_of(made.seen["features"][few], reference.seen["features"])
    pairs = np.concatenate([images_at(made.images, few), images_at(reference.images, nearest)])
    return data_url(as_png(contact_sheet(pairs, len(few))))
