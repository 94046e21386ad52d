"""Renaming the keys of a state dict by a table, and stacking query, key and value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The table that renames back."""
    return {ours: theirs for theirs, ours in table.items()}


def num_blocks(tensors: Tensors, blocks: str) -> int:
    """How many there are of ``blocks.0. blocks.1. ...``"""
    return len({key[len(blocks) + 1 :].partition(".")[0] for key in tensors if key.startswith(f"{blocks}.")})


def rename(key: str, table: Mapping[str, str]) -> str:
    """``key`` with its beginning replaced by the first entry that is all of it or ends at a dot.

    Raises:
        ValueError: no entry fits.
    """
    for old, new in table.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    raise ValueError(f"{key} is not a key of this layout")


def rename_blocks(
    tensors: Tensors, table: Mapping[str, str], blocks: tuple[str, str], block_table: Mapping[str, str]
) -> dict[str, Tensor]:
    """Every key by ``table``; ``OLD.N.rest`` of ``blocks`` (OLD, NEW) as ``NEW.N.`` and the rest by ``block_table``.

    Raises:
        ValueError: a key that no entry fits.
    """
    pattern = re.compile(rf"{re.escape(blocks[0])}\.(\d+)\.(.*)")

    def renamed(key: str) -> str:
        block = pattern.match(key)
        return f"{blocks[1]}.{block[1]}.{rename(block[2], block_table)}" if block else rename(key, table)

    return rename_all(tensors, renamed)


def rename_all(tensors: Tensors, renamed: Callable[[str], str]) -> dict[str, Tensor]:
    """Every key as ``renamed`` has it.

    Raises:
        ValueError: keys for which ``renamed`` raises one; lists them.
    """
    names, unexpected = {}, []
    for key in tensors:
        try:
            names[key] = renamed(key)
        except ValueError:
            unexpected.append(key)
    if unexpected:
        more = f" and {len(unexpected) - 8} more" if len(unexpected) > 8 else ""
        raise ValueError(f"not keys of this layout: {', '.join(unexpected[:8])}{more}")
    return {names[key]: value for key, value in tensors.items()}


def stack_attention(tensors: Tensors, place: str, parts: tuple[str, str, str]) -> dict[str, Tensor]:
    """Query, key and value of ``PREFIX.place.PART.KIND`` as one ``PREFIX.place.qkv.KIND``.

    Raises:
        ValueError: one of the three is missing.
    """
    pattern = re.compile(rf"(.*{re.escape(place)}\.)({'|'.join(parts)})\.(weight|bias)$")
    stacked = {}
    for key, value in tensors.items():
        match = pattern.match(key)
        if match is None:
            stacked[key] = value
            continue
        names = [f"{match[1]}{part}.{match[3]}" for part in parts]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        stacked[f"{match[1]}qkv.{match[3]}"] = torch.cat([tensors[name] for name in names])
    return stacked


def split_attention(tensors: Tensors, place: str, parts: tuple[str, str, str]) -> dict[str, Tensor]:
    """The inverse of `stack_attention`."""
    pattern = re.compile(rf"(.*{re.escape(place)}\.)qkv\.(weight|bias)$")
    split = {}
    for key, value in tensors.items():
        match = pattern.match(key)
        if match is None:
            split[key] = value
        else:
            split.update({f"{match[1]}{part}.{match[2]}": v for part, v in zip(parts, value.chunk(3), strict=True)})
    return split
