"""Encoders give the numbers of the transformers ports that the released autoencoders were made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.errors import UserError
from rae_xla.models.convert.encoders import port_from_timm, timm_from_port
from rae_xla.models.encoders import ENCODERS, EncoderConfig, load_encoder
from rae_xla.models.pretrained import pretrained_weights
from rae_xla.models.resize import resize_bicubic

transformers = pytest.importorskip("transformers", reason="a development dependency")
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
OUR_SIZES = {"width": 48, "depth": 2, "num_heads": 3}
GRID = 6  # of the small ports' pretraining
Port = Callable[[Tensor], Tensor]


LAST_NORMS = ("layernorm.weight", "layernorm.bias", "post_layernorm.weight", "post_layernorm.bias")


def randomised(model: nn.Module, *, with_norm: bool = False) -> nn.Module:
    """Random values everywhere but in the last norm, which the released autoencoders make plain."""
    generator = torch.Generator().manual_seed(1)
    last_norms = () if with_norm else LAST_NORMS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(last_norms):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def dinov2() -> tuple[nn.Module, Port]:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, patch_size=14, image_size=14 * GRID, mlp_ratio=4)
    model = randomised(transformers.Dinov2WithRegistersModel(config))
    return model, lambda pixels: model(pixels).last_hidden_state[:, 5:]


def siglip2() -> tuple[nn.Module, Port]:
    config = transformers.SiglipVisionConfig(**SIZES, patch_size=16, image_size=16 * GRID)
    model = randomised(transformers.SiglipVisionModel(config))
    return model, lambda pixels: model(pixels, interpolate_pos_encoding=True).last_hidden_state


def siglip2_so400m() -> tuple[nn.Module, Port]:
    sizes = {**SIZES, "intermediate_size": int(48 * 4304 / 1152)}
    config = transformers.SiglipVisionConfig(**sizes, patch_size=14, image_size=14 * GRID)
    model = randomised(transformers.SiglipVisionModel(config))

    def before_last_norm(pixels: Tensor) -> Tensor:
        """As the second paper has it, and normalised without scale and shift."""
        found = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
        return functional.layer_norm(found, found.shape[-1:], eps=1e-6)

    return model, before_last_norm


def webssl() -> tuple[nn.Module, Port]:
    config = transformers.Dinov2Config(**SIZES, patch_size=14, image_size=14 * GRID, mlp_ratio=4)
    model = randomised(transformers.Dinov2Model(config), with_norm=True)
    return model, lambda pixels: model(pixels).last_hidden_state[:, 1:]


def mae() -> tuple[nn.Module, Port]:
    config = transformers.ViTMAEConfig(**SIZES, patch_size=16, image_size=16 * GRID, mask_ratio=0.0)
    model = randomised(transformers.ViTMAEModel(config))

    def forward(pixels: Tensor) -> Tensor:
        order = torch.arange((pixels.shape[-1] // 16) ** 2).expand(len(pixels), -1).float()
        return model(pixels, noise=order, interpolate_pos_encoding=True).last_hidden_state[:, 1:]

    return model, forward


PORTS = {
    "dinov2_b": (dinov2, "dinov2"),
    "siglip2_b": (siglip2, "siglip2"),
    "siglip2_so400m": (siglip2_so400m, "siglip2"),
    "webssl_dino_l": (webssl, "dinov2_plain"),
    "mae_b": (mae, "mae"),
}
PATCH_SIZES = {name: 16 if name in ("siglip2_b", "mae_b") else 14 for name in PORTS}


def saved(model: nn.Module, directory: Path) -> str:
    path = directory / "port.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize("grid", [GRID, 4, 9], ids=["pretraining", "smaller", "larger"])
@pytest.mark.parametrize("name", list(PORTS))
def test_patch_tokens_equal_the_port(name: str, grid: int, tmp_path: Path) -> None:
    model, port = PORTS[name][0]()
    side = grid * PATCH_SIZES[name]
    encoder = load_encoder(EncoderConfig(name=name, input_size=side, **OUR_SIZES), saved(model, tmp_path), "weights")
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = port((images - encoder.pixel_mean) / encoder.pixel_std)
    found = encoder(images)
    assert found.shape == (2, 48, grid, grid)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(PORTS))
def test_there_and_back(name: str) -> None:
    make, port_name = PORTS[name]
    model, port = make()
    theirs = dict(model.state_dict())
    timm_tensors = timm_from_port(theirs)
    back = port_from_timm(timm_tensors, port_name)
    # What is lost on the way, by name; see the module's docstring.
    lost = [key for key in theirs if key not in back or not torch.equal(theirs[key], back[key])]
    allowed = {"dinov2": ("layernorm.", "mask_token", "cls_token", "position_embeddings")}
    allowed |= {"siglip2": ("post_layernorm.", "head."), "mae": ("layernorm.",), "dinov2_plain": ("mask_token",)}
    assert all(any(part in key for part in allowed[port_name]) for key in lost), lost
    again = timm_from_port(back)
    assert again.keys() == timm_tensors.keys()
    assert all(torch.equal(again[key], timm_tensors[key]) for key in again)
    # And the port's features do not notice.
    missing, unexpected = make()[0].load_state_dict(back, strict=False)
    assert not unexpected and all("layernorm" in key for key in missing)
    images = torch.rand(1, 3, *[PATCH_SIZES[name] * (16 if name == "dinov2_b" else GRID)] * 2)
    before = port(images)
    model.load_state_dict(back, strict=False)
    torch.testing.assert_close(port(images), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dinov2_s", "siglip2_b", "mae_b"])
def test_the_file_that_timm_publishes_loads(name: str, tmp_path: Path) -> None:
    """timm's own state dict at its own input size: more in it than features need, positions of another grid."""
    model = timm.create_model(ENCODERS[name].timm_model, depth=1)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    config = EncoderConfig(name=name, depth=1)
    encoder = load_encoder(config, str(tmp_path / "timm.safetensors"), "weights")
    assert torch.equal(encoder.backbone.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    with torch.no_grad():
        features = encoder(torch.rand(1, 3, 256, 256))
    assert features.shape == (1, *config.latent_shape)
    assert features.mean(dim=1).abs().max() < 1e-4  # Each token is normalised, without scale and shift.


@pytest.mark.parametrize("shape", [(256, 224), (512, 448), (224, 256), (32, 48), (384, 256)])
def test_resize_equals_torch(shape: tuple[int, int]) -> None:
    images = torch.rand(2, 3, shape[0], shape[0] - 8, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(images, size=(shape[1], shape[1]), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_bicubic(images, shape[1]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_latent_shapes_of_the_table(name: str) -> None:
    config = EncoderConfig(name=name)
    widths = {"dinov2_s": 384, "dinov2_b": 768, "dinov2_l": 1024, "siglip2_b": 768, "mae_b": 768}
    widths |= {"siglip2_so400m": 1152, "webssl_dino_l": 1024}
    assert config.latent_shape == (widths[name], 16, 16)
    if name.startswith("dinov2"):
        assert EncoderConfig(name=name, input_size=448).latent_shape == (widths[name], 32, 32)


def test_a_file_of_another_encoder_is_refused(tmp_path: Path) -> None:
    config = EncoderConfig(name="dinov2_b", **OUR_SIZES)
    with pytest.raises(UserError, match=r"autoencoder.encoder.weights: .*port.safetensors does not fit this model"):
        load_encoder(config, saved(siglip2()[0], tmp_path), "autoencoder.encoder.weights")
    path = saved(mae()[0], tmp_path)
    with pytest.raises(UserError, match="37 positions do not form a square"):
        load_encoder(config, path, "weights")
    wider = EncoderConfig(name="mae_b", width=96, depth=2, num_heads=3)
    with pytest.raises(UserError, match=r"is \[1, 1, 48\], should be \[1, 1, 96\]"):
        load_encoder(wider, path, "weights")


def test_no_network_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"autoencoder.encoder.weights: vit_base_patch14_reg4.* cannot be fetched"):
        pretrained_weights(ENCODERS["dinov2_b"].timm_model, str(tmp_path), "autoencoder.encoder.weights")
    assert not (tmp_path / "pretrained").exists()


def test_other_processes_wait_for_process_0(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"root must be a place that all hosts share"):
        pretrained_weights("any", str(tmp_path), "weights", process_index=1, wait_seconds=0.05)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "any.safetensors").touch()
    assert pretrained_weights("any", str(tmp_path), "weights", process_index=1).endswith("pretrained/any.safetensors")
