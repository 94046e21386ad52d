"""The whole pipeline, small and real: train, sample and score an RAE on scikit-learn's handwritten digits, on the CPU.

Each step is what one of the other tools does with a recipe of recipes/quickstart/. CPU_NUM_DEVICES=8 runs the same on
eight virtual devices. Running it again resumes; a finished training is not repeated.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores and the seconds of each step."""
    from rae_xla.quickstart import run_quickstart

    result = run_quickstart(arguments.out, arguments.overrides, arguments.num_images)
    for row in result["scores"]:
        print(
            f"{row['mode']:16} recognised {100 * row['recognised_share']:.1f}%   "
            f"Frechet distance (judge) {row['judge_frechet_distance']:.2f}   identical {row['identical_images']}   "
            f"neighbour distance {row['neighbour_distance']:.1f} (real digits {row['real_neighbour_distance']:.1f})"
        )
    print(f"judge on real held-out digits {100 * result['scores'][0]['judge_heldout_accuracy']:.1f}%")
    print(f"reconstruction PSNR on held-out digits {result['psnr']:.2f} dB")
    print(f"Look at {result['report']}. Next: change a recipe in recipes/quickstart/ and run again with another --out,")
    print("or try CPU_NUM_DEVICES=8 bash tools/quickstart.sh --out runs/eight mesh.fsdp=2")
    return result


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="laid over every recipe")
    parser.add_argument("--out", metavar="DIR", default="runs/quickstart", help="default: runs/quickstart")
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="for each guidance (default: 1000)")
    cli.run(main, parser)
