"""What a run on eight devices does that one on one cannot: ``python tests/eight_devices.py DIRECTORY``.

DIRECTORY/found.json says what was found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rae_xla.recipe import load_recipe
from rae_xla.runtime import Runtime, create
from rae_xla.training.tasks import train

ON_THE_MESH = ["mesh.fsdp=2", "checkpoint.every_steps=7", "log.every_steps=1", "train.schedule=constant"]


def trained(runtime: Runtime, root: Path, num_steps: int) -> bytes:
    overrides = [*ON_THE_MESH, f"root={root}", f"train.num_epochs={num_steps * 64 / 1437}"]
    report = train(load_recipe("recipes/quickstart/judge.yaml", overrides), runtime)
    assert report["steps"] == num_steps, report
    return (root / "judge" / "checkpoints" / f"step_{num_steps:08d}" / "state.safetensors").read_bytes()


def complaint_about_sharding(runtime: Runtime) -> str:
    def total(state, frozen, batch):
        return {"sum": state["sum"] + batch["x"].sum()}, {"scaled": frozen["scale"] * batch["x"]}

    step = runtime.compile(total, "total")
    state, frozen = runtime.place_state({"sum": torch.zeros(())}), runtime.place_frozen({"scale": torch.ones(())})
    state, _ = step(state, frozen, runtime.place_batch({"x": torch.ones(16, 4)}))
    try:
        step(state, frozen, runtime.place_frozen({"x": torch.ones(16, 4)}))
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    recipe = load_recipe("recipes/quickstart/judge.yaml", ON_THE_MESH)
    runtime = create("xla", recipe.mesh, recipe.precision)
    whole = trained(runtime, directory / "whole", 10)
    trained(runtime, directory / "parts", 7)
    resumed = trained(runtime, directory / "parts", 10)
    found = {
        "num_devices": runtime.num_devices,
        "resumed_is_whole": resumed == whole,
        "complaint": complaint_about_sharding(runtime),
    }
    (directory / "found.json").write_text(json.dumps(found))
