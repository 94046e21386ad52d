"""Making a manifest: what a folder, a bucket or a data set of the Hugging Face Hub holds, found once."""

from __future__ import annotations

import hashlib
import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from PIL import Image
from tqdm import tqdm

from rae_xla.data.manifest import Container, Manifest, Shard, checksum_in
from rae_xla.data.shards import table_pairs, tar_samples
from rae_xla.errors import UserError

CONTAINERS: dict[str, Container] = {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
IMAGE_SUFFIXES = tuple(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in ("JPEG", "PNG", "WEBP")
)
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class")
TAR_BLOCK_IMAGES = 64
HUB = "hf:"


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Where images and labels are: columns, or suffixes of a tar file's members; ``None`` takes the first usual name.

    ``num_classes``: ``None`` takes the largest label and one.
    """

    image_column: str | None = None
    label_column: str | None = None
    num_classes: int | None = None


def index(source: str, labelling: Labelling, split: str, num_threads: int) -> Manifest:
    """The manifest of a folder or pattern of shards, of a folder with a folder of images for each class, both also as
    URLs, or of the ``split`` of ``hf:OWNER/NAME``. Paths in it are absolute.

    Raises:
        UserError: nothing there, mixed or empty shards, columns that are not there, labels out of range.
    """
    paths = _hub_files(source, split) if source.startswith(HUB) else _shard_files(source)
    return index_shards(paths, labelling, num_threads) if paths else _index_folder(source, labelling.num_classes)


def index_shards(paths: list[str], labelling: Labelling, num_threads: int) -> Manifest:
    """The manifest of these shards; see `index`."""
    container = _container(paths)
    columns = _columns(container, paths[0], labelling)

    def indexed(path: str) -> tuple[Shard, int]:
        with _told(path, container):
            return _INDEXERS[container](path, columns)

    with ThreadPoolExecutor(num_threads) as pool:
        found = list(tqdm(pool.map(indexed, paths), total=len(paths), desc="indexing", unit="shard", disable=None))
    empty = [shard.path for shard, _ in found if not shard.num_images]
    if empty:
        raise UserError(f"{empty[0]}: has no images; leave it out")
    largest = max(largest for _, largest in found)
    return _manifest(container, columns, [shard for shard, _ in found], largest, labelling.num_classes)


@contextmanager
def _told(path: str, container: Container) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, tarfile.TarError, KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as {container} ({_first_line(error)}); remove or mend it") from error


def _manifest(
    container: Container, columns: tuple[str, str], shards: list[Shard], largest_label: int, num_classes: int | None
) -> Manifest:
    if num_classes is not None and largest_label >= num_classes:
        raise UserError(f"--num-classes: {num_classes}, but there is a label {largest_label}; labels count from 0")
    return Manifest(
        container=container,
        num_images=sum(shard.num_images for shard in shards),
        num_classes=largest_label + 1 if num_classes is None else num_classes,
        image_column=columns[0],
        label_column=columns[1],
        shards=tuple(shards),
    )


def _hub_files(source: str, split: str) -> list[str]:
    from datasets import load_dataset_builder

    name = source.removeprefix(HUB)
    try:
        builder = load_dataset_builder(name)
    # The Hub, its cache and the data set's own description can each fail in their own ways.
    except Exception as error:
        raise UserError(f"{source}: cannot be found on the Hugging Face Hub ({_first_line(error)})") from error
    files = builder.config.data_files or {}
    if split not in files:
        raise UserError(f"--split: {source} has no {split!r}; use {' or '.join(files)}")
    return [str(file) for file in files[split]]


def _shard_files(source: str) -> list[str]:
    """Files of known kinds that a pattern names or a folder holds at any depth, sorted; a folder of images has none."""
    filesystem, inner = _opened(source)
    try:
        names = filesystem.glob(inner) if "*" in inner else filesystem.find(inner)
    except OSError as error:
        raise UserError(
            f"{source}: cannot be read ({_first_line(error)}); check the name and your credentials"
        ) from error
    if not names:
        raise UserError(f"{source}: nothing is there; correct the path")
    whole = filesystem.unstrip_protocol if "://" in source else posixpath.abspath
    return sorted(whole(name) for name in names if _kind(name))


def _opened(source: str) -> tuple[Any, str]:
    try:
        return url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise UserError(f"{source}: cannot be reached ({error}); give a local path or a gs:// URL") from error


def _kind(name: str) -> Container | None:
    return CONTAINERS.get(posixpath.splitext(name)[1].lower())


def _container(paths: list[str]) -> Container:
    kinds = {_kind(path): path for path in paths}
    container = _kind(paths[0])
    if container is None or len(kinds) > 1:
        raise UserError(
            f"SOURCE: {' and '.join(kinds.values())} are not shards of one known kind; name one, as *.parquet"
        )
    return container


def _columns(container: Container, path: str, labelling: Labelling) -> tuple[str, str]:
    """Those given, or the first of the usual names that the first shard has."""
    with _told(path, container), fsspec.open(path, "rb") as file:
        if container == "parquet":
            known = pq.read_schema(file).names
        elif container == "arrow":
            known = _arrow_reader(file)[0].names
        else:
            known = _tar_suffixes(file)
    chosen = []
    image, label = labelling.image_column, labelling.label_column
    for option, given, usual in (("--image-column", image, IMAGE_COLUMNS), ("--label-column", label, LABEL_COLUMNS)):
        names = (given.partition("#")[0],) if given else usual
        found = next((name for name in names if name in known), None)
        if found is None:
            raise UserError(f"{option}: {path} has no {' or '.join(names)}; it has {', '.join(known)}")
        chosen.append(given or found)
    return chosen[0], chosen[1]


def _index_parquet(path: str, columns: tuple[str, str]) -> tuple[Shard, int]:
    with fsspec.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        labels = table.read(columns=[columns[1]]).column(0)
        return _shard(path, labels, blocks=tuple(groups))


def _index_arrow(path: str, columns: tuple[str, str]) -> tuple[Shard, int]:
    blocks, ranges, largest = [], [], -1
    with fsspec.open(path, "rb") as file:
        schema, start, end = _arrow_reader(file)
        header = start, end
        while (message := _next_message(file)) is not None:
            if message.type != "record batch":
                raise ValueError(f"it has a {message.type}; write it without dictionaries")
            batch = pa.ipc.read_record_batch(message, schema)
            pairs = table_pairs(pa.Table.from_batches([batch]), *columns)
            largest = max([largest, *_checked([label for _, label in pairs])])
            blocks.append(batch.num_rows)
            ranges.append((end, file.tell()))
            end = file.tell()
    return _shard(path, None, blocks=tuple(blocks), ranges=tuple(ranges), header=header)[0], largest


def _arrow_reader(file: Any) -> tuple[Any, int, int]:
    """Schema, and where its message begins and ends: at once in a stream, after eight bytes in a file."""
    start = 8 if file.read(6) == b"ARROW1" else 0
    file.seek(start)
    schema = pa.ipc.read_schema(pa.ipc.read_message(file))
    return schema, start, file.tell()


def _next_message(file: Any) -> Any:
    # A stream may stop without its end being marked; in a file the index follows the mark.
    try:
        return pa.ipc.read_message(file)
    except (EOFError, pa.ArrowInvalid):
        return None


def _index_tar(path: str, columns: tuple[str, str]) -> tuple[Shard, int]:
    offsets, labels = [], []
    with fsspec.open(path, "rb") as file:
        for offset, _, label in tar_samples(file, *columns):
            offsets.append(offset)
            labels.append(label)
        size = file.seek(0, io.SEEK_END)
    starts = range(0, len(offsets), TAR_BLOCK_IMAGES)
    ends = [*[offsets[start] for start in starts[1:]], size]
    return _shard(
        path,
        labels,
        blocks=tuple(min(TAR_BLOCK_IMAGES, len(offsets) - start) for start in starts),
        ranges=tuple((offsets[start], end) for start, end in zip(starts, ends, strict=True)),
    )


def _tar_suffixes(file: Any) -> list[str]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        names = [member.name.rpartition("/")[2] for member, _ in zip(archive, range(TAR_BLOCK_IMAGES), strict=False)]
    return sorted({name.partition(".")[2].lower() for name in names if "." in name})


_INDEXERS: dict[str, Callable[[str, tuple[str, str]], tuple[Shard, int]]] = {
    "parquet": _index_parquet,
    "arrow": _index_arrow,
    "tar": _index_tar,
}


def _shard(path: str, labels: Any, **where: Any) -> tuple[Shard, int]:
    """And its largest label."""
    size, checksum = _described(path)
    values = [] if labels is None else _checked(labels.to_pylist() if hasattr(labels, "to_pylist") else labels)
    return Shard(path=path, num_bytes=size, checksum=checksum, **where), max(values, default=-1)


def _checked(labels: list[Any]) -> list[int]:
    for label in labels:
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"a label is {label!r}; labels are whole numbers from 0")
    return labels


def _described(path: str) -> tuple[int, str]:
    """Size and checksum: what the store says, so that nothing is downloaded for it, or of the file's content."""
    filesystem, inner = _opened(path)
    about = filesystem.info(inner)
    checksum = checksum_in(about)
    if checksum is None:
        with filesystem.open(inner, "rb") as file:
            checksum = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return about["size"], checksum


def _index_folder(source: str, num_classes: int | None) -> Manifest:
    filesystem, inner = _opened(source)
    inner = inner.rstrip("/")
    names = sorted(name for name in filesystem.find(inner) if name.lower().endswith(IMAGE_SUFFIXES))
    files = [posixpath.relpath(name, inner) for name in names]
    classes = sorted({file.split("/")[0] for file in files if "/" in file})
    loose = next((file for file in files if "/" not in file), None)
    if not files or loose:
        found = f"{loose} is in no class's folder" if loose else "has neither shards nor images"
        raise UserError(
            f"{source}: {found}; give {', '.join(f'*{suffix}' for suffix in CONTAINERS)} or a folder for each class"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[file.split("/")[0]] for file in files]
    path = filesystem.unstrip_protocol(inner) if "://" in source else posixpath.abspath(inner)
    shard = Shard(path=path, num_bytes=0, files=tuple(files), labels=tuple(labels))
    return _manifest("files", ("image", "label"), [shard], len(classes) - 1, num_classes)


def relative_to(manifest_path: str, manifest: Manifest) -> Manifest:
    """With paths relative to the manifest's folder where they are inside it, so that both can be moved together.

    Raises:
        UserError: a manifest in a bucket of files on this disk.
    """
    folder = manifest_path.rpartition("/")[0] or "."
    if "://" not in manifest_path:
        folder = posixpath.abspath(folder)
    elif any("://" not in shard.path for shard in manifest.shards):
        raise UserError(f"--out: {manifest_path} is not where its images are; keep it on their disk, or --reshard them")
    inside = folder + "/"
    return manifest.model_copy(
        update={"shards": tuple(s.model_copy(update={"path": s.path.removeprefix(inside)}) for s in manifest.shards)}
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
