"""Weights out of a run's checkpoint, as one safetensors file: what `tools/train.py` leaves at its end, from any step.

Averaged weights (EMA), or with --raw those that are trained. One tensor after the other is read and written; memory is
needed for some three times the largest, which is one kind of tensor of all blocks.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file says of the weights, and ``file``."""
    from rae_xla.training.export import export_run

    about = export_run(arguments.run, arguments.step, "raw" if arguments.raw else "ema", arguments.out)
    print(f"{'raw' if arguments.raw else 'averaged'} weights of step {about['step']} are in {arguments.out}")
    return {**about, "file": arguments.out}


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("run", metavar="RUN", help="a run directory, which may be a gs:// URL")
    parser.add_argument("--out", metavar="FILE", required=True, help="may be a gs:// URL")
    parser.add_argument("--step", metavar="N", type=int, help="default: the newest")
    parser.add_argument("--raw", action="store_true", help="as they are trained, not averaged")
    cli.run(main, parser)
