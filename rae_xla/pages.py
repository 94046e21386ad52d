"""What the HTML pages share: each is one file with its pictures inside."""

from __future__ import annotations

import base64
from typing import Any

import jinja2

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100%; image-rendering: pixelated }
.sheets { display: flex; flex-wrap: wrap; gap: 1.5rem } figure { margin: 0 } figcaption { color: #555 }
.plain td { text-align: left; overflow-wrap: anywhere }
</style></head><body>
<h1>{{ title }}</h1>
"""


def page(template: str, title: str, **values: Any) -> str:
    """A page of this title whose content is a template of Jinja's, with these values in it."""
    return (
        jinja2.Environment(autoescape=True)
        .from_string(f"{_PAGE}{template}</body></html>\n")
        .render(title=title, **values)
    )


def data_url(png: bytes) -> str:
    """A picture as an address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
