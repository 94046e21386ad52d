"""What must be settled before torch_xla is imported: which kind of device it finds."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

TPU_DEVICE_FILES = ("/dev/accel0", "/dev/vfio/0")


def choose_device() -> None:
    """Name the CPU as the device where there is no TPU and nothing was said."""
    if "PJRT_DEVICE" not in os.environ and not any(os.path.exists(file) for file in TPU_DEVICE_FILES):
        logger.info("no TPU here: running on the CPU; CPU_NUM_DEVICES=8 makes eight virtual devices of it")
        os.environ["PJRT_DEVICE"] = "CPU"
