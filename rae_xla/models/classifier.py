"""Two small image classifiers for the quickstart, which has no pretrained weights to start from, and a linear probe.

B batch, C channels, h = w = grid of a latent, K classes. One is the encoder with a linear head: training it makes the
representation. The other is a plain convolutional network that shares nothing with it and judges what was generated.
The probe is a linear layer by itself, on the latents of an encoder that stays as it is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.config import Config
from rae_xla.models.encoders import Encoder, EncoderConfig


class ConvNetConfig(Config):
    """Three halvings of the image, the first ``width`` channels wide, then a hidden layer of ``feature_width``."""

    name: Literal["convnet"]
    width: int = Field(gt=0)
    feature_width: int = Field(gt=0)
    weights: str | None = None


class EncoderClassifier(nn.Module):
    """The encoder, the mean of its patch features, a linear head."""

    def __init__(self, config: EncoderConfig, num_classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.head = nn.Linear(config.latent_shape[0], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> logits float32 [B, K]."""
        return self.head(self.encoder(images).mean(dim=(2, 3)).to(self.head.weight.dtype)).float()


class ConvTrunk(nn.Module):
    """Three strided convolutions and a hidden layer, whose output serves as features."""

    def __init__(self, config: ConvNetConfig, image_size: int) -> None:
        super().__init__()
        width = config.width
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.hidden = nn.Linear(2 * width * (-(-image_size // 8)) ** 2, config.feature_width)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> float32 [B, feature_width]."""
        pixels = (images * 2 - 1).to(self.hidden.weight.dtype)
        return functional.gelu(self.hidden(self.convolutions(pixels).flatten(1))).float()


class ConvNet(nn.Module):
    """A plain convolutional classifier: `ConvTrunk` and a linear head."""

    def __init__(self, config: ConvNetConfig, *, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = ConvTrunk(config, image_size)
        self.head = nn.Linear(config.feature_width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> logits float32 [B, K]."""
        return self.head(self.trunk(images).to(self.head.weight.dtype)).float()


class LinearProbe(nn.Module):
    """The mean of a latent's tokens, a linear layer."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, num_classes)

    def init_weights(self) -> None:
        """Zeros: the loss is convex in them, so the start does not choose the end."""
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """float32 [B, C, h, w] -> logits float32 [B, K]."""
        return self.head(latents.mean(dim=(2, 3)).to(self.head.weight.dtype)).float()


def create_classifier(
    config: EncoderConfig | ConvNetConfig, *, image_size: int, num_classes: int
) -> EncoderClassifier | ConvNet:
    """The classifier that this configuration describes."""
    if isinstance(config, ConvNetConfig):
        return ConvNet(config, image_size=image_size, num_classes=num_classes)
    return EncoderClassifier(config, num_classes)
