"""Modules as pure functions: the module gives the architecture, a dict of tensors gives the values.

Inputs and outputs of the models here are float32; a model computes in the dtype of its parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]


def parameters_of(module: nn.Module) -> Tensors:
    """The parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def buffers_of(module: nn.Module) -> Tensors:
    """The buffers by name: tables, frequencies and statistics that no optimizer touches."""
    return {name: buffer.detach() for name, buffer in module.named_buffers()}


def tensors_of(module: nn.Module) -> Tensors:
    """Parameters and buffers by name."""
    return {**parameters_of(module), **buffers_of(module)}


def call(module: nn.Module, tensors: Tensors, dtype: torch.dtype, *arguments: Any) -> Tensor:
    """``module(*arguments)`` with these values; parameters are cast to ``dtype``, buffers stay float32."""
    parameters = {name for name, _ in module.named_parameters()}
    values = {name: value.to(dtype) if name in parameters else value for name, value in tensors.items()}
    return functional_call(module, values, arguments)
