"""Checkpoints of other layouts: there and back is the identity, and what is not a checkpoint is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, run_tool
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae_xla import storage
from rae_xla.errors import UserError
from rae_xla.models.autoencoder import AutoencoderConfig, load_latent_decoder, load_latent_encoder
from rae_xla.models.convert.checkpoints import convert_file, convert_from_diffusers, convert_to_diffusers
from rae_xla.models.convert.files import read_weight_file
from rae_xla.models.decoder import Decoder, DecoderConfig
from rae_xla.models.loading import load_weights

Tensors = dict[str, Tensor]


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("end", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ["dit", "dit_dh", "dit_dh_guide", "decoder"])
def test_released_there_and_back_is_the_identity(name: str, end: str, tmp_path: Path) -> None:
    ours, back = str(tmp_path / "ours.safetensors"), str(tmp_path / f"back.{end}")
    released = str(GOLDEN / f"{name}.safetensors")
    report = convert_file(released, ours, "ours")
    assert report["kind"] == name.removesuffix("_guide")
    # Nothing official is left in ours.
    assert not any("embedder.proj" in key or "pos_embed" in key or "rope" in key for key in load_file(ours))
    convert_file(ours, back, "released")
    assert_equal(dict(read_weight_file(back, "back").tensors), load_file(released))


def test_statistics_there_and_back(tmp_path: Path) -> None:
    stats = {"mean": torch.randn(4, 2, 2), "var": torch.rand(4, 2, 2)}
    source, ours, back = (str(tmp_path / name) for name in ("stat.pt", "ours.safetensors", "back.pt"))
    torch.save(stats, source)
    convert_file(source, ours, "ours")
    assert_equal(load_file(ours), {"mean": stats["mean"], "variance": stats["var"]})
    convert_file(ours, back, "released")
    assert_equal(torch.load(back, weights_only=True), stats)
    torch.save({"var": stats["var"]}, source)
    convert_file(source, ours, "ours")
    assert_equal(load_file(ours), {"mean": torch.zeros(4, 2, 2), "variance": stats["var"]})


def test_a_training_file_gives_its_ema_and_says_so(tmp_path: Path) -> None:
    ema = load_file(GOLDEN / "decoder.safetensors")
    model = {key: value + 1 if "pos_embed" not in key else value for key, value in ema.items()}
    # As stage 1 leaves it: the frozen encoder inside, behind a data-parallel wrapper, with optimizer state beside it.
    encoder = {"module.encoder.cls_token": torch.zeros(1)}
    file = {
        "ema": {**encoder, **{f"module.decoder.{key}": value for key, value in ema.items()}},
        "model": {**encoder, **{f"module.decoder.{key}": value for key, value in model.items()}},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "step": 7,
    }
    source, ours = str(tmp_path / "training.pt"), str(tmp_path / "ours.safetensors")
    torch.save(file, source)
    for which, expected, taken in ((None, ema, "ema"), ("ema", ema, "ema"), ("model", model, "model")):
        assert convert_file(source, ours, "ours", which)["taken"] == taken
        assert torch.equal(load_file(ours)["output.weight"], expected["decoder_pred.weight"])
    torch.save({key: value for key, value in file.items() if key != "ema"}, source)
    assert convert_file(source, ours, "ours")["taken"] == "model"
    with pytest.raises(UserError, match="holds no ema weights, but model, optimizer, step"):
        convert_file(source, ours, "ours", "ema")
    torch.save({"state_dict": load_file(GOLDEN / "decoder.safetensors"), "epoch": 1}, source)
    assert convert_file(source, ours, "ours")["taken"] is None
    torch.save({**file, "ema": None}, source)
    assert convert_file(source, ours, "ours")["taken"] == "model"
    with pytest.raises(UserError, match="holds one set of weights, not ema beside another"):
        convert_file(ours, str(tmp_path / "x.safetensors"), "ours", "ema")


def test_half_precision_is_read(tmp_path: Path) -> None:
    tensors = {key: value.bfloat16() for key, value in load_file(GOLDEN / "dit.safetensors").items()}
    torch.save(tensors, tmp_path / "in.pt")
    convert_file(str(tmp_path / "in.pt"), str(tmp_path / "ours.safetensors"), "ours")
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["input.bias"], tensors["x_embedder.proj.bias"])


def test_recipes_read_released_files_as_they_are(tmp_path: Path) -> None:
    config = DecoderConfig(patch_size=4, width=32, depth=3, num_heads=2, mlp_width=64)
    ours = str(tmp_path / "ours.safetensors")
    convert_file(str(GOLDEN / "decoder.safetensors"), ours, "ours")
    decoders = [Decoder(config, channels=24, grid=4) for _ in range(2)]
    for decoder, path in zip(decoders, (ours, str(GOLDEN / "decoder.safetensors")), strict=True):
        load_weights(decoder, path, "weights")
    assert_equal(dict(decoders[0].state_dict()), dict(decoders[1].state_dict()))


def altered(change: Callable[[Tensors], None]) -> Tensors:
    tensors = load_file(GOLDEN / "dit_dh.safetensors")
    change(tensors)
    return tensors


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a missing key": (
        lambda: altered(lambda t: t.pop("blocks.1.attn.proj.bias")),
        "backbone.1.attention.output.bias is missing",
    ),
    "unexpected keys": (
        lambda: altered(lambda t: t.update({"a.b": torch.zeros(1), "blocks.0.c": torch.zeros(1)})),
        "not keys of this layout: a.b, blocks.0.c",
    ),
    "another shape": (
        lambda: altered(lambda t: t.update({"blocks.0.attn.qkv.weight": torch.zeros(96, 31)})),
        r"backbone.0.attention.qkv.weight is \[96, 31\], should be \[96, 32\]",
    ),
    "other positions": (
        lambda: altered(lambda t: t.update({"pos_embed": t["pos_embed"] + 0.1})),
        "pos_embed differs from the fixed table",
    ),
    "no tables": (lambda: altered(lambda t: t.pop("enc_feat_rope.freqs_cos")), "enc_feat_rope.freqs_cos is missing"),
    "a flat table": (lambda: altered(lambda t: t.update({"pos_embed": t["pos_embed"].flatten()})), "3 dimensions"),
    "flat labels": (
        lambda: altered(lambda t: t.update({"y_embedder.embedding_table.weight": torch.tensor(1.0)})),
        "shapes are not those of any dit_dh",
    ),
    "uneven statistics": (lambda: {"mean": torch.zeros(3), "var": torch.ones(4, 2, 2)}, "of one shape, found"),
    "other statistics": (
        lambda: {"var": torch.ones(4, 2, 2), "count": torch.ones(1)},
        "not keys of this layout: count",
    ),
    "another model": (lambda: {"conv1.weight": torch.zeros(3)}, "holds no model that is known here"),
    "no state dict": (lambda: {"epoch": 3, "lr": [1.0]}, "holds no state dict of weights, but epoch, lr"),
    "a list": (lambda: [torch.zeros(1)], "holds no state dict of weights, but list"),
    "an object": (lambda: {"model": {"a": Path()}}, "is not a checkpoint of plain tensors"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_no_checkpoint_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    torch.save(content(), tmp_path / "in.pt")
    with pytest.raises(UserError, match=message) as caught:
        convert_file(str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"), "ours")
    assert str(caught.value).startswith("IN: ") and "in.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_statistics_without_a_mean_do_not_go_back(tmp_path: Path) -> None:
    save_file({"variance": torch.ones(4, 2, 2)}, tmp_path / "in.safetensors")
    with pytest.raises(UserError, match="should be a mean and a variance"):
        convert_file(str(tmp_path / "in.safetensors"), str(tmp_path / "out.pt"), "released")


@pytest.mark.parametrize("depth", [-1, 0, 4, 99])
def test_a_backbone_depth_that_cannot_be(depth: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"backbone depth {depth}: backbone and head have 4 blocks together"):
        convert_file(str(GOLDEN / "dit_dh.safetensors"), str(tmp_path / "out.safetensors"), "ours", None, depth)


@pytest.mark.parametrize("end", ["pt", "old.pt", "safetensors"])
def test_a_file_cut_short_is_refused(end: str, tmp_path: Path) -> None:
    whole = tmp_path / f"whole.{end}"
    tensors = load_file(GOLDEN / "decoder.safetensors")
    # The old format of torch.save has no index at its end, so that every cut is read differently.
    torch.save(tensors, whole, _use_new_zipfile_serialization=False) if end == "old.pt" else None
    torch.save(tensors, whole) if end == "pt" else None
    save_file(tensors, whole) if end == "safetensors" else None
    for share in (0.0, 0.01, 0.1, 0.3, 0.6, 0.95):
        cut = tmp_path / f"cut.{end}"
        cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        with pytest.raises(UserError, match=r"cut\.[\w.]+ is not a .*, or is cut short"):
            convert_file(str(cut), str(tmp_path / "out.safetensors"), "ours")


def test_the_tool_says_what_it_took_and_exits_with_2_for_a_mistake(tmp_path: Path) -> None:
    torch.save({"ema": load_file(GOLDEN / "dit.safetensors"), "model": {}}, tmp_path / "in.pt")
    arguments = [str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"), "--json", str(tmp_path / "report.json")]
    code, output, errors = run_tool("convert_checkpoint", *arguments)
    assert code == 0, errors
    assert "dit, ema weights: wrote" in output
    assert json.loads((tmp_path / "report.json").read_text())["taken"] == "ema"
    code, _, errors = run_tool("convert_checkpoint", str(tmp_path / "none.pt"), str(tmp_path / "out.safetensors"))
    assert code == 2 and errors.count("\n") == 1 and "none.pt cannot be read" in errors


ENCODERS = {
    "dinov2": {"name": "dinov2_b", "input_size": 224, "width": 64, "depth": 2, "num_heads": 1},
    "siglip2": {"name": "siglip2_b", "input_size": 256, "depth": 1},
    "mae": {"name": "mae_b", "input_size": 256, "depth": 1},
}


@pytest.mark.parametrize("port", list(ENCODERS))
def test_diffusers_both_ways(port: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="a development dependency")
    encoder = ENCODERS[port]
    decoder = {"patch_size": 4, "width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64}
    width = encoder.get("width", 768)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(width, 16, 16, generator=generator)
    std = torch.rand(width, 16, 16, generator=generator) + 0.5
    pixels = {"encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3} if port == "siglip2" else {}
    theirs = diffusers.AutoencoderRAE(
        encoder_type=port,
        encoder_hidden_size=width,
        encoder_patch_size=14 if port == "dinov2" else 16,
        encoder_num_hidden_layers=encoder["depth"],
        encoder_input_size=encoder["input_size"],
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        patch_size=4,
        latents_mean=mean,
        latents_std=std,
        **pixels,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    theirs.save_pretrained(tmp_path / "theirs")
    convert_from_diffusers(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    config = AutoencoderConfig.model_validate(
        {
            "encoder": {**encoder, "weights": "encoder.safetensors"},
            "decoder": {**decoder, "weights": "decoder.safetensors"},
            "latent_stats": "latent_stats.safetensors",
        }
    )
    root = str(tmp_path / "ours")
    images = torch.rand(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        expected = theirs.encode(images).latent
        latents = load_latent_encoder(config, root)(images)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
        made = load_latent_decoder(config, root)(latents)
        torch.testing.assert_close(made, theirs.decode(expected).sample, rtol=1e-5, atol=1e-5)

    # timm's own file has more in it than features need.
    whole = load_file(f"{root}/encoder.safetensors") | {"norm.weight": torch.ones(width), "attn_pool.x": torch.ones(1)}
    save_file(whole, f"{root}/encoder.safetensors")
    convert_to_diffusers(config, root, str(tmp_path / "back"))
    # `from_pretrained` of diffusers 0.39 fails on DINOv2 with transformers 4.57, on its own files too.
    back = diffusers.AutoencoderRAE.from_config(json.loads((tmp_path / "back" / "config.json").read_text())).eval()
    back.load_state_dict(load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(back.encode(images).latent, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back.decode(expected).sample, theirs.decode(expected).sample, rtol=1e-5, atol=1e-5)
    convert_from_diffusers(str(tmp_path / "back"), str(tmp_path / "again"))
    for name in ("encoder", "decoder"):
        once, again = (load_file(tmp_path / where / f"{name}.safetensors") for where in ("ours", "again"))
        assert_equal(again, {key: value for key, value in once.items() if key in again} if name == "encoder" else once)
    stats = [load_file(tmp_path / where / "latent_stats.safetensors") for where in ("ours", "again")]
    assert torch.equal(stats[0]["mean"], stats[1]["mean"])
    torch.testing.assert_close(stats[0]["variance"], stats[1]["variance"], rtol=1e-6, atol=0)


def test_a_directory_that_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no readable config.json; give a saved AutoencoderRAE"):
        convert_from_diffusers(str(tmp_path), str(tmp_path / "out"))
    storage.write_json(str(tmp_path / "config.json"), ["dinov2"])
    save_file({"encoder.x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"config.json: encoder_type should be one of dinov2, siglip2, mae"):
        convert_from_diffusers(str(tmp_path), str(tmp_path / "out"))
    storage.write_json(str(tmp_path / "config.json"), {"encoder_type": "mae", "encoder_input_size": 224})
    save_file({"encoder.x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"config.json: encoder_patch_size is missing or not"):
        convert_from_diffusers(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
