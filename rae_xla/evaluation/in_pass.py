"""Scores of samples in the job that makes them: what is kept of a sample is its features, and the image if wanted.

Two programs, one after the other on each batch: the sampler in the recipe's precision, the extractor in float32.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rae_xla.errors import UserError
from rae_xla.evaluation.batches import Columns, Share, run_batches
from rae_xla.evaluation.measured import DIGEST, Measured, check_numbers, digests_of, view, write_statistics
from rae_xla.evaluation.score_files import SCORES, score_manifest, write_scores
from rae_xla.evaluation.scores import Scores, check_enough, warn_of_order
from rae_xla.evaluation.scoring import SampleScoring
from rae_xla.evaluation.stored_images import StoredImages
from rae_xla.hosts import Hosts
from rae_xla.recipe import EvaluationRecipe
from rae_xla.runtime import Runtime
from rae_xla.storage import join

# What stays of samples whose images are not kept: their mean and covariance, for other references.
STATISTICS_FILE = "statistics.npz"


def _named(identity: Mapping[str, Any]) -> str:
    sha256 = identity.get("sha256")
    return str(
        identity["name"] or identity.get("path") or (f"a file of SHA-256 {sha256[:8]}..." if sha256 else "its own data")
    )


class ScoringInPass:
    """Of samples of this size. ``reference``: see `SampleScoring`. ``keep_images``: whether samples stay as images.

    Raises:
        UserError: weights or reference are missing or do not fit.
    """

    def __init__(
        self,
        recipe: EvaluationRecipe,
        reference: str | None,
        image_size: int,
        runtime: Runtime,
        *,
        keep_images: bool = True,
    ) -> None:
        self.keep_images = keep_images
        self._runtime, self._image_size, self._batch_size = runtime, image_size, recipe.batch_size
        self._scoring = SampleScoring(
            recipe.features, recipe.data, reference, recipe.root, image_size, recipe.batch_size, runtime, Hosts(runtime)
        )
        self._started = time.perf_counter()

    def plan(self) -> dict[str, Any]:
        """What a job that goes on has to have in common with the one before; references may differ."""
        return {"features": self._scoring.extractor.about(), "images_kept": self.keep_images}

    def check_same(self, manifest: Mapping[str, Any], directory: str) -> None:
        """Raises a `UserError` if samples that are finished were scored against another reference."""
        before, now = manifest["scored_against"], self.identity()
        if before != now:
            samples = directory if self.keep_images else join(directory, SCORES, STATISTICS_FILE)
            raise UserError(
                f"--reference: {directory} was scored against {_named(before)}, now it is {_named(now)}; "
                f"tools/evaluate.py generation --samples {samples} scores what is there against another"
            )

    def identity(self) -> dict[str, Any]:
        """Of the reference: its content, or for want of that where it is."""
        about = self._scoring.about
        known = {"name": about["name"], "sha256": about.get("sha256")}
        return known if known["sha256"] is not None else {**known, "path": about.get("path")}

    def seen(self, batches: Iterator[tuple[Columns, Columns]], own: Share) -> Iterator[Columns]:
        """What a sampler makes, batch by batch, and the columns of its images."""
        made_before: deque[Columns] = deque()

        def rows(_: int) -> Iterator[Columns]:
            for _given, made in batches:
                made_before.append(made)
                yield {"images": made["images"]}

        extractor = self._scoring.extractor
        found = run_batches(
            view(extractor, self._runtime), extractor.tensors(), rows, len(own.indices), own.batch_size, self._runtime,
            "features", exact=True,
        )  # fmt: skip
        for part, seen in found:
            yield {**made_before.popleft(), **seen, DIGEST: digests_of(part["images"])}

    def reference(self, num_images: int) -> Measured:
        """Measured by all hosts, for so many samples. Raises a `UserError` if these are too few for scores."""
        check_enough(num_images, "--num-images")
        return self._scoring.reference()

    def write(
        self,
        directory: str,
        seen: Columns,
        labels: np.ndarray,
        images: StoredImages | None,
        real: Measured,
        sampling: dict[str, Any],
    ) -> Scores:
        """``scores/manifest.json`` and ``scores/report.html`` of a folder of samples. Returns the scores."""
        check_numbers(seen, directory)
        warn_of_order(labels)
        made = Measured.of(seen, {"path": directory, "num_images": len(labels)}, images, labels)
        scores = self._scoring.scores(made, real)
        extractor = self._scoring.extractor
        manifest = score_manifest(
            self._runtime, extractor, scores, made, real, sampling, self._batch_size, self._started
        )
        write_scores(join(directory, SCORES), manifest, made, real)
        if not self.keep_images:
            said = {
                "features": extractor.about(),
                "num_images": len(labels),
                "image_size": self._image_size,
                "images_sha256": made.about["images_sha256"],
            }
            write_statistics(join(directory, SCORES, STATISTICS_FILE), made.gaussians, said)
        return scores

    @property
    def columns(self) -> tuple[str, ...]:
        """What is kept of each sample besides its image."""
        return (*self._scoring.extractor.columns, DIGEST)
