"""Samples: a label and a noise for each index, and the sampler as one program from there to the image.

Label and noise are functions of (seed, sample index) alone, so batch size and number of devices change an image by
rounding at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_xla.data.sources import num_classes_of
from rae_xla.data.transforms import to_bytes
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import Columns, Rows, map_batches, run_batches
from rae_xla.evaluation.files import read_array
from rae_xla.flow.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    Velocity,
    autoguidance,
    classifier_free,
)
from rae_xla.flow.sampler import Solver, intervals_of
from rae_xla.flow.schedule import sampling_times
from rae_xla.models.autoencoder import load_latent_decoder
from rae_xla.models.diffusion import DiffusionModel, load_diffusion_model
from rae_xla.models.dit import DiTConfig
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.loading import required_path
from rae_xla.precision import effective_precision
from rae_xla.random import Purpose, normal, uniform
from rae_xla.recipe import DiffusionRecipe, SamplingRecipe
from rae_xla.run_blocks import ComputeConfig, make_run_blocks
from rae_xla.runtime import Runtime

SampledRecipe = DiffusionRecipe | SamplingRecipe


def labels_of(mode: str, seed: int, num_images: int, num_classes: int) -> np.ndarray:
    """int32 [num_images]. ``balanced``: classes in turn; ``random``: drawn; ``unconditional``: the null class.

    Classes in turn are equally many of each if the number divides, and never in blocks: scores that split samples in
    file order need a mixed order.
    """
    rows = np.arange(num_images)
    if mode == "random":
        drawn = uniform(seed, Purpose.SAMPLE_LABEL, torch.from_numpy(rows.astype(np.int32))).numpy()
        return (drawn * num_classes).astype(np.int32)
    return (rows % num_classes if mode == "balanced" else np.full_like(rows, num_classes)).astype(np.int32)


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
    """A diffusion model, its guide and the decoder as one program: (sample index, label) -> image.

    ``model``: one whose values the caller has, in place of the recipe's file. ``weights``: another file than that.

    Raises:
        UserError: weights are missing or do not fit.
    """

    def __init__(
        self,
        recipe: SampledRecipe,
        runtime: Runtime,
        model: DiffusionModel | None = None,
        weights: str | None = None,
    ) -> None:
        self._recipe = recipe
        self._runtime = runtime
        self.latent_shape = recipe.autoencoder.encoder.latent_shape
        self.num_classes = _num_classes(recipe) if model is None else model.num_classes
        self.shift = recipe.flow.shift_for(self.latent_shape)
        config = recipe.sampler
        self._times = sampling_times(config.num_grid_points, self.shift, end_at_zero=config.end_at_zero)
        self._decoder = load_latent_decoder(recipe.autoencoder, recipe.root)
        # Unrolled, the guided sampler of DiT^DH-XL compiles for half an hour.
        self._run_blocks = make_run_blocks(ComputeConfig(blocks="scan"), runtime)
        self._guide: DiffusionModel | None = None
        if isinstance(recipe.guidance, AutoGuidance):
            guide = recipe.guidance.model
            self._guide = self._load(guide, guide.weights, "guidance.model.weights")
        self._weights, key = _model_weights(recipe) if weights is None else (weights, "weights")
        self._model = self._load(recipe.model, self._weights, key) if model is None else model

    def constants(self) -> dict[str, Any]:
        """What `images` is given besides the ``model``, on the host."""
        guide = {} if self._guide is None else {"guide": tensors_of(self._guide)}
        return {"decoder": tensors_of(self._decoder), **guide, "grid": {"intervals": intervals_of(self._times)}}

    def images(self, frozen: Any, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """``images`` uint8 [B, H, W, 3] and ``latents`` float32 [B, C, h, w], as the model makes them; to be compiled.

        ``frozen``: `constants` and the ``model``'s values. ``batch``: ``rows`` int32 [B], the samples' indices,
        ``labels`` int32 [B], and ``noise`` float32 [B, C, h, w] if it is not that of (seed, index).
        """
        noise = batch.get("noise")
        if noise is None:
            noise = normal(seed, Purpose.INITIAL_NOISE, batch["rows"], self.latent_shape)
        models = {name: frozen[name] for name in ("model", "guide") if name in frozen}
        intervals, scan = frozen["grid"]["intervals"], self._runtime.scan
        solver = Solver(self._recipe.sampler, self._times, self._recipe.guidance, seed)
        latents = solver(self._velocity, models, noise, batch, intervals, scan)
        images = to_bytes(self._call(self._decoder, frozen["decoder"], latents))
        # Each host takes its own rows of them.
        split = self._runtime.split_batch
        return {"images": split(images), "latents": split(latents)}

    def run(
        self, rows: Rows, num_rows: int, seed: int, batch_size: int, wanted: tuple[str, ...]
    ) -> Iterator[tuple[Columns, Columns]]:
        """Those ``wanted`` of `images` of all rows, see `run_batches`, with the recipe's weights."""
        program, name = self._program(seed, wanted), self._name
        return run_batches(program, self._frozen(), rows, num_rows, batch_size, self._runtime, name)

    def check(self, labels: np.ndarray, initial_noise: np.ndarray | None) -> None:
        """Raises a `UserError` for a label out of range or noise that is not [N, C, h, w]."""
        unconditional = self._recipe.sampler.labels == "unconditional"
        most = self.num_classes if unconditional else self.num_classes - 1
        if len(labels) and not (labels.min() >= 0 and labels.max() <= most):
            raise UserError(f"labels: must lie in 0..{most}, got {labels.min()}..{labels.max()}")
        wanted = (len(labels), *self.latent_shape)
        if initial_noise is not None and initial_noise.shape != wanted:
            raise UserError(f"initial noise: {list(initial_noise.shape)}, should be {list(wanted)}")

    def sample(
        self, labels: np.ndarray, seed: int, initial_noise: np.ndarray | None = None, *, with_latents: bool = False
    ) -> Columns:
        """`images` of all labels in memory, where there is one host; ``initial_noise``: float [N, C, h, w].

        Raises:
            UserError: see `check`.
        """
        self.check(labels, initial_noise)
        columns = sample_columns(np.arange(len(labels)), labels, initial_noise)
        program = self._program(seed, ("images", "latents") if with_latents else ("images",))
        size = min(self._recipe.sampler.batch_size, len(labels))
        parts = list(map_batches(program, self._frozen(), columns, size, self._runtime, self._name))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def settings(self) -> dict[str, Any]:
        """All of the recipe that decides an image, but for what is in the weights' files."""
        recipe = self._recipe
        sizes = {
            "model": recipe.model.model_dump(mode="json", exclude={"weights"}),
            "encoder": recipe.autoencoder.encoder.model_dump(mode="json", exclude={"weights"}),
            "decoder": recipe.autoencoder.decoder.model_dump(mode="json", exclude={"weights"}),
        }
        return {
            "sampler": recipe.sampler.model_dump(mode="json", exclude={"batch_size", "labels"}),
            "shift": self.shift,
            "guidance": recipe.guidance.model_dump(mode="json", exclude={"model": {"weights"}}),
            "precision": effective_precision(recipe.precision, self._runtime.describe()["device"]),
            "num_classes": self.num_classes,
            **sizes,
        }

    def derived(self) -> dict[str, Any]:
        """What follows from `settings`, for people."""
        return {
            "evaluations": self._recipe.sampler.num_evaluations,
            "times": [round(float(t), 8) for t in self._times],
            "pixels": "clamped to [0, 1], times 255, truncated",
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

    @property
    def _name(self) -> str:
        return f"sampling ({self._recipe.guidance.method})"

    def _frozen(self) -> dict[str, Any]:
        return {"model": tensors_of(self._model), **self.constants()}

    def _program(self, seed: int, wanted: tuple[str, ...]) -> Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]:
        def program(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            made = self.images(frozen, batch, seed)
            return {name: made[name] for name in wanted}

        return program

    def _load(self, config: DiTConfig, weights: str | None, key: str) -> DiffusionModel:
        path = required_path(weights, self._recipe.root, key)
        return load_diffusion_model(config, self.latent_shape, self.num_classes, path, key)

    def _call(self, module: Any, tensors: Any, *arguments: Tensor) -> Tensor:
        # Left to itself the compiler may have every device compute a loop's whole batch.
        arguments = tuple(self._runtime.split_batch(argument) for argument in arguments)
        return call(module, tensors, self._runtime, *arguments, run_blocks=self._run_blocks)

    def _velocity(self, weights: Any, guided: bool) -> Velocity:
        def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self._call(self._model, weights["model"], x, t, labels)

        def guide(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self._call(self._guide, weights["guide"], x, t, labels)

        guidance = self._recipe.guidance
        if guided and isinstance(guidance, ClassifierFreeGuidance):
            return classifier_free(model, guidance, self.num_classes)
        if guided and isinstance(guidance, AutoGuidance):
            return autoguidance(model, guide, guidance)
        return model


def sample_columns(rows: np.ndarray, labels: np.ndarray, initial_noise: np.ndarray | None) -> Columns:
    """What `Sampler.images` takes of samples with these indices, whose labels and noise are among all of them."""
    noise = {} if initial_noise is None else {"noise": initial_noise[rows].astype(np.float32)}
    return {"rows": rows.astype(np.int32), "labels": labels[rows].astype(np.int32), **noise}


def _num_classes(recipe: SampledRecipe) -> int:
    return recipe.num_classes if isinstance(recipe, SamplingRecipe) else num_classes_of(recipe.data, recipe.root)


def _model_weights(recipe: SampledRecipe) -> tuple[str | None, str]:
    """The file to sample with, and the key that says which: a training's own, whatever it was started from."""
    if isinstance(recipe, SamplingRecipe):
        return recipe.model.weights, "model.weights"
    return recipe.weights_file, "run_dir"
