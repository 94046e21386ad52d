"""Samples of several hosts that are killed: ``python tests/sampling_jobs.py RECIPE OUT N HOSTS... KILLS``.

``HOSTS``: how many there are in the first job, the second, and so on; the last number again and again. Every host is a
process forked from this one, with the eager runtime; all are killed when a random share of the samples is stored, KILLS
times, and then left to end. Prints how many jobs it took and how many samples were found at the start of each.
SCORED in the environment, a recipe and a reference: they are scored as they are made, and no image is kept.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time

from simulated_hosts import start_host

from rae_xla import storage
from rae_xla.evaluation import sample_set
from rae_xla.evaluation.in_pass import ScoringInPass
from rae_xla.evaluation.sample_set import PARTS, write_sample_set
from rae_xla.recipe import load_recipe
from rae_xla.runtime import Runtime


def stored(out: str) -> int:
    """How many samples are in parts."""
    names = storage.list_names(f"{out}/{PARTS}")
    spans = [name.split(".")[0].split("-") for name in names if name.endswith(".safetensors")]
    return sum(int(end) - int(begin) for begin, end in spans)


def job(num_hosts: int, recipe: str, out: str, num_images: int, kill_at: int | None) -> bool:
    """Whether it came to its end; it is killed when so many samples are stored."""
    loaded = load_recipe(recipe, [])

    def write(runtime: Runtime) -> None:
        scoring = None
        if "SCORED" in os.environ:
            evaluation, reference = os.environ["SCORED"].split()
            recipe, size = load_recipe(evaluation, []), loaded.autoencoder.image_size
            scoring = ScoringInPass(recipe, reference, size, runtime, keep_images=False)
        write_sample_set(loaded, runtime, out, seed=loaded.seed, num_images=num_images, scoring=scoring)

    with tempfile.TemporaryDirectory() as folder:
        running = {start_host(rank, num_hosts, f"{folder}/meeting", loaded, write) for rank in range(num_hosts)}
        codes = []
        while running:
            time.sleep(0.01)
            for child in list(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    running.remove(child)
                    codes.append(os.waitstatus_to_exitcode(status))
            if running and kill_at is not None and stored(out) >= kill_at:
                for child in running:
                    os.kill(child, signal.SIGKILL)
                for child in running:
                    os.waitpid(child, 0)
                return False
        assert codes == [0] * num_hosts, codes
        return True


def main() -> None:
    recipe, out, num_images, *hosts, kills = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    # Of which a kill loses one each host.
    sample_set.IMAGES_PER_PART = max(10, num_images // 200)
    moments, found_at_start = random.Random(0), []
    while True:
        begin = stored(out)
        found_at_start.append(begin)
        number = len(found_at_start) - 1
        num_hosts = hosts[min(number, len(hosts) - 1)]
        # Somewhere in the first half of what is left, so that it is always killed before its end.
        kill_at = begin + round(moments.uniform(0.01, 0.5) * (num_images - begin)) if number < kills else None
        if job(num_hosts, recipe, out, num_images, kill_at):
            break
    print(json.dumps({"jobs": len(found_at_start), "found_at_start": found_at_start}))


if __name__ == "__main__":
    main()
