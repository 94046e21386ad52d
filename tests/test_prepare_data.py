"""Manifests: what `tools/prepare_data.py` writes and refuses, and what is refused of them later."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_bucket import FaultyProxy
from photos import Rows, parquet, samples, write_shards
from stream_cases import batches_of, config_of, prepare

from rae_xla.data.manifest import read_manifest
from rae_xla.data.sources import open_source
from rae_xla.errors import UserError


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
        assert code == 2 and errors.count("\n") == 1 and re.search(message, errors), errors
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


def test_a_missing_bucket_is_told(bucket: FaultyProxy) -> None:
    code, errors = prepare("gs://nowhere/set", "gs://nowhere/set/train.json")
    assert code == 2 and errors.count("\n") == 1 and "gs://nowhere/set is not there" in errors, errors
    with pytest.raises(UserError, match=r"data.source: gs://nowhere/train.json is not there"):
        open_source(config_of("gs://nowhere/train.json"), ".", "train")
