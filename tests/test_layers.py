"""Layers whose gradients are written by hand, against PyTorch's own; on XLA they are in tests/test_mesh.py too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from rae_xla.models.layers import Attention, Linear, Rotary, rotary_angles


def test_linear_and_its_parts_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    ours, plain = Linear(12, 18), nn.Linear(12, 18)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12, requires_grad=True)
    gradient = torch.randn(2, 5, 18)
    expected = torch.autograd.grad(plain(x), [x, *plain.parameters()], gradient)
    assert_close(torch.autograd.grad(ours(x), [x, *ours.parameters()], gradient), expected)
    assert_close(torch.autograd.grad(ours.parts(x, 3), [x, *ours.parameters()], gradient.chunk(3, dim=-1)), expected)
    # A part that nobody uses.
    gradient[..., 6:12] = 0
    first, _, last = ours.parts(x, 3)
    found = torch.autograd.grad([first, last], [x, *ours.parameters()], [gradient[..., :6], gradient[..., 12:]])
    assert_close(found, torch.autograd.grad(plain(x), [x, *plain.parameters()], gradient))


def _plain_attention(attention: Attention, x: Tensor, angles: Tensor | None) -> Tensor:
    """With heads' channels last, neighbours turned as complex numbers, and PyTorch's attention."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if angles is not None:
        turn = torch.complex(*angles[..., ::2])
        q, k = [torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k)]
    return attention.output(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("turned", [True, False])
def test_attention_and_its_gradients_are_those_of_pytorch(*, turned: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4)
    x = torch.randn(2, 9, 32, requires_grad=True)
    inputs = [x, *attention.parameters()]
    found = attention(x, *(Rotary(8, 3).tables() if turned else ()))
    expected = _plain_attention(attention, x, rotary_angles(8, 3) if turned else None)
    assert_close(found, expected)
    gradient = torch.randn_like(found)
    assert_close(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        atol=1e-5,
        rtol=1e-5,
    )


def test_attentions_gradients_in_bfloat16_do_not_hear_what_all_keys_have_in_common() -> None:
    """Biases of keys and values far above their differences, as trained transformers have them."""
    torch.manual_seed(0)
    width, tokens = 64, 64
    attention = Attention(width, 1)
    with torch.no_grad():
        attention.qkv.bias[width:] = 4 * torch.randn(2 * width)
    x, gradient = torch.randn(4, tokens, width), torch.randn(4, tokens, width)

    def of_queries(dtype: torch.dtype) -> Tensor:
        cast = Attention(width, 1).to(dtype)
        cast.load_state_dict(attention.to(torch.bfloat16).state_dict())
        [found] = torch.autograd.grad(cast(x.bfloat16().to(dtype)), [cast.qkv.weight], gradient.bfloat16().to(dtype))
        return found[:width].double()

    exact = of_queries(torch.float64)
    assert (of_queries(torch.bfloat16) - exact).norm() < 0.05 * exact.norm()
