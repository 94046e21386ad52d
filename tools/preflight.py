"""What a recipe costs on a Cloud TPU slice, known without one: memory, time, FLOPs and transfers of each program.

Each program of the recipe is traced as its tool would run it, for as many devices as the slice has chips, and
compiled for the slice by the TPU's own compiler, which runs here. Takes minutes a program; what was compiled before is
not compiled again. Weights are not needed.
Slices by their Cloud names: v6e-8, v5p-64, v5litepod-16, v4-32; 2xv6e-256 for two slices.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """``programs``: a list, one for each program and slice."""
    from rae_xla.topologies import topology

    # A misspelt one is told before torch is imported.
    topologies = [topology(name) for name in dict.fromkeys(arguments.topology)]
    from rae_xla.preflight.main import preflight

    result, shown = preflight(arguments, topologies)
    print(shown)
    return result


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--topology", metavar="NAME", action="append", required=True, help="a slice; may be repeated")
    parser.add_argument("--program", metavar="NAME", action="append", help="train, sample, ...; all if not given")
    parser.add_argument("--search", action="store_true", help="try other settings too, and print them by their speed")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile with little effort: in half a minute or so, memory and times rough",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write report.html and a trace for ui.perfetto.dev of each program"
    )
    parser.add_argument("--dump-hlo", metavar="DIR", help="write each compiled program's text")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="compile so many at once (default: 1)")
    parser.add_argument("--cache", metavar="DIR", help="of compiled programs (default: ~/.cache/rae_xla/preflight)")
    cli.run(main, parser)
