"""Optimizer, schedules, loader, checkpoints and statistics against independent code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_xla.backends
from mesh_cases import small_model

from rae_xla import storage, tensor_files
from rae_xla.data.loader import BatchesInMemory
from rae_xla.data.sources import DataConfig, open_in_memory
from rae_xla.data.transforms import shift_randomly, to_bytes
from rae_xla.errors import UserError
from rae_xla.evaluation.distances import identical_images, nearest_neighbour_distances
from rae_xla.models.functional import by_module_names, call, parameters_of
from rae_xla.models.layers import LayerNorm, RMSNorm
from rae_xla.precision import effective_precision
from rae_xla.recipe import LatentNoiseConfig, load_recipe
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training.decoder_losses import latent_noise
from rae_xla.training.ema import decay_at
from rae_xla.training.metrics import read_metrics
from rae_xla.training.optimizer import OptimizerConfig, adamw, clip_by_global_norm, learning_rate_at
from rae_xla.training.stored_index import StoredIndex
from rae_xla.training.tasks import train
from rae_xla.training.update import initial_state, make_update


def test_adamw_and_clipping_equal_torch() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(num_epochs=1, learning_rate=0.1, weight_decay=0.3, ema_decay=0.9, clip_norm=0.5)
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    reference = torch.optim.AdamW([parameter], lr=0.1, betas=config.betas, weight_decay=0.3)
    ours = {"p": parameter.detach().clone()}
    first = second = {"p": torch.zeros(4, 3)}
    for step in range(5):
        gradient = torch.randn(4, 3)
        parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        reference.step()
        clipped, our_norm = clip_by_global_norm({"p": gradient}, config.clip_norm)
        ours, first, second = adamw(
            ours, clipped, first, second, torch.tensor(step, dtype=torch.int32), torch.tensor(0.1), config
        )
        torch.testing.assert_close(our_norm, norm)
    torch.testing.assert_close(ours["p"], parameter.detach())


@pytest.mark.parametrize(
    ("schedule", "at_half"), [("constant", 1.0), ("linear", 0.1 + 0.9 / 2), ("cosine", 0.1 + 0.9 * 0.5)]
)
def test_schedules(schedule: str, at_half: float) -> None:
    config = OptimizerConfig(
        num_epochs=12, learning_rate=1.0, schedule=schedule, final_learning_rate=0.1, warmup_epochs=2, ema_decay=0.9
    )

    def at(step: int) -> float:
        return learning_rate_at(torch.tensor(step, dtype=torch.int32), config, 10.0).item()

    assert at(0) == pytest.approx(1 / 20) and at(19) == pytest.approx(1.0) and at(20) == pytest.approx(1.0)
    assert at(70) == pytest.approx(at_half)
    assert at(120) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_a_rate_may_come_to_its_end_before_or_after_the_run() -> None:
    """As released: constant for 40 epochs, a tenth at epoch 800, whether the run has 80 of them or 1,400."""
    for num_epochs in (80, 800, 1400):
        config = OptimizerConfig(
            num_epochs=num_epochs, learning_rate=2e-4, schedule="linear", final_learning_rate=2e-5,
            decay_start_epoch=40, decay_end_epoch=800, ema_decay=0.9,
        )  # fmt: skip
        for epoch, expected in ((0, 2e-4), (40, 2e-4), (80, 2e-4 - 1.8e-4 * 40 / 760), (800, 2e-5), (1000, 2e-5)):
            rate = learning_rate_at(torch.tensor(10 * epoch, dtype=torch.int32), config, 10.0)
            assert rate.item() == pytest.approx(expected, rel=1e-5)


def test_every_image_once_an_epoch_and_hosts_share_the_batch() -> None:
    config = DataConfig(source="digits", image_size=8, batch_size=60)
    images = open_in_memory(config, "train")
    whole = BatchesInMemory(images, config, 1, 0, 1)
    positions = np.concatenate([whole.batch(step)["positions"] for step in range(48)])
    assert positions.tolist() == list(range(48 * 60))
    labels = np.concatenate([whole.batch(step)["labels"] for step in range(48)])[: 2 * len(images)]
    for epoch in np.split(labels, 2):
        assert np.bincount(epoch).tolist() == np.bincount(images.labels).tolist()
    hosts = [BatchesInMemory(images, config, 1, index, 3).batch(7)["images"] for index in range(3)]
    assert torch.equal(torch.cat(hosts), whole.batch(7)["images"])


def test_splits_are_fixed_and_apart() -> None:
    config = DataConfig(source="digits", image_size=8, batch_size=1)
    splits = {split: open_in_memory(config, split) for split in ("train", "heldout")}
    assert [len(splits[split]) for split in ("train", "heldout")] == [1437, 360]
    assert np.bincount(splits["heldout"].labels).min() >= 35


def test_shift_moves_and_fills_with_black() -> None:
    images = np.full((64, 4, 4, 3), 9, np.uint8)
    moved = shift_randomly(images, 2, 0, np.arange(64, dtype=np.int32))
    corners = {tuple(np.argwhere(image[..., 0] == 9).min(axis=0)) for image in moved}
    assert moved.shape == images.shape and len(corners) > 5
    assert {int(image.min()) for image in moved} == {0, 9}


def test_pixels_are_truncated() -> None:
    image = torch.tensor([-0.5, 0.999, 1.5]).reshape(1, 3, 1, 1)
    assert to_bytes(image).flatten().tolist() == [0, 254, 255]


def test_latent_noise_distributions() -> None:
    rows = torch.arange(20000, dtype=torch.int32)
    expected = {"uniform": 0.8**2 / 3, "half_normal": 0.8**2}  # E[sigma^2]
    for distribution, variance in expected.items():
        noise = latent_noise(
            LatentNoiseConfig(scale=0.8, distribution=distribution), 0, rows, torch.Size([20000, 4, 2, 2])
        )
        assert noise.var().item() == pytest.approx(variance, rel=0.05)


def test_diversity_measures() -> None:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[1] = 3
    images[3] = 3
    labels = np.array([0, 0, 1, 1])
    np.testing.assert_allclose(nearest_neighbour_distances(images, labels), [3, 3, 3, 3])
    assert identical_images(images) == 2


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(root: Path, steps: int) -> dict:
        overrides = ["runtime=eager", f"root={root}", "data.batch_size=16", "log.every_steps=1"]
        overrides += ["checkpoint.every_steps=3", "train.schedule=constant", f"train.num_epochs={steps * 16 / 1437}"]
        recipe = load_recipe("recipes/quickstart/judge.yaml", overrides)
        return train(recipe, create("eager", MeshConfig(), "fp32"))

    run(tmp_path / "whole", 7)
    run(tmp_path / "parts", 4)
    run(tmp_path / "parts", 7)
    whole, parts = [(tmp_path / name / "judge" / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert whole == parts
    saved = StoredIndex(str(tmp_path / "whole" / "judge" / "checkpoints" / "step_00000007")).shapes
    assert {"parameters/vectors", "ema/vectors", "second_moments/head.weight", "step"} <= set(saved)
    lines = read_metrics(str(tmp_path / "parts" / "judge" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert run(tmp_path / "parts", 7)["steps"] == 7


@pytest.mark.parametrize("where", ["eager", "xla"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where: str) -> None:
    module = torch.nn.Linear(3, 1)
    config = OptimizerConfig(num_epochs=1, learning_rate=0.1, ema_decay=0.5)

    def loss(model, frozen, batch):
        return (model(batch["x"]) - 1).square().mean(), {}

    runtime = create(where, MeshConfig(), "fp32")
    step = runtime.compile(make_update(module, loss, config, ComputeConfig(), 10.0, runtime), "update")
    state, frozen = runtime.place_state(initial_state(module, config)), runtime.place_frozen({"buffers": {}})
    states, metrics = [], []
    for value in (1.0, float("nan"), float("inf"), 2.0):
        state, measured = step(state, frozen, runtime.place_batch({"x": torch.full((4, 3), value)}))
        states.append(runtime.to_host(state))
        metrics.append(measured)
    # Read when the states that they were measured with are gone, as the log does.
    skipped = [int(runtime.to_host(measured)["skipped_updates"]) for measured in metrics]
    # The first real update after them is the second one of AdamW and EMA.
    twice = runtime.place_state(initial_state(module, config))
    for value in (1.0, 2.0):
        twice, _ = step(twice, frozen, runtime.place_batch({"x": torch.full((4, 3), value)}))
    torch.testing.assert_close(states[3]["parameters"], runtime.to_host(twice)["parameters"])
    assert skipped == [0, 1, 2, 2] and [int(state["step"]) for state in states] == [1, 2, 3, 4]
    for part in ("parameters", "ema", "first_moments", "second_moments"):
        for name, value in states[0][part].items():
            assert torch.equal(states[1][part][name], value) and torch.equal(states[2][part][name], value)
            assert states[3][part][name].isfinite().all() and not torch.equal(states[3][part][name], value)


def test_packed_values_are_those_of_the_module() -> None:
    module = small_model()
    packed = parameters_of(module)
    assert packed["backbone.*.mlp.output.weight"].shape == (2, 64, 170) and packed["head.*.vectors"].ndim == 2
    assert len(packed) == 21 < len(list(module.parameters()))
    found = by_module_names(module, packed)
    assert set(found) == {name for name, _ in module.named_parameters()}
    for name, value in module.named_parameters():
        assert torch.equal(found[name], value), name


def test_norms_and_their_weights_stay_float32_in_bf16() -> None:
    # Vectors of equal names and sizes that are not of alike blocks.
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), LayerNorm(8), RMSNorm(8))
    seen = {}

    def note(part, arguments, _) -> None:
        seen[type(part).__name__] = part.weight.dtype, arguments[0].dtype

    for part in module:
        part.register_forward_hook(note)
    output = call(module, parameters_of(module), create("eager", MeshConfig(), "bf16"), torch.randn(2, 8).bfloat16())
    assert output.dtype == torch.bfloat16
    assert seen["Linear"] == (torch.bfloat16, torch.bfloat16)
    assert seen["LayerNorm"] == seen["RMSNorm"] == (torch.float32, torch.bfloat16)


def test_ema_decay_grows_with_warmup() -> None:
    def at(step: int, **options: bool) -> float:
        config = OptimizerConfig(num_epochs=1, learning_rate=1.0, ema_decay=0.9, **options)
        return decay_at(torch.tensor(step, dtype=torch.int32), config.ema_decay, config).item()

    assert [at(step) for step in (0, 1000)] == pytest.approx([0.9, 0.9])
    assert [at(step, ema_warmup=True) for step in (0, 8, 79, 1000)] == pytest.approx([0.1, 0.5, 80 / 89, 0.9])


def test_microbatches_must_divide(tmp_path: Path) -> None:
    recipe = load_recipe("recipes/quickstart/judge.yaml", ["compute.num_microbatches=3", f"root={tmp_path}"])
    with pytest.raises(UserError, match=r"compute\.num_microbatches: data\.batch_size 64 does not divide into 3 parts"):
        train(recipe, create("eager", MeshConfig(), "fp32"))
    assert not list(tmp_path.iterdir())


def test_blocks_of_a_model_without_blocks_are_an_error(tmp_path: Path) -> None:
    recipe = load_recipe("recipes/quickstart/judge.yaml", ["compute.remat=block", f"root={tmp_path}"])
    with pytest.raises(UserError, match=r"compute\.remat: this model has no blocks"):
        train(recipe, create("eager", MeshConfig(), "fp32"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["eager", "xla"])
def test_a_trace_of_chosen_steps_and_where_a_step_spends_its_time(where: str, tmp_path: Path) -> None:
    overrides = [f"runtime={where}", f"root={tmp_path}", "data.batch_size=16", f"train.num_epochs={8 * 16 / 1437}"]
    recipe = load_recipe("recipes/quickstart/judge.yaml", [*overrides, "log.every_steps=1", "profile.steps=[3,5]"])
    train(recipe, create(where, MeshConfig(), "fp32"))
    [trace] = [path for path in (tmp_path / "judge" / "profile").rglob("*") if ".trace.json" in path.name]
    content = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    assert len(json.loads(content)["traceEvents"]) > 10
    for line in read_metrics(str(tmp_path / "judge" / "metrics.jsonl"))[1:]:
        parts = [line[f"{part}_ms"] for part in ("input", "host", "device_wait")]
        assert min(parts) >= 0 and 0 < sum(parts) <= 1.5 * line["step_ms"], line


def test_precision_in_effect() -> None:
    assert effective_precision("fp32", "TPU")["matmul_multiplies"] == "bfloat16"
    assert effective_precision("fp32_highest", "TPU")["matmul_multiplies"] == "float32"
    assert effective_precision("bf16", "CPU")["matmul_inputs"] == "bfloat16"
    runtime = create("xla", MeshConfig(), "fp32_highest")
    assert torch_xla.backends.get_mat_mul_precision() == "highest" and runtime.describe()["precision"] == "fp32_highest"
    create("xla", MeshConfig(), "fp32")
    assert torch_xla.backends.get_mat_mul_precision() == "default"


def test_a_root_that_is_a_url() -> None:
    """fsspec's in-memory store stands for a bucket: no directories, whole objects."""
    overrides = ["runtime=eager", "root=memory://bucket/project", "data.batch_size=16", "checkpoint.every_steps=2"]
    for steps in (3, 5):
        recipe = load_recipe("recipes/quickstart/judge.yaml", [*overrides, f"train.num_epochs={steps * 16 / 1437}"])
        report = train(recipe, create("eager", MeshConfig(), "fp32"))
    assert report["resumed_from_step"] == 3 and report["steps"] == 5
    names = storage.list_names("memory://bucket/project/judge")
    assert {"checkpoints", "metrics.jsonl", "recipe.yaml", "report.json", "weights.safetensors"} <= set(names)
    assert storage.list_names("memory://bucket/project/judge/checkpoints") == ["step_00000004", "step_00000005"]
    assert "trunk.hidden.weight" in tensor_files.read_tensors(
        "memory://bucket/project/judge/weights.safetensors", "weights"
    )


def test_bf16_keeps_float32_parameters_and_learns_alike(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        short = ["data.batch_size=16", f"train.num_epochs={12 * 16 / 1437}", "log.every_steps=1"]
        overrides = [*short, "runtime=eager", f"root={tmp_path / precision}", f"precision={precision}"]
        recipe = load_recipe("recipes/quickstart/judge.yaml", overrides)
        losses[precision] = train(recipe, create("eager", MeshConfig(), precision))["last"]["loss"]
        weights = tensor_files.read_tensors(str(tmp_path / precision / "judge" / "weights.safetensors"), "weights")
        assert {value.dtype for value in weights.values()} == {torch.float32}
    assert losses["fp32"] != losses["bf16"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_training_starts_from_weights_that_are_given(one_device_run: Path, tmp_path: Path) -> None:
    """Without a step worth its name, what comes out is what was given."""
    given = one_device_run / "diffusion" / "weights.safetensors"
    still = [f"train.num_epochs={32 / 1437}", "train.learning_rate=1.0e-12", "runtime=eager", f"run_dir={tmp_path}"]
    overrides = [f"root={one_device_run}", *still, f"model.weights={given}"]
    recipe = load_recipe("recipes/quickstart/diffusion.yaml", overrides)
    train(recipe, create("eager", MeshConfig(), "fp32"))
    before, after = [
        tensor_files.read_tensors(str(path), "weights") for path in (given, tmp_path / "weights.safetensors")
    ]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    about = tensor_files.read_about(str(tmp_path / "weights.safetensors"))
    assert about["layout"] == {"kind": "dit_dh", "grid": 4, "head_widths": [24, 32]}
