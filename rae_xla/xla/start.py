"""What must be settled before torch_xla is imported: which kind of device it finds, and how its compiler is set."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

TPU_DEVICE_FILES = ("/dev/accel0", "/dev/vfio/0")

# Gradients are summed over the chips by the sparse cores, beside the products, and those of large matrices one by one:
# by itself libtpu 0.0.21 stops for a sum, and joins all of a block's to one, which is ready last. The multiplier has
# the scheduler leave them their time. docs/performance.md has the figures.
COMPILER_FLAGS = (
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "--xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes=1000",
    "--xla_tpu_sparse_core_all_reduce_latency_multiplier=4",
    "--xla_jf_crs_combiner_threshold_in_bytes=4000000",
)
# Those that torch_xla 2.9 adds when it is imported, for a compiler that is asked without it.
FLAGS_OF_TORCH_XLA = (
    "--xla_tpu_use_enhanced_launch_barrier=false",
    "--xla_latency_hiding_scheduler_rerun=1",
    "--xla_tpu_prefer_async_allgather_to_allreduce=true",
    "--xla_tpu_enable_flash_attention=false",
)


def choose_device() -> None:
    """Name the CPU as the device where there is no TPU and nothing was said; set the compiler of a TPU."""
    if "PJRT_DEVICE" not in os.environ and not any(os.path.exists(file) for file in TPU_DEVICE_FILES):
        logger.info("no TPU here: running on the CPU; CPU_NUM_DEVICES=8 makes eight virtual devices of it")
        os.environ["PJRT_DEVICE"] = "CPU"
    if os.environ.get("PJRT_DEVICE", "TPU") == "TPU":
        set_flags(COMPILER_FLAGS)


def set_flags(flags: tuple[str, ...]) -> None:
    """Of libtpu; what the environment says already comes last, and so decides."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([flag for flag in flags if flag not in given] + given)
