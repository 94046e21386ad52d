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
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rae_xla import __version__, storage, tensor_files
from rae_xla.config import flattened
from rae_xla.errors import StoppedError, UserError
from rae_xla.evaluation.batches import Columns, Share
from rae_xla.evaluation.files import contact_sheet, read_array, write_array, write_png, write_samples
from rae_xla.evaluation.generation import SampledRecipe, Sampler, labels_of, sample_columns
from rae_xla.evaluation.in_pass import ScoringInPass
from rae_xla.evaluation.measured import Measured
from rae_xla.evaluation.score_files import MANIFEST_FILE
from rae_xla.evaluation.stored_images import SAMPLES_FILE, open_stored
from rae_xla.hosts import Hosts, check_seen_by_all
from rae_xla.recipe import save_recipe
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

# What the samples of a folder are, from the first one on.
PLAN_FILE = "plan.json"
PARTS = "parts"
# Columns of a part: images, and where not all are kept the indices of those that are.
IMAGES = "images"
SHOWN = "images_at"
# What is written at a time, whichever comes first. A kill costs each host that, and the batches under way.
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
    scoring: ScoringInPass | None = None,
) -> dict[str, Any]:
    """Write ``samples.npz``, ``contact_sheet.png``, ``recipe.yaml`` and ``manifest.json``; returns the manifest.

    A set that is there already is not made again; one that was begun is gone on with. On several hosts all of them
    must see ``directory``.

    ``labels``, ints [N]: one image for each; ``None``: ``num_images``, with the labels that the recipe's sampler says.
    ``initial_noise``: a ``.npy`` file, float [N, C, h, w], in place of the seed's. ``save_latents``: a ``.npy`` file
    to write the latents to. ``scoring``: score them too, into ``scores/``, and keep no ``samples.npz`` if it says so.

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
        given = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest() if mode == "given" else None
        plan = {
            "num_images": len(chosen),
            "label_mode": mode,
            "labels_sha256": given,
            "seed": seed,
            **sampler.settings(),
            "latents": save_latents,
            **({} if scoring is None else {"scored": scoring.plan()}),
            "files": {name: {"path": path, "sha256": storage.content_hash(path)} for name, path in read.items()},
        }
        return _begun(recipe, directory, plan)

    begun = hosts.from_first(begin)
    if begun.manifest is not None:
        logger.info("samples: %s has them already", directory)
        if scoring is not None:
            scoring.check_same(begun.manifest, directory)
        return begun.manifest
    check_seen_by_all(storage.join(directory, PLAN_FILE), "--out", hosts)
    # Before the samples: it takes less, and what is wrong with it is to be known first.
    real = None if scoring is None else scoring.reference(len(chosen))
    own = Share.of(begun.missing, min(recipe.sampler.batch_size, len(chosen)), runtime)
    columns = (sample_columns(indices, chosen, noise) for indices in own.given)
    wanted = ("images", "latents") if save_latents is not None else ("images",)
    batches = sampler.run(lambda _: columns, len(own.indices), seed, own.batch_size, wanted)
    found = (made for _, made in batches) if scoring is None else scoring.seen(batches, own)
    sheet = _Sheet(chosen, in_classes=mode in ("balanced", "random"))
    failure = None
    try:
        with _PartsWriter(directory, None if scoring is None or scoring.keep_images else sheet.places) as writer:
            for indices, made in zip(own.batches, found, strict=True):
                writer.add(indices, made)
    except UserError as error:
        failure = error
    failures = [error for error in hosts.of_all(failure) if error is not None]
    if failures:
        raise failures[0]
    about = {
        **sampler.derived(),
        "made_now": len(begun.missing),
        "rae_xla": __version__,
        "runtime": runtime.describe(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return hosts.from_first(lambda: _put_together(directory, chosen, save_latents, about, sheet, scoring, real))


def _begun(recipe: SampledRecipe, directory: str, plan: dict[str, Any]) -> _Begun:
    path, finished = storage.join(directory, PLAN_FILE), storage.join(directory, MANIFEST_FILE)
    latents = plan["latents"]
    if storage.exists(path):
        before = storage.read_json(path)
        then, now = (dict(flattened(content)) for content in (before, plan))
        for key in dict.fromkeys((*now, *then)):
            # Files may have moved.
            if now.get(key) != then.get(key) and not key.endswith(".path"):
                raise UserError(
                    f"--out: {directory} holds samples made with another {key} ({_shown(then.get(key))}, now "
                    f"{_shown(now.get(key))}); give another folder, or remove it"
                )
        if storage.exists(finished):
            if latents is not None and not storage.exists(latents):
                raise UserError(f"--save-latents: {latents} is gone, and {directory} is finished; give another folder")
            _remove_parts(directory)
            return _Begun(np.empty(0, np.int64), dict(storage.read_json(finished)))
    elif set(storage.list_names(directory)) & {MANIFEST_FILE, SAMPLES_FILE, PARTS}:
        raise UserError(
            f"--out: {directory} holds samples and no {PLAN_FILE}, which says what they are; give another folder"
        )
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


class _PartsWriter:
    """Files of samples whose indices follow each other, written behind the next batches.

    ``shown``: of all others no image is kept.
    """

    def __init__(self, directory: str, shown: list[int] | None) -> None:
        self._shown = None if shown is None else frozenset(shown)
        self._directory = storage.join(directory, PARTS)
        self._samples: list[tuple[int, Columns]] = []
        self._thread = ThreadPoolExecutor(1, "samples")
        self._writing: Future[None] | None = None
        self._written_at = time.monotonic()

    def __enter__(self) -> _PartsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # What is whole is kept whatever ends the job.
        self._write_next()
        self._wait()
        self._thread.shutdown()

    def add(self, indices: np.ndarray, made: Columns) -> None:
        """Samples in the order of their indices; rows beyond these are none. Raises a `UserError` if a write failed."""
        for row, index in enumerate(indices.tolist()):
            samples = self._samples
            if samples and (len(samples) == IMAGES_PER_PART or index != samples[-1][0] + 1):
                self._write_next()
            kept = {name: values[row] for name, values in made.items()}
            if self._shown is not None and index not in self._shown:
                del kept[IMAGES]
            self._samples.append((index, kept))
        if time.monotonic() - self._written_at > SECONDS_PER_PART:
            self._write_next()

    def _write_next(self) -> None:
        self._wait()
        self._written_at = time.monotonic()
        samples, self._samples = self._samples, []
        if not samples:
            return
        columns: dict[str, list[np.ndarray]] = defaultdict(list)
        for index, kept in samples:
            for name, values in kept.items():
                columns[name].append(values)
            if self._shown is not None and IMAGES in kept:
                columns[SHOWN].append(np.array(index))
        tensors = {name: torch.from_numpy(np.stack(rows)) for name, rows in columns.items()}
        path = _part_path(self._directory, samples[0][0], samples[-1][0] + 1)
        self._writing = self._thread.submit(tensor_files.write_tensors, path, tensors)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _part_path(directory: str, begin: int, end: int) -> str:
    return storage.join(directory, f"{begin:08d}-{end:08d}.safetensors")


def _parts_at(directory: str) -> list[tuple[int, int]]:
    """Ranges of indices that are written, in order."""
    names = storage.list_names(storage.join(directory, PARTS))
    found = [re.fullmatch(r"(\d+)-(\d+)\.safetensors", name) for name in names]
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _remove_parts(directory: str) -> None:
    if PARTS in storage.list_names(directory):
        storage.remove(storage.join(directory, PARTS))


@dataclass(frozen=True)
class _Part:
    """Rows ``first`` to ``end`` of a set, which are in the file of ``begin`` to ``end``."""

    path: str
    begin: int
    first: int
    end: int

    def read(self, *names: str) -> Columns:
        """Raises a `StoppedError` if the file does not hold what its name says."""
        tensors = tensor_files.read_tensors(self.path, "--out")
        if any(name not in tensors or len(tensors[name]) != self.end - self.begin for name in names):
            raise StoppedError(f"{self.path} is damaged; remove it, and the same command makes its samples again")
        return {name: tensors[name].numpy()[self.first - self.begin :] for name in names}

    def shown(self) -> Iterator[tuple[int, np.ndarray]]:
        """Of a set without images, those that are kept for the sheet, by their indices."""
        tensors = tensor_files.read_tensors(self.path, "--out")
        if SHOWN in tensors:
            yield from zip(tensors[SHOWN].tolist(), tensors[IMAGES].numpy(), strict=True)


def _all_parts(directory: str, num_images: int) -> list[_Part]:
    """Every row once: hosts of a job that was thought dead may have made some again, and those are the same."""
    parts, reached = [], 0
    for begin, end in _parts_at(directory):
        if begin <= reached < end:
            parts.append(_Part(_part_path(storage.join(directory, PARTS), begin, end), begin, reached, end))
            reached = end
    if reached != num_images:
        raise StoppedError(f"{directory}: sample {reached} is missing; the same command makes it")
    return parts


def _put_together(
    directory: str,
    labels: np.ndarray,
    save_latents: str | None,
    about: dict[str, Any],
    sheet: _Sheet,
    scoring: ScoringInPass | None,
    real: Measured | None,
) -> dict[str, Any]:
    parts = _all_parts(directory, len(labels))
    plan = storage.read_json(storage.join(directory, PLAN_FILE))
    samples = storage.join(directory, SAMPLES_FILE)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (scoring.columns if scoring is not None else ())}

    def images() -> Iterator[np.ndarray]:
        """Of all parts, each read once: the sheet takes what it shows, and columns what scores are of."""
        for part in parts:
            read = part.read(*columns, *([IMAGES] if keeps_images else []))
            for name, rows in columns.items():
                rows.append(read[name])
            if keeps_images:
                yield sheet.seen(part.first, read[IMAGES])
            else:
                for index, image in part.shown():
                    sheet.seen(index, image[None])

    keeps_images = scoring is None or scoring.keep_images
    if keeps_images:
        shape = parts[0].read(IMAGES)[IMAGES].shape[1:]
        write_samples(samples, images(), (len(labels), *shape), labels)
    else:
        list(images())
    if save_latents is not None:
        shape = parts[0].read("latents")["latents"].shape[1:]
        latents = (part.read("latents")["latents"] for part in parts)
        write_array(save_latents, latents, (len(labels), *shape), np.dtype(np.float32))
    write_png(storage.join(directory, "contact_sheet.png"), sheet.drawn())
    manifest = {**plan, **about}
    if scoring is not None and real is not None:
        seen = {name: np.concatenate(rows) for name, rows in columns.items()}
        stored = open_stored(samples, "--out") if keeps_images else None
        scores = scoring.write(directory, seen, labels, stored, real, manifest)
        manifest |= {"scores": scores, "scored_against": scoring.identity()}
    storage.write_json(storage.join(directory, MANIFEST_FILE), manifest)
    _remove_parts(directory)
    return manifest


class _Sheet:
    """At most 100 images, picked out as they pass: a row for each of the first classes, or the first of them."""

    def __init__(self, labels: np.ndarray, *, in_classes: bool) -> None:
        classes = np.unique(labels)[: LARGEST_SHEET // ROWS_OF_A_CLASS]
        rows = [np.flatnonzero(labels == label)[:ROWS_OF_A_CLASS] for label in classes]
        if in_classes and min(map(len, rows)) > 1:
            self._columns = max(map(len, rows))
            self.places = [int(index) for row in rows for index in [*row, *[-1] * (self._columns - len(row))]]
        else:
            self.places = list(range(min(LARGEST_SHEET, len(labels))))
            self._columns = min(10, len(self.places))
        self._images: dict[int, np.ndarray] = {}

    def seen(self, begin: int, images: np.ndarray) -> np.ndarray:
        """The same images; those of them that the sheet shows are kept."""
        for index in self.places:
            if begin <= index < begin + len(images):
                self._images[index] = images[index - begin].copy()
        return images

    def drawn(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        blank = np.full_like(next(iter(self._images.values())), 255)
        return contact_sheet(np.stack([self._images.get(index, blank) for index in self.places]), self._columns)
