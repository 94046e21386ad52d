"""Ten updates of a small DiT^DH, every way to compute them that is asked for: ``python tests/mesh_cases.py OUT``.

On as many devices as ``CPU_NUM_DEVICES`` says; OUT.pt holds losses and parameters of each case. With a second argument,
a checkpoint, only that is read, and the exit status says whether it is what was written.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import torch
from torch.utils._pytree import tree_leaves, tree_map

from rae_xla.flow.objective import flow_matching_loss, interpolate
from rae_xla.models.dit_dh import DiTDH, DiTDHConfig
from rae_xla.models.functional import buffers_of
from rae_xla.models.loading import initialised
from rae_xla.random import Purpose, normal, uniform
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import Runtime, create
from rae_xla.sharding import MeshConfig
from rae_xla.training.checkpoint import CheckpointConfig, Checkpoints, Progress
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.stored_index import StoredIndex
from rae_xla.training.update import initial_state, make_update

NUM_STEPS, BATCH_SIZE, LATENT_SHAPE = 10, 16, (8, 2, 2)
OPTIMIZER = OptimizerConfig(
    num_epochs=1, learning_rate=1e-4, schedule="linear", ema_decay=0.9, more_ema_decays=(0.5,), ema_warmup=True
)


@dataclass(frozen=True)
class Case:
    fsdp: int = 1
    blocks: str = "list"
    remat: str = "none"
    num_microbatches: int = 1
    precision: str = "fp32"
    rules: tuple = ()
    grid: tuple = ()


RULES = (("*.attention.qkv.weight", ("data", "fsdp")), ("head.*.mlp.*", ("fsdp", None)))

# Eight devices as chips of which an fsdp group of four is a block of 2x2, and not numbered in a row.
GRID = (4, 2)

CASES = {
    1: [
        *[Case(1, blocks, remat) for blocks in ("list", "scan") for remat in ("none", "block", "matmuls")],
        Case(1, "list", "none", 2),
        Case(1, "scan", "matmuls", 4),
        Case(1, "scan", "matmuls", 2, "bf16"),
    ],
    2: [Case(1), Case(2, "scan", "block", 2)],
    4: [Case(2, "list", "matmuls", 2, rules=RULES), Case(4, "scan")],
    8: [Case(1), Case(2, "scan", "matmuls", 2), Case(4, "list", "block", grid=GRID), Case(8, "scan")],
}


def small_model() -> DiTDH:
    """Large enough to be split, and its output layer not zero, so that every gradient is there from the first step."""
    sizes = {"width": 64, "depth": 2, "num_heads": 2, "head_width": 96, "head_depth": 1, "head_num_heads": 2}
    config = DiTDHConfig.model_validate(sizes)
    module = initialised(lambda: DiTDH(config, channels=LATENT_SHAPE[0], grid=LATENT_SHAPE[1], num_classes=10), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def batch(step: int) -> dict[str, torch.Tensor]:
    rows = torch.arange(BATCH_SIZE, dtype=torch.int32) + BATCH_SIZE * step
    return {
        "x": torch.randn(BATCH_SIZE, *LATENT_SHAPE, generator=torch.Generator().manual_seed(step)),
        "rows": rows,
        "labels": rows % 10,
    }


def loss(model, frozen, batch):
    rows = batch["rows"]
    noise, times = normal(3, Purpose.FLOW_NOISE, rows, LATENT_SHAPE), uniform(3, Purpose.FLOW_TIME, rows)
    predicted = model(interpolate(batch["x"], noise, times), times, batch["labels"])
    return flow_matching_loss(predicted, batch["x"], noise).mean(), {}


def run(case: Case, where: str) -> dict:
    mesh = MeshConfig(fsdp=case.fsdp, rules=case.rules)
    runtime = in_blocks(mesh) if where == "xla" and case.grid else create(where, mesh, case.precision)
    compute = ComputeConfig(blocks=case.blocks, remat=case.remat, num_microbatches=case.num_microbatches)
    module = small_model()
    update = make_update(module, loss, OPTIMIZER, compute, float(NUM_STEPS), runtime)
    step = runtime.compile(update, "small")
    state = runtime.place_state(initial_state(module, OPTIMIZER))
    frozen = runtime.place_frozen({"buffers": buffers_of(module)})
    losses = []
    for index in range(NUM_STEPS):
        state, metrics = step(state, frozen, runtime.place_batch(batch(index)))
        losses.append(float(runtime.to_host(metrics["loss"])))
    return {"losses": losses, "state": runtime.to_host(state)}


def in_blocks(mesh: MeshConfig) -> Runtime:
    """On eight devices as a slice of `GRID`."""
    from rae_xla.xla.runtime import XLARuntime

    return XLARuntime(mesh, "fp32", GRID)


def numbered_state() -> dict:
    """A training state whose every number is another."""
    state = initial_state(small_model(), OPTIMIZER)
    count = 0
    for number, tensor in enumerate(tree_leaves(state)):
        tensor.copy_(torch.arange(count, count + tensor.numel()).reshape(tensor.shape) + number)
        count += tensor.numel()
    return state


def restored_everywhere(runtime: Runtime, directory: str) -> bool:
    """Whether a checkpoint of `numbered_state` is read as it is, whole on each of these devices and split over them."""
    expected = numbered_state()
    meshes = [create("xla", MeshConfig(fsdp=fsdp), "fp32") for fsdp in {1, runtime.num_devices}]
    for mesh in [*meshes, *([in_blocks(MeshConfig(fsdp=4))] if runtime.num_devices == 8 else [])]:
        checkpoints = Checkpoints("unused", CheckpointConfig(every_steps=1), mesh, {}, {})
        empty = tree_map(torch.zeros_like, expected)
        state, progress = checkpoints.restore(StoredIndex(directory), mesh.place_state(empty))
        equal = map(torch.equal, tree_leaves(mesh.to_host(state)), tree_leaves(expected))
        if progress != Progress(3) or not all(equal):
            return False
    return True


if __name__ == "__main__":
    runtime = create("xla", MeshConfig(), "fp32")
    if len(sys.argv) > 2:
        sys.exit(0 if restored_everywhere(runtime, sys.argv[2]) else 1)
    results = {json.dumps(asdict(case)): run(case, "xla") for case in CASES[runtime.num_devices]}
    torch.save(results, sys.argv[1])
