"""References: what samples or reconstructions are compared with, by name, or by the path of a file.

A reference is for generation (what a model was trained on) or for reconstruction (what an autoencoder is shown), and
the one is refused for the other: a FID against the wrong one is a number that nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rae_xla import storage
from rae_xla.errors import UserError
from rae_xla.evaluation.measured import said_of_itself
from rae_xla.evaluation.stored_images import read_arrays
from rae_xla.models.pretrained import downloaded

Purpose = Literal["generation", "reconstruction"]
KEY = "--reference"
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
# Inside a recipe's root.
MADE_HERE = "references"


@dataclass(frozen=True)
class NamedReference:
    """``url``: where it is published; ``None`` for one that everybody makes. ``sha256``: where it is known."""

    purpose: Purpose
    url: str | None = None
    sha256: str | None = None


NAMED = {
    "adm_imagenet256": NamedReference(
        "generation",
        f"{_ADM}/256/VIRTUAL_imagenet256_labeled.npz",
        "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    ),
    # Its hash was not found; it is in every manifest, and `tools/evaluate.py compare` tells two apart.
    "adm_imagenet512": NamedReference("generation", f"{_ADM}/512/VIRTUAL_imagenet512.npz"),
    "imagenet_val_256_rfid": NamedReference("reconstruction"),
}


def open_reference(reference: str, purpose: Purpose, root: str) -> tuple[str, dict[str, Any]]:
    """The path of a reference, and what is known of it: ``name``, ``path``, ``sha256``, ``purpose``.

    To be asked for by one host.

    Raises:
        UserError: no such name or file, another file than the name's, or for another purpose.
    """
    path = _path_of(reference, root)
    is_file = path.endswith(".npz")
    sha256 = storage.content_hash(path) if is_file else None
    named = NAMED.get(reference)
    if named is not None and named.sha256 not in (None, sha256):
        raise UserError(f"{KEY}: {path} is not {reference}, whose SHA-256 is {named.sha256}; remove it")
    by_content = next((name for name, row in NAMED.items() if sha256 is not None and row.sha256 == sha256), None)
    name = by_content or (reference if named is not None else None)
    said = said_of_itself(read_arrays(path, KEY), path, KEY) if is_file else {}
    for meant in (None if name is None else NAMED[name].purpose, said.get("purpose")):
        if meant not in (None, purpose):
            raise UserError(
                f"{KEY}: {name or path} is a reference for {meant}, and these are scores of {purpose}; name one for "
                f"that, or make it (tools/reference_stats.py --for {purpose})"
            )
    return path, {"name": name, "path": path, "sha256": sha256, "purpose": purpose if name or said else None}


def _path_of(reference: str, root: str) -> str:
    named = NAMED.get(reference)
    if named is not None and named.url is not None:
        return downloaded(named.url, named.sha256, root, KEY)
    path = storage.join(root, MADE_HERE, f"{reference}.npz") if named is not None else reference
    if not storage.exists(path):
        remedy = (
            f"make {path} with tools/reference_stats.py recipes/evaluation/{reference}.yaml"
            if named is not None
            else f"correct the path, or name one of {', '.join(NAMED)}"
        )
        raise UserError(f"{KEY}: {reference} is not there; {remedy}")
    return path
