"""A set of images as scores see it: the Gaussians of its features, and the features themselves where it holds images.

B batch, F features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.evaluation.batches import Columns, Share, gathered, run_batches
from rae_xla.evaluation.features import Extractor
from rae_xla.evaluation.gaussian import Gaussian
from rae_xla.evaluation.stored_images import StoredImages, has_images, open_stored, read_arrays
from rae_xla.hosts import Hosts
from rae_xla.runtime import Runtime

# ADM's names for mean and covariance of a column.
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# What a file of ours says of itself, as JSON.
ABOUT = "about"


@dataclass(frozen=True)
class Measured:
    """``gaussians``: by column. ``seen`` and ``images``: where there are images. ``about``: for manifests.

    ``labels``: ints [n], where they are known.
    """

    gaussians: dict[str, Gaussian]
    about: dict[str, Any]
    seen: Columns | None = None
    images: StoredImages | None = None
    labels: np.ndarray | None = None

    @staticmethod
    def of(
        seen: Columns, about: dict[str, Any], images: StoredImages | None = None, labels: np.ndarray | None = None
    ) -> Measured:
        """What an extractor sees of images."""
        gaussians = {column: Gaussian.of(seen[column]) for column in MOMENTS if column in seen}
        return Measured(gaussians, about, seen, images, labels)


class Measuring:
    """Measures sets with one extractor, in batches of one shape, on all devices of all hosts."""

    def __init__(self, extractor: Extractor, batch_size: int, runtime: Runtime, hosts: Hosts) -> None:
        self.extractor = extractor
        self._batch_size, self._runtime, self._hosts = batch_size, runtime, hosts

    def images(self, images: StoredImages, name: str, key: str, about: Mapping[str, Any] | None = None) -> Measured:
        """Of a set of images; each host reads its share of them, and gets what all have found.

        Raises:
            UserError: images are no pictures, or features are no numbers; names ``key``.
        """
        seen = self._seen(images, name, key)
        about = {"path": images.path, "num_images": len(images), **(about or {})}
        return Measured.of(seen, about, images, images.labels)

    def file(self, path: str, name: str, key: str, about: Mapping[str, Any] | None = None) -> Measured:
        """Of a file or folder. Statistics in it come before those of its images, as ADM has it: they are of more.

        Raises:
            UserError: it cannot be read, or has statistics of other features; names ``key``.
        """
        arrays = read_arrays(path, key) if path.endswith(".npz") else {}
        said = {**said_of_itself(arrays, path, key), **(about or {})}
        gaussians = self._gaussians(arrays, said, path, key)
        if arrays and not has_images(path, key):
            if "features" not in gaussians:
                raise UserError(
                    f"{key}: {path} holds neither images (arr_0) nor statistics (mu, sigma) of {self.extractor.space}"
                )
            return Measured(gaussians, {"path": path, **said})
        found = self.images(open_stored(path, key), name, key, said)
        return replace(found, gaussians={**found.gaussians, **gaussians})

    def _seen(self, images: StoredImages, name: str, key: str) -> Columns:
        own = Share.of(np.arange(len(images)), min(self._batch_size, len(images)), self._runtime)
        batches = run_batches(
            view(self.extractor, self._runtime), self.extractor.tensors(), lambda _: _given(images, own, key),
            len(own.indices), own.batch_size, self._runtime, name, exact=True,
        )  # fmt: skip
        found = [(indices, seen) for indices, (_, seen) in zip(own.batches, batches, strict=True)]
        columns = gathered(found, len(images), self._hosts)
        check_numbers(columns, f"{key}: {images.path}")
        return columns

    def _gaussians(
        self, arrays: Mapping[str, np.ndarray], said: Mapping[str, Any], path: str, key: str
    ) -> dict[str, Gaussian]:
        """The statistics in a file, by column. Those that do not say of which features are Inception's."""
        held = {column: names for column, names in MOMENTS.items() if all(name in arrays for name in names)}
        made_of, ours = said.get("features"), self.extractor.about()
        if made_of is None and self.extractor.space != "inception":
            return {}
        if held and made_of is not None and made_of != ours:
            changed = next(name for name in {**ours, **made_of} if ours.get(name) != made_of.get(name))
            raise UserError(
                f"{key}: statistics of {path} are of features with {changed} {made_of.get(changed)}, now it is "
                f"{ours.get(changed)}; make it again with these, or score with those"
            )
        found = {}
        for column, names in held.items():
            mean, covariance = [arrays[name].astype(np.float64) for name in names]
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
                raise UserError(f"{key}: {path}: {' and '.join(names)} are {shapes}, should be [d] and [d, d]")
            check_numbers({names[0]: mean, names[1]: covariance}, f"{key}: {path}")
            found[column] = Gaussian(mean, covariance, said.get("num_images"))
        return found


def view(extractor: Extractor, runtime: Runtime) -> Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]:
    """An extractor as a program for `run_batches`: ``images`` to columns that lie like the batch."""

    def program(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = extractor(frozen, batch["images"], runtime)
        return {name: runtime.split_batch(values) for name, values in seen.items()}

    return program


def said_of_itself(arrays: Mapping[str, np.ndarray], path: str, key: str) -> dict[str, Any]:
    """What a file of ours says; nothing of others. Raises a `UserError` if it is damaged."""
    if ABOUT not in arrays:
        return {}
    try:
        return dict(json.loads(str(arrays[ABOUT])))
    except ValueError as error:
        raise UserError(f"{key}: {path}: what it says of itself ({ABOUT}) is not JSON; make it again") from error


def _given(images: StoredImages, own: Share, key: str) -> Iterator[Columns]:
    """A host that has no image left takes part with a blank one."""
    blank = np.zeros((1, images.image_size, images.image_size, 3), np.uint8)
    begin, end = (int(own.indices[0]), int(own.indices[-1]) + 1) if len(own.indices) else (0, 0)
    stored = images.rows(begin, end, own.of_host)
    largest = 0
    for indices in own.batches:
        rows = next(stored) if len(indices) else blank
        largest = max(largest, int(rows.max()))
        yield {"images": rows}
    if end > begin and largest <= 1:
        raise UserError(f"{key}: no pixel of {images.path} is above {largest}; images are to be in 0..255")


def check_numbers(columns: Mapping[str, np.ndarray], where: str) -> None:
    """Raises a `UserError` if there is a NaN or an infinity in them."""
    for name, values in columns.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(f"{where}: {name} has values that are no finite numbers; are weights and images whole?")
