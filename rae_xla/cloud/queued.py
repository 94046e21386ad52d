"""What is asked of Cloud for a job: its slices made, listed, described and deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rae_xla.cloud.gcloud import Gcloud, GcloudError, flag, one_of_each
from rae_xla.cloud.job import JobFiles, JobSpec

START = Path(__file__).parent / "start.sh"
# By generation; docs.cloud.google.com/tpu/docs/runtimes
RUNTIME_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_QUEUED = ("compute", "tpus", "queued-resources")


def create_slice(files: JobFiles, spec: JobSpec, generation: int, gcloud: Gcloud) -> None:
    """Ask for it; that it is asked for already is no mistake.

    Raises:
        GcloudError: it was refused, or nobody answered.
    """
    try:
        gcloud.run(*create_arguments(files, spec, generation))
    except GcloudError as error:
        if error.kind != "taken":
            raise


def create_arguments(files: JobFiles, spec: JobSpec, generation: int) -> list[str]:
    """Of gcloud, but for project and zone. Nothing of a recipe is in them: machines read it from the bucket."""
    name = spec.resource(generation)
    several = [f"--node-count={spec.num_slices}", f"--node-prefix={name}"]
    return [
        *(*_QUEUED, "create", name),
        f"--accelerator-type={spec.accelerator}",
        f"--runtime-version={spec.runtime_version}",
        *(several if spec.num_slices > 1 else [f"--node-id={name}"]),
        *(["--spot"] if spec.spot else []),
        *(["--reserved"] if spec.reserved else []),
        *(["--internal-ips"] if spec.internal_ips else []),
        *one_of_each({"service-account": spec.service_account, "network": spec.network, "subnetwork": spec.subnetwork}),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        f"--labels=rae-xla-job={spec.name}",
        flag("metadata", {"rae-xla-job": files.directory, "rae-xla-package": spec.package}),
        flag("metadata-from-file", {"startup-script": str(START)}),
        "--async",
    ]


def listed_slices(gcloud: Gcloud) -> list[dict[str, Any]]:
    """The zone's queued resources, of all jobs; raises GcloudError."""
    return gcloud.read(*_QUEUED, "list") or []


def described_slice(spec: JobSpec, generation: int, gcloud: Gcloud) -> dict[str, Any] | None:
    """One, asked for by its name; ``None`` if it is not there. Raises GcloudError if nobody can say."""
    try:
        found: dict[str, Any] = gcloud.read(*_QUEUED, "describe", spec.resource(generation))
    except GcloudError as error:
        if error.kind != "not_found":
            raise
        return None
    return found


def delete_slice(spec: JobSpec, generation: int, gcloud: Gcloud) -> None:
    """Give it back with its machines; that it is gone is no mistake.

    Raises:
        GcloudError: it cannot be deleted yet, or nobody answered.
    """
    try:
        gcloud.run(*_QUEUED, "delete", spec.resource(generation), "--force", "--async")
    except GcloudError as error:
        if error.kind != "not_found":
            raise
