"""Tensors in parts in safetensors files, written and read through ``torch.distributed.checkpoint``.

Each process writes its parts into files of its own; process 0 writes ``index.json``, which says where each part is and
its CRC-32, and last ``complete.json`` with the index's hash. A folder without the last does not count. Parts are read
by whoever needs any of their values, on whatever mesh. (The library's own files need a pickle to be read and have no
checksums; its planners know tensors of one device, and torch_xla's copy what is to be overwritten to the host first.
So its own reader cannot read these; anything that reads safetensors and JSON can.)
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from rae_xla import storage, tensor_files
from rae_xla.runtime import Parts
from rae_xla.training.stored_index import FORMAT, INDEX_FILE, MARKER_FILE, StoredIndex, narrowed

# Written at a time, each by a thread of its own.
FILE_BYTES = 2**30
FILES_AT_A_TIME = 4
# A part is checked, and so read, whole: this much is held besides what it is for.
PART_BYTES = 2**28

PartsByName = Mapping[str, Parts]


def write_parts(directory: str, parts: PartsByName, about: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Write what this process has; all processes of ``group`` write together. ``about`` is kept in the index.

    Raises:
        Exception: whatever kept any of the processes from writing.
    """
    try:
        with _one_process_is_enough():
            dcp.save(
                {name: _in_smaller_parts(tensor) for name, tensor in parts.items()},
                storage_writer=_Writer(directory, about),
                planner=_Planner(),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        raise _first_of(error) from error


def read_parts(index: StoredIndex, wanted: PartsByName, group: dist.ProcessGroup | None) -> None:
    """Fill in the values of ``wanted``, in place; names and shapes are the index's.

    Raises:
        DamagedError: in what any of the processes reads.
    """
    try:
        with _one_process_is_enough():
            dcp.load(
                dict(wanted),
                storage_reader=_Reader(index),
                planner=_LoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        raise _first_of(error) from error


@contextmanager
def _one_process_is_enough() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def remove_step(directory: str) -> None:
    """The marker goes first, so that nothing is ever taken for whole that is not."""
    marker = storage.join(directory, MARKER_FILE)
    if storage.exists(marker):
        storage.remove(marker)
    storage.remove(directory)


def _first_of(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


class _Planner(SavePlanner):
    """Every part that a process has is written: `Runtime.parts_of` gives each to one process only."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._parts: PartsByName = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([item for name, tensor in self._parts.items() for item in _write_items(name, tensor)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
                raise AssertionError(f"the parts of {name} that processes have are not all of it, each once")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._parts[write_item.index.fqn].parts[_offsets(write_item.index)]


def _in_smaller_parts(tensor: Parts) -> Parts:
    """The same values, in parts of at most `PART_BYTES` where the first dimension can be split so."""
    smaller = {}
    for offsets, values in tensor.parts.items():
        if values.ndim == 0 or values.nbytes <= PART_BYTES:
            smaller[offsets] = values
            continue
        num_rows = max(1, PART_BYTES // values[0].nbytes)
        for number, piece in enumerate(values.split(num_rows)):
            smaller[offsets[0] + number * num_rows, *offsets[1:]] = piece
    return replace(tensor, parts=smaller)


def _write_items(name: str, tensor: Parts) -> Iterator[WriteItem]:
    for offsets, values in tensor.parts.items():
        yield WriteItem(
            index=MetadataIndex(name, torch.Size(offsets)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(offsets), values.shape),
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size(tensor.shape),
            ),
        )


class _LoadPlanner(LoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._wanted: PartsByName = state_dict
        self._stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, tensor in self._wanted.items():
            stored = self._stored[name]
            assert isinstance(stored, TensorStorageMetadata)
            places = [ChunkStorageMetadata(torch.Size(offsets), part.shape) for offsets, part in tensor.parts.items()]
            items += create_read_items_for_chunk_list(name, stored, places)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only tensors are stored")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        whole = self._wanted[read_item.dest_index.fqn].parts[_offsets(read_item.dest_index)]
        return narrowed(whole, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was filled in where it is."""


class _Writer(StorageWriter):
    def __init__(self, directory: str, about: Mapping[str, Any]) -> None:
        self._directory = directory
        self._about = about

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        # Whatever was left of an earlier try at this step; the others write when the plan has come from here.
        if is_coordinator and storage.is_directory(self._directory):
            remove_step(self._directory)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files = {
            f"part_{plan.storage_data:05d}_{number:03d}.safetensors": items
            for number, items in enumerate(_in_files(plan.items))
        }
        with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
            written = threads.map(lambda file: self._write_file(file, files[file], planner), files)
            results = [result for of_file in written for result in of_file]
        return _done(results)

    def _write_file(self, file: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        checksums: list[int] = []

        def values() -> Iterator[Tensor]:
            for item in items:
                part = planner.resolve_data(item)
                assert isinstance(part, Tensor)
                checksums.append(zlib.crc32(tensor_files.bytes_of(part)))
                yield part

        described = {_part_name(item.index): (_dtype(item), _chunk(item).sizes) for item in items}
        begins = tensor_files.stream_tensors(storage.join(self._directory, file), described, values())
        return [
            WriteResult(item.index, _size(item), (file, begin, checksum))
            for item, begin, checksum in zip(items, begins, checksums, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {(r.index.fqn, r.index.offset): r.storage_data for of_process in results for r in of_process}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            parts = []
            for chunk in tensor.chunks:
                file, begin, checksum = places[name, chunk.offsets]
                where = {"file": file, "begin": begin, "crc32": checksum}
                parts.append({"offsets": list(chunk.offsets), "shape": list(chunk.sizes), **where})
            dtype = tensor_files.DTYPE_NAMES[tensor.properties.dtype]
            tensors[name] = {"shape": list(tensor.size), "dtype": dtype, "parts": parts}
        index = json.dumps({"format": FORMAT, "about": self._about, "tensors": tensors}).encode()
        storage.write_bytes(storage.join(self._directory, INDEX_FILE), index)
        marker = {"index_sha256": hashlib.sha256(index).hexdigest()}
        storage.write_json(storage.join(self._directory, MARKER_FILE), marker)


class _Reader(StorageReader):
    def __init__(self, index: StoredIndex) -> None:
        self._index = index

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        index = self._index
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=index.dtypes[name]),
                    torch.Size(shape),
                    [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in index.parts[name]],
                )
                for name, shape in index.shapes.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        stored = {(name, part.offsets): part for name, parts in self._index.parts.items() for part in parts}
        by_part: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_part[item.storage_index.fqn, _offsets(item.storage_index)].append(item)

        # A part is read whole, for its checksum, and once, whoever needs some of it.
        def fill(place: tuple[str, tuple[int, ...]]) -> None:
            values = self._index.read(place[0], stored[place])
            for item in by_part[place]:
                target = planner.resolve_tensor(item)
                target.copy_(narrowed(values, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)

        with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
            for _ in threads.map(fill, by_part):
                pass
        return _done(None)


def _in_files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """One after the other, until a file is full. Those of the largest type first, as safetensors wants them."""
    files: list[list[WriteItem]] = []
    room = 0
    for item in sorted(items, key=lambda item: -_dtype(item).itemsize):
        if room < _size(item) or not files:
            files.append([])
            room = FILE_BYTES
        files[-1].append(item)
        room -= _size(item)
    return iter(files)


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


def _size(item: WriteItem) -> int:
    return math.prod(_chunk(item).sizes) * _dtype(item).itemsize


def _offsets(index: MetadataIndex) -> tuple[int, ...]:
    assert index.offset is not None
    return tuple(index.offset)


def _part_name(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, _offsets(index)))}"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
