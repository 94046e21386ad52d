"""Score samples, an autoencoder, or its latents; and say what differs between two scores.

  evaluate.py generation [RECIPE] --samples S --reference R [--inception-weights W]
  evaluate.py reconstruction RECIPE [--reference R]
  evaluate.py linear-probe RECIPE
  evaluate.py compare A B

generation      FID, sFID, Inception Score, precision and recall by ADM's protocol, of samples.npz or a folder of
                pictures; without RECIPE in Inception's features. In others' (features of the recipe) names say so
reconstruction  rFID, PSNR, SSIM and LPIPS on held-out images; rFID is against these images if no reference is given
linear-probe    top-1 and top-5 accuracy on held-out images; trains the classifier first, or goes on where it was
compare         what differs between two manifests of scores (files, or folders that hold one) that can move a score

References by name: adm_imagenet256 and adm_imagenet512 are fetched once into ROOT/pretrained and checked;
imagenet_val_256_rfid is made by tools/reference_stats.py. By path: an .npz of images (arr_0), statistics (mu, sigma,
mu_s, sigma_s) or both, or a folder of pictures. One for generation is refused for reconstruction, and the other way.
manifest.json, with all that decides the scores, and report.html are written into scores/ beside samples.npz, into
NAME.scores/ beside other files and folders, and for reconstruction into the run directory.
The recipe's task is evaluation, or linear_probe.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli

WHATS = ("generation", "reconstruction", "linear-probe", "compare")


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores."""
    from rae_xla.errors import UserError

    what, options = arguments.what, _options(arguments)
    taken = {"generation": set(OPTIONS), "reconstruction": set(OPTIONS) - {"--samples"}}
    not_taken = [name for name in options if name not in taken.get(what, set())]
    if not_taken:
        raise UserError(f"{not_taken[0]}: not for {what}; see --help")
    if what == "compare":
        return _compare(arguments.given)
    scores = _scored(what, arguments, options)
    cli.print_scores(scores)
    return scores


def _options(arguments: argparse.Namespace) -> dict[str, str]:
    named = {name: getattr(arguments, name.lstrip("-").replace("-", "_")) for name in OPTIONS}
    return {name: value for name, value in named.items() if value is not None}


def _scored(what: str, arguments: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    from rae_xla import runtime
    from rae_xla.errors import UserError
    from rae_xla.evaluation.linear_probe import evaluate_linear_probe
    from rae_xla.evaluation.reconstruction_scores import evaluate_reconstruction
    from rae_xla.evaluation.scoring import evaluate_generation
    from rae_xla.recipe import load_recipe

    if what == "generation":
        path, overrides = cli.recipe_and_overrides(arguments.given, cli.INCEPTION_RECIPE)
        if "--samples" not in options:
            raise UserError("--samples: required for generation; give a samples.npz, or a folder of pictures")
    elif arguments.given:
        path, *overrides = arguments.given
    else:
        raise UserError(f"RECIPE: required for {what}")
    overrides = [*overrides, *cli.inception_override(options.get("--inception-weights"))]
    recipe = load_recipe(path, overrides, "linear_probe" if what == "linear-probe" else "evaluation")
    if what != "linear-probe":
        cli.check_inception(options.get("--inception-weights"), recipe)
    made = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    if what == "generation":
        return evaluate_generation(recipe, made, options["--samples"], options.get("--reference"), options.get("--out"))
    if what == "reconstruction":
        return evaluate_reconstruction(recipe, made, options.get("--reference"), options.get("--out"))
    return evaluate_linear_probe(recipe, made)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _compare(given: list[str]) -> dict[str, Any]:
    from rae_xla.errors import UserError
    from rae_xla.evaluation.score_files import compare

    if len(given) != 2:
        raise UserError(f"compare: takes two manifests of scores, got {len(given)}")
    found = compare(*given)
    for title, key in (("can move a score", "moves_scores"), ("may move last digits", "moves_last_digits")):
        print(f"{title}: {'nothing differs' if not found[key] else ''}")
        for name, (first, second) in found[key].items():
            print(f"  {name}: {_short(first)} / {_short(second)}")
    for name, (first, second) in found["scores"].items():
        print(f"{name:28} {first} / {second}")
    return found


OPTIONS = {
    "--samples": ("S", "samples.npz, a folder that holds it, or a folder of pictures (generation)"),
    "--reference": ("R", "a name, or an .npz of images or statistics"),
    "--inception-weights": ("W", "torch-fidelity's weights-inception-2015-12-05-6726825d.pth; fetched if not given"),
    "--out": ("DIR", "for manifest.json and report.html (default: see above)"),
}

if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("what", choices=WHATS)
    parser.add_argument(
        "given", metavar="RECIPE key.sub=value", nargs="*", help="a YAML file, and values laid over it; compare: A B"
    )
    for name, (metavar, help_) in OPTIONS.items():
        parser.add_argument(name, metavar=metavar, help=help_)
    cli.run(main, parser)
