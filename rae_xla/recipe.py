"""Recipes: what a YAML file may say, one class for each task, put together from the components' own configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from rae_xla import storage
from rae_xla.cloud.job import CloudConfig
from rae_xla.config import Config, apply_overrides, describe_errors, flattened, read_yaml
from rae_xla.data.sources import SOURCES, DataConfig
from rae_xla.errors import UserError
from rae_xla.evaluation.features import FeaturesConfig, InceptionConfig
from rae_xla.evaluation.reference import NAMED
from rae_xla.flow.guidance import GuidanceConfig, NoGuidance
from rae_xla.flow.sampler import SamplerConfig
from rae_xla.flow.schedule import FlowConfig, TimeConfig
from rae_xla.losses.adversarial import AdversarialConfig
from rae_xla.losses.perceptual import PerceptualConfig
from rae_xla.models.autoencoder import AutoencoderConfig, LatentEncoderConfig
from rae_xla.models.classifier import ConvNetConfig
from rae_xla.models.diffusion import DiffusionModelConfig
from rae_xla.models.encoders import EncoderConfig
from rae_xla.precision import Precision
from rae_xla.run_blocks import ComputeConfig
from rae_xla.sharding import MeshConfig
from rae_xla.training.checkpoint import CheckpointConfig
from rae_xla.training.heldout import HeldoutConfig
from rae_xla.training.looks import PreviewConfig, ScoringConfig
from rae_xla.training.metrics import LogConfig
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.profile import ProfileConfig
from rae_xla.training.recovery import RecoveryConfig
from rae_xla.training.same_run import ResumeConfig


class CommonRecipe(Config):
    """What every task has. Relative paths in a recipe are inside ``root``, which may be a ``gs://`` URL."""

    task: str
    root: str = "."
    seed: int = Field(ge=0, lt=2**63)
    runtime: Literal["xla", "eager"] = "xla"
    mesh: MeshConfig = MeshConfig()
    precision: Precision = "fp32"
    cloud: CloudConfig = CloudConfig()

    def path(self, path: str) -> str:
        """A path of this recipe, made absolute by its ``root``."""
        return storage.resolve(self.root, path)

    def paths(self, files: Mapping[str, str | None]) -> dict[str, str]:
        """The files that are named, by the same keys, made absolute."""
        return {key: self.path(file) for key, file in files.items() if file is not None}


class RunRecipe(CommonRecipe):
    """A task that reads a data set and leaves a run directory."""

    run_dir: str
    data: DataConfig

    @property
    def weights_file(self) -> str:
        """What a training leaves, inside ``root``."""
        return storage.join(self.run_dir, "weights.safetensors")


class TrainingRecipe(RunRecipe):
    """What every training has."""

    train: OptimizerConfig
    compute: ComputeConfig = ComputeConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    checkpoint: CheckpointConfig
    recovery: RecoveryConfig = RecoveryConfig()
    resume: ResumeConfig = ResumeConfig()


def _classifier_kind(content: Any) -> str:
    if isinstance(content, dict):
        return "convnet" if content.get("name") == "convnet" else "encoder"
    return "convnet" if isinstance(content, ConvNetConfig) else "encoder"


class ClassifierRecipe(TrainingRecipe):
    """Train a classifier on the source's labels: the quickstart's encoder, and its independent judge."""

    task: Literal["classifier"]
    model: Annotated[
        Annotated[EncoderConfig, Tag("encoder")] | Annotated[ConvNetConfig, Tag("convnet")],
        Discriminator(_classifier_kind),
    ]
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _from_scratch(self) -> ClassifierRecipe:
        if self.model.weights is not None:
            raise ValueError("model.weights: must be null here, a classifier is trained from nothing")
        return self


class LatentNoiseConfig(Config):
    """Noise added to the encoder's features while the decoder trains (arXiv 2510.11690, section 4.3).

    sigma is drawn per image: ``half_normal`` |N(0, scale^2)| as in the paper, ``uniform`` scale * U(0, 1) as released.
    """

    scale: float = Field(ge=0)
    distribution: Literal["half_normal", "uniform"]


class AutoencoderRecipe(TrainingRecipe):
    """Train a decoder on a frozen encoder: L1, and LPIPS and an adversarial loss where they are given."""

    task: Literal["autoencoder"]
    autoencoder: AutoencoderConfig
    latent_noise: LatentNoiseConfig
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    heldout: HeldoutConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> AutoencoderRecipe:
        _check_raw_features(self.autoencoder)
        _check_image_size(self.autoencoder, self.data.image_size)
        if self.heldout is not None:
            _check_heldout(self.data, self.heldout.source, "heldout.source")
        return self


class LinearProbeRecipe(TrainingRecipe):
    """Train a linear classifier on frozen latents, and score it on held-out images.

    ``heldout_source``: the manifest of these; ``null`` for sets in memory, which hold a part of theirs out.
    """

    task: Literal["linear_probe"]
    autoencoder: LatentEncoderConfig
    heldout_source: str | None = None

    @model_validator(mode="after")
    def _held_out(self) -> LinearProbeRecipe:
        _check_heldout(self.data, self.heldout_source, "heldout_source")
        return self


class LatentStatsRecipe(RunRecipe):
    """Exact mean and variance of the encoder's features over the training split."""

    task: Literal["latent_stats"]
    autoencoder: AutoencoderConfig

    @model_validator(mode="after")
    def _fits(self) -> LatentStatsRecipe:
        _check_raw_features(self.autoencoder)
        return self


class DiffusionRecipe(TrainingRecipe):
    """Train a diffusion transformer on latents by flow matching, and sample from it.

    ``model.weights`` is where training starts; samples are made with what it ended with.
    """

    task: Literal["diffusion"]
    autoencoder: AutoencoderConfig
    model: DiffusionModelConfig
    flow: FlowConfig
    sampler: SamplerConfig
    guidance: GuidanceConfig = NoGuidance()
    preview: PreviewConfig | None = None
    scoring: ScoringConfig | None = None

    @model_validator(mode="after")
    def _labels(self) -> DiffusionRecipe:
        _check_guidance(self.guidance, self.sampler)
        if self.guidance.method == "classifier_free" and not self.flow.label_dropout:
            raise ValueError("guidance.method: classifier_free needs a model trained with flow.label_dropout above 0")
        if self.scoring is not None and self.scoring.reference is None and self.data.source not in SOURCES:
            raise ValueError(
                "scoring.reference: required here; only sets in memory hold images out to compare with "
                f"({', '.join(SOURCES)})"
            )
        if self.flow.label_dropout == 1 and self.sampler.labels != "unconditional":
            raise ValueError("sampler.labels: must be unconditional where flow.label_dropout is 1, no label is learnt")
        return self


class ReconstructionRecipe(CommonRecipe):
    """An autoencoder by itself, to encode and decode images."""

    task: Literal["reconstruction"]
    autoencoder: AutoencoderConfig


class SamplingRecipe(CommonRecipe):
    """Sample with weights that are there already; nothing is trained and no data set is needed."""

    task: Literal["sampling"]
    autoencoder: AutoencoderConfig
    model: DiffusionModelConfig
    num_classes: int = Field(gt=0)
    flow: TimeConfig = TimeConfig()
    sampler: SamplerConfig
    guidance: GuidanceConfig = NoGuidance()

    @model_validator(mode="after")
    def _labels(self) -> SamplingRecipe:
        _check_guidance(self.guidance, self.sampler)
        return self


class EvaluationRecipe(CommonRecipe):
    """Score samples and reconstructions.

    ``features``: the space that images are compared in. ``batch_size``: of all hosts together, and that of ``data``.
    ``data``: what is reconstructed, and what samples are compared with if no reference is named: the manifest of
    held-out images, or a set in memory, which holds a part of its own out.
    """

    task: Literal["evaluation"]
    run_dir: str = "evaluation"
    features: FeaturesConfig = InceptionConfig()
    batch_size: int = Field(default=256, gt=0)
    data: DataConfig | None = None
    autoencoder: AutoencoderConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_batch_size(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
            return content
        size = content.get("batch_size", cls.model_fields["batch_size"].default)
        return {**content, "data": {**content["data"], "batch_size": size}}

    @model_validator(mode="after")
    def _fits(self) -> EvaluationRecipe:
        if self.autoencoder is not None:
            if self.data is None:
                raise ValueError("data: required with autoencoder; it says what is reconstructed")
            _check_image_size(self.autoencoder, self.data.image_size)
        return self


def _check_guidance(guidance: GuidanceConfig, sampler: SamplerConfig) -> None:
    if guidance.method == "classifier_free" and sampler.labels == "unconditional":
        raise ValueError("guidance.method: classifier_free is away from samples without label, and all are; take none")


def _check_heldout(data: DataConfig, source: str | None, key: str) -> None:
    if data.source in SOURCES and source is not None:
        raise ValueError(f"{key}: must be null here, {data.source} holds out a part of its own")
    if data.source not in SOURCES and source in (None, *SOURCES):
        raise ValueError(
            f"{key}: required here, {data.source} is read as a manifest of one split; name that of the held-out images"
        )


def _check_raw_features(autoencoder: AutoencoderConfig) -> None:
    if autoencoder.latent_stats is not None:
        raise ValueError("autoencoder.latent_stats: must be null here, where features are taken as they are")


def _check_image_size(autoencoder: AutoencoderConfig, image_size: int) -> None:
    made = autoencoder.image_size
    if made != image_size:
        raise ValueError(
            f"autoencoder.decoder.patch_size: {autoencoder.decoder.patch_size} makes images of {made} pixels, "
            f"data.image_size is {image_size}"
        )


RECIPES: dict[str, type[CommonRecipe]] = {
    "classifier": ClassifierRecipe,
    "autoencoder": AutoencoderRecipe,
    "linear_probe": LinearProbeRecipe,
    "latent_stats": LatentStatsRecipe,
    "diffusion": DiffusionRecipe,
    "reconstruction": ReconstructionRecipe,
    "sampling": SamplingRecipe,
    "evaluation": EvaluationRecipe,
}


def load_recipe(path: str, overrides: list[str], *tasks: str) -> Any:
    """The recipe in a YAML file, with ``key.sub=value`` overrides applied, for one of these tasks (any if none given).

    Raises:
        UserError: anything wrong with it, in one line.
    """
    content = apply_overrides(read_yaml(path), overrides)
    task = content.get("task")
    known = tasks or tuple(RECIPES)
    if task not in known:
        found = f"{task!r} does not fit this command" if task else "missing; is this a base of other recipes"
        raise UserError(f"{path}: task: {found}; this command takes a recipe with task {' or '.join(known)}")
    try:
        return RECIPES[str(task)].model_validate(content)
    except ValidationError as error:
        raise UserError(describe_errors(error, path, RECIPES[str(task)], content)) from error


# Keys whose values are files that are read.
_INPUT_KEYS = ("weights", "latent_stats", "source", "heldout_source", "reference", "from")


def input_files(recipe: CommonRecipe) -> dict[str, str]:
    """The files that a recipe names to be read, by its keys, made absolute; no sets in memory, no references' names."""
    named = {
        key: value
        for key, value in flattened(recipe.model_dump(mode="json"))
        if key.rpartition(".")[2] in _INPUT_KEYS and value not in (None, *SOURCES, *NAMED)
    }
    return recipe.paths(named)


def check_inputs(recipe: CommonRecipe) -> None:
    """Raises a `UserError` that names all files of `input_files` that are not there."""
    missing = [f"{key}: {path} is not there" for key, path in input_files(recipe).items() if not storage.exists(path)]
    if missing:
        raise UserError("; ".join(missing) + "; make or copy them first, or correct the paths")


def with_autoencoder() -> tuple[str, ...]:
    """The tasks whose recipes have an autoencoder, decoder and all."""
    fields = {task: recipe.model_fields.get("autoencoder") for task, recipe in RECIPES.items()}
    return tuple(task for task, field in fields.items() if field and field.annotation is AutoencoderConfig)


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, every default spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def save_recipe(recipe: CommonRecipe, directory: str) -> None:
    """``recipe.yaml`` in a run directory."""
    storage.write_text(storage.join(directory, "recipe.yaml"), dump_recipe(recipe))
