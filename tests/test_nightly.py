"""Slow proofs at full size, left out by default: ``bash tools/test.sh -m nightly``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import run_python
from photos import samples, write_manifest_of, write_shards

from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig, open_source
from rae_xla.data.stream import StreamedBatches
from rae_xla.models.convert.released import layout_of, to_released
from rae_xla.models.decoder import Decoder
from rae_xla.models.diffusion import create_diffusion_model
from rae_xla.models.loading import initialised
from rae_xla.recipe import load_recipe

RECIPE = "recipes/released/imagenet256.yaml"


@pytest.mark.nightly
@pytest.mark.parametrize("where", ["eager", "xla"])
def test_dit_dh_xl_of_the_released_layout_samples_an_image(where: str, tmp_path: Path) -> None:
    """838.7 M and 415.4 M parameters from .pt files as released, 49 evaluations, one image of 256 px."""
    recipe = load_recipe(RECIPE, [])
    shape = recipe.autoencoder.encoder.latent_shape
    modules = {
        recipe.model.weights: lambda: create_diffusion_model(recipe.model, shape, recipe.num_classes),
        recipe.autoencoder.decoder.weights: lambda: Decoder(
            recipe.autoencoder.decoder, channels=shape[0], grid=shape[1]
        ),
    }
    for name, make in modules.items():
        module = initialised(make, 0).requires_grad_(False)
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():  # What starts at zero would leave the noise as it is.
                    parameter.normal_(std=0.02)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"ema": to_released(module.state_dict(), layout_of(module)), "step": 1}, tmp_path / name)
        del module
    stats = tmp_path / recipe.autoencoder.latent_stats
    stats.parent.mkdir(parents=True)
    torch.save({"mean": torch.zeros(shape), "var": torch.ones(shape)}, stats)

    overrides = [f"root={tmp_path}", f"runtime={where}", "sampler.batch_size=1"]
    arguments = [RECIPE, *overrides, "--labels", "207", "--out", str(tmp_path / "out")]
    done = run_python("tools/sample.py", *arguments, "--save-latents", str(tmp_path / "latents.npy"))
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stderr[-500:], (tmp_path / "out" / "manifest.json").read_text()[-300:])
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (1, 256, 256, 3) and samples["arr_0"].std() > 1
    latents = np.load(tmp_path / "latents.npy")
    assert latents.shape == (1, *shape) and np.isfinite(latents).all()


@pytest.mark.nightly
def test_lpips_is_zero_for_equal_images_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a VGG of random weights in torch.hub's folder: the file is found, read and used."""
    from torchvision.models import vgg16

    from rae_xla.evaluation.reconstruction import VGG_FILE, lpips

    (tmp_path / "checkpoints").mkdir()
    torch.save(vgg16().state_dict(), tmp_path / "checkpoints" / VGG_FILE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    noisy = np.clip(images.astype(int) + generator.integers(-60, 61, images.shape), 0, 255).astype(np.uint8)
    same, other = lpips(images, images), lpips(images, noisy)
    assert same is not None and other is not None
    assert np.abs(same).max() < 1e-6 and other.min() > 1e-4


@pytest.mark.nightly
def test_memory_of_a_loader_stays_flat_over_100_000_samples(tmp_path: Path) -> None:
    """The proportional share of this process and its workers, after 20,000 samples and after 100,000."""
    write_shards(tmp_path, "parquet", samples(4000), num_shards=8, images_per_block=50)
    stream = StreamConfig(shuffle_images=1024, num_workers=2)
    config = DataConfig(source=write_manifest_of(tmp_path), image_size=32, batch_size=200, flip=True, stream=stream)
    images = open_source(config, ".", "train")
    assert isinstance(images, ShardedImages)
    arriving = StreamedBatches(images, config, 0, 0, 1).from_step(0)
    found = []
    for step in range(1, 501):
        next(arriving)
        if step % 100 == 0:
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            found.append(sum(process.memory_full_info().pss for process in family) / 2**20)
    arriving.close()
    print([round(mib) for mib in found], "MiB after each 20,000 samples")
    assert found[-1] < 1.03 * found[0]


@pytest.mark.nightly
def test_a_small_decoder_learns_in_all_phases_on_eight_devices(tmp_path: Path) -> None:
    """The decoder's training of the paper in small, and its table 5: what noise in training gains and costs."""
    options = ["--root", str(tmp_path), "--json", str(tmp_path / "found.json")]
    done = run_python("tools/benchmark.py", "decoder", *options, CPU_NUM_DEVICES="8")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    print(done.stdout)
    assert found["steps"] == 208
    first, last = found["first"], found["last"]
    assert last["heldout_psnr"] > first["heldout_psnr"] + 2 and last["heldout_lpips"] < 0.8 * first["heldout_lpips"]
    accuracies = [value for _, value in found["discriminator_accuracy"]]
    assert accuracies and min(accuracies) > 0.1 and max(accuracies) < 0.95
    weights = [value for _, value in found["adaptive_weight"]]
    assert weights and all(0 < weight < 1e4 for weight in weights)
    without, trained_with = found["trade_off"]["without"], found["trade_off"]["with"]
    assert trained_with["noisy"] > without["noisy"] + 0.3
    assert without["clean"] - 3 < trained_with["clean"] < without["clean"]
