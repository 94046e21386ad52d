"""The adversarial losses of arXiv 2510.11690, which are VQGAN's: hinge for the discriminator, and the decoder's.

B batch, L logits of an image.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from rae_xla.config import Config
from rae_xla.models.discriminator import DiscriminatorConfig


class Moment(Config):
    """A time in a run: ``{epoch: 6}`` or ``{step: 500}``, from its start."""

    epoch: float | None = Field(default=None, ge=0)
    step: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one(self) -> Moment:
        if (self.epoch is None) == (self.step is None):
            raise ValueError("give either epoch or step, the other null")
        return self

    def in_steps(self, steps_per_epoch: float) -> int:
        """Steps that are done by then."""
        if self.step is not None:
            return self.step
        assert self.epoch is not None
        return round(self.epoch * steps_per_epoch)


class AdversarialConfig(Config):
    """The discriminator learns from ``discriminator_from`` on, the decoder from it from ``loss_from`` on.

    Its loss counts ``weight`` times the adaptive weight, which is ``largest_adaptive_weight`` at most. The
    discriminator has the decoder's optimizer, with a schedule that begins with its first update.
    """

    weight: float = Field(default=0.75, gt=0)
    largest_adaptive_weight: float = Field(default=1e4, gt=0)
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    discriminator_from: Moment
    loss_from: Moment


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits float32 [B, L]: half of what real ones lack to 1 and fake ones exceed -1, on average."""
    return 0.5 * (functional.relu(1.0 - real).mean() + functional.relu(1.0 + fake).mean())


def decoder_loss(fake: Tensor) -> Tensor:
    """What the decoder makes small, of the logits float32 [B, L] of its images."""
    return -fake.mean()


def discriminator_accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share of logits that are higher for the image than for its reconstruction; 0.5 is chance."""
    return (real > fake).float().mean()


def adaptive_weight(of_reconstruction: Tensor, of_adversarial: Tensor, largest: float) -> Tensor:
    """How much louder the reconstruction's gradient is at the last layer (arXiv 2012.09841, equation 7).

    Both gradients are float32 and of the last layer's weight. At most ``largest``.
    """
    ratio = of_reconstruction.norm() / (of_adversarial.norm() + 1e-6)
    return ratio.clamp(max=largest)


def quantised(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a file of 8 bits would hold them, so that no discriminator can tell by the digits."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0
