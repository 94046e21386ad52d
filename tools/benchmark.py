"""The project's own measurements.

models         parameters and multiply-adds of every named model, beside the paper's figures
width          Theorem 1: the loss of one digit learnt by heart at several widths; needs a run of the quickstart
step-overhead  host time of a training step of a DiT^DH, traced lazily every time and traced once and replayed;
               --depth-only for the true number of blocks and tensors at a tiny width, which a CPU runs;
               CPU_NUM_DEVICES=8 for eight virtual devices
input          images a second from shards to batches of 256 px, beside torchvision's ImageFolder; --workers
decoder        a small decoder on photographs with all losses, every phase of the paper's within 208 steps: its curves,
               and what noise in training gains and costs; CPU_NUM_DEVICES=8 for eight virtual devices
diffusion      shift, width, averaging and guidance of a small DiT^DH on digits: curves of loss and scores; an hour
sampler        host time of sampling with a DiT^DH: one lazy graph for each step, as released, and one program for all;
               --depth-only, --images for how many at a time
frechet        the Frechet distance of 2,048 features, beside scipy's square root of a matrix
checkpoint-stall  how long a save of a model's training state keeps the loop, beside a synchronous one; --model dit_dh_b
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def models(_: argparse.Namespace) -> dict[str, Any]:
    """``rows`` of ``name params_millions gflops``, and the paper's figures."""
    from dataclasses import asdict

    from rae_xla.models.flops import model_costs

    rows = [asdict(cost) for cost in model_costs()]
    print("One image of 256 px; GFLOPs are billions of multiply-adds. 'as the paper': see rae_xla/models/flops.py.")
    print(f"{'':14} {'M parameters':>13} {'paper':>7} {'GFLOPs':>8} {'as the paper':>13} {'paper':>7}")
    for row in rows:
        print(
            f"{row['name']:14} {row['params_millions']:13.1f} {_shown(row['paper_params_millions'], 1):>7} "
            f"{row['gflops']:8.2f} {_shown(row['gflops_as_paper'], 2):>13} {_shown(row['paper_gflops'], 2):>7}"
        )
    return {"rows": rows}


def width(arguments: argparse.Namespace) -> dict[str, Any]:
    """``rows`` of ``width loss bound steps``."""
    from rae_xla.benchmarks.width import WIDTHS, draw, loss_by_width

    root = arguments.root or "runs/quickstart"
    rows = loss_by_width(root, WIDTHS, [])
    print(f"width   loss  bound (tokens are {rows[0]['token_width']} wide)")
    for row in rows:
        print(f"{row['width']:5} {row['loss']:6.4f} {row['bound']:6.4f}")
    picture = f"{root}/overfit/width.png"
    draw(rows, picture)
    print(f"drawn in {picture}")
    return {"rows": rows, "picture": picture}


def step_overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """``lazy_ms engine_ms ratio compilations_after_warmup host_syncs_per_step``."""
    from rae_xla.benchmarks.overhead import step_overhead as measured
    from rae_xla.run_blocks import ComputeConfig
    from rae_xla.sharding import MeshConfig

    result = measured(
        arguments.model,
        MeshConfig(fsdp=arguments.fsdp),
        ComputeConfig(blocks=arguments.blocks, remat=arguments.remat),
        depth_only=arguments.depth_only,
        num_steps=200,
        num_lazy_steps=10,
    )
    print(
        f"{result['model']}, {result['tensors']} parameter tensors stacked into {result['stacked_tensors']}, "
        f"{result['num_devices']} devices; host time per step:"
    )
    print(f"traced lazily every step {result['lazy_ms']:.1f} ms, traced once and replayed {result['engine_ms']:.2f} ms")
    print(f"ratio {result['ratio']:.0f}; over {result['steps']} replayed steps with a changing learning rate")
    print(
        f"{result['compilations_after_warmup']} compilations, {result['host_syncs_per_step']:.2f} host syncs per step"
    )
    return result


def input_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """``images_per_second_per_core torchvision_images_per_second_per_core ratio``, and how far the pixels are."""
    from rae_xla.benchmarks.input import input_speed as measured

    result = measured(arguments.images or 2048, arguments.workers)
    print(
        f"JPEG of 500x375, {result['kilobytes_per_image']:.0f} kB, to batches of 256 px, {result['workers']} workers; "
        "images a second and worker:"
    )
    print(
        f"ours {result['images_per_second_per_core']:.0f}, torchvision's ImageFolder "
        f"{result['torchvision_images_per_second_per_core']:.0f}, ratio {result['ratio']:.2f}"
    )
    print(
        f"against ADM's crop: at most {result['largest_difference']} of 255, "
        f"{100 * result['share_of_values_that_differ']:.2f}% of values; "
        f"resampling=exact {'is' if result['exact_mode_is_exact'] else 'is not'} exact"
    )
    print(f"start-up with {result['startup_shards']} shards {result['startup_seconds']:.2f} s")
    return result


def decoder(arguments: argparse.Namespace) -> dict[str, Any]:
    """``heldout``: rows of scores; curves of the discriminator; ``trade_off``: PSNR by training and by latents."""
    from rae_xla.benchmarks.decoder import decoder_phases, draw, noise_trade_off

    root = arguments.root or "runs/photographs"
    result = decoder_phases(root, [])
    picture = f"{root}/decoder.png"
    draw(result, picture)
    print("step  PSNR   SSIM    LPIPS   of held-out squares of two photographs, by averaged weights")
    for line in result["heldout"]:
        psnr, ssim, lpips = (line[f"heldout_{name}"] for name in ("psnr", "ssim", "lpips"))
        print(f"{line['step']:4} {psnr:6.2f} {ssim:7.4f} {lpips:7.4f}")
    for name in ("discriminator_accuracy", "adaptive_weight"):
        values = [value for _, value in result[name]]
        print(f"{name.replace('_', ' ')} from {min(values):.3f} to {max(values):.3f}")
    print(f"drawn in {picture}")
    trade_off = noise_trade_off(root, [])
    for name, values in trade_off.items():
        print(f"trained {name} noise: PSNR {values['clean']:.2f} of clean latents, {values['noisy']:.2f} of noisy ones")
    return {**result, "trade_off": trade_off, "picture": picture}


def diffusion(arguments: argparse.Namespace) -> dict[str, Any]:
    """``rows`` of ``name last_loss scored``; scores ``averaged not_averaged guided``."""
    from rae_xla.benchmarks.diffusion import diffusion_choices, draw

    root = arguments.root or "runs/diffusion"
    result = diffusion_choices(root)
    picture = f"{root}/diffusion.png"
    draw(result, picture)
    print(f"{'':26}   loss  recognised  Frechet distance (judge)")
    for row in result["rows"]:
        _print_scores(f"{row['name']:26} {row['last_loss']:6.4f}", row["scored"][-1])
    for name, title in (
        ("guided", "as in the paper, guided"),
        ("averaged", "constant rate, averaged"),
        ("not_averaged", "constant rate, not averaged"),
    ):
        _print_scores(f"{title:33}", result[name])
    print(f"drawn in {picture}")
    return {**result, "picture": picture}


def _print_scores(title: str, scores: dict[str, Any]) -> None:
    print(f"{title} {100 * scores['recognised_share']:10.1f}% {scores['judge_frechet_distance']:8.2f}")


def sampler(arguments: argparse.Namespace) -> dict[str, Any]:
    """``released_host_ms_per_image host_ms_per_image ratio compilations``."""
    from rae_xla.benchmarks.sampler import sampler_overhead

    result = sampler_overhead(arguments.model, depth_only=arguments.depth_only, num_images=arguments.images or 8)
    print(
        f"{result['model']}, {result['num_images']} images at a time, {result['evaluations']} evaluations; host time "
        "of an image:"
    )
    print(
        f"one lazy graph for each step {result['released_host_ms_per_image']:.2f} ms, one program for all "
        f"{result['host_ms_per_image']:.3f} ms, ratio {result['ratio']:.0f}"
    )
    print(
        f"{result['compilations']} compilation for all calls, {result['transfers_to_host_per_call']:.0f} transfer to "
        f"the host for each; samples differ by {result['largest_difference']:.1e} of the largest value"
    )
    return result


def checkpoint_stall(arguments: argparse.Namespace) -> dict[str, Any]:
    """``synchronous_seconds asynchronous_seconds ratio``."""
    from rae_xla.benchmarks.stall import checkpoint_stall as measured

    result = measured(arguments.model, arguments.fsdp)
    print(f"{result['model']}, a training state of {result['gigabytes']:.2f} GB; the step after a save ends later by:")
    print(
        f"{result['synchronous_seconds']:.2f} s if training waits until it is written, "
        f"{result['asynchronous_seconds']:.2f} s if it goes on, ratio {result['ratio']:.1f}"
    )
    usual, meanwhile = result["seconds_of_a_step"], result["seconds_of_a_step_meanwhile"]
    print(f"a step takes {usual:.2f} s, {meanwhile:.2f} s while the same processor writes a state")
    return result


def frechet(_: argparse.Namespace) -> dict[str, Any]:
    """``scipy_seconds seconds ratio relative_difference``."""
    from rae_xla.benchmarks.frechet import frechet as measured

    result = measured()
    print(
        f"{result['width']} features of {result['num_images']} images, median of {result['pairs']} pairs: "
        f"scipy's sqrtm {result['scipy_seconds']:.2f} s, here {result['seconds']:.2f} s, ratio {result['ratio']:.1f}"
    )
    print(f"they differ by {result['relative_difference']:.1e} of the distance")
    return result


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    measurements = {
        "models": models,
        "width": width,
        "step-overhead": step_overhead,
        "input": input_speed,
        "decoder": decoder,
        "diffusion": diffusion,
        "sampler": sampler,
        "checkpoint-stall": checkpoint_stall,
        "frechet": frechet,
    }
    parser.add_argument("what", choices=list(measurements))
    parser.add_argument(
        "--model", metavar="NAME", default="dit_dh_xl", help="of step-overhead, sampler (default: dit_dh_xl)"
    )
    parser.add_argument("--depth-only", action="store_true", help="tiny width, true depth")
    parser.add_argument("--fsdp", metavar="N", type=int, default=1, help="for step-overhead (default: 1)")
    parser.add_argument("--blocks", choices=["list", "scan"], default="list", help="for step-overhead (default: list)")
    parser.add_argument(
        "--remat", choices=["none", "block", "matmuls"], default="none", help="for step-overhead (default: none)"
    )
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="for input (default: 2)")
    parser.add_argument("--images", metavar="N", type=int, help="for input (default: 2048) and sampler (default: 8)")
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="for width, of a quickstart (default: runs/quickstart); for decoder (runs/photographs), diffusion "
        "(runs/diffusion)",
    )
    cli.run(lambda arguments: measurements[arguments.what](arguments), parser)
