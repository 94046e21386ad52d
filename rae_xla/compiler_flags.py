"""How a TPU's compiler is set: by ``LIBTPU_INIT_ARGS``, which libtpu reads when it starts.

Preflight's compiler runs without torch_xla and is set as on the slice, by its generation: v4, v5p, v5litepod, v6e.
"""

from __future__ import annotations

from collections.abc import Sequence

VARIABLE = "LIBTPU_INIT_ARGS"

# Gradients are summed over the chips by the sparse cores, beside the products, and those of large matrices one by one:
# by itself libtpu 0.0.21 stops for a sum, and joins all of a block's to one, which is ready last. The multiplier has
# the scheduler leave them their time. docs/performance.md has the figures. Other generations were not measured.
_OF_V6E = (
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "--xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes=1000",
    "--xla_tpu_sparse_core_all_reduce_latency_multiplier=4",
    "--xla_jf_crs_combiner_threshold_in_bytes=4000000",
)
# What torch_xla 2.9 adds by itself when it is imported on a TPU.
_OF_TORCH_XLA = (
    "--xla_tpu_use_enhanced_launch_barrier=false",
    "--xla_latency_hiding_scheduler_rerun=1",
    "--xla_tpu_prefer_async_allgather_to_allreduce=true",
    "--xla_tpu_enable_flash_attention=false",
)
_OF_TORCH_XLA_ON_V5 = ("--xla_enable_async_all_gather=true", "--xla_enable_async_collective_permute=true")


def flags_of_torch_xla(generation: str) -> tuple[str, ...]:
    """Those that are set by torch_xla on such a TPU."""
    return (*_OF_TORCH_XLA, *(_OF_TORCH_XLA_ON_V5 if generation.startswith("v5") else ()))


def our_flags(generation: str) -> tuple[str, ...]:
    """Those that we set beside them."""
    return _OF_V6E if generation == "v6e" else ()


def with_flags(given: str, flags: Sequence[str]) -> str:
    """What the user gave comes last, and so decides."""
    given_flags = given.split()
    return " ".join([flag for flag in flags if flag not in given_flags] + given_flags)
