"""Images through encoder and decoder, and how near they come back: PSNR, SSIM, LPIPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rae_xla import storage
from rae_xla.data.transforms import centre_crop, decoded, to_bytes, to_unit
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import map_batches
from rae_xla.evaluation.files import contact_sheet, write_png
from rae_xla.evaluation.similarity import SSIM_BORDER, as_unit, psnr, ssim
from rae_xla.losses.perceptual import TIMM_MODEL, PerceptualDistance, load_perceptual_distance
from rae_xla.models.autoencoder import AutoencoderConfig, load_latent_decoder, load_latent_encoder
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.pretrained import pretrained_path
from rae_xla.runtime import Runtime

# torchvision's ImageNet weights, which the LPIPS of the papers stands on, where torch.hub keeps them.
VGG_FILE = "vgg16-397923af.pth"


class Reconstructing:
    """Encoder and decoder as a program for `rae_xla.evaluation.batches`.

    Raises:
        UserError: weights are missing or do not fit.
    """

    def __init__(self, config: AutoencoderConfig, root: str, runtime: Runtime) -> None:
        self._runtime = runtime
        # The decoder first: its files are there or not, the encoder's may have to be fetched.
        self._decoder = load_latent_decoder(config, root)
        self._encoder = load_latent_encoder(config, root, runtime.process_index)

    def tensors(self) -> dict[str, Any]:
        """What a call is given as ``frozen``, on the host."""
        return {"encoder": tensors_of(self._encoder), "decoder": tensors_of(self._decoder)}

    def __call__(self, frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``images`` uint8 [B, H, W, 3] there and back -> [B, S, S, 3], S the decoder's image size."""
        latents = call(self._encoder, frozen["encoder"], self._runtime, to_unit(batch["images"]))
        images = to_bytes(call(self._decoder, frozen["decoder"], self._runtime, latents))
        return {"images": self._runtime.split_batch(images)}


def reconstruct(
    config: AutoencoderConfig, root: str, images: np.ndarray, batch_size: int, runtime: Runtime
) -> np.ndarray:
    """uint8 [n, H, W, 3] through encoder and decoder -> uint8 [n, S, S, 3], S the decoder's image size.

    Raises:
        UserError: weights are missing or do not fit.
    """
    program = Reconstructing(config, root, runtime)
    parts = map_batches(program, program.tensors(), {"images": images}, batch_size, runtime, "reconstructing")
    return np.concatenate([part["images"] for part in parts])


def reconstruct_files(
    config: AutoencoderConfig, root: str, files: list[str], directory: str, runtime: Runtime
) -> dict[str, Any]:
    """Write each image file, cropped, beside its reconstruction into ``directory``; returns the scores.

    ``lpips`` is ``None`` where VGG's weights are not on this machine.

    Raises:
        UserError: a file is not an image, or weights are missing or do not fit.
    """
    originals = np.stack([centre_crop(read_image(file), config.image_size) for file in files])
    images = reconstruct(config, root, originals, min(len(files), 8), runtime)
    values: dict[str, np.ndarray | None] = {
        "psnr": psnr(as_unit(originals), as_unit(images)).numpy(),
        "ssim": ssim(as_unit(originals), as_unit(images)).numpy() if config.image_size > 2 * SSIM_BORDER else None,
        "lpips": lpips(originals, images, root),
    }
    rows = []
    for index, file in enumerate(files):
        path = storage.join(directory, f"{index:03d}_{Path(file).stem}.png")
        if runtime.process_index == 0:
            write_png(path, contact_sheet(np.stack([originals[index], images[index]]), 2))
        scores = {name: None if value is None else float(value[index]) for name, value in values.items()}
        rows.append({"image": file, "beside": path, **scores})
    means = {name: None if value is None else float(value.mean()) for name, value in values.items()}
    return {**means, "num_images": len(rows), "images": rows, "runtime": runtime.describe()}


def read_image(path: str) -> Image.Image:
    """An image file as RGB, upright; what is transparent in it keeps its colour.

    Raises:
        UserError: missing, not an image, or of more than 8 bits.
    """
    try:
        return decoded(path)
    except ValueError as error:
        raise UserError(f"IMAGE: {path} cannot be read ({error})") from error


def lpips_network(root: str) -> PerceptualDistance | None:
    """LPIPS with VGG's weights, or ``None`` if these are not on this machine, see `lpips`."""
    files = [pretrained_path(TIMM_MODEL, root), str(Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE)]
    file = next((file for file in files if storage.exists(file)), None)
    return None if file is None else load_perceptual_distance(file, "LPIPS")


def lpips(originals: np.ndarray, reconstructions: np.ndarray, root: str) -> np.ndarray | None:
    """LPIPS with VGG of each image, float32 [n]; uint8 [n, H, W, 3] both.

    ``None`` if VGG's weights are neither where a training puts them in ``root`` nor in torch.hub's folder of
    checkpoints; nothing is downloaded.
    """
    network = lpips_network(root)
    if network is None:
        return None
    pairs = zip(as_unit(originals).float(), as_unit(reconstructions).float(), strict=True)
    return np.array([network(2 * first[None] - 1, 2 * second[None] - 1).item() for first, second in pairs])
