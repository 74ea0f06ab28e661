"""The exactness contract of a feed-forward: compact equals masked for any keep-set.

The masked reference itself is checked against diffusers' own module with a hook on its GEGLU.
Tolerances are as in test_resblock: greatest deviation in full precision, root mean square against
the float64 reference in half precision; pruned differs from dense by at least 100 times as much.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldcp_core import (
    CompactFeedForward,
    Correction,
    LinearWeights,
    PrunedSite,
    SoftGate,
    block_gates,
    masked_feed_forward,
)

WIDTH, HIDDEN = 16, 64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def weights(
    seed: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[LinearWeights, LinearWeights]:
    g = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> LinearWeights:
        weight = torch.randn(rows, columns, generator=g) * columns**-0.5
        offset = torch.randn(rows, generator=g) if bias else None
        return LinearWeights(weight.to(dtype), None if offset is None else offset.to(dtype))

    return linear(2 * HIDDEN, WIDTH), linear(WIDTH, HIDDEN)


def maps(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 9)) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=g).to(dtype)


def to(pair: tuple[LinearWeights, LinearWeights], dtype: torch.dtype) -> list[LinearWeights]:
    return [
        LinearWeights(w.weight.to(dtype), None if w.bias is None else w.bias.to(dtype))
        for w in pair
    ]


def keep_and_constants(seed: int, share: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(HIDDEN, generator=g) >= share, 2 * torch.randn(HIDDEN, generator=g)


def test_the_reference_is_diffusers_own_module_with_its_hidden_channels_replaced() -> None:
    module = FeedForward(WIDTH, activation_fn="geglu").eval()
    keep, mu = keep_and_constants(1, 0.5)
    proj, out = module.net[0].proj, module.net[2]
    pair = LinearWeights(proj.weight, proj.bias), LinearWeights(out.weight, out.bias)
    x = maps(2)
    with torch.no_grad():
        assert torch.equal(masked_feed_forward(x, *pair, None), module(x))
        hook = module.net[0].register_forward_hook(lambda m, i, o: torch.where(keep, o, mu))
        expected = module(x)
        hook.remove()
        found = masked_feed_forward(x, *pair, SoftGate(keep.float(), mu))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    bias=st.booleans(),
    constant=st.booleans(),
    corrects=st.booleans(),
    shape=st.sampled_from([(1, 1), (2, 9), (3, 4, 5)]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_compact_equals_masked(
    dtype: torch.dtype,
    seed: int,
    share: float,
    bias: bool,
    constant: bool,
    corrects: bool,
    shape: tuple[int, ...],
) -> None:
    pair, x = weights(seed, dtype, bias), maps(seed + 1, dtype, shape)
    keep, mu = keep_and_constants(seed, share)
    if share == 0.0:
        keep[0] = False  # something is pruned, always
    correction = None
    if corrects:
        g = torch.Generator().manual_seed(seed)
        left = torch.randn(WIDTH, 3, generator=g).half()
        right = (torch.randn(3, int(keep.sum()), generator=g) / 8).half()
        correction = Correction(left, right, torch.randn(WIDTH, generator=g))
    gate = PrunedSite(keep, mu if constant else None, correction=correction)
    compact = CompactFeedForward(gate, *pair)(x)
    assert compact.dtype == dtype and compact.shape == x.shape

    mu = mu.to(dtype).double() if constant else torch.zeros(HIDDEN)
    soft = SoftGate(keep.double(), mu, correction)
    exact = to(pair, torch.float64)
    reference = masked_feed_forward(x.double(), *exact, soft)
    dense = masked_feed_forward(x.double(), *exact, None)
    size = max(float(reference.abs().max()), float(dense.abs().max()), 1e-3)
    error = float((compact.double() - reference).abs().max()) / size
    assert error <= TOLERANCE[dtype]
    if share == 0.5 and dtype in (torch.float32, torch.float64):
        assert float((dense - reference).abs().max()) / size >= 100 * TOLERANCE[dtype]


def test_the_pruned_rows_and_columns_are_gone_and_the_originals_are_not_held() -> None:
    pair = weights(3)
    keep = torch.arange(HIDDEN) % 4 != 0  # 48 of 64 stay
    compact = CompactFeedForward(PrunedSite(keep, torch.ones(HIDDEN)), *pair)
    numbers = sum(t.numel() for t in compact.tensors())
    assert numbers == 2 * 48 * (WIDTH + 1) + WIDTH * 48 + WIDTH
    held = {t.untyped_storage().data_ptr() for t in compact.tensors()}
    full = {t.untyped_storage().data_ptr() for w in pair for t in (w.weight, w.bias)}
    assert not held & full


def test_feed_forwards_and_res_blocks_are_told_apart_by_their_sites() -> None:
    ff = "mid_block.attentions.0.transformer_blocks.0.ff"
    keep, mu = keep_and_constants(1, 0.5)
    conv = torch.arange(8) < 4
    found = block_gates(
        {f"{ff}.net.0": PrunedSite(keep, mu), "mid_block.resnets.0.conv2": PrunedSite(conv)}
    )
    gate, other = found[ff], found["mid_block.resnets.0"]
    assert isinstance(gate, PrunedSite) and gate.keep is keep and gate.constant is mu
    assert other.inner is None and other.residual is conv
