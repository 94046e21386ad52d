"""What must be settled before a device is used: which kind, and how its compiler is set."""

from __future__ import annotations

import logging
import os

from rae_xla.compiler_flags import VARIABLE, our_flags, with_flags

logger = logging.getLogger(__name__)

TPU_DEVICE_FILES = ("/dev/accel0", "/dev/vfio/0")


def choose_device() -> None:
    """Name the CPU as the device where there is no TPU and nothing was said; before torch_xla is imported."""
    if "PJRT_DEVICE" not in os.environ and not any(os.path.exists(file) for file in TPU_DEVICE_FILES):
        logger.info("no TPU here: running on the CPU; CPU_NUM_DEVICES=8 makes eight virtual devices of it")
        os.environ["PJRT_DEVICE"] = "CPU"


def set_compiler() -> None:
    """Set the compiler of a TPU; before torch_xla looks for devices."""
    if os.environ.get("PJRT_DEVICE", "TPU") != "TPU":
        return
    from torch_xla._internal import tpu

    flags = our_flags("v6e" if tpu.version() == 6 else "another")
    if flags:
        os.environ[VARIABLE] = with_flags(os.environ.get(VARIABLE, ""), flags)
        logger.info("%s=%s", VARIABLE, os.environ[VARIABLE])
