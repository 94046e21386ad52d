"""The project's own measurements.

models   parameters and multiply-adds of every named model, beside the paper's figures
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the rows that were printed."""
    return {"models": models}[arguments.what]()


def models() -> dict[str, Any]:
    """`rows` of ``name params_millions gflops`` and the paper's figures."""
    from dataclasses import asdict

    from rae_xla.models.flops import model_costs

    rows = [asdict(cost) for cost in model_costs()]
    print("One image of 256 px; GFLOPs are billions of multiply-adds. 'as the paper': see rae_xla/models/flops.py.")
    print(f"{'':14} {'M parameters':>13} {'paper':>7} {'GFLOPs':>8} {'as the paper':>13} {'paper':>7}")
    for row in rows:
        shown = [
            f"{row[key]:.{digits}f}" if row[key] is not None else ""
            for key, digits in (
                ("params_millions", 1),
                ("paper_params_millions", 1),
                ("gflops", 2),
                ("gflops_as_paper", 2),
                ("paper_gflops", 2),
            )
        ]
        print(f"{row['name']:14} {shown[0]:>13} {shown[1]:>7} {shown[2]:>8} {shown[3]:>13} {shown[4]:>7}")
    return {"rows": rows}


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("what", choices=["models"])
    cli.run(main, parser)
