"""Samples: a label and a noise for each index, the sampler as one program, and what is written about them.

Label and noise are functions of (seed, sample index) alone, so batch size and number of devices change an image by
float32 rounding at most, and every class appears equally often.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from torch import Tensor

from rae_xla import __version__, storage
from rae_xla.data.sources import num_classes_of
from rae_xla.data.transforms import to_bytes
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import map_batches
from rae_xla.evaluation.files import contact_sheet, read_array, write_array, write_png, write_samples
from rae_xla.flow.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    Velocity,
    autoguidance,
    classifier_free,
)
from rae_xla.flow.sampler import euler
from rae_xla.flow.schedule import sampling_times
from rae_xla.models.autoencoder import load_latent_decoder
from rae_xla.models.diffusion import DiffusionModel, load_diffusion_model
from rae_xla.models.dit import DiTConfig
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.loading import required_path
from rae_xla.random import Purpose, normal
from rae_xla.recipe import DiffusionRecipe, SamplingRecipe, save_recipe
from rae_xla.runtime import Runtime

LARGEST_SHEET = 100


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """int32 [num_images], classes in turn: equally many of each if the number divides, and never in blocks.

    Scores that split samples in file order need a mixed order.
    """
    return (np.arange(num_images) % num_classes).astype(np.int32)


def read_labels(listed: str | None, file: str | None) -> np.ndarray | None:
    """Whole numbers [N] from ``--labels 3,7`` or a ``.npy`` file; ``None`` if neither is given.

    Raises:
        UserError: not a list of whole numbers.
    """
    if file is not None:
        labels = read_array(file, "--labels-file")
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
            raise UserError(
                f"--labels-file: {file} holds {labels.dtype} {list(labels.shape)}, should be whole numbers [N]"
            )
        return labels
    if listed is None:
        return None
    try:
        return np.array([int(label) for label in listed.split(",")], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise UserError(f"--labels: {listed!r} is not a list of numbers such as 3,7") from error


class Sampler:
    """A trained model, its guide and the decoder as one compiled program: (index, label) -> image."""

    def __init__(self, recipe: DiffusionRecipe | SamplingRecipe, runtime: Runtime) -> None:
        self._recipe = recipe
        self._runtime = runtime
        self.num_classes = _num_classes(recipe)
        self.latent_shape = recipe.autoencoder.encoder.latent_shape
        self.shift = recipe.flow.shift_for(self.latent_shape)
        self._decoder = load_latent_decoder(recipe.autoencoder, recipe.root)
        self._weights, key = _model_weights(recipe)
        self._model = self._load(recipe.model, self._weights, key)
        self._guide: DiffusionModel | None = None
        if isinstance(recipe.guidance, AutoGuidance):
            guide = recipe.guidance.model
            self._guide = self._load(guide, guide.weights, "guidance.model.weights")

    def sample(
        self, labels: np.ndarray, seed: int, initial_noise: np.ndarray | None = None, *, with_latents: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Images uint8 [N, H, W, 3], and latents float32 [N, C, h, w] (normalised, as the model makes them) if asked.

        Image i has label ``labels[i]`` and the noise of (seed, i), or ``initial_noise[i]``, float32 [N, C, h, w].

        Raises:
            UserError: a label out of range, or noise of another shape.
        """
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise UserError(f"labels: must lie in 0..{self.num_classes - 1}, got {labels.min()}..{labels.max()}")
        frozen = {"model": tensors_of(self._model), "decoder": tensors_of(self._decoder)}
        if self._guide is not None:
            frozen["guide"] = tensors_of(self._guide)
        frozen["times"] = {"grid": self._times()}
        columns = {"rows": np.arange(len(labels), dtype=np.int32), "labels": labels.astype(np.int32)}
        if initial_noise is not None:
            wanted = (len(labels), *self.latent_shape)
            if initial_noise.shape != wanted:
                raise UserError(f"initial noise: {list(initial_noise.shape)}, should be {list(wanted)}")
            columns["noise"] = initial_noise.astype(np.float32)

        def program(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if initial_noise is None:
                noise = normal(seed, Purpose.INITIAL_NOISE, batch["rows"], self.latent_shape)
            else:
                noise = batch["noise"]
            models = {name: frozen[name] for name in ("model", "guide") if name in frozen}
            times = frozen["times"]["grid"]
            latents = euler(self._velocity, models, noise, batch["labels"], times, self._runtime.scan)
            images = to_bytes(self._call(self._decoder, frozen["decoder"], latents))
            return {"images": images, "latents": latents} if with_latents else {"images": images}

        size = self._recipe.sampler.batch_size
        name = f"sampling ({self._recipe.guidance.method})"
        parts = list(map_batches(program, frozen, columns, min(size, len(labels)), self._runtime, name))
        images = np.concatenate([part["images"] for part in parts])
        return images, np.concatenate([part["latents"] for part in parts]) if with_latents else None

    def manifest(self) -> dict[str, Any]:
        """Everything that decides the images, but for the number and the seed."""
        recipe = self._recipe
        return {
            "sampler": recipe.sampler.model_dump(),
            "times": [round(float(t), 8) for t in self._times()],
            "shift": self.shift,
            "guidance": recipe.guidance.model_dump(),
            "pixels": "clamped to [0, 1], times 255, truncated",
            "runtime": self._runtime.describe(),
        }

    def weights_files(self) -> dict[str, str]:
        """The files whose content decides the images."""
        recipe = self._recipe
        return recipe.paths(
            {
                "model": self._weights,
                "decoder": recipe.autoencoder.decoder.weights,
                "latent_stats": recipe.autoencoder.latent_stats,
                "guide": recipe.guidance.model.weights if isinstance(recipe.guidance, AutoGuidance) else None,
            }
        )

    def _load(self, config: DiTConfig, weights: str | None, key: str) -> DiffusionModel:
        path = required_path(weights, self._recipe.root, key)
        return load_diffusion_model(config, self.latent_shape, self.num_classes, path, key)

    def _times(self) -> Tensor:
        config = self._recipe.sampler
        return sampling_times(config.num_grid_points, self.shift, end_at_zero=config.end_at_zero)

    def _call(self, module: Any, tensors: Any, *arguments: Tensor) -> Tensor:
        # Left to itself the compiler may have every device compute a loop's whole batch.
        arguments = tuple(self._runtime.split_batch(argument) for argument in arguments)
        return call(module, tensors, self._runtime, *arguments)

    def _velocity(self, weights: Any) -> Velocity:
        def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self._call(self._model, weights["model"], x, t, labels)

        def guide(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self._call(self._guide, weights["guide"], x, t, labels)

        guidance = self._recipe.guidance
        if isinstance(guidance, ClassifierFreeGuidance):
            return classifier_free(model, guidance, self.num_classes)
        if isinstance(guidance, AutoGuidance):
            return autoguidance(model, guide, guidance)
        return model


def _num_classes(recipe: DiffusionRecipe | SamplingRecipe) -> int:
    return recipe.num_classes if isinstance(recipe, SamplingRecipe) else num_classes_of(recipe.data, recipe.root)


def _model_weights(recipe: DiffusionRecipe | SamplingRecipe) -> tuple[str | None, str]:
    """The file to sample with, and the key that says which: a training's own, whatever it was started from."""
    if isinstance(recipe, SamplingRecipe):
        return recipe.model.weights, "model.weights"
    return recipe.weights_file, "run_dir"


def write_sample_set(
    recipe: DiffusionRecipe | SamplingRecipe,
    runtime: Runtime,
    directory: str,
    *,
    seed: int,
    num_images: int = 1000,
    labels: np.ndarray | None = None,
    initial_noise: str | None = None,
    save_latents: str | None = None,
) -> dict[str, Any]:
    """Write ``samples.npz``, ``contact_sheet.png``, ``recipe.yaml`` and ``manifest.json``; returns the manifest.

    The sheet shows at most 100 images: a row for each of the first classes, or the order of ``labels`` if given.

    ``labels``, ints [N]: one image for each; ``None``: ``num_images``, class-balanced. ``initial_noise``: a ``.npy``
    file, float [N, C, h, w], in place of the seed's. ``save_latents``: a ``.npy`` file to write the latents to.
    """
    started = time.perf_counter()
    sampler = Sampler(recipe, runtime)
    chosen = balanced_labels(num_images, sampler.num_classes) if labels is None else labels
    noise = None if initial_noise is None else read_array(initial_noise, "--initial-noise")
    images, latents = sampler.sample(chosen, seed, noise, with_latents=save_latents is not None)
    read = {**sampler.weights_files(), **({} if initial_noise is None else {"initial_noise": initial_noise})}
    manifest = {
        "num_images": len(images),
        "label_mode": "balanced" if labels is None else "given",
        "seed": seed,
        **sampler.manifest(),
        "files": {name: {"path": path, "sha256": storage.content_hash(path)} for name, path in read.items()},
        "rae_xla": __version__,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if runtime.process_index == 0:
        save_recipe(recipe, directory)
        write_samples(storage.join(directory, "samples.npz"), images, chosen)
        if save_latents is not None and latents is not None:
            write_array(save_latents, latents)
        storage.write_json(storage.join(directory, "manifest.json"), manifest)
        few = images[:LARGEST_SHEET]
        sheet = class_sheet(images, chosen) if labels is None else contact_sheet(few, columns=min(10, len(few)))
        write_png(storage.join(directory, "contact_sheet.png"), sheet)
    return manifest


def class_sheet(images: np.ndarray, labels: np.ndarray, per_class: int = 10) -> np.ndarray:
    """Contact sheet with a row for each of the first classes, the first images of each."""
    shown = np.unique(labels)[: LARGEST_SHEET // per_class]
    rows = [images[np.flatnonzero(labels == label)[:per_class]] for label in shown]
    blank = np.full_like(images[:1], 255)
    padded = [np.concatenate([row, np.repeat(blank, per_class - len(row), axis=0)]) for row in rows]
    return contact_sheet(np.concatenate(padded), per_class)
