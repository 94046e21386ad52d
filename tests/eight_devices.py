"""What a run on eight devices does that one on one cannot: ``python tests/eight_devices.py DIRECTORY``.

DIRECTORY/found.json says what was found.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import golden_cases
import mesh_cases
import photos
import torch
import torch_xla
from torch.utils._pytree import tree_leaves

from rae_xla.data.prefetch import Prefetched
from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig, open_source
from rae_xla.data.stream import StreamedBatches
from rae_xla.evaluation.batches import own_rows
from rae_xla.models.functional import buffers_of
from rae_xla.recipe import load_recipe
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import Runtime, create
from rae_xla.sharding import MeshConfig
from rae_xla.training.checkpoint import CheckpointConfig, Checkpoints, Progress, step_directory
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.stored_index import StoredIndex
from rae_xla.training.tasks import train
from rae_xla.training.update import initial_state, make_update

ON_THE_MESH = ["mesh.fsdp=2", "checkpoint.every_steps=7", "log.every_steps=1", "train.schedule=constant"]


def trained(runtime: Runtime, root: Path, num_steps: int) -> bytes:
    overrides = [*ON_THE_MESH, f"root={root}", f"train.num_epochs={num_steps * 64 / 1437}"]
    report = train(load_recipe("recipes/quickstart/judge.yaml", overrides), runtime)
    assert report["steps"] == num_steps, report
    return (root / "judge" / "checkpoints" / f"step_{num_steps:08d}" / "part_00000_000.safetensors").read_bytes()


def diffusion_resumes(runtime: Runtime, directory: str) -> bool:
    """Whether steps 8 to 10 from step 7's checkpoint are those of one run, with drawn noise and all that is scanned."""
    module = mesh_cases.small_model()
    optimizer = OptimizerConfig(num_epochs=1, learning_rate=1e-3, schedule="linear", ema_decay=0.9, ema_warmup=True)
    compute = ComputeConfig(blocks="scan", remat="matmuls", num_microbatches=2)
    update = make_update(module, mesh_cases.loss, optimizer, compute, 10.0, runtime)
    step = runtime.compile(update, "diffusion")
    frozen = runtime.place_frozen({"buffers": buffers_of(module)})

    def state_after(state: dict, steps: range) -> dict:
        for index in steps:
            state, _ = step(state, frozen, runtime.place_batch(mesh_cases.batch(index)))
        return state

    def start() -> dict:
        return runtime.place_state(initial_state(module, optimizer))

    whole = runtime.to_host(state_after(start(), range(10)))
    checkpoints = Checkpoints(directory, CheckpointConfig(every_steps=1), runtime, {}, {})
    checkpoints.save(Progress(7), state_after(start(), range(7)))
    checkpoints.wait()
    state, progress = checkpoints.restore(StoredIndex(step_directory(directory, 7)), start())
    resumed = runtime.to_host(state_after(state, range(7, 10)))
    return progress == Progress(7) and all(map(torch.equal, tree_leaves(whole), tree_leaves(resumed)))


def checkpoint_on_all_meshes(runtime: Runtime, directory: Path) -> bool:
    """Writes a state that lies in eight parts, and itself beside; whether it is read as one that every device has."""
    state = runtime.place_state(mesh_cases.numbered_state())
    config = CheckpointConfig(every_steps=1, copy_on="host")
    checkpoints = Checkpoints(str(directory), config, runtime, {}, {})
    checkpoints.save(Progress(3), state)
    checkpoints.wait()
    return mesh_cases.restored_everywhere(runtime, step_directory(str(directory), 3))


def streamed_batch_lies_in_parts(runtime: Runtime, directory: Path) -> bool:
    """Whether each device gets its own part of a batch out of shards, and all together what one would get."""
    photos.write_shards(directory, "parquet", photos.samples(48), num_shards=2, images_per_block=6)
    stream = StreamConfig(shuffle_images=24, num_workers=0)
    config = DataConfig(
        source=photos.write_manifest_of(directory), image_size=32, batch_size=16, flip=True, stream=stream
    )
    images = open_source(config, ".", "train")
    assert isinstance(images, ShardedImages)
    batches = StreamedBatches(images, config, 0, 0, 1)
    expected = list(islice(batches.from_step(2), 3))
    with Prefetched(batches.from_step(2), runtime.place_batch) as arriving:
        for batch in expected:
            placed, _ = next(arriving)
            for name, whole in batch.tensors.items():
                parts = [part for part, _ in torch_xla._XLAC._get_local_shards([placed[name]])[0]]
                if len(parts) != 8 or not torch.equal(torch.cat(parts), whole):
                    return False
    return True


def rows_are_in_order(runtime: Runtime) -> bool:
    """Whether a host's rows, out of the devices' parts as on several hosts, are those of the whole."""

    def double(state, frozen, batch):
        return state, {"rows": runtime.split_batch(batch["rows"] * 2), "whole": batch["rows"].sum()}

    batch = runtime.place_batch({"rows": torch.arange(32.0).reshape(16, 2)})
    _, outputs = runtime.compile(double, "double")({}, {}, batch)
    # As if there were another one, which has no part in this.
    several = SimpleNamespace(num_processes=2, parts_of=runtime.parts_of)
    rows = own_rows({"rows": outputs["rows"]}, several)["rows"]
    return bool((rows == runtime.to_host(outputs)["rows"].numpy()).all())


def golden_differences(runtime: Runtime) -> dict[str, float]:
    """How far the golden sampling cases are from the released code, of the largest value."""
    cases, models = golden_cases.golden_cases(), golden_cases.golden_models()
    found = {}
    for case in golden_cases.SAMPLED:
        made = golden_cases.sampled(case, models, cases, runtime, copies=8)
        found[case] = golden_cases.difference(made, cases[case].repeat(8, 1, 1, 1))
    return found


def multiplied_differs(runtime: Runtime) -> float:
    """How far products with many matrices at once, and their gradients, are from those of one device."""
    generator = torch.Generator().manual_seed(0)
    x, weights, gradient = [torch.randn(*s, generator=generator) for s in ((16, 12), (3, 24, 12), (3, 16, 24))]

    def made_by(runtime: Runtime) -> dict[str, torch.Tensor]:
        def products(state, frozen, batch):
            given = [batch["x"].detach().requires_grad_(), frozen["weights"].detach().requires_grad_()]
            with torch.enable_grad():
                product = runtime.multiplied(*given)
            assert product is not None and runtime.multiplied(given[0], given[1][:, :-1]) is None
            return state, [product.detach(), *torch.autograd.grad(product, given, frozen["gradient"])]

        frozen = runtime.place_frozen({"weights": weights, "gradient": gradient})
        return runtime.to_host(runtime.compile(products, "products")({}, frozen, runtime.place_batch({"x": x}))[1])

    at_hand = x.requires_grad_(), weights.requires_grad_()
    product = at_hand[0] @ at_hand[1].transpose(1, 2)
    expected = [product.detach(), *torch.autograd.grad(product, at_hand, gradient)]
    return max(float((a - b).abs().max()) for a, b in zip(made_by(runtime), expected, strict=True))


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
        "diffusion_resumes": diffusion_resumes(runtime, str(directory / "diffusion")),
        "restores": checkpoint_on_all_meshes(create("xla", MeshConfig(fsdp=8), "fp32"), directory / "mesh_of_8"),
        "restores_blocks": checkpoint_on_all_meshes(
            mesh_cases.in_blocks(MeshConfig(fsdp=4)), directory / "mesh_of_blocks"
        ),
        "streamed_in_parts": streamed_batch_lies_in_parts(runtime, directory / "shards"),
        "rows_in_order": rows_are_in_order(runtime),
        "golden": golden_differences(runtime),
        "multiplied_differs": [multiplied_differs(create("xla", MeshConfig(fsdp=n), "fp32")) for n in (1, 4, 8)],
        "complaint": complaint_about_sharding(runtime),
    }
    (directory / "found.json").write_text(json.dumps(found))
