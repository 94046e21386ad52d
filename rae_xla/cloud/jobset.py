"""The same job for a Kubernetes cluster: a JobSet, for teams whose queue is xpk's or Kueue's.

A slice is a Job of one pod a machine. JobSet starts all of them again when one fails, as often as ``max_crashes`` and
``max_preemptions`` say together, for it does not tell them apart; a pod that ends with 2, a mistake, ends the JobSet.
Fields: jobset.sigs.k8s.io, v1alpha2; node labels: docs.cloud.google.com/kubernetes-engine/docs/how-to/tpus.
"""

from __future__ import annotations

from typing import Any

from rae_xla.cloud.job import RECIPE, JobFiles, JobSpec
from rae_xla.cloud.queued import START
from rae_xla.errors import UserError

# GKE's names of generations.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5litepod": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
# Has curl, tar and the Python that we need.
IMAGE = "python:3.11"
# What a large state takes to be saved in; a spot machine has half a minute at best.
GRACE_SECONDS = 300
# JobSet's restarts are not counted apart.
MOST_RESTARTS = 1000


def jobset(
    files: JobFiles, spec: JobSpec, image: str = IMAGE, queue: str | None = None, service_account: str | None = None
) -> dict[str, Any]:
    """The manifest. ``queue``: of Kueue's. ``service_account``: the cluster's, which needs the bucket."""
    limits = spec.limits
    labels = {} if queue is None else {"kueue.x-k8s.io/queue-name": queue}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": spec.name,
            "labels": labels,
            # A slice's pods lie on one node pool, and nothing else of the JobSet does.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": min(limits.max_crashes + limits.max_preemptions, MOST_RESTARTS),
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": spec.num_slices,
                    "template": {"spec": _job(files, spec, image, service_account)},
                }
            ],
        },
    }


def _job(files: JobFiles, spec: JobSpec, image: str, service_account: str | None) -> dict[str, Any]:
    where = spec.topology
    hosts = where.hosts_per_slice
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[where.generation],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, where.shape)),
        **({"cloud.google.com/gke-spot": "true"} if spec.spot else {}),
    }
    chips = where.chips_per_slice // hosts
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [
            {
                "name": "worker",
                "image": image,
                # Which fetches the recipe beside the code and runs the command in it.
                "command": ["bash", "-c", START.read_text(), START.name, *map(_verbatim, spec.command(RECIPE))],
                "env": [
                    {"name": name, "value": _verbatim(value)}
                    for name, value in {**spec.environment, **_about(files, spec)}.items()
                ],
                # Of the slices' coordinator and of the hosts.
                "ports": [{"containerPort": port, "protocol": "TCP"} for port in (8471, 8080)],
                "resources": {"limits": {"google.com/tpu": str(chips)}},
            }
        ],
    }
    if spec.spot:
        pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
    if service_account is not None:
        pod["serviceAccountName"] = service_account
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [UserError.exit_code]}}]
        },
        "template": {"spec": pod},
    }


def _verbatim(value: str) -> str:
    """Kubernetes puts variables in for ``$(NAME)``."""
    return value.replace("$(", "$$(")


def _about(files: JobFiles, spec: JobSpec) -> dict[str, str]:
    return {"RAE_XLA_JOB": files.directory, "RAE_XLA_PACKAGE": spec.package}
