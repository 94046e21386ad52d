"""Hosts that score samples together: ``python tests/score_hosts.py N SAMPLES OUT RECIPE override...``.

Prints the scores that each has found, a line for each. OUT gets what they write, and their meeting place.
"""

from __future__ import annotations

import json
import sys

from simulated_hosts import run_hosts

from rae_xla.evaluation.scoring import evaluate_generation
from rae_xla.recipe import load_recipe
from rae_xla.runtime import Runtime

if __name__ == "__main__":
    num_hosts, samples, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    recipe = load_recipe(sys.argv[4], sys.argv[5:])

    def score(runtime: Runtime) -> None:
        found = json.dumps(evaluate_generation(recipe, runtime, samples, None, out))
        # In one piece: all hosts write to the same place.
        sys.stdout.write(f"{found}\n")

    sys.exit(run_hosts(num_hosts, f"{out}.meeting", recipe, score))
