"""Weights out of a checkpoint, one stored tensor after the other: memory for the largest, and some 1.5 GB."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from rae_xla import storage, tensor_files
from rae_xla.errors import UserError
from rae_xla.models.functional import Tensors, by_module_names
from rae_xla.training.checkpoint import CHECKPOINTS, CONSTANTS, complete_steps, step_directory
from rae_xla.training.ema import averages
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.same_run import COMPUTED
from rae_xla.training.stored_index import DamagedError, StoredIndex

RAW = "raw"
Export = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where values of ``shape`` are stored: block ``block`` of tensor ``name``, from ``begin`` of its last dimension.

    It is taken apart as a tensor is, so what takes packed tensors apart tells where everything lies.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None = None
    begin: int | None = None

    def split(self, sizes: list[int], dim: int) -> list[Place]:
        """As `torch.Tensor.split` along the last dimension."""
        assert dim == -1 and self.begin is None
        begins = [sum(sizes[:number]) for number in range(len(sizes))]
        return [
            replace(self, shape=(*self.shape[:-1], size), begin=begin)
            for size, begin in zip(sizes, begins, strict=True)
        ]

    def unbind(self, dim: int) -> list[Place]:
        """As `torch.Tensor.unbind` along the first dimension."""
        assert dim == 0 and self.block is None
        return [replace(self, shape=self.shape[1:], block=block) for block in range(self.shape[0])]

    def of(self, tensor: Tensor) -> Tensor:
        """Its values in the stored tensor."""
        values = tensor if self.block is None else tensor[self.block]
        return values if self.begin is None else values.narrow(-1, self.begin, self.shape[-1])


def described_weights(module: nn.Module, parameters: Tensors, export: Export) -> tuple[dict[str, Any], Tensors]:
    """For a checkpoint's index, where the tensors of the weights' file lie in packed ``parameters``; and the constants.

    ``export``: from weights by their names in the module to what the file holds; what it adds are constants.
    """
    whole = {name: Place(name, tuple(value.shape)) for name, value in parameters.items()}
    exported = export(by_module_names(module, cast(Any, whole)))
    constants = {name: value for name, value in exported.items() if isinstance(value, Tensor)}
    places = {name: Place(name, tuple(v.shape)) if name in constants else v for name, v in exported.items()}
    return {name: {**asdict(place), "constant": name in constants} for name, place in places.items()}, constants


def export_run(run_dir: str, step: int | None, kind: str, path: str) -> dict[str, Any]:
    """`export_weights` of a run's checkpoint of this step, or the newest.

    Raises:
        UserError: there is none, or it is damaged, or has no such average.
    """
    directory = storage.join(run_dir, CHECKPOINTS)
    steps = complete_steps(directory)
    if not steps:
        raise UserError(f"{run_dir} has no complete checkpoint; give a run directory, which holds {CHECKPOINTS}/")
    if step is not None and step not in steps:
        raise UserError(f"--step: {step} is not there; {run_dir} has {', '.join(map(str, steps))}")
    try:
        found = StoredIndex(step_directory(directory, step or steps[-1]))
        train = OptimizerConfig.model_validate(found.about["recipe"]["train"])
        # The first is called by its decay too.
        kind = "ema" if kind == f"ema_{train.ema_decay}" else kind
        if kind not in (RAW, *averages(train)):
            decays = ", ".join(map(str, averages(train).values()))
            raise UserError(f"--ema-decay: {kind.removeprefix('ema_')} was not kept by {run_dir}, which has {decays}")
        return export_weights(found, kind, path)
    except DamagedError as error:
        raise UserError(f"{error}; export another step") from error


def export_weights(checkpoint: StoredIndex, kind: str, path: str) -> dict[str, Any]:
    """Write a checkpoint's weights and return what their file says of them.

    ``kind``: one of the state's `averages`, or ``raw`` for those that are trained.

    Raises:
        DamagedError: the checkpoint is not as it was written; no file is left.
    """
    said = checkpoint.about
    # Equal weights are equal bytes, wherever and on whatever they were trained.
    recipe = {key: value for key, value in said["recipe"].items() if key not in COMPUTED}
    about = {**said["model"], "step": said["progress"]["step"], "kind": kind, "recipe": recipe}
    # Neighbours in the file are of the same stored tensor, so that each is read once.
    places = {name: _place(kind, place) for name, place in said["weights"].items()}
    order = sorted(places, key=lambda name: places[name].name)
    described = {name: (checkpoint.dtypes[places[name].name], places[name].shape) for name in order}

    def values() -> Iterator[Tensor]:
        read, tensor = "", Tensor()
        for name in tensor_files.in_file_order(described):
            place = places[name]
            if place.name != read:
                read, tensor = place.name, checkpoint.whole(place.name)
            yield place.of(tensor)

    tensor_files.stream_tensors(path, described, values(), about)
    return about


def _place(kind: str, said: Mapping[str, Any]) -> Place:
    part = CONSTANTS if said["constant"] else "parameters" if kind == RAW else kind
    return Place(f"{part}/{said['name']}", tuple(said["shape"]), said["block"], said["begin"])
