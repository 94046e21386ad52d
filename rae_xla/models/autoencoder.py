"""The Representation Autoencoder: images to normalised latents with a frozen encoder, and back with a trained decoder.

B batch, C channels, h = w = grid of the latent, H = W image side.

Source: arXiv 2510.11690, section 3; the per-position normalisation and its eps are those of the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.errors import UserError
from rae_xla.models.convert.files import read_weights
from rae_xla.models.decoder import Decoder, DecoderConfig
from rae_xla.models.encoders import Encoder, EncoderConfig, load_encoder
from rae_xla.models.loading import load_weights, on_meta, required_path, values_wanted
from rae_xla.models.pretrained import weights_path

STATS_EPS = 1e-5


class LatentEncoderConfig(Config):
    """An encoder and the file of latent statistics; ``latent_stats: null`` leaves latents as they are."""

    encoder: EncoderConfig
    latent_stats: str | None = None


class AutoencoderConfig(LatentEncoderConfig):
    """With a decoder."""

    decoder: DecoderConfig

    @property
    def image_size(self) -> int:
        """The side of the images that the decoder makes, in pixels."""
        return self.decoder.patch_size * self.encoder.latent_shape[1]


class _Normalised(nn.Module):
    """Latents = (features - shift) / scale, per position; shift 0 and scale 1 until statistics are given."""

    latent_shift: Tensor
    latent_scale: Tensor

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("latent_shift", torch.zeros(latent_shape, device="cpu"), persistent=False)
        self.register_buffer("latent_scale", torch.ones(latent_shape, device="cpu"), persistent=False)

    def set_stats(self, mean: Tensor, variance: Tensor) -> None:
        """Normalise by these statistics, float32 [C, h, w]."""
        self.latent_shift.copy_(mean)
        self.latent_scale.copy_((variance + STATS_EPS).sqrt())


class LatentEncoder(_Normalised):
    """Images to latents."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.config.latent_shape)
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> float32 [B, C, h, w]; zero mean and unit variance at each position."""
        return (self.encoder(images) - self.latent_shift) / self.latent_scale


class LatentDecoder(_Normalised):
    """Latents to images."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config.encoder.latent_shape)
        channels, grid, _ = config.encoder.latent_shape
        self.decoder = Decoder(config.decoder, channels=channels, grid=grid)
        mean, std = config.encoder.pixel_stats()
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    def init_weights(self) -> None:
        """The decoder's."""
        self.decoder.init_weights()

    def forward(self, latents: Tensor) -> Tensor:
        """float32 [B, C, h, w] -> float32 [B, 3, H, W], around [0, 1] and not clamped."""
        pixels = self.decoder(latents * self.latent_scale + self.latent_shift)
        return pixels * self.pixel_std + self.pixel_mean


def load_latent_encoder(config: LatentEncoderConfig, root: str, process_index: int = 0) -> LatentEncoder:
    """The encoder with its weights, and the statistics if the configuration names them.

    ``process_index``: only process 0 of a pod fetches published weights.

    Raises:
        UserError: a file is missing or does not fit.
    """
    path = encoder_weights_path(config, root, process_index)
    module = LatentEncoder(load_encoder(config.encoder, path, "autoencoder.encoder.weights"))
    _load_stats(module, config, root)
    return module


def encoder_weights_path(
    config: LatentEncoderConfig, root: str, process_index: int = 0, key: str = "autoencoder.encoder.weights"
) -> str:
    """The file of the encoder's weights, fetched if the configuration names none; see `weights_path`.

    Raises:
        UserError: none is named and none is published, or it cannot be fetched.
    """
    encoder = config.encoder
    unpublished = "an encoder with sizes of its own" if encoder.has_own_sizes else None
    if not encoder.row.is_published:
        unpublished = f"{encoder.name}, of which timm has no weights"
    return weights_path(encoder.weights, encoder.timm_model, root, key, process_index, unpublished=unpublished)


def made_with(config: LatentEncoderConfig, root: str, image_size: int) -> dict[str, str | int | None]:
    """What decides the latents of images, by recipe key: hashes of files, and values.

    Raises:
        UserError: see `encoder_weights_path`; the file of statistics is missing.
    """
    files = {"autoencoder.encoder.weights": encoder_weights_path(config, root)}
    if config.latent_stats is not None:
        files["autoencoder.latent_stats"] = required_path(config.latent_stats, root, "autoencoder.latent_stats")
    hashes = {key: storage.content_hash(path) for key, path in files.items()}
    return {**hashes, "autoencoder.encoder.name": config.encoder.name, "data.image_size": image_size}


def load_latent_decoder(config: AutoencoderConfig, root: str) -> LatentDecoder:
    """The decoder with its weights, and the statistics if the configuration names them.

    Raises:
        UserError: a file is missing or does not fit.
    """
    key = "autoencoder.decoder.weights"
    path = required_path(config.decoder.weights, root, key)
    module = on_meta(lambda: LatentDecoder(config))
    load_weights(module.decoder, path, key)
    _load_stats(module, config, root)
    return module


def _load_stats(module: _Normalised, config: LatentEncoderConfig, root: str) -> None:
    if config.latent_stats is None or not values_wanted():
        return
    key = "autoencoder.latent_stats"
    path = storage.resolve(root, config.latent_stats)
    stats = read_weights(path, key).tensors
    shape = list(config.encoder.latent_shape)
    for name in ("mean", "variance"):
        if name not in stats or list(stats[name].shape) != shape:
            got = list(stats[name].shape) if name in stats else "missing"
            raise UserError(
                f"{key}: {path}: {name} is {got}, should be {shape}; run tools/latent_stats.py for this encoder"
            )
    module.set_stats(stats["mean"].float(), stats["variance"].float())
