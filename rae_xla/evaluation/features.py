"""Networks whose features images are compared in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.models.classifier import ConvNet, ConvNetConfig
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.loading import load_weights
from rae_xla.runtime import Runtime


class JudgeFeatures:
    """The hidden layer of an independent classifier, the judge, and the label that it sees.

    Raises:
        UserError: its weights are missing or do not fit; names ``key``.
    """

    def __init__(self, config: ConvNetConfig, image_size: int, num_classes: int, path: str | None, key: str) -> None:
        if path is None:
            raise UserError(f"{key}: required here; train the judge and give its safetensors file")
        network = ConvNet(config, image_size=image_size, num_classes=num_classes)
        load_weights(network, path, key)
        self._trunk, self._head = network.trunk, network.head

    def tensors(self) -> dict[str, Any]:
        """What a call is given as ``frozen``, on the host."""
        return {"trunk": tensors_of(self._trunk), "head": tensors_of(self._head)}

    def __call__(self, frozen: Any, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        """uint8 [B, H, W, 3] -> ``features`` float32 [B, F] and ``predicted`` labels int64 [B]."""
        features = call(self._trunk, frozen["trunk"], runtime, to_unit(images))
        logits = call(self._head, frozen["head"], runtime, features.to(runtime.compute_dtype))
        return {"features": features, "predicted": logits.argmax(dim=1)}
