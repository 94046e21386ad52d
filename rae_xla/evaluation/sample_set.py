"""Sets of samples of any size, on any number of hosts: written piece by piece, and gone on with after a kill.

While a set is made, ``DIR/parts/`` has files of some hundred samples, each named by the range of their indices. What a
job finds there it does not make again; what is missing is shared out evenly, whoever made the rest. When all is there
the first host puts it together as ``samples.npz``, and the parts go.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rae_xla import __version__, storage
from rae_xla.config import flattened
from rae_xla.errors import StoppedError, UserError
from rae_xla.evaluation.batches import Columns, batch_size_for
from rae_xla.evaluation.files import contact_sheet, read_array, write_array, write_png, write_samples
from rae_xla.evaluation.generation import SampledRecipe, Sampler, labels_of, sample_columns
from rae_xla.hosts import Hosts
from rae_xla.recipe import save_recipe
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
# What the samples of a folder are, from the first one on.
PLAN_FILE = "plan.json"
PARTS = "parts"
# What a kill may cost each host, whichever comes first.
IMAGES_PER_PART = 512
SECONDS_PER_PART = 60.0
LARGEST_SHEET = 100
ROWS_OF_A_CLASS = 10


@dataclass(frozen=True)
class _Begun:
    """What the first host tells the others. ``missing``: indices [n]; ``manifest``: of a set that is there already."""

    missing: np.ndarray
    manifest: dict[str, Any] | None


def write_sample_set(
    recipe: SampledRecipe,
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

    A set that is there already is not made again; one that was begun is gone on with. On several hosts all of them
    must see ``directory``.

    ``labels``, ints [N]: one image for each; ``None``: ``num_images``, with the labels that the recipe's sampler says.
    ``initial_noise``: a ``.npy`` file, float [N, C, h, w], in place of the seed's. ``save_latents``: a ``.npy`` file
    to write the latents to.

    Raises:
        UserError: labels or noise do not fit the model; the folder has samples of another kind.
        StoppedError: parts of another job's hosts are missing.
    """
    started = time.perf_counter()
    hosts = Hosts(runtime)
    sampler = Sampler(recipe, runtime)
    noise = None if initial_noise is None else read_array(initial_noise, "--initial-noise")
    mode = recipe.sampler.labels if labels is None else "given"
    chosen = labels_of(mode, seed, num_images, sampler.num_classes) if labels is None else labels
    sampler.check(chosen, noise)

    def begin() -> _Begun:
        read = {**sampler.weights_files(), **({} if initial_noise is None else {"initial_noise": initial_noise})}
        plan = {
            "num_images": len(chosen),
            "label_mode": mode,
            "labels_sha256": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
            "seed": seed,
            **sampler.settings(),
            "latents": save_latents is not None,
            "files": {name: {"path": path, "sha256": storage.content_hash(path)} for name, path in read.items()},
        }
        return _begun(recipe, directory, plan)

    begun = hosts.told_by_first(begin)
    if begun.manifest is not None:
        logger.info("samples: %s has them already", directory)
        return begun.manifest
    if not storage.exists(storage.join(directory, PLAN_FILE)):
        raise UserError(f"--out: host {runtime.process_index} does not see {directory}; give a gs:// folder")
    wanted = ("images", "latents") if save_latents is not None else ("images",)
    with _PartsWriter(directory) as writer:
        for rows, made in _sampled(sampler, runtime, recipe, begun.missing, chosen, noise, seed, wanted):
            writer.add(rows, made)
    hosts.all_told(None)
    seconds = round(time.perf_counter() - started, 2)
    about = {"made_now": len(begun.missing), "rae_xla": __version__, "runtime": runtime.describe()}
    return hosts.told_by_first(lambda: _put_together(directory, chosen, save_latents, {**about, "seconds": seconds}))


def _begun(recipe: SampledRecipe, directory: str, plan: dict[str, Any]) -> _Begun:
    path, finished = storage.join(directory, PLAN_FILE), storage.join(directory, MANIFEST_FILE)
    if storage.exists(path):
        before = storage.read_json(path)
        then, now = (dict(flattened(content)) for content in (before, plan))
        for key in sorted({*now, *then}):
            # Files may have moved.
            if now.get(key) != then.get(key) and not key.endswith(".path"):
                raise UserError(
                    f"--out: {directory} holds samples made with another {key} ({_shown(then.get(key))}, now "
                    f"{_shown(now.get(key))}); give another folder, or remove it"
                )
        if storage.exists(finished):
            return _Begun(np.empty(0, np.int64), dict(storage.read_json(finished)))
    else:
        save_recipe(recipe, directory)
        storage.write_json(path, plan)
    missing = np.ones(plan["num_images"], bool)
    for first, last in _parts_at(directory):
        missing[first:last] = False
    if not missing.all():
        logger.info("samples: %d of %d are in %s already", np.sum(~missing), len(missing), directory)
    return _Begun(np.flatnonzero(missing), None)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sampled(
    sampler: Sampler,
    runtime: Runtime,
    recipe: SampledRecipe,
    missing: np.ndarray,
    labels: np.ndarray,
    noise: np.ndarray | None,
    seed: int,
    wanted: tuple[str, ...],
) -> Iterator[tuple[np.ndarray, Columns]]:
    """Batch by batch, what this host has to make: indices and what was made of them."""
    shares = np.array_split(missing, runtime.num_processes)
    own = shares[runtime.process_index]
    batch_size = batch_size_for(min(recipe.sampler.batch_size, len(labels)), runtime)
    of_host = batch_size // runtime.num_processes
    # As many batches as the host with the largest share has: all devices are in every one of them.
    begins = range(0, max(map(len, shares)), of_host)

    def rows(size: int) -> Iterator[Columns]:
        for begin in begins:
            yield sample_columns(own[begin : begin + size] if begin < len(own) else np.zeros(1, int), labels, noise)

    batches = sampler.run(rows, len(own), seed, batch_size, wanted)
    for begin, (_, made) in zip(begins, batches, strict=True):
        indices = own[begin : begin + of_host]
        yield indices, {name: values[: len(indices)] for name, values in made.items()}


class _PartsWriter:
    """Files of samples whose indices follow each other, written behind the next batches."""

    def __init__(self, directory: str) -> None:
        self._directory = storage.join(directory, PARTS)
        self._indices: list[int] = []
        self._rows: dict[str, list[np.ndarray]] = {}
        self._thread = ThreadPoolExecutor(1, "samples")
        self._writing: Future[None] | None = None
        self._written_at = time.monotonic()

    def __enter__(self) -> _PartsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is whole is kept whatever ends the job.
        self._write_next()
        self._wait()
        self._thread.shutdown()

    def add(self, indices: np.ndarray, made: Columns) -> None:
        """Rows of samples, in the order of their indices. Raises a `UserError` if some could not be written."""
        for row, index in enumerate(indices.tolist()):
            if self._indices and (len(self._indices) == IMAGES_PER_PART or index != self._indices[-1] + 1):
                self._write_next()
            self._indices.append(index)
            for name, values in made.items():
                self._rows.setdefault(name, []).append(values[row])
        if time.monotonic() - self._written_at > SECONDS_PER_PART:
            self._write_next()

    def _write_next(self) -> None:
        self._wait()
        self._written_at = time.monotonic()
        if not self._indices:
            return
        tensors = {name: torch.from_numpy(np.stack(rows)) for name, rows in self._rows.items()}
        name = f"{self._indices[0]:08d}-{self._indices[-1] + 1:08d}.safetensors"
        self._writing = self._thread.submit(storage.write_tensors, storage.join(self._directory, name), tensors)
        self._indices, self._rows = [], {}

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _parts_at(directory: str) -> list[tuple[int, int]]:
    """Ranges of indices that are written, in order."""
    names = storage.list_names(storage.join(directory, PARTS))
    found = [re.fullmatch(r"(\d+)-(\d+)\.safetensors", name) for name in names]
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _put_together(
    directory: str, labels: np.ndarray, save_latents: str | None, about: dict[str, Any]
) -> dict[str, Any]:
    parts = _parts_at(directory)
    ends = [0, *[end for _, end in parts]]
    if [begin for begin, _ in parts] != ends[:-1] or ends[-1] != len(labels):
        raise StoppedError(f"{directory}: parts of the samples are missing; the same command makes them")

    def read(name: str) -> Iterator[np.ndarray]:
        for begin, end in parts:
            path = storage.join(directory, PARTS, f"{begin:08d}-{end:08d}.safetensors")
            yield storage.read_tensors(path, "--out")[name].numpy()

    plan = storage.read_json(storage.join(directory, PLAN_FILE))
    sheet = _Sheet(labels, in_classes=plan["label_mode"] in ("balanced", "random"))
    first = next(read("images"))
    images = (sheet.seen(begin, part) for (begin, _), part in zip(parts, read("images"), strict=True))
    write_samples(storage.join(directory, "samples.npz"), images, (len(labels), *first.shape[1:]), labels)
    if save_latents is not None:
        shape = next(read("latents")).shape[1:]
        write_array(save_latents, read("latents"), (len(labels), *shape), np.dtype(np.float32))
    write_png(storage.join(directory, "contact_sheet.png"), sheet.drawn())
    manifest = {**plan, **about}
    storage.write_json(storage.join(directory, MANIFEST_FILE), manifest)
    storage.remove(storage.join(directory, PARTS))
    return manifest


class _Sheet:
    """At most 100 images, picked out as they pass: a row for each of the first classes, or the first of them."""

    def __init__(self, labels: np.ndarray, *, in_classes: bool) -> None:
        classes = np.unique(labels)[: LARGEST_SHEET // ROWS_OF_A_CLASS]
        rows = [np.flatnonzero(labels == label)[:ROWS_OF_A_CLASS] for label in classes]
        if in_classes and min(map(len, rows)) > 1:
            self._columns = max(map(len, rows))
            self._places = [index for row in rows for index in [*row, *[-1] * (self._columns - len(row))]]
        else:
            self._places = list(range(min(LARGEST_SHEET, len(labels))))
            self._columns = min(10, len(self._places))
        self._images: dict[int, np.ndarray] = {}

    def seen(self, begin: int, images: np.ndarray) -> np.ndarray:
        """The same images; those of them that the sheet shows are kept."""
        for index in self._places:
            if begin <= index < begin + len(images):
                self._images[index] = images[index - begin].copy()
        return images

    def drawn(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        blank = np.full_like(next(iter(self._images.values())), 255)
        return contact_sheet(np.stack([self._images.get(index, blank) for index in self._places]), self._columns)
