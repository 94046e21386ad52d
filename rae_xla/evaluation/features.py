"""Networks whose features images are compared in: Inception as ADM has it, an encoder of this project, a classifier.

All compute in float32, multiplied as such, whatever else runs in the same process: bfloat16 products move a Fréchet
distance by a thousandth and more.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Discriminator, Tag
from torch import Tensor

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.models.autoencoder import LatentEncoderConfig, encoder_weights_path
from rae_xla.models.classifier import ConvNet, ConvNetConfig
from rae_xla.models.encoders import EncoderConfig, load_encoder
from rae_xla.models.functional import InFloat32, call, tensors_of
from rae_xla.models.inception import POOL_WIDTH, SPATIAL_WIDTH, load_inception
from rae_xla.models.loading import load_weights, values_wanted
from rae_xla.models.pretrained import downloaded
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class InceptionConfig(Config):
    """Inception-v3 of 2015-12-05. ``weights``: torch-fidelity's file or one of that layout; ``null`` fetches it."""

    name: Literal["inception"] = "inception"
    weights: str | None = None


def _kind(content: Any) -> str:
    name = content.get("name") if isinstance(content, dict) else getattr(content, "name", None)
    return str(name) if name in ("inception", "convnet") else "encoder"


Features = InceptionConfig | ConvNetConfig | EncoderConfig
FeaturesConfig = Annotated[
    Annotated[InceptionConfig, Tag("inception")]
    | Annotated[ConvNetConfig, Tag("convnet")]
    | Annotated[EncoderConfig, Tag("encoder")],
    Discriminator(_kind),
]


class Extractor(Protocol):
    """Images to features. A new one is a class here, and a line in `load_extractor`."""

    space: str
    """What the space of its features is called, for the names of scores."""
    columns: dict[str, int | None]
    """What a call returns, and how wide it is; ``None`` for one value of an image."""

    def tensors(self) -> Any:
        """What a call is given as ``frozen``, on the host."""

    def __call__(self, frozen: Any, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        """uint8 [B, S, S, 3] -> ``features`` float32 [B, F], and what else the scores of this space need.

        Part of a compiled step, which is to be ``exact``.
        """

    def about(self) -> dict[str, Any]:
        """What decides the features, for manifests."""


class InceptionFeatures:
    """``features`` of FID [B, 2048], ``spatial`` of sFID [B, 2023].

    Raises:
        UserError: its weights are missing or do not fit; names ``key``.
    """

    space = "inception"

    def __init__(self, config: InceptionConfig, image_size: int, root: str, key: str, process_index: int = 0) -> None:
        self.columns: dict[str, int | None] = {"features": POOL_WIDTH, "spatial": SPATIAL_WIDTH}
        path = _inception_path(config, root, key, process_index)
        self._network = load_inception(path, image_size, key)
        self._sha256 = storage.content_hash(path) if values_wanted() else None
        if values_wanted() and self._sha256 != INCEPTION_SHA256:
            logger.warning(
                "%s: %s is not the published Inception (SHA-256 %s...); scores compare with nobody else's",
                key, path, INCEPTION_SHA256[:8],
            )  # fmt: skip

    def tensors(self) -> Any:
        """See `Extractor`."""
        return tensors_of(self._network)

    def __call__(self, frozen: Any, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        """See `Extractor`."""
        pixels = images.permute(0, 3, 1, 2).float()
        pool, spatial = call(self._network, frozen, InFloat32(runtime.whole), pixels)
        return {"features": pool, "spatial": spatial}

    def about(self) -> dict[str, Any]:
        """See `Extractor`."""
        return {"name": "inception", "weights_sha256": self._sha256, "is_published": self._sha256 == INCEPTION_SHA256}

    @property
    def logits_weight(self) -> np.ndarray:
        """Of the Inception Score: float64 [1008, 2048]."""
        return self._network.fc.weight.double().numpy()


def _inception_path(config: InceptionConfig, root: str, key: str, process_index: int) -> str:
    if not values_wanted():
        return ""
    if config.weights is None:
        kept = str(Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
        return downloaded(INCEPTION_URL, INCEPTION_SHA256, root, key, process_index, beside=kept)
    path = storage.resolve(root, config.weights)
    if not storage.exists(path):
        raise UserError(f"{key}: {path} is not there; get {INCEPTION_URL} (SHA-256 {INCEPTION_SHA256})")
    return path


class EncoderFeatures:
    """The mean of an encoder's tokens, [B, C]: what an RAE's latents say of an image.

    Fréchet distances in DINOv2's features are elsewhere taken of its class token, which latents do not have.

    Raises:
        UserError: its weights are missing or do not fit; names ``key``.
    """

    def __init__(self, config: EncoderConfig, root: str, key: str, process_index: int = 0) -> None:
        self.space = config.name if config.name != "timm_vit" else config.timm_model.partition(".")[0]
        self._config = config
        self.columns: dict[str, int | None] = {"features": config.latent_shape[0]}
        path = encoder_weights_path(LatentEncoderConfig(encoder=config), root, process_index, key)
        self._network = load_encoder(config, path, key)
        self._sha256 = storage.content_hash(path) if values_wanted() else None

    def tensors(self) -> Any:
        """See `Extractor`."""
        return tensors_of(self._network)

    def __call__(self, frozen: Any, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        """See `Extractor`."""
        tokens = call(self._network, frozen, InFloat32(runtime.whole), to_unit(images))
        return {"features": tokens.mean(dim=(2, 3))}

    def about(self) -> dict[str, Any]:
        """See `Extractor`."""
        sizes = self._config.model_dump(mode="json", exclude={"weights"}, exclude_none=True)
        return {**sizes, "pooling": "mean of tokens", "weights_sha256": self._sha256}


class JudgeFeatures:
    """The hidden layer of an independent classifier, the judge [B, F], and ``predicted``, the label that it sees.

    Raises:
        UserError: its weights are missing or do not fit; names ``key``.
    """

    space = "judge"

    def __init__(self, config: ConvNetConfig, image_size: int, num_classes: int, root: str, key: str) -> None:
        if config.weights is None and values_wanted():
            raise UserError(f"{key}: required here; train the judge and give its safetensors file")
        path = storage.resolve(root, config.weights or "")
        network = ConvNet(config, image_size=image_size, num_classes=num_classes)
        load_weights(network, path, key)
        self._trunk, self._head = network.trunk, network.head
        self.columns: dict[str, int | None] = {"features": config.feature_width, "predicted": None}
        self._about = {
            **config.model_dump(mode="json", exclude={"weights"}),
            "weights_sha256": storage.content_hash(path) if values_wanted() else None,
        }

    def tensors(self) -> Any:
        """See `Extractor`."""
        return {"trunk": tensors_of(self._trunk), "head": tensors_of(self._head)}

    def __call__(self, frozen: Any, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        """See `Extractor`. ``predicted``: int64 [B]."""
        in_float32 = InFloat32(runtime.whole)
        features = call(self._trunk, frozen["trunk"], in_float32, to_unit(images))
        logits = call(self._head, frozen["head"], in_float32, features)
        return {"features": features, "predicted": logits.argmax(dim=1)}

    def about(self) -> dict[str, Any]:
        """See `Extractor`."""
        return self._about


def load_extractor(
    config: Features,
    image_size: int,
    num_classes: int | None,
    root: str,
    key: str,
    process_index: int = 0,
) -> Extractor:
    """With its weights, for images of this size. ``num_classes``: of the labels, which a classifier must know.

    Raises:
        UserError: weights are missing or do not fit; names ``key``.
    """
    if isinstance(config, InceptionConfig):
        return InceptionFeatures(config, image_size, root, key, process_index)
    if isinstance(config, EncoderConfig):
        return EncoderFeatures(config, root, key, process_index)
    if num_classes is None:
        raise UserError(f"{key}: a classifier needs data, whose labels it was trained on; name data in the recipe")
    return JudgeFeatures(config, image_size, num_classes, root, key)
