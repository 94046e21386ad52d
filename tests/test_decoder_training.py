"""Decoder training: losses weighed by their gradients, phases, held-out scores, and what is told before it begins."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_tool
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rae_xla.benchmarks.decoder import RECIPE, write_untrained
from rae_xla.data.loader import training_batches
from rae_xla.data.sources import open_in_memory
from rae_xla.evaluation.distances import frechet_distance
from rae_xla.evaluation.features import load_extractor
from rae_xla.evaluation.measured import Measuring
from rae_xla.evaluation.reconstruction import reconstruct
from rae_xla.evaluation.similarity import as_unit, psnr, ssim
from rae_xla.evaluation.stored_images import ImagesInMemory
from rae_xla.hosts import Hosts
from rae_xla.losses.adversarial import decoder_loss
from rae_xla.losses.augmentation import augmented, drawn
from rae_xla.losses.perceptual import load_perceptual_distance
from rae_xla.models.autoencoder import LatentDecoder, load_latent_encoder
from rae_xla.models.classifier import ConvNet, ConvNetConfig
from rae_xla.models.discriminator import DiscriminatorHeads, load_features
from rae_xla.models.functional import buffers_of, call, tensors_of
from rae_xla.models.loading import initialised
from rae_xla.random import Purpose
from rae_xla.recipe import AutoencoderRecipe, load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training.checkpoint import CHECKPOINTS, complete_steps
from rae_xla.training.decoder_losses import LAST_LAYER, DecoderLosses, latent_noise
from rae_xla.training.diagnosis import first_not_finite
from rae_xla.training.metrics import read_metrics
from rae_xla.training.stored_index import StoredIndex
from rae_xla.training.tasks import task_of, train
from rae_xla.training.update import make_mean_gradients

# Six steps of 52 in an epoch, two of each phase.
SMALL = [
    "data.batch_size=8",
    "train.num_epochs=0.115",
    "adversarial.discriminator_from={step: 2, epoch: null}",
    "adversarial.loss_from={step: 4, epoch: null}",
    "autoencoder.decoder.depth=1",
    "heldout.num_images=5",
    "heldout.batch_size=4",
    "heldout.every_steps=4",
    "heldout.features={name: convnet, width: 4, feature_width: 8, weights: judge.safetensors}",
    "log.every_steps=1",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
]
SET_DISTANCE = "heldout_judge_reconstruction_frechet_distance_5"
# VGG takes a CPU minutes to compile, and seconds a step to run.
PLAIN = "perceptual=null"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the untrained encoder, VGG, DINO and a classifier are."""
    path = tmp_path_factory.mktemp("photographs")
    write_untrained(small_recipe(path))
    judge = ConvNetConfig(name="convnet", width=4, feature_width=8)
    module = initialised(lambda: ConvNet(judge, image_size=32, num_classes=2), 0)
    save_file(module.state_dict(), path / "judge.safetensors")
    return path


def small_recipe(root: Path, *overrides: str) -> AutoencoderRecipe:
    return load_recipe(str(RECIPE), [f"root={root}", "runtime=eager", *SMALL, *overrides])


def trained(root: Path, *overrides: str) -> tuple[dict[str, Any], Path]:
    recipe = small_recipe(root, *overrides)
    return train(recipe, create(recipe.runtime, recipe.mesh, recipe.precision)), root / recipe.run_dir


@pytest.fixture(scope="module")
def eager_run(root: Path) -> Path:
    return trained(root, "run_dir=eager")[1]


@pytest.fixture(scope="module")
def plain_run(root: Path) -> Path:
    return trained(root, PLAIN, "run_dir=plain")[1]


def test_weighing_by_gradients_equals_two_full_backward_passes(root: Path) -> None:
    recipe = small_recipe(root)
    assert recipe.adversarial is not None
    runtime = create("eager", MeshConfig(), "fp32")
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root)
    module = initialised(lambda: LatentDecoder(recipe.autoencoder), 1)
    perceptual = load_perceptual_distance(str(root / "vgg16.safetensors"), "perceptual.weights")
    config = recipe.adversarial.discriminator
    dino = load_features(config, str(root / "dino.safetensors"), "adversarial.discriminator.weights")
    heads = initialised(lambda: DiscriminatorHeads(config), 2)
    losses = DecoderLosses(recipe, runtime, encoder, module, perceptual, (dino, heads))
    frozen = {
        "buffers": buffers_of(module),
        "encoder": tensors_of(encoder),
        "perceptual": tensors_of(perceptual),
        "dino": tensors_of(dino),
        "discriminator": tensors_of(heads),
    }
    images = open_in_memory(recipe.data, "train")
    batch = next(training_batches(images, recipe.data, recipe.seed, 0, 1).from_step(0)).tensors
    parameters = {name: value for name, value in tensors_of(module).items() if name not in frozen["buffers"]}
    found, metrics = make_mean_gradients(module, losses.adversarial, recipe.compute, runtime)(parameters, frozen, batch)

    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    original = batch["images"].permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = encoder(original)
        features = features + latent_noise(recipe.latent_noise, recipe.seed, batch["positions"], features.shape)
    decoded = call(module, {**frozen["buffers"], **leaves}, runtime, features)
    difference = (decoded - original).abs().mean() + perceptual(2 * original - 1, 2 * decoded - 1).mean()
    numbers = drawn(recipe.seed, Purpose.AUGMENT_DECODED, batch["positions"])
    judged = decoder_loss(heads(dino(augmented(2 * decoded - 1, numbers))))
    of_difference, of_judged = (
        dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))
        for loss in (difference, judged)
    )
    weight = of_difference[LAST_LAYER].norm() / (of_judged[LAST_LAYER].norm() + 1e-6)
    assert metrics["adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    assert metrics["loss"].item() == pytest.approx((difference + 0.75 * weight * judged).item(), rel=1e-4)
    for name, gradient in found.items():
        expected = of_difference[name] + 0.75 * weight * of_judged[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_each_phase_trains_what_it_says(eager_run: Path) -> None:
    lines = [line for line in read_metrics(str(eager_run / "metrics.jsonl")) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["discriminator_loss" in line for line in lines] == [False, False, True, True, True, True]
    assert ["adaptive_weight" in line for line in lines] == [False, False, False, False, True, True]
    # The discriminator's schedule begins with its first update.
    warm = [line["discriminator_learning_rate"] / line["learning_rate"] for line in lines[2:]]
    assert warm == pytest.approx([1 / 3, 2 / 4, 3 / 5, 4 / 6], rel=1e-5)

    def stored(step: int) -> StoredIndex:
        return StoredIndex(str(eager_run / CHECKPOINTS / f"step_{step:08d}"))

    assert complete_steps(str(eager_run / CHECKPOINTS)) == [1, 2, 3, 4, 5, 6]
    checkpoints = {step: stored(step) for step in (2, 4, 6)}
    heads = [name for name in checkpoints[2].shapes if name.startswith("discriminator/parameters/")]
    assert [int(found.whole("discriminator/updates")) for found in checkpoints.values()] == [0, 2, 4]
    untrained = initialised(lambda: DiscriminatorHeads(small_recipe(eager_run).adversarial.discriminator), 42 + 1)
    expected = tensors_of(untrained)
    for name in heads:
        assert torch.equal(checkpoints[2].whole(name), expected[name.rpartition("/")[2]]), name
        assert not torch.equal(checkpoints[4].whole(name), checkpoints[2].whole(name)), name
    assert all("discriminator" not in name for name in load_file(eager_run / "weights.safetensors"))


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_a_run_resumed_in_any_phase_ends_as_the_other(root: Path, plain_run: Path, step: int) -> None:
    again, name = root / f"again_{step}", f"step_{step:08d}"
    shutil.copytree(plain_run / CHECKPOINTS / name, again / CHECKPOINTS / name)
    report, _ = trained(root, PLAIN, f"run_dir=again_{step}")
    assert report["resumed_from_step"] == step
    ends = [StoredIndex(str(run / CHECKPOINTS / "step_00000006")) for run in (again, plain_run)]
    for tensor in ends[1].shapes:
        assert torch.equal(ends[0].whole(tensor), ends[1].whole(tensor)), tensor


def test_a_broken_discriminator_is_named(root: Path, plain_run: Path) -> None:
    recipe = small_recipe(root, PLAIN)
    runtime = create("eager", MeshConfig(), "fp32")
    task = task_of(recipe, runtime)
    batch = next(training_batches(task.images, recipe.data, recipe.seed, 0, 1).from_step(0)).tensors
    for phase in task.phases[1:]:
        found = phase.diagnosis({}, {**task.frozen, **phase.diagnosed(task.state)}, batch)[1]
        assert first_not_finite(found) is None and any(name.startswith("discriminator's output") for name in found)
        heads = task.state["discriminator"]
        broken = {
            name: value * torch.nan if "middle.weight" in name else value for name, value in heads["parameters"].items()
        }
        state = {**task.state, "discriminator": {**heads, "parameters": broken}}
        found = phase.diagnosis({}, {**task.frozen, **phase.diagnosed(state)}, batch)[1]
        assert first_not_finite(found) == "discriminator's parameter heads.0.middle.weight"
        _, metrics = phase.update(state, task.frozen, batch)
        assert metrics["skipped_updates"] == 1


def test_xla_compiles_every_phase_first_and_trains_as_eager_does(
    root: Path, plain_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # With VGG: tools/benchmark.py decoder.
    with caplog.at_level(logging.INFO):
        trained(root, PLAIN, "runtime=xla", "run_dir=xla")
    told = [record.getMessage() for record in caplog.records]
    compiled = [re.match(r"(\w+): traced and compiled", line) for line in told]
    names = [match[1] for match in compiled if match]
    assert names == ["decoder_reconstruction", "decoder_discriminator", "decoder_adversarial", "heldout", "features"]
    first_scores = next(number for number, line in enumerate(told) if "held-out images: " in line)
    assert max(number for number, match in enumerate(compiled) if match) < first_scores
    ours, expected = (load_file(run / "weights.safetensors") for run in (root / "xla", plain_run))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-4)
    lines, others = (read_metrics(str(run / "metrics.jsonl")) for run in (root / "xla", plain_run))
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "adaptive_weight", "discriminator_loss", "heldout_psnr", "heldout_ssim", SET_DISTANCE):
            assert (name in line) == (name in other)
            assert name not in line or line[name] == pytest.approx(other[name], rel=2e-3), (name, line["step"])


def test_held_out_scores_are_those_of_the_exported_weights(root: Path, eager_run: Path) -> None:
    lines = [line for line in read_metrics(str(eager_run / "metrics.jsonl")) if "heldout_psnr" in line]
    assert [line["step"] for line in lines] == [4, 6]
    recipe = small_recipe(root, "run_dir=eager", f"autoencoder.decoder.weights={eager_run}/weights.safetensors")
    images = open_in_memory(recipe.data, "heldout").images[:5]
    made = reconstruct(recipe.autoencoder, recipe.root, images, 5, create("eager", MeshConfig(), "fp32"))
    assert lines[-1]["heldout_psnr"] == pytest.approx(float(psnr(as_unit(images), as_unit(made)).mean()), abs=1e-3)
    assert lines[-1]["heldout_ssim"] == pytest.approx(float(ssim(as_unit(images), as_unit(made)).mean()), abs=1e-4)
    network = load_perceptual_distance(str(root / "vgg16.safetensors"), "perceptual.weights")
    pair: list[Tensor] = [2 * as_unit(of).float() - 1 for of in (images, made)]
    assert lines[-1]["heldout_lpips"] == pytest.approx(float(network(*pair).mean()), rel=1e-4)
    runtime = create("eager", MeshConfig(), "fp32")
    extractor = load_extractor(recipe.heldout.features, 32, 2, recipe.root, "weights")
    measuring = Measuring(extractor, 32, 5, runtime, Hosts(runtime))
    sets = [measuring.images(ImagesInMemory("set", of), "set", "set").gaussians["features"] for of in (images, made)]
    assert lines[-1][SET_DISTANCE] == pytest.approx(frechet_distance(*sets), rel=1e-3)
    sheet = np.asarray(Image.open(eager_run / "samples" / "reconstructions_00000006.png"))
    assert sheet.shape == (2 * 34 + 2, 4 * 34 + 2, 3)
    assert np.array_equal(sheet[2:34, 2:34], images[0]) and np.array_equal(sheet[36:68, 2:34], made[0])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["perceptual.weights=none.pth"], "perceptual.weights: .*none.pth cannot be read"),
        (["perceptual.weights=null"], "perceptual.weights: vgg16.tv_in1k cannot be fetched .* give its path here"),
        (["perceptual.weights=dino.safetensors"], r"perceptual.weights: .*features.0.weight is missing"),
        (["adversarial.discriminator.weights=none.safetensors"], "adversarial.discriminator.weights: .*cannot be read"),
        (["adversarial.discriminator.weights=null"], "adversarial.discriminator.weights: required for a discriminator"),
        (["adversarial.discriminator.weights=encoder.safetensors"], "adversarial.discriminator.weights: .*not fit"),
        (["adversarial.discriminator.feature_blocks=[1, 4]"], "feature_blocks: 4 is not there; blocks are 0 to 3"),
        (["adversarial.discriminator.feature_blocks=[3, 1]"], r"feature_blocks: \[3, 1\] are not in order, each once"),
        (["adversarial.discriminator.kernel_size=8"], "kernel_size: 8 has no middle; use 9"),
        (["adversarial.loss_from.step=1"], "adversarial.loss_from: step 1 is before the discriminator's first, 2"),
        (["adversarial.loss_from.epoch=2"], "adversarial.loss_from: give either epoch or step, the other null"),
        (["adversarial.loss_from=3"], "adversarial.loss_from"),
        (["data.source=train.json"], "heldout.source: required here, train.json is read as a manifest"),
    ],
)
def test_mistakes_are_told_before_training(
    root: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, errors = run_tool("train", str(RECIPE), f"root={root}", "runtime=eager", *SMALL, "run_dir=bad", *overrides)
    assert code == 2 and errors.count("\n") == 1 and re.search(message, errors), errors
    assert not (root / "bad").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "overrides", [["compute.num_microbatches=2"], ["compute.blocks=scan", "compute.remat=matmuls"]]
)
def test_ways_to_compute_give_the_same_update(root: Path, plain_run: Path, overrides: list[str]) -> None:
    """Parts of a batch have an adaptive weight each, so there only eager and the device are compared."""
    states = []
    for where in ("eager", "xla"):
        recipe = small_recipe(root, PLAIN, f"runtime={where}", "autoencoder.decoder.depth=2", *overrides)
        runtime = create(where, recipe.mesh, "fp32")
        task = task_of(recipe, runtime)
        batch = next(training_batches(task.images, recipe.data, recipe.seed, 0, 1).from_step(0)).tensors
        step = runtime.compile(task.phases[-1].update, "update")
        state, metrics = step(
            runtime.place_state(task.state), runtime.place_frozen(task.frozen), runtime.place_batch(batch)
        )
        assert runtime.to_host(metrics)["skipped_updates"] == 0
        states.append(runtime.to_host({"second": state["second_moments"], "heads": state["discriminator"]}))
    for part in ("second", "heads"):
        found, expected = (tree_leaves(state[part]) for state in states[::-1])
        for value, other in zip(found, expected, strict=True):
            # Second moments are squares: of single small values rounding makes any share.
            assert (value - other).float().norm() <= 2e-3 * other.float().norm()


def test_the_mesh_of_a_decoder_and_its_discriminator_is_explained(root: Path) -> None:
    code, output, errors = run_tool("train", str(RECIPE), f"root={root}", "runtime=eager", *SMALL, "--explain-mesh")
    assert code == 0, errors
    assert "decoder.output.weight" in output and "discriminator: heads.*.middle.weight" in output
