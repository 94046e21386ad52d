"""A set of images as scores see it: the Gaussians of its features, and the features themselves where it holds images.

B batch, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.evaluation.batches import Columns, Share, as_step, gathered, own_rows, run_batches
from rae_xla.evaluation.features import Extractor
from rae_xla.evaluation.files import write_arrays
from rae_xla.evaluation.gaussian import Gaussian
from rae_xla.evaluation.stored_images import StoredImages, has_images, open_stored, read_arrays
from rae_xla.hosts import Hosts
from rae_xla.runtime import Runtime

# ADM's names for mean and covariance of a column.
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# What a file of ours says of itself, as JSON.
ABOUT = "about"


# Beside the columns of an extractor: eight bytes that tell one image from another.
DIGEST = "digest"


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
        seen: Columns, about: Mapping[str, Any], images: StoredImages | None = None, labels: np.ndarray | None = None
    ) -> Measured:
        """What an extractor sees of images. A column `DIGEST` becomes one hash of all images, in ``about``."""
        gaussians = {column: Gaussian.of(seen[column]) for column in MOMENTS if column in seen}
        content = {"images_sha256": hashlib.sha256(seen[DIGEST].tobytes()).hexdigest()} if DIGEST in seen else {}
        return Measured(gaussians, {**about, **content}, seen, images, labels)


class Measuring:
    """Measures sets of images of one size with an extractor, in batches of one shape, on all devices of all hosts.

    ``image_size``: ``None`` where there are statistics only.
    """

    def __init__(
        self, extractor: Extractor, image_size: int | None, batch_size: int, runtime: Runtime, hosts: Hosts
    ) -> None:
        self.extractor = extractor
        self._image_size, self._batch_size, self._runtime, self._hosts = image_size, batch_size, runtime, hosts

    def images(self, images: StoredImages, name: str, key: str, about: Mapping[str, Any] | None = None) -> Measured:
        """Of a set of images; each host reads its share of them, and gets what all have found.

        Raises:
            UserError: images are of another size or no pictures, or features are no numbers, on any host; names
                ``key``.
        """
        self._check_size(images.image_size, f"images of {images.path}", key)
        own = Share.of(np.arange(len(images)), min(self._batch_size, len(images)), self._runtime)
        reading = _Reading(images, own)
        batches = run_batches(
            view(self.extractor, self._runtime), self.extractor.tensors(), lambda _: reading.batches(),
            len(own.indices), own.batch_size, self._runtime, name, exact=True,
        )  # fmt: skip
        found = [
            (indices, {**seen, DIGEST: digests_of(part["images"])})
            for indices, (part, seen) in zip(own.batches, batches, strict=True)
        ]
        for failure in self._hosts.of_all(reading.failure):
            if failure is not None:
                raise failure
        largest = max(self._hosts.of_all(reading.largest))
        if largest <= 1:
            raise UserError(f"{key}: no pixel of {images.path} is above {largest}; images are to be in 0..255")
        columns = gathered(found, len(images), self._hosts)
        check_numbers(columns, f"{key}: {images.path}")
        about = {"path": images.path, "num_images": len(images), **(about or {})}
        return Measured.of(columns, about, images, images.labels)

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
        if not gaussians:
            return found
        # The statistics are of images that are not here, and of how many only the file can say.
        kept = {"num_images": said.get("num_images"), "kept_images": len(found.images or ())}
        return replace(found, gaussians={**found.gaussians, **gaussians}, about={**found.about, **kept})

    def _check_size(self, size: int, what: str, key: str) -> None:
        if self._image_size not in (None, size):
            raise UserError(
                f"{key}: {what} have {size} pixels a side, and {self._image_size} are scored; take one size"
            )

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
        if held and "image_size" in said:
            self._check_size(said["image_size"], f"statistics of {path}", key)
        found = {}
        for column, names in held.items():
            width = self.extractor.columns.get(column)
            mean, covariance = [arrays[name].astype(np.float64) for name in names]
            if mean.shape != (width,) or covariance.shape != (width, width):
                shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
                wanted = f"[{width}] and [{width}, {width}]"
                raise UserError(f"{key}: {path}: {' and '.join(names)} are {shapes}, should be {wanted}")
            check_numbers({names[0]: mean, names[1]: covariance}, f"{key}: {path}")
            found[column] = Gaussian(mean, covariance, said.get("num_images"))
        return found


def view(extractor: Extractor, runtime: Runtime) -> Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]:
    """An extractor as a program for `run_batches`: ``images`` to columns that lie like the batch."""

    def program(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = extractor(frozen, batch["images"], runtime)
        return {name: runtime.split_batch(values) for name, values in seen.items()}

    return program


class Viewing:
    """An extractor as a compiled program of its own, for images that are on the devices."""

    def __init__(self, extractor: Extractor, runtime: Runtime) -> None:
        self.extractor, self._runtime = extractor, runtime
        self._program = runtime.compile(as_step(view(extractor, runtime)), "features", exact=True)
        self._tensors: Any = None

    def prepare(self, images: Tensor) -> None:
        """Compile for batches like this one."""
        self._tensors = self._runtime.place_frozen(self.extractor.tensors())
        self._program.prepare({}, self._tensors, {"images": images})

    def __call__(self, images: Tensor) -> Columns:
        """What it sees of this host's images."""
        _, seen = self._program({}, self._tensors, {"images": images})
        return own_rows(seen, self._runtime)


def write_statistics(
    path: str,
    gaussians: Mapping[str, Gaussian],
    about: Mapping[str, Any],
    others: Mapping[str, np.ndarray] | None = None,
) -> None:
    """An ``.npz`` with ADM's names, that says of what it is; and other arrays."""
    arrays = {ABOUT: np.array(json.dumps(about))}
    for column, gaussian in gaussians.items():
        arrays |= dict(zip(MOMENTS[column], (gaussian.mean, gaussian.covariance), strict=True))
    write_arrays(path, {**arrays, **(others or {})})


def said_of_itself(arrays: Mapping[str, np.ndarray], path: str, key: str) -> dict[str, Any]:
    """What a file of ours says; nothing of others. Raises a `UserError` if it is damaged."""
    if ABOUT not in arrays:
        return {}
    try:
        return dict(json.loads(str(arrays[ABOUT])))
    except ValueError as error:
        raise UserError(f"{key}: {path}: what it says of itself ({ABOUT}) is not JSON; make it again") from error


def digests_of(images: np.ndarray) -> np.ndarray:
    """uint8 [n, S, S, 3] -> int64 [n]."""
    found = [hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest() for image in images]
    return np.frombuffer(b"".join(found), "<i8")


class _Reading:
    """A host's share of images, batch by batch. What fails does not keep it from its part in the other batches."""

    def __init__(self, images: StoredImages, own: Share) -> None:
        self._images, self._own = images, own
        self.failure: UserError | None = None
        self.largest = 0

    def batches(self) -> Iterator[Columns]:
        """A host that has no image left takes part with a blank one."""
        own, size = self._own, self._images.image_size
        begin, end = (int(own.indices[0]), int(own.indices[-1]) + 1) if len(own.indices) else (0, 0)
        stored = self._images.rows(begin, end, own.of_host)
        for indices in own.batches:
            rows = np.zeros((max(1, len(indices)), size, size, 3), np.uint8)
            if len(indices) and self.failure is None:
                try:
                    rows = next(stored)
                except UserError as error:
                    self.failure = error
            self.largest = max(self.largest, int(rows.max()))
            yield {"images": rows}


def check_numbers(columns: Mapping[str, np.ndarray], where: str) -> None:
    """Raises a `UserError` if there is a NaN or an infinity in them."""
    for name, values in columns.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(f"{where}: {name} has values that are no finite numbers; are weights and images whole?")
