"""Published files: weights of timm's models from the Hugging Face hub, others by their address.

Each is fetched once and kept under the recipe's ``root``.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import timm

from rae_xla import storage, tensor_files
from rae_xla.errors import UserError, first_line
from rae_xla.models.loading import values_wanted

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1800.0
DOWNLOAD_TIMEOUT_SECONDS = 30.0
_PIECE_BYTES = 8 * 2**20


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
    _by_the_first(lambda: _fetch(timm_model, path, key), path, key, process_index, wait_seconds)
    return path


def downloaded(
    url: str, sha256: str | None, root: str, key: str, process_index: int = 0, *, beside: str | None = None
) -> str:
    """The path of a published file, ``ROOT/pretrained/`` and its name, which `pretrained_weights` is like.

    ``beside``: where another program may have put it already.

    Raises:
        UserError: it cannot be fetched, or is not the file of this SHA-256; names ``key`` and the remedy.
    """
    path = storage.join(root, "pretrained", posixpath.basename(url))
    source = beside if beside is not None and storage.exists(beside) else url
    _by_the_first(lambda: _download(source, path, sha256, key), path, key, process_index, WAIT_SECONDS)
    if sha256 is not None and process_index == 0 and storage.content_hash(path) != sha256:
        raise UserError(f"{key}: {path} is not the file that was published (SHA-256 {sha256}); remove it")
    return path


def _by_the_first(fetch: Callable[[], None], path: str, key: str, process_index: int, wait_seconds: float) -> None:
    """Have process 0 fetch what is not there, and the others wait for it."""
    if process_index == 0:
        if not storage.exists(path):
            fetch()
        return
    deadline = time.monotonic() + wait_seconds
    while not storage.exists(path):
        if time.monotonic() > deadline:
            raise UserError(f"{key}: process 0 has not written {path}; root must be a place that all hosts share")
        time.sleep(min(5.0, wait_seconds))


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
    tensor_files.write_tensors(path, backbone.state_dict())


def _download(url: str, path: str, sha256: str | None, key: str) -> None:
    logger.info("fetching %s into %s", url, path)
    known = "" if sha256 is None else f" (SHA-256 {sha256})"

    def pieces(response: Any) -> Iterator[bytes]:
        digest = hashlib.sha256()
        with _told_as_a_fetch(url, path, known, key):
            # A connection that ends early says nothing.
            expected = getattr(response, "length", None)
            received = 0
            while piece := response.read(_PIECE_BYTES):
                digest.update(piece)
                received += len(piece)
                yield piece
            if expected not in (None, received):
                raise OSError(f"{received} of {expected} bytes came")
        # Before it has its name.
        if sha256 is not None and digest.hexdigest() != sha256:
            raise UserError(f"{key}: {url} sent another file than the one that was published{known}; try again")

    with _told_as_a_fetch(url, path, known, key):
        address = url if "://" in url else Path(url).as_uri()
        response = urlopen(address, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    with response:
        storage.write_pieces(path, pieces(response))


@contextmanager
def _told_as_a_fetch(url: str, path: str, known: str, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{key}: {url} cannot be fetched ({first_line(error)}); with no network, put that file{known} at {path}, "
            "or give its path here"
        ) from error
