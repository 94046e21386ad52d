"""Latent statistics of the same digits, in several batch sizes: ``python tests/latent_stats_cases.py ROOT``.

On as many devices as ``CPU_NUM_DEVICES`` says. ROOT/batch_N holds what a pass in batches of N found, ROOT/killed that
of one that was killed and went on; ROOT/far_from_zero.safetensors see there. `write_encoder` comes first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rae_xla import tensor_files
from rae_xla.evaluation import latent_stats
from rae_xla.evaluation.batches import num_rows_of, run_batches
from rae_xla.models.encoders import Encoder
from rae_xla.recipe import LatentStatsRecipe
from rae_xla.runtime import Runtime, create

BATCH_SIZES = (7, 64, 500)
KILLED_AFTER_SAVES = 5
# In batches of each size the last one is not full.
NUM_IMAGES = 503
ENCODER = {"name": "timm_vit", "timm_model": "vit_tiny_patch16_224", "input_size": 32, "patch_size": 8}
ENCODER |= {"width": 24, "depth": 1, "num_heads": 2, "weights": "encoder.safetensors"}
DECODER = {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 32}


def recipe_of(root: Path, run_dir: str, batch_size: int, **changes: object) -> LatentStatsRecipe:
    data = {"source": "digits", "image_size": 32, "batch_size": batch_size, "num_images": NUM_IMAGES, **changes}
    content = {"task": "latent_stats", "seed": 0, "root": str(root), "run_dir": run_dir, "data": data}
    return LatentStatsRecipe.model_validate({**content, "autoencoder": {"encoder": ENCODER, "decoder": DECODER}})


def write_encoder(root: Path, seed: int = 0) -> None:
    encoder = Encoder(recipe_of(root, "", 1).autoencoder.encoder)
    generator = torch.Generator().manual_seed(seed)
    # So large that features hang on the image, and at many positions have a mean larger than their deviation.
    drawn = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in encoder.state_dict().items()}
    save_file(drawn, root / ENCODER["weights"])


def far_rows() -> np.ndarray:
    """Rows whose mean is some thousand times their deviation; float32 [N, 4, 2, 2]."""
    return np.random.default_rng(0).normal(300.0, 0.1, (NUM_IMAGES, 4, 2, 2)).astype(np.float32)


def far_from_zero(root: Path) -> None:
    """ROOT/far_from_zero.safetensors: moments of `far_rows`, in batches of 504, float64."""
    values = far_rows()

    def reduced(frozen: dict, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return latent_stats.reduce_batch(batch["values"] * frozen["parameters"]["one"], batch["is_real"])

    runtime = runtime_of(recipe_of(root, "", 500))
    frozen = {"parameters": {"one": torch.ones(())}}
    parts = ({"values": values[start : start + 504]} for start in range(0, NUM_IMAGES, 504))
    moments = latent_stats.Progress.none(values.shape[1:]).moments
    for part, found in run_batches(reduced, frozen, lambda size: parts, NUM_IMAGES, 504, runtime, "far from zero"):
        moments = moments.merge(latent_stats.Moments.of_batch(num_rows_of(part), found))
    tensors = {"mean": torch.from_numpy(moments.mean), "variance": torch.from_numpy(moments.squares / moments.count)}
    save_file(tensors, root / "far_from_zero.safetensors")


def runtime_of(recipe: LatentStatsRecipe) -> Runtime:
    return create("xla", recipe.mesh, recipe.precision)


def passes(root: Path) -> None:
    for batch_size in BATCH_SIZES:
        recipe = recipe_of(root, f"batch_{batch_size}", batch_size)
        latent_stats.write_latent_stats(recipe, runtime_of(recipe))


def killed_pass(root: Path) -> None:
    """In batches of 64, by a process that ends when it has kept its progress some times."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    write, saves = tensor_files.write_tensors, []

    def write_or_die(*arguments: object) -> None:
        write(*arguments)
        saves.append(arguments)
        if len(saves) == KILLED_AFTER_SAVES:
            os.kill(os.getpid(), signal.SIGKILL)

    tensor_files.write_tensors = write_or_die
    latent_stats.SECONDS_BETWEEN_SAVES = 0.0
    recipe = recipe_of(root, "killed", 64)
    latent_stats.write_latent_stats(recipe, runtime_of(recipe))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    directory = Path(sys.argv[1])
    # Before this process has devices, which a fork would share.
    killed_pass(directory)
    passes(directory)
    far_from_zero(directory)
    killed = recipe_of(directory, "killed", 64)
    latent_stats.write_latent_stats(killed, runtime_of(killed))
