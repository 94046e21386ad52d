"""LPIPS with VGG-16: how different two images look to a network (arXiv 1801.03924, version 0.1).

B batch, H = W image side, C channels of a layer.

The linear layers are those that the lpips package ships; the features are of torchvision's VGG-16. Values are the
package's (tests/test_losses.py). One difference: the length of a feature vector is taken a hair above zero, since the
gradient of a root at zero is infinite, and a pixel at which all channels are off would make the whole gradient NaN.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision
from pydantic import Field
from torch import Tensor, nn

from rae_xla import tensor_files
from rae_xla.config import Config
from rae_xla.models.convert.files import read_weight_file
from rae_xla.models.loading import assign_weights, on_meta, values_wanted

TIMM_MODEL = "vgg16.tv_in1k"
# After the last activation before each of the five poolings.
LAYERS = (3, 8, 15, 22, 29)
EPS = 1e-10
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class PerceptualConfig(Config):
    """LPIPS in a decoder's loss. ``weights``: torchvision's VGG-16, ``.pth`` or safetensors; ``null`` fetches it."""

    weight: float = Field(default=1.0, gt=0)
    weights: str | None = None


class PerceptualDistance(nn.Module):
    """LPIPS. It has no training mode: nothing of it is trained."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        vgg = torchvision.models.vgg16(init_weights=False)
        self.features = vgg.features[: LAYERS[-1] + 1]
        channels = [vgg.features[layer - 1].out_channels for layer in LAYERS]
        for number, width in enumerate(channels):
            self.register_buffer(f"linear_{number}", torch.zeros(width))
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1] both -> float32 [B], 0 for equal images."""
        distance = torch.zeros(len(first), device=first.device)
        layers = zip(self._features(first), self._features(second), strict=True)
        for number, (one, other) in enumerate(layers):
            weights = self.get_buffer(f"linear_{number}").view(-1, 1, 1)
            distance = distance + ((one - other).square() * weights).sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        """Of each layer, of length one at each pixel: float32 [B, C, h, w]."""
        x = ((images - self.shift) / self.scale).to(self.features[0].weight.dtype)
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in LAYERS:
                values = x.float()
                found.append(values / ((values.square().sum(dim=1, keepdim=True) + EPS**2).sqrt() + EPS))
        return found


def load_perceptual_distance(path: str, key: str) -> PerceptualDistance:
    """LPIPS with VGG's weights from a file, torchvision's or timm's.

    Raises:
        UserError: the file is unreadable or of another model; names ``key``, the file and the difference.
    """
    module = on_meta(PerceptualDistance)
    if values_wanted():
        vgg = read_weight_file(path, key).tensors
        tensors = {name: value for name, value in vgg.items() if name.startswith("features.")}
        spec = find_spec("lpips")
        assert spec is not None and spec.origin is not None
        # The package would have them unpickled.
        linear = tensor_files.read_pickle(str(Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"), key)
        tensors |= {
            f"linear_{number}": linear[f"lin{number}.model.1.weight"].flatten() for number in range(len(LAYERS))
        }
        assign_weights(module, tensors, path, key)
    return module.requires_grad_(False)
