"""Weight files as they are found, ours or other people's: safetensors or ``.pt``, plain or a whole training's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rae_xla import tensor_files
from rae_xla.errors import UserError
from rae_xla.models.convert.keys import Tensors
from rae_xla.models.convert.released import Layout, from_released, kind_of

logger = logging.getLogger(__name__)

Which = Literal["ema", "model"]
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# What data-parallel and compiled training leave in front of every key.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A state dict under its file's own key names.

    ``taken``: which of a training file's weights it is, ``None`` if the file holds no others. ``layout``: what a file
    written here says about itself, or the tables in a released one.
    """

    tensors: Tensors
    taken: Which | None
    layout: Layout | None


def read_weight_file(path: str, key: str, which: Which | None = None) -> WeightFile:
    """The weights in a file; ``which`` of a training file's, the EMA if there is one and nothing is said.

    Raises:
        UserError: unreadable, not a state dict, or without the weights asked for; names ``key`` and the file.
    """
    if path.endswith(".safetensors"):
        if which is not None:
            raise UserError(f"{key}: {path} holds one set of weights, not {which} beside another")
        tensors = tensor_files.read_tensors(path, key)
        layout = tensor_files.read_about(path).get("layout")
        return WeightFile(tensors=tensors, taken=None, layout=None if layout is None else Layout.from_json(layout))
    if not path.endswith(PICKLES):
        raise UserError(f"{key}: {path} should end in .safetensors or .pt")
    content = tensor_files.read_pickle(path, key)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    taken = _choose(content, which)
    chosen = content if taken is None or not isinstance(content, dict) else content.get(taken)
    if not isinstance(chosen, dict) or not chosen or not all(isinstance(value, Tensor) for value in chosen.values()):
        held = f"{', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{key}: {path} holds no {which or 'state dict of'} weights, but {held or 'nothing'}")
    return WeightFile(tensors=_unwrapped(chosen), taken=taken, layout=None)


def read_weights(path: str, key: str, backbone_depth: int | None = None) -> WeightFile:
    """A model's weights or latent statistics under our names, from a file of ours or a released one.

    Raises:
        UserError: as `read_weight_file`, or a released file with keys or tables that do not fit.
    """
    file = read_weight_file(path, key)
    if file.taken is not None:
        logger.info("%s: took the %s weights", path, file.taken)
    found = kind_of(file.tensors)
    if found is None or found[1] == "ours":
        return file
    try:
        tensors, layout = from_released(file.tensors, backbone_depth)
    except ValueError as error:
        raise UserError(f"{key}: {path}: {error}") from error
    return WeightFile(tensors=tensors, taken=file.taken, layout=layout)


def _choose(content: Any, which: Which | None) -> Which | None:
    if which is not None or not isinstance(content, dict):
        return which
    choices: tuple[Which, ...] = ("ema", "model")
    return next((choice for choice in choices if isinstance(content.get(choice), dict)), None)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    # An autoencoder's training file holds the frozen encoder too.
    if "decoder.decoder_pred.weight" in tensors:
        tensors = {k.removeprefix("decoder."): value for k, value in tensors.items() if k.startswith("decoder.")}
    return tensors
