"""From a recipe and a command line to a job in the bucket: everything is checked before anything is made."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rae_xla import storage
from rae_xla.cloud import package
from rae_xla.cloud.gcloud import Gcloud, GcloudError, check_logged_in, configured, names_of
from rae_xla.cloud.job import RECIPE, SPEC, JobFiles, JobSpec, Limits, check_name
from rae_xla.cloud.queued import RUNTIME_VERSIONS, create_slice
from rae_xla.cloud.watching import slices_of
from rae_xla.errors import UserError
from rae_xla.topologies import Topology, topology


@dataclass(frozen=True)
class Tool:
    """What a job may run: a tool of ours for recipes of these tasks, on ``several_hosts`` or on one."""

    script: str
    tasks: tuple[str, ...]
    several_hosts: bool
    before: tuple[str, ...] = ()
    """Arguments before the recipe."""
    out: bool = False
    """Whether it writes where ``--out`` says."""


TOOLS = {
    "train": Tool("train", ("classifier", "autoencoder", "diffusion", "linear_probe"), True),
    "sample": Tool("sample", ("diffusion", "sampling"), True, out=True),
    "evaluate-generation": Tool("evaluate", ("evaluation",), True, ("generation",)),
    "evaluate-reconstruction": Tool("evaluate", ("evaluation",), False, ("reconstruction",)),
    "linear-probe": Tool("evaluate", ("linear_probe",), False, ("linear-probe",)),
    "latent-stats": Tool("latent_stats", ("latent_stats",), False),
    "encode-latents": Tool("encode_latents", ("diffusion",), False, out=True),
    "reference-stats": Tool("reference_stats", ("evaluation",), False, out=True),
}
# In gcloud's configuration.
_WHERE = {"project": "project", "zone": "compute/zone"}
_OFFERED = ("compute", "tpus", "accelerator-types", "list")
# What must not lie in a bucket in plain text.
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A command line's wishes; ``None`` is left to the recipe's ``cloud`` and then to gcloud's configuration."""

    name: str
    recipe: str
    overrides: Sequence[str] = ()
    tool: str = "train"
    tool_arguments: Sequence[str] = ()
    cloud: dict[str, Any]
    num_slices: int = 1
    spot: bool = False
    reserved: bool = False
    environment: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Prepared:
    """A job that is not made yet."""

    files: JobFiles
    spec: JobSpec
    recipe: Any
    content: bytes
    """Of the package."""

    def make(self) -> None:
        """Write it; the last file is the one that makes it a job."""
        from rae_xla.recipe import save_recipe

        if not storage.exists(self.spec.package):
            storage.write_bytes(self.spec.package, self.content)
        save_recipe(self.recipe, self.files.directory)
        storage.write_json(self.files.path(SPEC), self.spec.model_dump(mode="json"))


def prepare(order: Order) -> Prepared:
    """The job, from what can be known here.

    Raises:
        UserError: the first thing that is wrong with the recipe or the order.
    """
    check_name(order.name)
    if order.tool not in TOOLS:
        raise UserError(f"--tool: {order.tool!r} is not known; use {', '.join(TOOLS)}")
    tool, environment = TOOLS[order.tool], _environment(order.environment)
    if order.cloud.get("accelerator") is not None:
        _slices(order.cloud["accelerator"], order.num_slices)
    if not Path(order.recipe).is_file():
        raise UserError(f"{order.recipe}: cannot be read; give the path of a recipe")
    # Imports torch, which takes a while; what is wrong with the command is told before.
    from rae_xla.recipe import load_recipe

    overrides = [*order.overrides, *([f"mesh.slices={order.num_slices}"] if order.num_slices > 1 else [])]
    recipe = load_recipe(order.recipe, overrides, *tool.tasks)
    _check_in_bucket(recipe, tool, order.tool_arguments)
    cloud = recipe.cloud.model_copy(update={key: value for key, value in order.cloud.items() if value is not None})
    where = {key: getattr(cloud, key) or configured(name) for key, name in _WHERE.items()}
    for key, value in where.items():
        if value is None:
            raise UserError(
                f"--{key}: not given, and neither in the recipe's cloud.{key} nor in gcloud's configuration"
            )
    if cloud.accelerator is None:
        raise UserError("--accelerator: required, or cloud.accelerator in the recipe; a Cloud name such as v6e-64")
    slices = _slices(cloud.accelerator, order.num_slices)
    _check_fits(recipe, tool, order.tool, slices)
    content = package.packed()
    files = JobFiles(recipe.root, order.name)
    spec = JobSpec(
        name=order.name,
        project=str(where["project"]),
        zone=str(where["zone"]),
        accelerator=cloud.accelerator,
        num_slices=order.num_slices,
        runtime_version=cloud.runtime_version or RUNTIME_VERSIONS[slices.generation],
        spot=order.spot,
        reserved=order.reserved,
        service_account=cloud.service_account,
        network=cloud.network,
        subnetwork=cloud.subnetwork,
        internal_ips=cloud.internal_ips,
        arguments=(f"tools/{tool.script}.py", *tool.before, "{recipe}", *order.tool_arguments),
        run_dir=recipe.path(recipe.run_dir) if order.tool == "train" else None,
        package=package.url_of(recipe.root, content),
        commit=package.version(),
        environment=environment,
        limits=order.limits,
        created=time.time(),
    )
    return Prepared(files, spec, recipe, content)


def _slices(accelerator: str, num_slices: int) -> Topology:
    one = topology(accelerator, "--accelerator")
    return one if num_slices == 1 else topology(f"{num_slices}x{accelerator}", "--num-slices")


def _check_in_bucket(recipe: Any, tool: Tool, arguments: Sequence[str]) -> None:
    """What lies on this machine is not there on others, and what is written on theirs is gone with them."""
    from rae_xla.recipe import input_files

    if not recipe.root.startswith("gs://"):
        raise UserError(f"root: {recipe.root!r}: the machines of a slice share nothing but a bucket; say root=gs://...")
    outputs = {"run_dir": recipe.path(recipe.run_dir)} if hasattr(recipe, "run_dir") else {}
    for key, path in {**outputs, **input_files(recipe)}.items():
        if "://" not in path:
            raise UserError(f"{key}: {path} is on this machine, which a slice does not see; copy it to the bucket")
    if tool.out:
        values = [value for option, value in pairwise(arguments) if option == "--out"]
        values += [one.removeprefix("--out=") for one in arguments if one.startswith("--out=")]
        if not values or not values[-1].startswith("gs://"):
            raise UserError("--out: required after -- with a gs:// path; a machine's own disk goes with it")


def _check_fits(recipe: Any, tool: Tool, name: str, slices: Topology) -> None:
    hosts = slices.hosts_per_slice * slices.num_slices
    if hosts > 1 and not tool.several_hosts:
        raise UserError(
            f"--accelerator: {slices.name} has {hosts} machines, and {name} runs on one; take v6e-8 or less"
        )
    if recipe.mesh.slices != slices.num_slices:
        # The other way round the order is laid over the recipe.
        raise UserError(f"mesh.slices: the recipe says {recipe.mesh.slices}; give --num-slices {recipe.mesh.slices}")
    try:
        recipe.mesh.shape_for(slices.num_chips)
    except UserError as error:
        raise UserError(f"{slices.name} has {slices.num_chips} chips: {error}") from error


def _environment(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise UserError(f"--env: {one!r}: written NAME=VALUE")
        if any(word in key.upper() for word in SECRETS):
            raise UserError(f"--env: {key} looks like a secret, and jobs lie in the bucket in plain text; leave it out")
        found[key] = value
    return found


def check_cloud(prepared: Prepared, gcloud: Gcloud) -> None:
    """Whether Cloud will take it: somebody is logged in, the zone has such slices, the bucket and the name are free.

    Raises:
        UserError: the first thing that is wrong; nothing was made.
    """
    spec = prepared.spec
    check_logged_in()
    try:
        _check_offered(spec, names_of(gcloud.read(*_OFFERED), "type"))
        check_bucket(prepared)
        left = slices_of(spec, gcloud)
    except GcloudError as error:
        raise UserError(f"{spec.project}, {spec.zone}: {error}") from error
    if left:
        names = ", ".join(spec.resource(one.generation) for one in left)
        raise UserError(f"--name: {spec.name}: there are slices of that name, {names}; give another")


def _check_offered(spec: JobSpec, offered: list[str]) -> None:
    if not offered:
        raise UserError(f"--zone: {spec.zone} has no TPUs; take another")
    if spec.accelerator not in offered:
        same = [name for name in offered if name.split("-")[0] == spec.accelerator.split("-")[0]]
        raise UserError(f"--accelerator: {spec.zone} has no {spec.accelerator}; it has {', '.join(same or offered)}")


def check_bucket(prepared: Prepared) -> None:
    """Whether the name is free, the bucket can be written, and all that the recipe reads is there.

    Raises:
        UserError: the first thing that is wrong; nothing was made.
    """
    from rae_xla.recipe import check_inputs

    files, spec = prepared.files, prepared.spec
    if files.read(SPEC) is not None:
        raise UserError(
            f"--name: {spec.name} is taken by a job in {files.root}; give another, or end and remove that one: "
            f"tools/tpu.py clean --name {spec.name} --root {files.root}"
        )
    probe = storage.join(files.root, f".writable-{uuid.uuid4().hex[:8]}")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    # What stores and the libraries below raise has no common base.
    except Exception as error:
        raise UserError(f"root: {files.root} cannot be written; make the bucket, or ask for the right to") from error
    check_inputs(prepared.recipe)


def show_submitting(prepared: Prepared, show: Callable[[str], None]) -> None:
    """Say what submitting would do, in order."""
    files, spec = prepared.files, prepared.spec
    gcloud = Gcloud(spec.project, spec.zone, show)
    gcloud.read(*_OFFERED)
    slices_of(spec, gcloud)
    show(f"write {spec.package} ({len(prepared.content) / 2**20:.1f} MiB)")
    show(f"write {files.path(RECIPE)}")
    show(f"write {files.path(SPEC)}: {json.dumps(spec.model_dump(mode='json'))}")
    create_slice(files, spec, 1, gcloud)
