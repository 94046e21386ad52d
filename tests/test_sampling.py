"""Sampling and reconstruction through the tools, with small checkpoints of the released layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_tool
from PIL import Image
from torch import nn

from rae_xla.errors import UserError
from rae_xla.evaluation.generation import Sampler
from rae_xla.evaluation.reconstruction import VGG_FILE, lpips, read_image
from rae_xla.evaluation.similarity import as_unit, psnr, ssim
from rae_xla.models.autoencoder import AutoencoderConfig
from rae_xla.models.convert.released import layout_of, to_released
from rae_xla.models.decoder import Decoder
from rae_xla.models.diffusion import create_diffusion_model
from rae_xla.models.dit_dh import DiTDHConfig
from rae_xla.models.encoders import Encoder
from rae_xla.models.loading import initialised
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig

ENCODER = {"name": "timm_vit", "timm_model": "vit_tiny_patch16_224", "input_size": 32, "patch_size": 8}
ENCODER |= {"width": 24, "depth": 1, "num_heads": 2}
RECIPE = {
    "task": "sampling",
    "seed": 3,
    "runtime": "eager",
    "autoencoder": {
        "encoder": {**ENCODER, "weights": "encoder.safetensors"},
        "decoder": {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 32, "weights": "decoder.pt"},
        "latent_stats": "stat.pt",
    },
    "num_classes": 5,
    "model": {"width": 16, "depth": 2, "num_heads": 2, "head_width": 32, "head_depth": 1, "head_num_heads": 2},
    "sampler": {"num_grid_points": 8, "batch_size": 16},
}
GUIDE = {"width": 8, "depth": 1, "num_heads": 1, "head_width": 32, "head_depth": 1, "head_num_heads": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and files as they were released: training files with EMA, statistics without a mean."""
    directory = tmp_path_factory.mktemp("released")
    config = AutoencoderConfig.model_validate(RECIPE["autoencoder"])

    def shaken(module: nn.Module, seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return module

    decoder = shaken(initialised(lambda: Decoder(config.decoder, channels=24, grid=4), 0), 1)
    torch.save({"ema": to_released(decoder.state_dict(), layout_of(decoder)), "model": {}}, directory / "decoder.pt")
    for name, sizes, seed in (("model", RECIPE["model"], 2), ("guide", GUIDE, 3)):
        make = create_diffusion_model
        model = shaken(initialised(lambda: make(DiTDHConfig.model_validate(sizes), (24, 4, 4), 5), 0), seed)  # noqa: B023
        torch.save(to_released(model.state_dict(), layout_of(model)), directory / f"{name}.pt")
    torch.save({"var": torch.rand(24, 4, 4, generator=torch.Generator().manual_seed(4)) + 0.5}, directory / "stat.pt")
    from safetensors.torch import save_file

    save_file(dict(shaken(Encoder(config.encoder), 5).state_dict()), directory / "encoder.safetensors")
    guidance = {"method": "autoguidance", "scale": 1.5, "model": {**GUIDE, "weights": "guide.pt"}}
    recipe = {
        **RECIPE,
        "root": str(directory),
        "model": {**RECIPE["model"], "weights": "model.pt"},
        "guidance": guidance,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory


def sample(root: Path, *arguments: str) -> tuple[int, str]:
    code, _, errors = run_tool("sample", str(root / "recipe.yaml"), *arguments)
    return code, errors


def test_released_weights_are_sampled_and_every_batch_has_its_labels(root: Path) -> None:
    labels = np.array([0, 1, 2, 3, 4, 4, 0], dtype=np.int32)
    images = {}
    for where, batch_size in (("eager", 16), ("eager", 2), ("xla", 2)):
        recipe = load_recipe(str(root / "recipe.yaml"), [f"sampler.batch_size={batch_size}"])
        found = Sampler(recipe, create(where, MeshConfig(), "fp32")).sample(labels, seed=1, with_latents=True)
        images[where, batch_size] = found["images"]
        assert found["latents"].shape == (7, 24, 4, 4)
    whole = images["eager", 16].astype(int)
    for other in images.values():
        assert np.abs(other - whole).max() <= 1
    recipe = load_recipe(str(root / "recipe.yaml"), [])
    relabelled = Sampler(recipe, create("eager", MeshConfig(), "fp32")).sample((labels + 1) % 5, seed=1)["images"]
    # Labels matter for every image, so that what is above could fail.
    assert (np.abs(relabelled - whole).reshape(7, -1).max(axis=1) > 5).all()


def test_labels_and_noise_from_files_and_latents_to_one(root: Path, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.npy") for name in ("noise", "labels", "latents", "again")}
    noise = np.random.default_rng(0).normal(size=(3, 24, 4, 4))
    np.save(files["noise"], noise)
    np.save(files["labels"], np.array([4, 0, 2]))
    given = ["--initial-noise", files["noise"], "--labels-file", files["labels"]]
    code, errors = sample(root, "--out", str(tmp_path / "one"), *given, "--save-latents", files["latents"])
    assert code == 0, errors
    code, errors = sample(root, "--out", str(tmp_path / "two"), *given, "--save-latents", files["again"], "--seed", "9")
    assert code == 0, errors
    # The seed has no part in it.
    np.testing.assert_array_equal(np.load(files["latents"]), np.load(files["again"]))
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["files"].keys() == {"model", "decoder", "latent_stats", "guide", "initial_noise"}
    with np.load(tmp_path / "one" / "samples.npz") as samples:
        assert samples["arr_1"].tolist() == [4, 0, 2] and samples["arr_0"].shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "1,9"], "labels: must lie in 0..4, got 1..9"),
        (["--labels", "4294967297"], "labels: must lie in 0..4"),
        (["--labels", "a"], "--labels: 'a' is not a list of numbers"),
        (["--num-images", "0"], "--num-images: must be at least 1"),
        (["--initial-noise", "x.npy"], "--initial-noise: goes with --labels or --labels-file"),
        (["--labels", "1", "--initial-noise", "README.md"], "README.md is not a .npy file"),
        (["model.weights=stat.pt"], r"model.weights: .*stat.pt does not fit this model"),
        (["model.width=32", "model.num_heads=2"], r"model.weights: .* does not fit this model: .*should be \[.*32"),
        (["model.num_heads=4"], r"made for 4x4 tokens and heads 8 and 16 wide, this model has .* heads 4 and 16 wide"),
        (["autoencoder.encoder.input_size=64"], r"latent_stats: .* should be|made for 4x4 tokens.* has 8x8 tokens"),
        (["model.weights=null"], "model.weights: required here"),
        (["autoencoder.latent_stats=model.pt"], "autoencoder.latent_stats: .*mean is missing, should be"),
        (["autoencoder.encoder.width=32"], r"is \[24, 4, 4\], should be \[32, 4, 4\]|does not fit this model"),
        (["model.weights=none.pt"], "model.weights: .*none.pt cannot be read"),
        (["modle.width=3"], "modle: unknown key; did you mean model"),
    ],
)
def test_mistakes_are_one_line(root: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, errors = sample(root, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2 and re.search(message, errors), errors
    assert errors.count("\n") == 1 and errors.startswith("sample.py: ")
    assert not (tmp_path / "out").exists()


def test_reconstruct_writes_images_beside_their_reconstructions(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # No VGG here.
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(pixels[..., 0]).resize((40, 33)).save(tmp_path / "grey.jpg")
    (tmp_path / "text.png").write_text("no image")
    arguments = [str(root / "recipe.yaml"), str(tmp_path / "photo.png"), str(tmp_path / "grey.jpg")]
    written = [*arguments, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    code, _, errors = run_tool("reconstruct", *written)
    assert code == 0, errors
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["num_images"] == 2 and result["lpips"] is None
    sheet = np.asarray(Image.open(tmp_path / "out" / "000_photo.png"))
    original, made = sheet[2:34, 2:34], sheet[2:34, 36:68]
    assert result["images"][0]["psnr"] == pytest.approx(psnr(as_unit(original[None]), as_unit(made[None])).item())
    assert result["images"][0]["ssim"] == pytest.approx(ssim(as_unit(original[None]), as_unit(made[None])).item())
    code, _, errors = run_tool("reconstruct", str(root / "recipe.yaml"), str(tmp_path / "text.png"))
    assert code == 2 and "text.png cannot be read (no image of a known kind)" in errors and errors.count("\n") == 1
    with pytest.raises(UserError, match="cannot be read"):
        read_image(str(tmp_path / "none.png"))
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        read_image(str(tmp_path / "deep.png"))


def test_ssim_equals_its_definition() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, (1, 24, 20, 3), dtype=np.uint8)
    second = np.clip(first.astype(int) + generator.integers(-30, 31, first.shape), 0, 255).astype(np.uint8)
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for channel in range(3):
        for row in range(24 - 10):
            for column in range(20 - 10):
                x, y = (image[0, row : row + 11, column : column + 11, channel] / 255 for image in (first, second))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy, c = (
                    (window * x * x).sum() - mx**2,
                    (window * y * y).sum() - my**2,
                    (window * x * y).sum() - mx * my,
                )
                values.append((2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(as_unit(first), as_unit(second)).item() == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(as_unit(first), as_unit(first)).item() == pytest.approx(1.0)


def test_lpips_is_left_out_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    images = np.zeros((1, 64, 64, 3), np.uint8)
    assert lpips(images, images, str(tmp_path)) is None and not (tmp_path / "checkpoints" / VGG_FILE).exists()
