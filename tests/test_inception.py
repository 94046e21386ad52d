"""Inception's features, and the mistakes that are often made with them; each would fail here."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_xla.backends
from conftest import run_python
from inception_weights import blotches, seen_by_torch_fidelity
from jaxlib import xla_client
from torch.nn import functional

from rae_xla.errors import UserError
from rae_xla.evaluation.batches import as_step
from rae_xla.evaluation.features import InceptionConfig, InceptionFeatures
from rae_xla.evaluation.measured import view
from rae_xla.models import pretrained
from rae_xla.models.inception import INPUT_SIZE, SPATIAL_CHANNELS, tf1_resize
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.xla import step as step_module


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return blotches(3, 256, 0)


@pytest.fixture(scope="module")
def theirs(inception_weights: Path, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return seen_by_torch_fidelity(inception_weights, images)


def features_of(weights: Path, size: int) -> InceptionFeatures:
    return InceptionFeatures(InceptionConfig(weights=str(weights)), size, ".", "weights")


@pytest.mark.parametrize("name", ["eager", "xla"])
def test_features_are_torch_fidelitys(
    name: str, inception_weights: Path, images: np.ndarray, theirs: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[str] = []
    extract = step_module.extract_internal

    def noted(traceable):
        lowered.append(torch_xla.backends.get_mat_mul_precision())
        return extract(traceable)

    monkeypatch.setattr(step_module, "extract_internal", noted)
    runtime = create(name, MeshConfig(), "bf16")
    extractor = features_of(inception_weights, 256)
    step = runtime.compile(as_step(view(extractor, runtime)), "features", exact=True)
    batch = runtime.place_batch({"images": torch.from_numpy(images)})
    seen = runtime.to_host(step({}, runtime.place_frozen(extractor.tensors()), batch)[1])
    assert lowered == (["highest"] if name == "xla" else [])
    assert torch_xla.backends.get_mat_mul_precision() == "default", "and the next program is as it was"
    pool, branch, logits = theirs
    assert pool.abs().mean() > 0.1 and pool.std(dim=0).mean() > 0.01, "features that say something"
    torch.testing.assert_close(seen["features"], pool, atol=1e-4, rtol=0)
    # Height, width, channels: ADM's order, in which its references are written.
    torch.testing.assert_close(
        seen["spatial"], branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), atol=1e-4, rtol=0
    )
    assert (seen["spatial"] - branch[:, :SPATIAL_CHANNELS].flatten(1)).abs().max() > 0.1, "channels first would differ"
    unbiased = seen["features"].double().numpy() @ extractor.logits_weight.T
    np.testing.assert_allclose(unbiased, logits.numpy(), atol=1e-3)


def test_images_are_scaled_as_tensorflow_1_did() -> None:
    """Pixel by pixel, as its kernel is written; half-pixel centres are more than a grey level away."""
    for size in (32, 256, 299, 512):
        column = np.random.default_rng(0).integers(0, 256, size).astype(np.float64)
        expected = []
        for place in range(INPUT_SIZE):
            position = np.float32(place) * (np.float32(size) / np.float32(INPUT_SIZE))
            low = int(position)
            share = float(position) - low
            expected.append(column[low] * (1 - share) + column[min(low + 1, size - 1)] * share)
        ours = tf1_resize(size).astype(np.float64) @ column
        np.testing.assert_allclose(ours, expected, atol=3e-5)
        line = torch.from_numpy(column)[None, None]
        half_pixel = functional.interpolate(line, size=INPUT_SIZE, mode="linear", align_corners=False)[0, 0].numpy()
        assert size == INPUT_SIZE or np.abs(half_pixel - ours).max() > 1


def test_products_are_float32_where_the_rest_is_bfloat16(tmp_path: Path) -> None:
    """A TPU rounds the inputs of float32 products to bfloat16 unless each of them says otherwise."""
    job = {"recipe": "recipes/evaluation/inception.yaml", "program": "features", "grid": [2, 4]}
    job["overrides"] = ["precision=bf16", "batch_size=8"]
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = run_python("-m", "rae_xla.preflight.trace_worker", str(tmp_path), CPU_NUM_DEVICES="1", PJRT_DEVICE="CPU")
    assert done.returncode == 0, done.stderr[-2000:]
    text = xla_client.XlaComputation((tmp_path / "program.pb").read_bytes()).as_hlo_text()
    products = re.findall(r"= \S+ (?:dot|convolution)\(.*", text)
    assert len(products) == 94 + 2, "the convolutions, and the two matrices that scale images"
    assert all("operand_precision={highest,highest}" in line for line in products)
    assert "bf16" not in text


def test_other_weights_are_told(inception_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert features_of(inception_weights, 64).about()["is_published"] is False
    assert "is not the published Inception (SHA-256 6726825d...)" in caplog.text
    tensors = torch.load(inception_weights, weights_only=True)
    for name, changed, found in (
        ("short", {k: v for k, v in tensors.items() if "Mixed_7c.branch1x1.bn.weight" not in k}, "is missing"),
        ("other", {k.replace("fc.", "head."): v for k, v in tensors.items()}, "fc.bias is missing"),
        ("none", {"x": torch.zeros(1)}, "it has no convolutions with batch norms"),
    ):
        torch.save(changed, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=rf"^weights: .*{name}.pth .*{found}"):
            features_of(tmp_path / f"{name}.pth", 64)


def test_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    sent = b"another file"
    monkeypatch.setattr(pretrained, "urlopen", lambda url, timeout: io.BytesIO(sent))
    with pytest.raises(UserError, match=r"weights: https://.*-6726825d.pth sent another file .*SHA-256 6726825d0af5"):
        InceptionFeatures(InceptionConfig(), 64, str(tmp_path), "weights")
    assert not list((tmp_path / "pretrained").iterdir()), "and nothing is kept of it"

    def unreachable(url: str, timeout: float) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(pretrained, "urlopen", unreachable)
    where = tmp_path / "pretrained" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match=rf"cannot be fetched \(timed out\); .*\(SHA-256 6726825d.*\) at {where}"):
        InceptionFeatures(InceptionConfig(), 64, str(tmp_path), "weights")
