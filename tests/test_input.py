"""Images in shards: every one once an epoch, the same for any number of hosts, whatever the bucket does meanwhile."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_tool
from faulty_bucket import BUCKET, FAULTS, FaultyProxy
from photos import NUM_CLASSES, Rows, encoded, parquet, samples, write_shards
from PIL import Image
from stream_cases import batches_of, config_of, prepare

from rae_xla.data.loader import LoadedBatch, images_in_order
from rae_xla.data.manifest import read_manifest
from rae_xla.data.order import SampleOrder
from rae_xla.data.prefetch import Prefetched
from rae_xla.data.shards import parquet_of
from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig, open_in_memory, open_source
from rae_xla.data.stream import StreamedBatches
from rae_xla.data.transforms import centre_crop, decoded
from rae_xla.errors import SourceError
from rae_xla.training.metrics import read_metrics

KINDS = ("parquet", "arrow", "arrow_file", "tar", "files")


@pytest.fixture(scope="module", params=KINDS)
def manifest(request: pytest.FixtureRequest, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    source = write_shards(directory, request.param, rows, num_shards=3, images_per_block=7)
    code, errors = prepare(source, directory / "manifest.json")
    assert code == 0, errors
    return directory / "manifest.json"


@pytest.fixture(scope="module")
def parquet_manifest(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    write_shards(directory, "parquet", rows, num_shards=4, images_per_block=7)
    assert prepare(str(directory), directory / "manifest.json")[0] == 0
    return directory / "manifest.json"


def test_every_kind_of_shard_gives_its_images(manifest: Path, rows: Rows) -> None:
    expected = Counter((label, centre_crop(decoded(image), 32).tobytes()) for image, label in rows)
    found: Counter[tuple[int, bytes]] = Counter()
    for batch in batches_of(config_of(manifest, batch_size=20), 5):
        pairs = zip(batch["labels"].tolist(), batch["images"].numpy(), strict=True)
        found.update((label, image.tobytes()) for label, image in pairs)
    assert found == expected
    about = read_manifest(str(manifest))
    assert about.num_images == len(rows) and about.num_classes == NUM_CLASSES
    assert all(not shard.path.startswith("/") for shard in about.shards if not shard.files), "it can be moved"


def test_hosts_and_workers_and_resumes_give_the_batches_of_one(parquet_manifest: Path) -> None:
    config = config_of(parquet_manifest, flip=True, crop="random", short_side=40)
    whole = batches_of(config, 30)
    assert torch.cat([batch["positions"] for batch in whole]).tolist() == list(range(240))
    hosts = [batches_of(config, 10, step=17, process=host, of=4) for host in range(4)]
    two_workers = config.model_copy(update={"stream": StreamConfig(shuffle_images=32, num_workers=2)})
    workers = batches_of(two_workers, 3, step=17)
    for number in range(10):
        for name, expected in whole[17 + number].items():
            assert torch.equal(torch.cat([host[number][name] for host in hosts]), expected)
            assert number >= 3 or torch.equal(workers[number][name], expected)


def test_every_image_in_order_for_statistics(parquet_manifest: Path, rows: Rows) -> None:
    config = config_of(parquet_manifest)
    parts = list(images_in_order(open_source(config, ".", "train"), config)(32))
    assert [len(part["images"]) for part in parts] == [32, 32, 32, 4]
    expected = np.stack([centre_crop(decoded(image), 32) for image, _ in rows])
    assert (np.concatenate([part["images"] for part in parts]) == expected).all()


def test_an_image_that_cannot_be_decoded_is_told_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = samples(40)
    rows[11], rows[31] = (rows[11][0][:200], 1), (b"nothing", 1)
    (tmp_path / "a.parquet").write_bytes(parquet(rows, 8))
    assert prepare(str(tmp_path), tmp_path / "manifest.json")[0] == 0
    config = config_of(tmp_path / "manifest.json", stream={"max_unreadable": 2})
    images = open_source(config, ".", "train")
    assert isinstance(images, ShardedImages)
    found = list(islice(StreamedBatches(images, config, 0, 0, 1).from_step(0), 5))
    assert sum(batch.counts.get("unreadable", 0) for batch in found) == 2
    assert "block 1 row 3 (" in caplog.text and "block 3 row 7 (no image of a known kind)" in caplog.text
    assert torch.cat([batch.tensors["positions"] for batch in found]).tolist() == list(range(40))
    config = config_of(tmp_path / "manifest.json", stream={"max_unreadable": 1})
    with pytest.raises(SourceError, match=r"2 images cannot be decoded, the last .*block .*data.stream.max_unreadable"):
        list(islice(StreamedBatches(images, config, 0, 0, 1).from_step(0), 5))


def test_a_faulty_bucket_gives_the_same_batches(bucket: FaultyProxy) -> None:
    source = f"gs://{BUCKET}/set/manifest.json"
    config = config_of(source, stream={"timeout_seconds": 1.0, "give_up_seconds": 60.0})
    clean = batches_of(config, 26)
    bucket.rate = 0.25
    images = open_source(config, ".", "train")
    assert isinstance(images, ShardedImages)
    found = list(islice(StreamedBatches(images, config, 3, 0, 1).from_step(0), 26))
    assert all(bucket.injected[fault] for fault in FAULTS), bucket.injected
    for batch, expected in zip(found, clean, strict=True):
        assert all(torch.equal(batch.tensors[name], expected[name]) for name in expected)
    retries = Counter[str]()
    for batch in found:
        retries.update(batch.counts)
    # aiohttp repeats a request by itself if the connection that it had kept was closed.
    for fault in set(FAULTS) - {"connection"}:
        assert retries[f"retries_{fault}"], retries


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bucket_that_stays_away_ends_the_reading(bucket: FaultyProxy, num_workers: int) -> None:
    stream = {"timeout_seconds": 1.0, "give_up_seconds": 1.0, "num_workers": num_workers}
    config = config_of(f"gs://{BUCKET}/set/manifest.json", stream=stream)
    images = open_source(config, ".", "train")
    bucket.away = True
    assert isinstance(images, ShardedImages)
    with pytest.raises(
        SourceError, match=r"^gs://images/set/train-\d.parquet cannot be reached for 1 seconds: [^\n]*$"
    ):
        next(StreamedBatches(images, config, 0, 0, 1).from_step(0))


RECIPE = """
task: classifier
seed: 1
runtime: eager
run_dir: run
data:
  source: shards/manifest.json
  image_size: 32
  batch_size: 10
  flip: true
  stream: {shuffle_images: 8, num_workers: 1, give_up_seconds: 1.0}
model: {name: convnet, width: 8, feature_width: 8}
train: {num_epochs: 3, learning_rate: 1.0e-3, schedule: constant, clip_norm: null, ema_decay: 0.9}
log: {every_steps: 1}
checkpoint: {every_steps: 100}
"""


def test_a_run_whose_source_goes_away_saves_and_goes_on_later(tmp_path: Path, rows: Rows) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    for root in ("whole", "broken"):
        write_shards(tmp_path / root / "shards", "parquet", rows, num_shards=10, images_per_block=5)
        assert prepare(str(tmp_path / root / "shards"), tmp_path / root / "shards" / "manifest.json")[0] == 0
    code, _, errors = run_tool("train", str(recipe), f"root={tmp_path}/whole")
    assert code == 0, errors
    # A shard whose bytes are not as they were indexed: found when it is read, which is not at once.
    windows = islice(SampleOrder([5] * 20, 10, 8, seed=1).windows(0, 0), 3)
    number = min(set(range(10)) - {piece.block // 2 for window in windows for piece in window.pieces})
    shard = tmp_path / "broken" / "shards" / f"train-{number:03d}.parquet"
    content = shard.read_bytes()
    shard.write_bytes(bytes(len(content)))
    code, _, errors = run_tool("train", str(recipe), f"root={tmp_path}/broken")
    assert code == 1 and "Traceback" not in errors, errors
    assert f"{shard.name}: block" in errors and "; saved at step" in errors.splitlines()[-1], errors
    shard.write_bytes(content)
    code, _, errors = run_tool("train", str(recipe), f"root={tmp_path}/broken")
    assert code == 0, errors
    weights = [(tmp_path / root / "run" / "weights.safetensors").read_bytes() for root in ("whole", "broken")]
    assert weights[0] == weights[1]
    # The content of a manifest is part of what a run is.
    manifest = tmp_path / "broken" / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_classes": 5', '"num_classes": 6'))
    code, _, errors = run_tool("train", str(recipe), f"root={tmp_path}/broken", "train.num_epochs=4")
    assert code == 2 and "data.source: " in errors and "is not what" in errors


def test_a_prefetching_thread_ends_with_its_context() -> None:
    closed = []

    def batches() -> Iterator[LoadedBatch]:
        try:
            for step in range(1000):
                yield LoadedBatch({"x": torch.tensor([step])}, {"retries_server": 1})
        finally:
            closed.append(True)

    with Prefetched(batches(), lambda batch: batch["x"] + 1) as arriving:
        assert [next(arriving) for _ in range(3)] == [(torch.tensor([n]), {"retries_server": 1}) for n in (1, 2, 3)]
    assert closed == [True] and not arriving._thread.is_alive()

    def failing() -> Iterator[LoadedBatch]:
        yield LoadedBatch({"x": torch.tensor([0])})
        raise SourceError("gone")

    with Prefetched(failing(), lambda batch: batch) as arriving:
        next(arriving)
        with pytest.raises(SourceError, match="gone"):
            next(arriving)


def test_keys_that_do_not_go_together_are_told() -> None:
    for values, message in (
        ({"source": "digits", "flip": True}, "digits is not cropped or mirrored"),
        ({"source": "x.json", "num_images": 3}, "num_images: for sets in memory .* x.json is read as a manifest"),
        ({"source": "x.json", "crop": "random"}, "short_side: goes with crop=random"),
        ({"source": "x.json", "crop": "random", "short_side": 16}, "short_side: 16 is below image_size"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(values.pop("source"), **values)


def test_stored_latents_train_what_images_train(tmp_path: Path, one_device_run: Path) -> None:
    digits = open_in_memory(DataConfig(source="digits", image_size=32, batch_size=1), "train")
    rows = [
        (encoded(Image.fromarray(image), "PNG"), int(label))
        for image, label in zip(digits.images[:150], digits.labels[:150], strict=True)
    ]
    (tmp_path / "images.parquet").write_bytes(parquet_of(rows, 64))
    assert prepare(str(tmp_path / "images.parquet"), tmp_path / "images.json")[0] == 0
    recipe = ["recipes/quickstart/diffusion.yaml", "runtime=eager", f"root={one_device_run}", "data.flip=true"]
    recipe += ["data.batch_size=50", "data.stream.num_workers=0", "model.depth=1", "model.head_depth=1"]
    images, latents = f"data.source={tmp_path}/images.json", f"{tmp_path}/latents/train.json"
    code, output, errors = run_tool("encode_latents", *recipe, images, "--out", latents, "--dtype", "float32")
    assert code == 0 and "latents of 150 images" in output, errors
    manifest = read_manifest(latents)
    assert manifest.latents is not None and manifest.latents.mirrored and manifest.block_sizes == [64, 64, 22]
    curves = []
    for name, source in (("images", images), ("latents", f"data.source={latents}")):
        run_dir = tmp_path / name
        training = [*recipe, source, f"run_dir={run_dir}", "train.num_epochs=2", "log.every_steps=1"]
        code, _, errors = run_tool("train", *training)
        assert code == 0, errors
        curves.append([line["loss"] for line in read_metrics(str(run_dir / "metrics.jsonl"))])
    assert len(curves[0]) == 6
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-5)

    mistakes = [
        (
            ["train", *recipe, "autoencoder.latent_stats=null"],
            "latent_stats: the latents of .* another one",
        ),
        (["train", "recipes/quickstart/judge.yaml", "runtime=eager", "data.random_shift_pixels=0"], "holds latents"),
        (["encode_latents", *recipe, "--out", latents], "holds latents"),
    ]
    for [tool, *arguments], message in mistakes:
        code, _, errors = run_tool(tool, *arguments, f"data.source={latents}", f"root={one_device_run}")
        assert code == 2 and errors.count("\n") == 1 and re.search(message, errors), errors
