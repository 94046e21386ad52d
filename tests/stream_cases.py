"""What tests of images in shards have in common."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from conftest import run_tool

from rae_xla.data.loader import Batch
from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig, open_source
from rae_xla.data.stream import StreamedBatches


def config_of(source: object, **changes: object) -> DataConfig:
    stream = {"shuffle_images": 32, "num_workers": 0, **changes.pop("stream", {})}
    values = {"image_size": 32, "batch_size": 8, "resampling": "exact", **changes}
    return DataConfig(source=str(source), stream=StreamConfig(**stream), **values)


def batches_of(config: DataConfig, num: int, *, step: int = 0, process: int = 0, of: int = 1) -> list[Batch]:
    images = open_source(config, ".", "train")
    assert isinstance(images, ShardedImages)
    arriving = StreamedBatches(images, config, 3, process, of).from_step(step)
    found = [batch.tensors for batch in islice(arriving, num)]
    arriving.close()
    return found


def prepare(source: str, manifest: Path | str, *options: str) -> tuple[int, str]:
    code, _, errors = run_tool("prepare_data", source, "--out", str(manifest), *options)
    return code, errors
