"""Whole files from one layout to another: what ``tools/convert_checkpoint.py`` does.

Decoders and diffusion transformers are checked key by key against the model of their sizes, statistics against each
other, before anything is written; an encoder is checked when a recipe loads it.
"""

from __future__ import annotations

import io
import logging
from typing import Any, Literal

import torch
from torch import nn

from rae_xla import __version__, storage, tensor_files
from rae_xla.errors import UserError
from rae_xla.models.autoencoder import AutoencoderConfig, encoder_weights_path
from rae_xla.models.convert.diffusers import AutoencoderParts, AutoencoderSizes, from_diffusers, to_diffusers
from rae_xla.models.convert.encoders import features_only, is_port, timm_from_port
from rae_xla.models.convert.files import Which, read_weight_file, read_weights
from rae_xla.models.convert.keys import Tensors, num_blocks
from rae_xla.models.convert.released import Layout, from_released, kind_of, to_released
from rae_xla.models.decoder import Decoder, DecoderConfig
from rae_xla.models.diffusion import create_diffusion_model
from rae_xla.models.dit import DiTConfig
from rae_xla.models.dit_dh import DiTDHConfig
from rae_xla.models.encoders import ENCODERS, EncoderConfig
from rae_xla.models.loading import describe_differences, on_meta, required_path

logger = logging.getLogger(__name__)

Target = Literal["ours", "released"]
DIFFUSERS_CONFIG = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert_file(
    source: str, target: str, to: Target, which: Which | None = None, backbone_depth: int | None = None
) -> dict[str, Any]:
    """One model or its statistics from ``source`` into ``target``; returns what it was.

    ``to`` ours: from a released or a transformers encoder's layout. ``to`` released: from a file written here, which
    says its own `Layout`. A target that ends in ``.pt`` is written with ``torch.save``, any other as safetensors.

    Raises:
        UserError: unreadable, of an unknown layout, or with keys that do not fit; names the file and the keys.
    """
    if not target.endswith((".pt", ".safetensors")):
        raise UserError(f"OUT: {target} should end in .safetensors or .pt")
    file = read_weight_file(source, "IN", which)
    found, port = kind_of(file.tensors), is_port(file.tensors)
    report: dict[str, Any] = {"from": source, "path": target, "layout": to, "taken": file.taken}
    try:
        if to == "ours" and port:
            tensors, layout, kind = timm_from_port(file.tensors), None, "encoder"
        elif to == "ours" and found is not None and found[1] == "released":
            tensors, layout = from_released(file.tensors, backbone_depth)
            kind = found[0]
            _check(tensors, layout)
        elif to == "released" and found is not None and found[1] == "ours":
            kind = found[0]
            if kind != "latent_stats" and file.layout is None:
                raise ValueError("carries no grid and heads; trainings and conversions of this version write them")
            _check(file.tensors, file.layout)
            tensors, layout = to_released(file.tensors, file.layout), None
        else:
            held = f"a {found[0]} in the {'released' if found[1] == 'released' else 'rae_xla'} layout" if found else ""
            raise ValueError(f"holds {held or 'no model that is known here'}; nothing to convert to {to}")
    except (ValueError, KeyError) as error:
        raise UserError(f"IN: {source}: {_said(error)}") from error
    about = {"version": __version__, **({} if layout is None else {"layout": layout.as_json()})}
    _write(target, tensors, about if to == "ours" else None)
    count = sum(value.numel() for value in tensors.values())
    return {**report, "kind": kind, "values_millions": round(count / 1e6, 3)}


def convert_from_diffusers(source: str, target: str) -> dict[str, Any]:
    """A saved ``AutoencoderRAE`` (a directory) as encoder, decoder and statistics files in the directory ``target``.

    Raises:
        UserError: a file is missing, or has keys that do not fit.
    """
    try:
        config = storage.read_json(storage.join(source, DIFFUSERS_CONFIG))
    except (OSError, ValueError) as error:
        raise UserError(f"IN: {source} has no readable {DIFFUSERS_CONFIG}; give a saved AutoencoderRAE") from error
    tensors = tensor_files.read_tensors(storage.join(source, DIFFUSERS_WEIGHTS), "IN")
    try:
        parts, layout = from_diffusers(tensors, config)
        _check(parts.decoder, layout)
    except (ValueError, KeyError) as error:
        raise UserError(f"IN: {source}: {_said(error)}") from error
    _warn_of_pixels(tensors, str(config["encoder_type"]))
    named = {"encoder": parts.encoder, "decoder": parts.decoder, "latent_stats": parts.stats}
    paths = {name: storage.join(target, f"{name}.safetensors") for name, part in named.items() if part is not None}
    for name, path in paths.items():
        about = {"version": __version__, **({"layout": layout.as_json()} if name == "decoder" else {})}
        _write(path, named[name] or {}, about)
    return {"from": source, "layout": "ours", "kind": "autoencoder", "paths": paths}


def convert_to_diffusers(config: AutoencoderConfig, root: str, target: str) -> dict[str, Any]:
    """A recipe's autoencoder as a directory that diffusers' ``AutoencoderRAE.from_pretrained`` reads.

    Raises:
        UserError: diffusers does not know the encoder, or a file is missing or does not fit.
    """
    port = config.encoder.row.port
    if port is None:
        raise UserError(f"autoencoder.encoder.name: diffusers knows no {config.encoder.name}")
    key = "autoencoder.decoder.weights"
    decoder = read_weights(required_path(config.decoder.weights, root, key), key).tensors
    encoder = read_weight_file(encoder_weights_path(config, root), "autoencoder.encoder.weights").tensors
    channels, grid, _ = config.encoder.latent_shape
    encoder = features_only(timm_from_port(encoder) if is_port(encoder) else encoder)
    stats = None
    if config.latent_stats is not None:
        stats = read_weights(storage.resolve(root, config.latent_stats), "autoencoder.latent_stats").tensors
    mean, std = config.encoder.pixel_stats()
    sizes = AutoencoderSizes(
        port=port,
        encoder_input_size=config.encoder.input_size,
        encoder_patch_size=config.encoder.input_size // grid,
        encoder_depth=num_blocks(encoder, "blocks"),
        pixel_mean=mean,
        pixel_std=std,
        decoder_patch_size=config.decoder.patch_size,
        decoder_num_heads=config.decoder.num_heads,
    )
    try:
        _check(decoder, Layout(kind="decoder", grid=grid))
        tensors, described = to_diffusers(AutoencoderParts(encoder=encoder, decoder=decoder, stats=stats), sizes)
    except (ValueError, KeyError) as error:
        raise UserError(f"autoencoder: {_said(error)}") from error
    tensor_files.write_tensors(storage.join(target, DIFFUSERS_WEIGHTS), tensors)
    storage.write_json(storage.join(target, DIFFUSERS_CONFIG), described)
    return {"layout": "diffusers", "kind": "autoencoder", "path": target, "channels": channels}


def _warn_of_pixels(tensors: Tensors, port: str) -> None:
    names = [name for name, row in ENCODERS.items() if row.port == port]
    stats = EncoderConfig.model_validate({"name": names[0]}).pixel_stats()
    for key, expected in zip(("encoder_mean", "encoder_std"), stats, strict=True):
        if key in tensors and not torch.allclose(tensors[key].view(3, 1, 1), expected, atol=1e-3):
            logger.warning("%s: pixels are not normalised as a recipe's %s does it: numbers differ", key, names[0])


def _said(error: ValueError | KeyError) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def _write(path: str, tensors: Tensors, about: dict[str, Any] | None) -> None:
    if path.endswith(".safetensors"):
        tensor_files.write_tensors(path, dict(tensors), about)
        return
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    storage.write_bytes(path, buffer.getvalue())


def _check(tensors: Tensors, layout: Layout | None) -> None:
    """Raises a ValueError that lists keys missing, unexpected or of another shape for a model of these sizes."""
    if layout is None:
        return
    try:
        expected = _model_of(tensors, layout).state_dict()
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from error
    # A tensor of other dimensions than it should have, or sizes that no model can have.
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the weights' shapes are not those of any {layout.kind}") from error
    differences = describe_differences(tensors, expected)
    if differences:
        raise ValueError(differences)


def _model_of(tensors: Tensors, layout: Layout) -> nn.Module:
    """The model that these weights are of, on the meta device; sizes are read off the weights."""
    if layout.kind == "decoder":
        width, channels = tensors["input.weight"].shape
        config = DecoderConfig(
            patch_size=round((tensors["output.weight"].shape[0] / 3) ** 0.5),
            width=width,
            depth=num_blocks(tensors, "blocks"),
            num_heads=1,  # No weight depends on it.
            mlp_width=tensors["blocks.0.hidden.weight"].shape[0],
        )
        return on_meta(lambda: Decoder(config, channels=channels, grid=layout.grid))
    num_classes = tensors["label_embedder.table.weight"].shape[0] - 1
    if layout.kind == "dit":
        width, channels = tensors["input.weight"].shape
        heads = width // layout.head_widths[0]
        model = DiTConfig(width=width, depth=num_blocks(tensors, "blocks"), num_heads=heads)
    else:
        width, channels = tensors["backbone_input.weight"].shape
        head_width = tensors["head_input.weight"].shape[0]
        model = DiTDHConfig(
            width=width,
            depth=num_blocks(tensors, "backbone"),
            num_heads=width // layout.head_widths[0],
            head_width=head_width,
            head_depth=num_blocks(tensors, "head"),
            head_num_heads=head_width // layout.head_widths[1],
        )
    return on_meta(lambda: create_diffusion_model(model, (channels, layout.grid, layout.grid), num_classes))
