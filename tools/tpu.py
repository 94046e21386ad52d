"""Jobs on Cloud TPU: from a recipe to a running slice with one command, and back to nothing that costs.

  tpu.py run RECIPE --name N --accelerator v6e-64 --zone Z [--spot] [key.sub=value ...]   submit, and watch to the end
  tpu.py run --name N [--again]            watch a job that is there; --again begins what was stopped or failed again
  tpu.py submit RECIPE --name N ...        ask for its slices and end here; nobody watches until run does
  tpu.py status|logs|attach|stop|clean --name N
  tpu.py list
  tpu.py manifest RECIPE --name N ...      the same job as a JobSet for Kubernetes, on standard output
  tpu.py cost FILE                         dollars for what preflight.py --json FILE found

run waits for capacity, starts the tool on every machine, tells preemption, crash, hang and mistakes apart, asks for a
slice again that was taken away, goes on from the newest checkpoint, and gives everything back at the end. It may be
killed and started anywhere else. Ctrl-C lets the job save itself and gives its slices back; again, at once.
stop does the same from elsewhere (--now: at once); clean ends a job at once and removes its folder. What its tool wrote
stays. run exits with 75 for a job that was stopped, 1 for one that failed, or 2 for what Cloud or its tool refused.

A job runs tools/train.py, or with --tool another one; what follows -- is its own:
  tpu.py run recipes/released/imagenet256.yaml --name s50k --tool sample --accelerator v6e-8 --zone Z
    root=gs://bucket/project precision=bf16 -- --num-images 50000 --out gs://bucket/project/samples
--root (or the environment's RAE_XLA_ROOT) is the bucket's folder that recipes have as their root.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from rae_xla import cli

COMMANDS = ("run", "submit", "status", "logs", "attach", "stop", "clean", "list", "manifest", "cost")
WITH_RECIPE = ("run", "submit", "manifest")


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was found or done."""
    from rae_xla.cloud import commands
    from rae_xla.errors import UserError

    what, given = arguments.what, arguments.given
    show = print if arguments.dry_run else None
    if what == "cost":
        return _cost(given, arguments.prices)
    if what == "list":
        return _list(_root(arguments), show)
    if arguments.name is None:
        raise UserError(f"--name: required for {what}")
    if what in WITH_RECIPE and given:
        return _with_recipe(what, arguments, show)
    if given or what in ("submit", "manifest"):
        raise UserError(f"RECIPE: {'required for' if not given else 'not for'} {what}; see --help")
    from rae_xla.cloud.job import JobFiles

    files = JobFiles(_root(arguments), arguments.name)
    if what == "run":
        return _ended(commands.watch(files, show, again=arguments.again))
    if what == "stop":
        return _told(commands.stop(files, at_once=arguments.now, show=show))
    if what == "clean":
        commands.clean(files, show=show)
        return {"cleaned": arguments.name}
    if what == "attach":
        sys.exit(commands.attach(files, arguments.worker, show))
    if what == "logs":
        for piece in commands.logs(files, arguments.worker, arguments.attempt, follow=arguments.follow):
            commands.write(piece)
        return {}
    found = commands.status(files, show)
    if found:
        print("\n".join(commands.as_lines(found)))
    return found


def _with_recipe(what: str, arguments: argparse.Namespace, show: Any) -> dict[str, Any]:
    from rae_xla.cloud import commands
    from rae_xla.cloud.job import Limits
    from rae_xla.cloud.submitting import Order

    recipe, *overrides = arguments.given
    limits = {name: getattr(arguments, name) for name in LIMITS if getattr(arguments, name) is not None}
    order = Order(
        name=arguments.name,
        recipe=recipe,
        overrides=overrides,
        tool=arguments.tool,
        tool_arguments=arguments.tool_arguments,
        cloud={name: getattr(arguments, name) for name in CLOUD},
        num_slices=arguments.num_slices,
        spot=arguments.spot,
        reserved=arguments.reserved,
        environment=arguments.env or (),
        limits=Limits(**limits),
    )
    if what == "manifest":
        import yaml

        made = commands.manifest(order, arguments.image, arguments.queue, arguments.kubernetes_service_account, show)
        print(yaml.safe_dump(made, sort_keys=False))
        return made
    files = commands.submit(order, show, ask=what == "submit")
    if show is not None:
        return {"job": files.directory}
    if what == "submit":
        print(f"{files.directory}: nobody watches it yet; tools/tpu.py run --name {files.name} --root {files.root}")
        return {"job": files.directory}
    return _ended(commands.watch(files))


def _ended(state: Any) -> dict[str, Any]:
    from rae_xla.errors import PreemptedError, StoppedError, UserError

    errors = {error.exit_code: error for error in (StoppedError, UserError, PreemptedError)}
    if state.exit_code:
        raise errors[state.exit_code](state.reason)
    return _told(state)


def _told(state: Any) -> dict[str, Any]:
    return {"outcome": state.outcome, "reason": state.reason, "chip_hours": state.chip_hours}


def _list(root: str, show: Any) -> dict[str, Any]:
    from rae_xla.cloud.commands import jobs

    if show is not None:
        show(f"list {root}/jobs")
        return {"jobs": []}
    found = jobs(root)
    for row in found:
        print("  ".join(str(value) for value in row.values()))
    return {"jobs": found}


def _cost(given: list[str], prices: str | None) -> dict[str, Any]:
    from rae_xla.cloud.cost import as_table, costs
    from rae_xla.errors import UserError

    if len(given) != 1:
        raise UserError("FILE: cost takes one file, of tools/preflight.py RECIPE --topology NAME --json FILE")
    rows = costs(given[0], prices)
    print(as_table(rows))
    return {"slices": rows}


def _root(arguments: argparse.Namespace) -> str:
    from rae_xla.errors import UserError

    root = arguments.root or os.environ.get("RAE_XLA_ROOT")
    if not root:
        raise UserError("--root: required, or RAE_XLA_ROOT; the gs:// folder that the job's recipe has as its root")
    return str(root).rstrip("/")


CLOUD = {
    "project": "Google Cloud project (default: the recipe's cloud.project, then gcloud's)",
    "zone": "zone (default: the recipe's cloud.zone, then gcloud's)",
    "accelerator": "one slice, by its Cloud name: v6e-8, v5p-64, ...",
    "runtime_version": "image of the machines (default: the generation's)",
    "service_account": "whose rights the machines have (default: the project's own)",
    "network": "VPC network",
    "subnetwork": "and its part",
}
LIMITS = {
    "max_preemptions": (int, "give up after so many slices that were taken away (default: 1000)"),
    "max_crashes": (int, "give up after so many crashes without a new checkpoint between (default: 3)"),
    "start_minutes": (float, "a machine that is not heard of so long after its slice is there is lost (default: 30)"),
    "lost_minutes": (float, "one that is not heard of any more for so long is, too (default: 10)"),
    "silent_minutes": (float, "nothing written for so long, compiling included, is a hang (default: 90)"),
    "settle_minutes": (float, "left to machines to end after the first has (default: 2)"),
    "save_minutes": (float, "left to machines that are asked to stop (default: 5)"),
    "no_capacity_minutes": (float, "between requests refused for want of capacity (default: 10)"),
    "unwatched_minutes": (float, "with its tool ended and nobody watching, a slice gives itself back (default: 30)"),
    "look_seconds": (float, "between two looks, of machines and of who watches (default: 15)"),
}

if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("given", metavar="RECIPE key.sub=value", nargs="*", help="a YAML file, and values laid over it")
    parser.add_argument("--name", help="of the job; also begins the names of its slices")
    parser.add_argument("--root", help="gs:// folder of the jobs, where no RECIPE says it")
    for name, help_ in CLOUD.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=help_)
    parser.add_argument(
        "--num-slices", metavar="K", type=int, default=1, help="several slices of this kind (default: 1)"
    )
    parser.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
    parser.add_argument("--reserved", action="store_true", help="from the project's reservation")
    parser.add_argument("--tool", default="train", help="what runs: train, sample, evaluate-generation, ...")
    parser.add_argument("--env", metavar="NAME=VALUE", action="append", help="environment of the tool; no secrets")
    for name, (kind, help_) in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="N", type=kind, help=help_)
    parser.add_argument("--worker", metavar="I", type=int, default=0, help="machine, counted over slices (default: 0)")
    parser.add_argument("--attempt", metavar="I", type=int, help="of which logs are shown (default: the present one)")
    parser.add_argument("--follow", action="store_true", help="go on showing logs until the attempt ends")
    parser.add_argument("--again", action="store_true", help="begin a job again that was stopped or has failed")
    parser.add_argument("--now", action="store_true", help="stop without waiting for a save")
    parser.add_argument("--image", default="python:3.11", help="container of a manifest (default: python:3.11)")
    parser.add_argument("--queue", help="Kueue's, for a manifest")
    parser.add_argument("--kubernetes-service-account", metavar="NAME", help="the cluster's, for a manifest")
    parser.add_argument("--prices", metavar="FILE", help="YAML like rae_xla/cloud/prices.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show what would be asked and written, and do nothing")
    own = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser.set_defaults(tool_arguments=sys.argv[own + 1 :])
    del sys.argv[own:]
    cli.run(main, parser)
