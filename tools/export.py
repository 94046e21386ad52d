"""Weights out of a run's checkpoint, as one safetensors file: what `tools/train.py` leaves at its end, from any step.

Averaged weights (EMA), of one of the decays that the run keeps, or with --raw those that are trained. One tensor after
the other is read and written: memory is needed for one stored tensor and some 1.5 GB.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file says of the weights, and ``file``."""
    from rae_xla.training.export import export_run

    kind = "raw" if arguments.raw else "ema" if arguments.ema_decay is None else f"ema_{arguments.ema_decay}"
    about = export_run(arguments.run, arguments.step, kind, arguments.out)
    print(f"{'raw' if arguments.raw else 'averaged'} weights of step {about['step']} are in {arguments.out}")
    return {**about, "file": arguments.out}


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("run", metavar="RUN", help="a run directory, which may be a gs:// URL")
    parser.add_argument("--out", metavar="FILE", required=True, help="may be a gs:// URL")
    parser.add_argument("--step", metavar="N", type=int, help="default: the newest")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--raw", action="store_true", help="as they are trained, not averaged")
    which.add_argument("--ema-decay", metavar="D", type=float, help="one of train.more_ema_decays (default: ema_decay)")
    cli.run(main, parser)
