"""Published weights of timm's models: fetched once from the Hugging Face hub, kept under the recipe's ``root``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import timm

from rae_xla import storage
from rae_xla.errors import UserError
from rae_xla.models.loading import values_wanted

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1800.0


def weights_path(
    weights: str | None,
    timm_model: str,
    root: str,
    key: str,
    process_index: int = 0,
    *,
    unpublished: str | None = None,
) -> str:
    """The file that a recipe names, or if it names none the published one, fetched; see `pretrained_weights`.

    ``unpublished``: what the model is if none of it can be published, for the message.

    Raises:
        UserError: none is named and none is published, or it cannot be fetched; names ``key``.
    """
    if not values_wanted():
        return ""
    if weights is not None:
        return storage.resolve(root, weights)
    if unpublished is not None:
        raise UserError(f"{key}: required for {unpublished}; give a safetensors file")
    return pretrained_weights(timm_model, root, key, process_index)


def pretrained_weights(
    timm_model: str, root: str, key: str, process_index: int = 0, wait_seconds: float = WAIT_SECONDS
) -> str:
    """The path of a timm model's published weights, ``ROOT/pretrained/TIMM_MODEL.safetensors``.

    Process 0 alone talks to the hub and writes the file, if it is not there; the others wait for it.

    Raises:
        UserError: no network or no such model, or process 0 did not deliver in time; names ``key`` and the remedy.
    """
    path = pretrained_path(timm_model, root)
    if process_index == 0:
        if not storage.exists(path):
            _fetch(timm_model, path, key)
        return path
    deadline = time.monotonic() + wait_seconds
    while not storage.exists(path):
        if time.monotonic() > deadline:
            raise UserError(f"{key}: process 0 has not written {path}; root must be a place that all hosts share")
        time.sleep(min(5.0, wait_seconds))
    return path


def pretrained_path(timm_model: str, root: str) -> str:
    """Where a root has them."""
    return storage.join(root, "pretrained", f"{timm_model}.safetensors")


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """These libraries log every retry; what matters comes as an exception."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _fetch(timm_model: str, path: str, key: str) -> None:
    logger.info("fetching %s from the Hugging Face hub into %s", timm_model, path)
    try:
        with _quiet("huggingface_hub", "timm"):
            backbone = timm.create_model(timm_model, pretrained=True)
    # The hub's errors are OSErrors; timm has RuntimeErrors for a model without weights.
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{key}: {timm_model} cannot be fetched from the Hugging Face hub ({type(error).__name__}); "
            f"with no network, put the file of huggingface.co/timm/{timm_model} somewhere and give its path here"
        ) from error
    storage.write_tensors(path, backbone.state_dict())
