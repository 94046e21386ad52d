"""Which line of this project made an operation, kept in the operation's name through tracing and compiling.

torch_xla's own record, a stack of calls for each operation, is lost inside scans, and has nothing of a backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch_xla
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = f"{Path(__file__).parent.parent}/"
# They run what others wrote.
_PASSING_ON = ("models/blocks.py", "models/functional.py", "run_blocks.py", "xla/")
# What runs in a backward pass of these, runs forward once more.
_COMPUTING = ("models/", "flow/")


@contextmanager
def source_lines() -> Iterator[None]:
    """Operations that are traced inside have ``rae_xla/.../file.py:line`` in their names, or that and `` backward``."""
    names = _Names()
    with _Forward(names), names:
        yield


class _Names(TorchDispatchMode):
    """Runs each operation in a scope that is named for its line."""

    def __init__(self) -> None:
        super().__init__()
        self.differentiated = ""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = line_of_caller()
        if torch._C._current_graph_task_id() >= 0 and not name.startswith(_COMPUTING):
            name = self.differentiated
        # The scope lasts as long as this object.
        scope = torch_xla._XLAC.profiler.scope_pusher(f"rae_xla/{name}") if name else None
        try:
            return operation(*args, **(kwargs or {}))
        finally:
            del scope


class _Forward(TorchFunctionMode):
    """Has autograd say whose backward pass it is at, as far as it knows: of the last function it began to undo."""

    def __init__(self, names: _Names) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            name = line_of_caller()
            for result in tree_leaves(results):
                if name and isinstance(result, Tensor) and result.grad_fn is not None:
                    result.grad_fn.register_prehook(self._entering(f"{name} backward"))
        return results

    def _entering(self, name: str) -> Any:
        def enter(_: Any) -> None:
            self._names.differentiated = name

        return enter


def line_of_caller() -> str:
    """``file.py:line`` in the package of the innermost caller that says what is computed; nothing if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            path = file.removeprefix(PACKAGE)
            if not path.startswith(_PASSING_ON):
                return f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
