"""Images in shards: every one once an epoch, the same for any number of hosts, whatever the bucket does meanwhile."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_tool
from faulty_bucket import BUCKET, FAULTS, FaultyProxy, faulty_bucket
from photos import NUM_CLASSES, Rows, encoded, parquet, photograph, samples, write_shards
from PIL import Image

from rae_xla import storage
from rae_xla.data.loader import Batch, LoadedBatch, images_in_order
from rae_xla.data.manifest import read_manifest
from rae_xla.data.order import SampleOrder
from rae_xla.data.prefetch import Prefetched
from rae_xla.data.shards import parquet_of
from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig, open_in_memory, open_source
from rae_xla.data.stream import StreamedBatches
from rae_xla.data.transforms import centre_crop, decoded, decoded_fast, random_crop
from rae_xla.errors import SourceError, UserError
from rae_xla.training.metrics import read_metrics

ROWS = 100
KINDS = ("parquet", "arrow", "arrow_file", "tar", "files")


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


@pytest.fixture(scope="module")
def rows() -> Rows:
    return samples(ROWS)


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


def test_an_epoch_is_every_image_once_though_it_is_killed_and_goes_on_with_other_hosts() -> None:
    drawn = random.Random(0)
    for trial in range(20):
        sizes = [drawn.randint(1, 40) for _ in range(drawn.randint(20, 80))]
        order = SampleOrder(sizes, drawn.choice([8, 24, 64, 256]), drawn.choice([400, 5000]), trial)
        starts = np.cumsum([0, *sizes])
        seen: list[int] = []
        step = 0
        while len(seen) < 3 * order.num_images:
            hosts = drawn.choice([number for number in (1, 2, 4, 8) if order.num_streams % number == 0])
            steps = drawn.randint(1, 2 * order.num_images // order.batch_size + 2)
            parts = [
                [_taken(order, stream, step, steps, starts) for stream in order.streams_of(host, hosts)]
                for host in range(hosts)
            ]
            for number in range(steps):
                each = order.images_per_step
                seen += [i for host in parts for own in host for i in own[number * each : (number + 1) * each]]
            step += steps
        assert seen[: order.batch_size] == _uninterrupted(order, starts)
        for epoch in range(3):
            found = seen[epoch * order.num_images : (epoch + 1) * order.num_images]
            assert sorted(found) == list(range(order.num_images))
        assert seen[: order.num_images] != seen[order.num_images : 2 * order.num_images]


def _taken(order: SampleOrder, stream: int, step: int, steps: int, starts: np.ndarray) -> list[int]:
    """The images that a stream gives to so many steps, as its host reads them."""
    first, wanted, found = step * order.images_per_step, steps * order.images_per_step, list[int]()
    for window in order.windows(stream, step):
        rows = np.concatenate([np.arange(piece.first, piece.end) + starts[piece.block] for piece in window.pieces])
        found += rows[window.rows][max(first - window.position, 0) :].tolist()
        if len(found) >= wanted:
            return found[:wanted]
    raise AssertionError


def _uninterrupted(order: SampleOrder, starts: np.ndarray) -> list[int]:
    return [image for stream in range(order.num_streams) for image in _taken(order, stream, 0, 1, starts)]


def test_neighbours_are_far_apart_and_batches_hold_many_blocks() -> None:
    order = SampleOrder([100] * 12812, 1024, 16384, 0)
    assert order.num_streams == 128 and order.images_per_step == 8 and order.window_images == 128
    blocks = {next(order.windows(stream, 700)).pieces[0].block // 20 for stream in range(order.num_streams)}
    assert len(blocks) > 100, "of as many shards"


def test_hosts_must_share_the_streams() -> None:
    order = SampleOrder([1000] * 10, 64, 4000, 0)
    assert order.num_streams == 4
    with pytest.raises(UserError, match=r"data.stream.shuffle_images: .* 4 streams, which do not divide over 8 hosts"):
        order.streams_of(0, 8)


def test_every_kind_of_shard_gives_its_images(manifest: Path, rows: Rows) -> None:
    expected = Counter((label, centre_crop(decoded(image), 32).tobytes()) for image, label in rows)
    found: Counter[tuple[int, bytes]] = Counter()
    for batch in batches_of(config_of(manifest, batch_size=20), 5):
        pairs = zip(batch["labels"].tolist(), batch["images"].numpy(), strict=True)
        found.update((label, image.tobytes()) for label, image in pairs)
    assert found == expected
    about = read_manifest(str(manifest))
    assert about.num_images == ROWS and about.num_classes == NUM_CLASSES
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


def _adm(image: Image.Image, size: int) -> np.ndarray:
    """By the words of ADM's paper, step by step."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (640, 427), (333, 257), (1100, 700), (90, 300)])
def test_centre_crop_is_adms(size: tuple[int, int]) -> None:
    image = photograph(1, size)
    expected = _adm(image, 256)
    assert (centre_crop(image, 256, "exact") == expected).all()
    difference = np.abs(centre_crop(np.asarray(image), 256, "fast").astype(int) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01


def test_random_crops_reach_every_edge() -> None:
    image = photograph(2, (60, 40))
    whole = np.asarray(image)
    for drawn, (top, left) in {(0.0, 0.0): (0, 0), (1 - 2**-24, 1 - 2**-24): (8, 28), (0.5, 0.5): (4, 14)}.items():
        assert (random_crop(image, 40, 32, drawn, "exact") == whole[top : top + 32, left : left + 32]).all()


def test_files_of_other_kinds_come_as_upright_rgb() -> None:
    image = photograph(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(encoded(image, exif=exif, quality=95))
    assert turned.size == (60, 80)
    plain = np.asarray(decoded(encoded(image, quality=95)))
    assert (np.asarray(turned) == np.rot90(plain, -1)).all()
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("L", "PNG")):
        found = decoded(encoded(image.convert(mode), kind))
        assert found.mode == "RGB" and found.size == image.size
        grey = np.asarray(image.convert("L")).astype(int).mean()
        assert abs(np.asarray(found.convert("L")).astype(int).mean() - grey) < 6
    with pytest.raises(ValueError, match="no image of a known kind"):
        decoded(b"something else")


def test_the_fast_decoder_gives_the_same_pixels_and_finds_the_same_faults() -> None:
    image, exif = photograph(4, (101, 77)), Image.Exif()
    exif[0x0112] = 5
    files = [
        *[encoded(image, quality=quality, subsampling=sub) for quality in (50, 90) for sub in (0, 1, 2)],
        encoded(image, progressive=True, exif=exif),
        *[encoded(image.convert(mode), kind) for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"))],
        encoded(image) + bytes(7),
    ]
    for file in files:
        assert (np.asarray(decoded_fast(file)) == np.asarray(decoded(file))).all()
    for broken in (files[0][:-300], files[0][:100], b"\xff\xd8\xff\xd9", b""):
        with pytest.raises((OSError, ValueError)):
            decoded(broken)
        with pytest.raises((OSError, ValueError)):
            decoded_fast(broken)


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


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> Iterator[FaultyProxy]:
    """``gs://images/set/manifest.json``, of four shards."""
    with faulty_bucket(monkeypatch) as proxy:
        for shard in range(4):
            content = parquet(rows[25 * shard : 25 * (shard + 1)], 5)
            storage.write_bytes(f"gs://{BUCKET}/set/train-{shard}.parquet", content)
        code, errors = prepare(f"gs://{BUCKET}/set/*.parquet", f"gs://{BUCKET}/set/manifest.json")
        assert code == 0, errors
        yield proxy


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


def test_resharding_shuffles_scales_and_leaves_out_what_cannot_be_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*samples(50, (80, 60)), (b"nothing", 2), *samples(9, (30, 20))]
    source = write_shards(tmp_path / "source", "tar", rows, num_shards=2, images_per_block=64)
    options = ["--reshard", "--images-per-shard", "16", "--images-per-block", "4", "--short-side", "40", "--jobs", "2"]
    code, errors = prepare(source, tmp_path / "out" / "train.json", *options)
    assert code == 0 and "left out: " in caplog.text, errors
    manifest = read_manifest(str(tmp_path / "out" / "train.json"))
    assert manifest.num_images == 59 and manifest.container == "parquet" and max(manifest.block_sizes) == 4
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    config = config_of(tmp_path / "out" / "train.json", image_size=20, batch_size=59)
    [batch] = batches_of(config, 1)
    assert sorted(batch["labels"].tolist()) == sorted(label for image, label in rows if image != b"nothing")
    # The same command goes on with the shards that are missing.
    gone = sorted(shards)[1]
    content = gone.read_bytes()
    gone.unlink()
    assert prepare(source, tmp_path / "out" / "train.json", *options)[0] == 0
    assert gone.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items() if path != gone)


def test_what_is_wrong_with_a_source_is_told(tmp_path: Path, rows: Rows) -> None:
    shards, manifest = tmp_path / "shards", tmp_path / "shards" / "train.json"
    write_shards(shards, "parquet", rows, num_shards=2, images_per_block=50)
    mistakes = [
        ([str(tmp_path / "none")], "nothing is there"),
        ([str(shards), "--reshard"], "--out: .* is where SOURCE is; give another folder"),
        ([str(shards), "--seed", "-1"], "--seed: at least 0"),
        ([str(shards), "--image-column", "pixels"], "--image-column: .* has no pixels; it has image, label"),
        ([str(shards), "--num-classes", "3"], "--num-classes: 3, but there is a label 4"),
        ([str(shards), "--jobs", "0"], "--jobs: at least 1, got 0"),
        ([str(shards), "--short-side", "40"], "--short-side: goes with --reshard"),
        (["what://ever"], "what://ever: cannot be reached"),
    ]
    for arguments, message in mistakes:
        code, errors = prepare(arguments[0], manifest, *arguments[1:])
        assert code == 2 and errors.count("\n") == 1 and _found(message, errors), errors
    code, errors = prepare(str(shards), "gs://bucket/train.json")
    assert code == 2 and "--out: gs://bucket/train.json is not where its images are" in errors
    (shards / "empty.parquet").write_bytes(parquet([], 1))
    assert "empty.parquet: has no images" in prepare(str(shards), manifest)[1]
    (shards / "empty.parquet").write_bytes(b"no table")
    assert "empty.parquet: cannot be read as parquet" in prepare(str(shards), manifest)[1]
    (shards / "empty.parquet").rename(shards / "other.tar")
    assert "are not shards of one known kind" in prepare(str(shards), manifest)[1]
    (shards / "other.tar").unlink()
    (shards / "minus.parquet").write_bytes(parquet([(rows[0][0], -1)], 1))
    assert "a label is -1; labels are whole numbers from 0" in prepare(str(shards), manifest)[1]
    (shards / "minus.parquet").unlink()
    for column, values, message in (
        ("image", ["a path"], "image is string, not bytes, or a struct with bytes"),
        ("label", [0.5], "label is double, not whole numbers"),
    ):
        columns = {"image": [rows[0][0]], "label": [0], column: values}
        pq.write_table(pa.table(columns), shards / "wrong.parquet")
        assert message in prepare(str(shards), manifest)[1]
    (shards / "wrong.parquet").unlink()
    assert not manifest.exists()

    assert prepare(str(shards), manifest)[0] == 0
    with pytest.raises(
        UserError, match=r"data.source: .*none.json is not there; tools/prepare_data.py makes manifests"
    ):
        open_source(config_of(tmp_path / "none.json"), ".", "train")
    content = json.loads(manifest.read_text())
    (shards / "wrong.json").write_text(json.dumps({**content, "num_images": 7}))
    with pytest.raises(UserError, match="says 7 images, its shards have 100"):
        open_source(config_of(shards / "wrong.json"), ".", "train")
    (shards / "wrong.json").write_text("[]")
    with pytest.raises(UserError, match=r"wrong.json is not a manifest of tools/prepare_data.py"):
        open_source(config_of(shards / "wrong.json"), ".", "train")
    shard = shards / "train-001.parquet"
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"train-001.parquet has changed since it was indexed"):
        open_source(config_of(manifest), ".", "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-001.parquet is missing"):
        open_source(config_of(manifest), ".", "train")


def _found(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None


def test_a_missing_bucket_is_told(bucket: FaultyProxy) -> None:
    code, errors = prepare("gs://nowhere/set", "gs://nowhere/set/train.json")
    assert code == 2 and errors.count("\n") == 1 and "gs://nowhere/set is not there" in errors, errors
    with pytest.raises(UserError, match=r"data.source: gs://nowhere/train.json is not there"):
        open_source(config_of("gs://nowhere/train.json"), ".", "train")


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
        assert code == 2 and errors.count("\n") == 1 and _found(message, errors), errors
