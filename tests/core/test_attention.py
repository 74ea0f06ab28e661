"""The exactness contract of an attention: compact equals masked for any set of kept heads.

The masked reference itself is checked against diffusers' own module with a hook on the layer that
reads the heads. Tolerances are as in test_feedforward.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldcp_core import (
    AttentionWeights,
    CompactAttention,
    Correction,
    LinearWeights,
    PrunedSite,
    SoftGate,
    masked_attention,
)

WIDTH, TEXT, HEADS = 24, 20, 6  # heads of 4 channels, which no multiple of 8 is
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def weights(seed: int, text: int, dtype: torch.dtype = torch.float32) -> AttentionWeights:
    g = torch.Generator().manual_seed(seed)

    def linear(columns: int, bias: bool = False) -> LinearWeights:
        weight = torch.randn(WIDTH, columns, generator=g) * 2 * columns**-0.5
        offset = torch.randn(WIDTH, generator=g).to(dtype) if bias else None
        return LinearWeights(weight.to(dtype), offset)

    return AttentionWeights(linear(WIDTH), linear(text), linear(text), linear(WIDTH, bias=True))


def to_double(found: AttentionWeights) -> AttentionWeights:
    return AttentionWeights(
        *(
            LinearWeights(w.weight.double(), None if w.bias is None else w.bias.double())
            for w in (found.q, found.k, found.v, found.out)
        )
    )


def maps(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keep_and_constants(seed: int, share: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    heads = torch.rand(HEADS, generator=g) >= share
    return heads.repeat_interleave(WIDTH // HEADS), 2 * torch.randn(WIDTH, generator=g)


@pytest.mark.parametrize("text", [None, TEXT])
def test_the_reference_is_diffusers_own_module_with_its_heads_replaced(text: int | None) -> None:
    module = Attention(WIDTH, text, heads=HEADS, dim_head=WIDTH // HEADS).eval()
    keep, mu = keep_and_constants(1, 0.5)
    layers = (module.to_q, module.to_k, module.to_v, module.to_out[0])
    own = AttentionWeights(*(LinearWeights(layer.weight, layer.bias) for layer in layers))
    x = maps(2, torch.float32, 2, 9, WIDTH)
    context = x if text is None else maps(3, torch.float32, 2, 5, text)
    with torch.no_grad():
        found = masked_attention(x, context, context, own, HEADS, None)
        assert torch.equal(found, module(x, context))
        hook = module.to_out[0].register_forward_pre_hook(lambda m, i: torch.where(keep, *i, mu))
        expected = module(x, context)
        hook.remove()
        soft = SoftGate(keep.float(), mu)
        found = masked_attention(x, context, context, own, HEADS, soft)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    text=st.booleans(),
    constant=st.booleans(),
    corrects=st.booleans(),
    shape=st.sampled_from([(1, 1, 1), (2, 9, 5), (3, 4, 4)]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_compact_equals_masked(
    dtype: torch.dtype,
    seed: int,
    share: float,
    text: bool,
    constant: bool,
    corrects: bool,
    shape: tuple[int, int, int],
) -> None:
    batch, positions, tokens = shape
    own = weights(seed, TEXT if text else WIDTH, dtype)
    x = maps(seed + 1, dtype, batch, positions, WIDTH)
    context = maps(seed + 2, dtype, batch, tokens, TEXT) if text else x
    value = maps(seed + 3, dtype, *context.shape)  # other nodes may give values of their own
    keep, mu = keep_and_constants(seed, share)
    keep[: WIDTH // HEADS] = False  # something is pruned, always
    correction = None
    if corrects:
        g = torch.Generator().manual_seed(seed)
        left = torch.randn(WIDTH, 3, generator=g).half()
        right = (torch.randn(3, int(keep.sum()), generator=g) / 8).half()
        correction = Correction(left, right, torch.randn(WIDTH, generator=g))
    gate = PrunedSite(keep, mu if constant else None, correction=correction)
    compact = CompactAttention(gate, own, HEADS)(x, context, value)
    assert compact.dtype == dtype and compact.shape == x.shape

    mu = mu.to(dtype).double() if constant else torch.zeros(WIDTH)
    soft, exact = SoftGate(keep.double(), mu, correction), to_double(own)
    doubles = [t.double() for t in (x, context, value)]
    reference = masked_attention(*doubles, exact, HEADS, soft)
    dense = masked_attention(*doubles, exact, HEADS, None)
    size = max(float(reference.abs().max()), float(dense.abs().max()), 1e-3)
    error = float((compact.double() - reference).abs().max()) / size
    assert error <= TOLERANCE[dtype]
    if share == 0.5 and dtype in (torch.float32, torch.float64):
        assert float((dense - reference).abs().max()) / size >= 100 * TOLERANCE[dtype]


def test_the_heads_are_gone_and_the_originals_are_not_held() -> None:
    own = weights(3, TEXT)
    keep = (torch.arange(HEADS) % 3 != 0).repeat_interleave(WIDTH // HEADS)  # 16 of 24 stay
    compact = CompactAttention(PrunedSite(keep, torch.ones(WIDTH)), own, HEADS)
    assert compact.heads == 4
    numbers = sum(t.numel() for t in compact.tensors())
    assert numbers == 16 * (WIDTH + 2 * TEXT) + WIDTH * 16 + WIDTH
    held = {t.untyped_storage().data_ptr() for t in compact.tensors()}
    layers = (own.q, own.k, own.v, own.out)
    full = {t.untyped_storage().data_ptr() for w in layers for t in w.tensors()}
    assert not held & full


def test_a_part_of_a_head_is_not_pruned() -> None:
    with pytest.raises(AssertionError):
        CompactAttention(PrunedSite(torch.arange(WIDTH) > 0), weights(3, TEXT), HEADS)
