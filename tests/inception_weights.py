"""Inception of random weights, in torch-fidelity's file layout and as torch-fidelity has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch_fidelity.feature_extractor_inceptionv3 as theirs
from torch import Tensor, nn


def write_weights(path: Path) -> None:
    """Batch norms whose four parts all count, and activations that neither vanish nor grow."""
    generator = torch.Generator().manual_seed(0)
    # No weights are published for tests: the constructor's own loading is passed by.
    load, theirs.FeatureExtractorInceptionV3.load_state_dict = nn.Module.load_state_dict, lambda *_: None
    fetch, theirs.load_state_dict_from_url = theirs.load_state_dict_from_url, lambda *_, **__: {}
    try:
        network = theirs.FeatureExtractorInceptionV3("random", ["2048"])
    finally:
        theirs.FeatureExtractorInceptionV3.load_state_dict, theirs.load_state_dict_from_url = load, fetch
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.8, 1.2, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    # So that predictions differ from image to image.
    nn.init.normal_(network.fc.weight, 0, 0.1, generator=generator)
    nn.init.normal_(network.fc.bias, 0, 1.0, generator=generator)
    torch.save(network.state_dict(), path)


def seen_by_torch_fidelity(path: Path, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Pool features [n, 2048], the branch of sFID [n, 192, 17, 17], logits without bias [n, 1008]."""
    network = theirs.FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    found: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    return pool, found[0], logits


def blotches(num_images: int, size: int, seed: int) -> np.ndarray:
    """uint8 [n, S, S, 3], each of its own mean colour, coarse and fine."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (num_images, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    mixed = coarse * generator.uniform(0.2, 1, (num_images, 1, 1, 3)) + generator.normal(
        0, 20, (num_images, size, size, 3)
    )
    return mixed.clip(0, 255).astype(np.uint8)
