"""Precision: what a recipe may ask for, and what that means on a kind of device.

Parameters, moments, averages, norms, softmaxes and the sampler's state are float32 in all three.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "fp32_highest", "bf16"]


def compute_dtype(precision: Precision) -> torch.dtype:
    """The type of what layers pass on, and of the inputs of matrix products."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def effective_precision(precision: Precision, device: str) -> dict[str, str]:
    """What is in effect on a kind of device ("TPU", "CPU", "cuda"), for logs and manifests.

    A TPU's matrix unit multiplies float32 in one bfloat16 pass unless it is told to take more (``fp32_highest``).
    """
    rounded = precision == "bf16" or (precision == "fp32" and device == "TPU")
    return {
        "precision": precision,
        "parameters": "float32",
        "activations": str(compute_dtype(precision)).removeprefix("torch."),
        "matmul_inputs": str(compute_dtype(precision)).removeprefix("torch."),
        "matmul_multiplies": "bfloat16" if rounded else "float32",
    }
