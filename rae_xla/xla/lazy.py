"""The rival of `CompiledStep`, for measurements: the same step, traced lazily every time."""

from __future__ import annotations

from typing import Any

import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics
from torch.utils._pytree import tree_leaves

from rae_xla.xla.mesh import keep_sharding
from rae_xla.xla.step import Step


class LazyStep:
    """Calls ``function(state, frozen, batch) -> (state, outputs)`` and lets torch_xla trace, look up and run it."""

    def __init__(self, function: Step) -> None:
        self._function = function

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        """One step, started on the device."""
        new_state, outputs = self._function(state, frozen, batch)
        for old, new in zip(tree_leaves(state), tree_leaves(new_state), strict=True):
            keep_sharding(old, new)
        torch_xla.sync()
        return new_state, outputs


def num_transfers_to_host() -> int:
    """Transfers from the devices to the host in this process so far."""
    data = xla_metrics.metric_data("TransferFromDeviceTime")
    return 0 if data is None else int(data[0])


def wait_for_devices() -> None:
    """Until all that was started is done."""
    xm.wait_device_ops()
