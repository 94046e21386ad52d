"""Losses of decoder training against independent code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from lpips import LPIPS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.losses.adversarial import (
    adaptive_weight,
    decoder_loss,
    discriminator_accuracy,
    discriminator_loss,
    quantised,
)
from rae_xla.losses.augmentation import augmented, drawn
from rae_xla.losses.perceptual import load_perceptual_distance
from rae_xla.models.discriminator import (
    DiscriminatorConfig,
    DiscriminatorHeads,
    load_features,
    spectral_vectors,
)
from rae_xla.models.functional import buffers_of, by_module_names, call, packed, parameters_of, tensors_of
from rae_xla.models.loading import initialised
from rae_xla.random import Purpose
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig

RUNTIME = create("eager", MeshConfig(), "fp32")


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG-16 of random weights, as torchvision's file."""
    torch.manual_seed(0)
    with torch.device("meta"):
        vgg = torchvision.models.vgg16()
    features = nn.Sequential(*vgg.features).to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    # The classifier is in the file too, and not needed.
    torch.save(
        {**{f"features.{n}": t for n, t in features.state_dict().items()}, "classifier.0.bias": torch.zeros(4)}, path
    )
    return path


def test_lpips_and_its_gradient_are_those_of_the_package(vgg_file: Path) -> None:
    ours = load_perceptual_distance(str(vgg_file), "perceptual.weights")
    theirs = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = torch.load(vgg_file, weights_only=True)
    with torch.no_grad():
        for name, parameter in theirs.net.named_parameters():
            _, index, kind = name.split(".")
            parameter.copy_(weights[f"features.{index}.{kind}"])
    torch.manual_seed(1)
    first, second = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    second.requires_grad_()
    expected = theirs(first, second).flatten()
    found = call(ours, tensors_of(ours), RUNTIME, first, second)
    assert expected.min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(value.sum(), second)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6 * float(gradients[1].abs().max()))


def test_lpips_of_equal_and_of_dead_pixels_has_a_finite_gradient(vgg_file: Path) -> None:
    module = load_perceptual_distance(str(vgg_file), "perceptual.weights")
    values = tensors_of(module)
    # With biases far below zero every channel is off everywhere.
    values = {name: value - 100.0 if name == "vectors" else value for name, value in values.items()}
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    for of, others in ((values, torch.rand(1, 3, 32, 32)), (tensors_of(module), images.detach())):
        distance = call(module, of, RUNTIME, images, others)
        assert distance.item() == 0
        assert torch.autograd.grad(distance.sum(), images)[0].isfinite().all()


def test_adversarial_losses_by_hand() -> None:
    real, fake = torch.tensor([[0.5, 2.0], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [0.5, 1.0]])
    # 1 - real: 0.5, 0 (below), 2, 0; 1 + fake: 0 (below), 1, 1.5, 2.
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 4.5 / 4))
    assert decoder_loss(fake).item() == pytest.approx(0.5 / 4)
    assert discriminator_accuracy(real, fake).item() == pytest.approx(0.5)
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), 1e4).item() == pytest.approx(2.5)
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.zeros(2), 1e4).item() == 1e4
    levels = torch.arange(256) / 127.5 - 1
    assert torch.equal(quantised(levels + 0.003), quantised(levels))
    assert torch.allclose(quantised(levels), levels, atol=1e-6) and quantised(torch.tensor(1.7)).item() == 1


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """[3, S, S]: pixel (i, j) is taken from (i + down, j + right), zero outside."""
    result = np.zeros_like(image)
    side = image.shape[-1]
    for i in range(side):
        for j in range(side):
            if 0 <= i + down < side and 0 <= j + right < side:
                result[:, i, j] = image[:, i + down, j + right]
    return result


def test_augmentation_of_a_known_image_for_given_numbers() -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16))
    # Up to 2 pixels of 16, so five shifts: floor(5 u) - 2.
    cases = [
        (0.0, 0.99, 0.5, 0.5, 0.5),
        (0.5, 0.5, 1.0, 0.5, 0.5),
        (0.5, 0.5, 0.5, 0.0, 0.5),
        (0.7, 0.3, 0.2, 0.9, 0.1),
    ]
    numbers = torch.tensor(cases)
    found = augmented(torch.from_numpy(image).float().expand(len(cases), -1, -1, -1), numbers)
    for case, result in zip(cases, found, strict=True):
        down, right, brightness, saturation, contrast = case
        expected = moved(image, int(5 * down) - 2, int(5 * right) - 2) + brightness - 0.5
        grey = expected.mean(axis=0, keepdims=True)
        expected = (expected - grey) * 2 * saturation + grey
        expected = (expected - expected.mean()) * (contrast + 0.5) + expected.mean()
        np.testing.assert_allclose(result, expected, atol=1e-6)
    # Numbers are drawn apart for what is real and what is not, and do not depend on the batch.
    rows = torch.arange(1000, dtype=torch.int32)
    real, fake = drawn(7, Purpose.AUGMENT_REAL, rows), drawn(7, Purpose.AUGMENT_FAKE, rows)
    assert torch.equal(drawn(7, Purpose.AUGMENT_REAL, rows[500:501]), real[500:501])
    assert abs(np.corrcoef(real.flatten(), fake.flatten())[0, 1]) < 0.05
    assert ((real.mean(dim=0) - 0.5).abs() < 0.03).all()


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino") / "dino.safetensors"
    save_file(timm.create_model("vit_small_patch8_224.dino", num_classes=0).state_dict(), path)
    return path


class PlainHead(nn.Module):
    """One head as it would be written with PyTorch's own layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        spectral = nn.utils.spectral_norm
        self.input = spectral(nn.Conv1d(width, width, 1), eps=1e-12)
        self.norm1 = nn.InstanceNorm1d(width, eps=1e-6, affine=True)
        self.middle = spectral(nn.Conv1d(width, width, 9, padding=4, padding_mode="circular"), eps=1e-12)
        self.norm2 = nn.InstanceNorm1d(width, eps=1e-6, affine=True)
        self.output = spectral(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.norm1(self.input(x)), 0.2)
        x = (x + functional.leaky_relu(self.norm2(self.middle(x)), 0.2)) / 2**0.5
        return self.output(x).flatten(1)


@pytest.fixture(scope="module")
def heads() -> tuple[DiscriminatorHeads, nn.ModuleList]:
    """Ours, and as many plain ones with the same weights and vectors."""
    ours = initialised(lambda: DiscriminatorHeads(DiscriminatorConfig()), 3)
    plain = nn.ModuleList(PlainHead(384) for _ in range(5))
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, theirs in zip(ours.heads, plain, strict=True):
            for name in ("input", "middle", "output"):
                layer, same = getattr(mine, name), getattr(theirs, name)
                same.weight_orig.copy_(layer.weight)
                same.bias.copy_(layer.bias)
                same.weight_u.copy_(layer.left)
                same.weight_v.copy_(layer.right)
            for name in ("norm1", "norm2"):
                getattr(mine, name).weight.uniform_(0.5, 1.5)
                getattr(theirs, name).load_state_dict(getattr(mine, name).state_dict())
    return ours, plain


def test_discriminator_is_dino_of_timm_with_plain_heads(
    dino_file: Path, heads: tuple[DiscriminatorHeads, nn.ModuleList]
) -> None:
    config = DiscriminatorConfig(weights=str(dino_file))
    features = load_features(config, str(dino_file), "adversarial.discriminator.weights")
    ours, plain = heads
    torch.manual_seed(1)
    images = (torch.rand(2, 3, 256, 256) * 2 - 1).requires_grad_()
    tokens = call(features, tensors_of(features), RUNTIME, images)
    found = call(ours, tensors_of(ours), RUNTIME, tokens)

    backbone = timm.create_model("vit_small_patch8_224.dino", num_classes=0)
    backbone.load_state_dict(load_file(dino_file))
    for block in backbone.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")
    kept: list[Tensor] = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _, __, output: kept.append(output[:, 1:].transpose(1, 2)))
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    pixels = functional.interpolate((images + 1) / 2, size=224, mode="bilinear")
    backbone((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    chosen = [kept[11], kept[2], kept[5], kept[8], kept[11]]
    expected = torch.cat([head.eval()(x) for head, x in zip(plain, chosen, strict=True)], dim=1)
    assert found.shape == expected.shape == (2, 5 * 784)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    gradients = [torch.autograd.grad(value.mean(), images)[0] for value in (found, expected)]
    # Not all: where a leaky ReLU's input rounds to the other side of zero, the gradient of that patch is another.
    near = torch.isclose(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))
    assert near.float().mean() > 0.995


def test_spectral_norm_moves_on_as_pytorchs_does(heads: tuple[DiscriminatorHeads, nn.ModuleList]) -> None:
    ours, plain = heads
    parameters, buffers = parameters_of(ours), buffers_of(ours)
    tokens = torch.randn(5, 2, 384, 30)
    plain.train()
    for _ in range(3):
        buffers = spectral_vectors(parameters, buffers)
        found = call(ours, {**parameters, **buffers}, RUNTIME, tokens)
        expected = torch.cat([head(x) for head, x in zip(plain, tokens, strict=True)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Gradients go through the estimate of the largest singular value too, as PyTorch's do.
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    plain.eval()
    value = call(ours, {**leaves, **buffers}, RUNTIME, tokens).square().mean()
    gradients = torch.autograd.grad(value, list(leaves.values()))
    by_name = by_module_names(ours, dict(zip(leaves, gradients, strict=True)))
    torch.cat([head(x) for head, x in zip(plain, tokens, strict=True)], dim=1).square().mean().backward()
    for number, head in enumerate(plain):
        for name in ("input", "middle", "output"):
            expected = getattr(head, name).weight_orig.grad
            found = by_name[f"heads.{number}.{name}.weight"]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    after = packed(dict(ours.named_parameters()))
    assert after.keys() == parameters.keys()
