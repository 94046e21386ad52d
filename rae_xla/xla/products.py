"""How a TPU multiplies float32: in one bfloat16 pass, unless it is told to take as many as float32 needs.

torch_xla has one setting for the process, which products get when they are lowered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch_xla.backends


def multiply_float32(*, exact: bool) -> None:
    """From now on, in what is lowered."""
    # It warns of being set more than once; tests/test_inception.py looks at what each program gets.
    logging.getLogger(torch_xla.backends.__name__).setLevel(logging.ERROR)
    if torch_xla.backends.get_mat_mul_precision() != (wanted := "highest" if exact else "default"):
        torch_xla.backends.set_mat_mul_precision(wanted)


@contextmanager
def exact_products(wanted: bool) -> Iterator[None]:
    """What is lowered inside multiplies float32 as such, if ``wanted``; else as it is set."""
    was_exact = torch_xla.backends.get_mat_mul_precision() == "highest"
    multiply_float32(exact=wanted or was_exact)
    try:
        yield
    finally:
        multiply_float32(exact=was_exact)
