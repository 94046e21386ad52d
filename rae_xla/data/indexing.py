"""Making a manifest: what a folder, a bucket or a data set of the Hugging Face Hub holds, found once."""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from rae_xla.data.manifest import Container, Manifest, Shard, checksum_in
from rae_xla.data.remote import RemoteFiles
from rae_xla.data.shards import check_schema, table_pairs, tar_samples
from rae_xla.errors import SourceError, UserError, first_line

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
    files = RemoteFiles()
    if source.startswith(HUB):
        return index_shards(_hub_files(source, split), labelling, num_threads)
    whole = source if "://" in source else posixpath.abspath(source)
    found = _found(files, whole)
    paths = sorted(path for path in found if _kind(path))
    return index_shards(paths, labelling, num_threads) if paths else _folder(whole, found, labelling.num_classes)


def index_shards(paths: list[str], labelling: Labelling, num_threads: int) -> Manifest:
    """The manifest of these shards; see `index`."""
    files = RemoteFiles()
    container = _container(paths)
    columns = _columns(files, container, paths[0], labelling)

    def indexed(path: str) -> tuple[Shard, int]:
        with _told(path, container):
            return _INDEXERS[container](files, path, columns)

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
    except SourceError as error:
        raise UserError(str(error)) from error
    except (pa.ArrowException, tarfile.TarError, KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as {container} ({first_line(error)}); remove or mend it") from error


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
    # The Hub, its cache, its library and the data set's own description can each fail in their own ways.
    try:
        from datasets import load_dataset_builder

        builder = load_dataset_builder(source.removeprefix(HUB))
    except Exception as error:
        raise UserError(f"{source}: cannot be found on the Hugging Face Hub ({first_line(error)})") from error
    files = {str(name): [str(file) for file in found] for name, found in (builder.config.data_files or {}).items()}
    if split not in files:
        raise UserError(f"--split: {source} has no {split!r}; use {' or '.join(files)}")
    return files[split]


def _found(files: RemoteFiles, source: str) -> dict[str, dict[str, Any]]:
    try:
        found = files.find(source)
    except SourceError as error:
        raise UserError(str(error)) from error
    if not found:
        raise UserError(f"{source}: nothing is there; correct the path")
    return found


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


def _columns(files: RemoteFiles, container: Container, path: str, labelling: Labelling) -> tuple[str, str]:
    """Those given, or the first of the usual names that the first shard has."""
    with _told(path, container):
        size = files.info(path)["size"]
        if container == "parquet":
            known = pq.read_schema(files.open(path, size)).names
        elif container == "arrow":
            known = _arrow_reader(files.open_buffered(path, size))[0].names
        else:
            known = _tar_suffixes(files.open_buffered(path, size))
    chosen = []
    image, label = labelling.image_column, labelling.label_column
    for option, given, usual in (("--image-column", image, IMAGE_COLUMNS), ("--label-column", label, LABEL_COLUMNS)):
        names = (given.partition("#")[0],) if given else usual
        found = next((name for name in names if name in known), None)
        if found is None:
            raise UserError(f"{option}: {path} has no {' or '.join(names)}; it has {', '.join(known)}")
        chosen.append(given or found)
    return chosen[0], chosen[1]


def _index_parquet(files: RemoteFiles, path: str, columns: tuple[str, str]) -> tuple[Shard, int]:
    about = files.info(path)
    table = pq.ParquetFile(files.open(path, about["size"]))
    check_schema(table.schema_arrow, *columns)
    groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    if not all(groups) and any(groups):
        raise ValueError("it has an empty row group")
    labels = table.read(columns=[columns[1]]).column(0).to_pylist()
    return _shard(files, path, about, labels, blocks=tuple(group for group in groups if group))


def _index_arrow(files: RemoteFiles, path: str, columns: tuple[str, str]) -> tuple[Shard, int]:
    about = files.info(path)
    blocks, ranges, labels = [], [], list[Any]()
    file = files.open_buffered(path, about["size"])
    schema, start, end = _arrow_reader(file)
    check_schema(schema, *columns)
    header = start, end
    while (message := _next_message(file)) is not None:
        if message.type != "record batch":
            raise ValueError(f"it has a {message.type}; write it without dictionaries")
        batch = pa.ipc.read_record_batch(message, schema)
        if batch.num_rows:
            labels += [label for _, label in table_pairs(pa.Table.from_batches([batch]), *columns)]
            blocks.append(batch.num_rows)
            ranges.append((end, file.tell()))
        end = file.tell()
    return _shard(files, path, about, labels, blocks=tuple(blocks), ranges=tuple(ranges), header=header)


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


def _index_tar(files: RemoteFiles, path: str, columns: tuple[str, str]) -> tuple[Shard, int]:
    about = files.info(path)
    offsets, labels = [], []
    for offset, _, label in tar_samples(files.open_buffered(path, about["size"]), *columns):
        offsets.append(offset)
        labels.append(label)
    starts = range(0, len(offsets), TAR_BLOCK_IMAGES)
    ends = [*[offsets[start] for start in starts[1:]], about["size"]]
    return _shard(
        files,
        path,
        about,
        labels,
        blocks=tuple(min(TAR_BLOCK_IMAGES, len(offsets) - start) for start in starts),
        ranges=tuple((offsets[start], end) for start, end in zip(starts, ends, strict=True)),
    )


def _tar_suffixes(file: Any) -> list[str]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        names = [member.name.rpartition("/")[2] for member, _ in zip(archive, range(TAR_BLOCK_IMAGES), strict=False)]
    return sorted({name.partition(".")[2].lower() for name in names if "." in name})


_INDEXERS: dict[str, Callable[[RemoteFiles, str, tuple[str, str]], tuple[Shard, int]]] = {
    "parquet": _index_parquet,
    "arrow": _index_arrow,
    "tar": _index_tar,
}


def _shard(files: RemoteFiles, path: str, about: dict[str, Any], labels: list[Any], **where: Any) -> tuple[Shard, int]:
    """And its largest label."""
    wrong = next((label for label in labels if not isinstance(label, int) or label < 0), 0)
    if wrong:
        raise ValueError(f"a label is {wrong!r}; labels are whole numbers from 0")
    checksum = checksum_in(about)
    if checksum is None:
        # Of a disk, which does not know it.
        content = hashlib.file_digest(files.open_buffered(path, about["size"]), "sha256")
        checksum = f"sha256:{content.hexdigest()}"
    return Shard(path=path, num_bytes=about["size"], checksum=checksum, **where), max(labels, default=-1)


def _folder(source: str, found: dict[str, dict[str, Any]], num_classes: int | None) -> Manifest:
    """Of a folder with a folder of images for each class."""
    source = source.rstrip("/")
    names = sorted(name for name in found if name.lower().endswith(IMAGE_SUFFIXES))
    files = [posixpath.relpath(name, source) for name in names]
    loose = next((file for file in files if "/" not in file), None)
    if not files or loose:
        what = f"{loose} is in no class's folder" if loose else "has neither shards nor images"
        kinds = ", ".join(f"*{suffix}" for suffix in CONTAINERS)
        raise UserError(f"{source}: {what}; give {kinds} or a folder with a folder of images for each class")
    classes = sorted({file.split("/")[0] for file in files})
    numbers = {name: number for number, name in enumerate(classes)}
    shard = Shard(
        path=source,
        num_bytes=sum(found[name]["size"] for name in names),
        files=tuple(files),
        sizes=tuple(found[name]["size"] for name in names),
        labels=tuple(numbers[file.split("/")[0]] for file in files),
    )
    return _manifest("files", ("image", "label"), [shard], len(classes) - 1, num_classes)


def check_out(manifest_path: str, sources: list[str]) -> None:
    """Raises a `UserError` for a manifest in a bucket of files on this disk."""
    if "://" in manifest_path and any("://" not in source and not source.startswith(HUB) for source in sources):
        raise UserError(f"--out: {manifest_path} is not where its images are; keep it on their disk, or --reshard them")


def relative_to(manifest_path: str, manifest: Manifest) -> Manifest:
    """With paths relative to the manifest's folder where they are inside it, so that both can be moved together.

    Raises:
        UserError: see `check_out`.
    """
    check_out(manifest_path, [shard.path for shard in manifest.shards])
    folder = manifest_path.rpartition("/")[0] or "."
    if "://" not in manifest_path:
        folder = posixpath.abspath(folder)
    inside = folder + "/"
    return manifest.model_copy(
        update={"shards": tuple(s.model_copy(update={"path": s.path.removeprefix(inside)}) for s in manifest.shards)}
    )
