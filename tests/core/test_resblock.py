"""The exactness contract: the compact block equals the masked reference for any keep-set.

Bit-equality needs a convolution whose output channels do not depend on how many of them are asked
for. PyTorch's own is one in half precision and wherever oneDNN runs it; its fallback for small
float32 maps may add in another order. So the bit-equal tests bring `rowwise_conv`, which is one by
construction, and everything else states a tolerance:

- float64, float32: greatest deviation, as a share of the greatest value of the reference; "pruned"
  differs from "dense" by at least 100 times the tolerance in the same measure.
- float16, bfloat16: root mean square against the float64 reference of the same rounded weights, as
  a share of its root mean square; or twice what the half-precision reference itself is off. 100
  times that is more than two outputs of one size can differ, so the second condition is put as a
  position on the way from masked (0) to dense (1): the compact output is within 0.01 of masked.

What is pruned is made important (its rows and columns of conv2 are large) so that it must show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ldcp_core import (
    PADDINGS,
    CompactResBlock,
    ConvWeights,
    Correction,
    Padding,
    PrunedSite,
    ResBlockGate,
    SoftGate,
    block_gates,
    masked_resblock,
)
from ldcp_core.resblock import _convolve

TOLERANCE = {
    torch.float64: 1e-5,  # the norm runs in float32 here too
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
DTYPES = list(TOLERANCE)
HALF = (torch.float16, torch.bfloat16)

Conv = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

thorough = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", autouse=True)
def without_derivatives() -> Iterator[None]:
    """As models are sampled; where a derivative may be asked for, less is written in place."""
    with torch.no_grad():
        yield


# --- hosts ----------------------------------------------------------------------------------------


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def circular_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a tiling node makes of a convolution: nn.Conv2d with padding_mode 'circular'."""
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    result: Tensor = conv._conv_forward(x, weight, bias)
    return result


def rowwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str = "constant") -> Tensor:
    """A 3x3 convolution that computes each output channel on its own, in one fixed order."""
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode=mode).contiguous(), 3)
    rows = [(patches * row[:, None]).sum(1) for row in weight.flatten(1)]
    y = torch.stack(rows, 1) if rows else patches.new_empty(x.shape[0], 0, patches.shape[2])
    if bias is not None:
        y = y + bias[:, None]
    return y.unflatten(2, x.shape[2:])


def rowwise_circular_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rowwise_conv(x, weight, bias, mode="circular")


def soft(keep: Tensor | None, constant: Tensor | None) -> SoftGate | None:
    if keep is None:
        return None
    return SoftGate(keep.float(), torch.zeros(keep.numel()) if constant is None else constant)


@dataclass(repr=False)
class Block:
    """A ResBlock made of tensors; it is its own `ResBlockOps`."""

    norm1_affine: tuple[Tensor, Tensor]
    norm2_weights: tuple[Tensor, Tensor]
    first: ConvWeights
    second: ConvWeights
    shortcut: Tensor | None
    groups: int
    eps: float = 1e-5
    folds: bool = True
    conv: Conv = torch_conv

    def norm1(self, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, self.groups, *self.norm1_affine, self.eps))

    def norm2(self, h: Tensor) -> Tensor:
        return F.silu(F.group_norm(h, self.groups, *self.norm2_weights, self.eps))

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm2_weights

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.conv(x, weight, bias)

    def conv2(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.conv(x, weight, bias)

    def skip(self, x: Tensor) -> Tensor:
        return x if self.shortcut is None else F.conv2d(x, self.shortcut)

    def dense(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x), self.first.weight, self.first.bias) + emb[:, :, None, None]
        return self.skip(x) + self.conv2(self.norm2(h), self.second.weight, self.second.bias)

    def masked(self, x: Tensor, emb: Tensor, gate: ResBlockGate) -> Tensor:
        inner = soft(gate.inner, gate.inner_constant)
        if inner is not None:
            inner = replace(inner, correction=gate.correction)
        gates = inner, soft(gate.residual, gate.residual_constant)
        return masked_resblock(self, x, emb, self.first, self.second, *gates, gate.padding)

    def compact(self, x: Tensor, emb: Tensor, gate: ResBlockGate) -> Tensor:
        return CompactResBlock(gate, self.first, self.second, folds=self.folds)(self, x, emb)

    def to(self, dtype: torch.dtype) -> Block:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype)

        def cast_conv(w: ConvWeights) -> ConvWeights:
            return ConvWeights(cast(w.weight), None if w.bias is None else cast(w.bias))

        return replace(
            self,
            norm1_affine=tuple(map(cast, self.norm1_affine)),
            norm2_weights=tuple(map(cast, self.norm2_weights)),
            first=cast_conv(self.first),
            second=cast_conv(self.second),
            shortcut=None if self.shortcut is None else cast(self.shortcut),
        )


# --- random cases ---------------------------------------------------------------------------------


@dataclass(repr=False)
class Case:
    """One block, one gate and one input, in float64 but rounded to ``dtype``."""

    block: Block
    gate: ResBlockGate
    x: Tensor
    emb: Tensor
    dtype: torch.dtype

    def __repr__(self) -> str:
        kept = {kind: getattr(self.gate, kind) for kind in ("inner", "residual")}
        kept = {kind: k if k is None else k.int().tolist() for kind, k in kept.items()}
        return (
            f"Case(x {tuple(self.x.shape)}, emb {tuple(self.emb.shape)}, groups "
            f"{self.block.groups}, {kept}, {self.gate.padding}, {self.dtype})"
        )

    @property
    def prunes(self) -> bool:
        """Whether something is pruned whose absence must show in the output.

        (A GroupNorm group of a single value comes out as the bias whatever goes in, so on 1x1
        maps there must be several channels to a group.)
        """
        inner, residual = self.gate.inner, self.gate.residual
        if residual is not None and not residual.all():
            return True
        values = (
            inner.numel() // self.block.groups * self.x[0, 0].numel() if inner is not None else 0
        )
        return inner is not None and not bool(inner.all()) and values >= 4

    def run(self, how: str, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        block, x, emb = self.block.to(dtype), self.x.to(dtype), self.emb.to(dtype)
        if how == "dense":
            return block.dense(x, emb)
        return getattr(block, how)(x, emb, self.gate)


def make_case(
    seed: int,
    *,
    groups: int = 2,
    in_channels: int = 8,
    out_channels: int = 8,
    size: tuple[int, int] = (4, 4),
    batch: int = 2,
    inner: Tensor | None = None,
    residual: Tensor | None = None,
    constants: bool = True,
    padding: Padding = "zero",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    conv: Conv = torch_conv,
    folds: bool = True,
    importance: float = 8.0,
    correction: bool = False,
) -> Case:
    """Weights of order one; what is pruned weighs ``importance`` times as much as the rest."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).double()

    i, o = in_channels, out_channels
    second = random(o, o, 3, 3) / math.sqrt(9 * o)
    if inner is not None:
        second[:, ~inner] *= importance
    if residual is not None:
        second[~residual] *= importance
    block = Block(
        norm1_affine=(1 + 0.2 * random(i), 0.2 * random(i)),
        norm2_weights=(1 + 0.2 * random(o), 0.2 * random(o)),
        first=ConvWeights(random(o, i, 3, 3) / math.sqrt(9 * i), random(o) if bias else None),
        second=ConvWeights(second, random(o) if bias else None),
        shortcut=random(o, i, 1, 1) / math.sqrt(i) if i != o else None,
        groups=groups,
        conv=conv,
        folds=folds,
    )
    mu = [
        0.5 * random(o).float() if constants and k is not None else None for k in (inner, residual)
    ]
    gate = ResBlockGate(padding, inner, mu[0], residual, mu[1])
    if correction and inner is not None and not bool(inner.all()):
        left, right = random(o, 2), random(2, 9 * int(inner.sum())) / math.sqrt(9 * o)
        gate = replace(gate, correction=Correction(left.half(), right.half(), random(o).float()))
    rounded = block.to(dtype).to(torch.float64)
    x, emb = random(batch, i, *size), random(batch, o)
    return Case(rounded, gate, x, emb, dtype)


@st.composite
def keep_sets(draw: st.DrawFn, channels: int) -> Tensor | None:
    kind = draw(st.sampled_from(["ungated", "none", "all", "one", "some", "some", "some"]))
    if kind == "ungated":
        return None
    if kind == "one":
        keep = torch.zeros(channels, dtype=torch.bool)
        keep[draw(st.integers(0, channels - 1))] = True
        return keep
    if kind == "some":
        return torch.tensor(draw(st.lists(st.booleans(), min_size=channels, max_size=channels)))
    return torch.full((channels,), kind == "all")


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    paddings: tuple[Padding, ...] = PADDINGS,
    conv: Conv = torch_conv,
    folds: bool = True,
    inner: bool = True,
) -> Case:
    groups = draw(st.sampled_from([1, 2, 4]))
    out_channels = groups * draw(st.integers(2, 5))
    in_channels = draw(st.sampled_from([out_channels, groups * 2, groups * 3]))
    return make_case(
        draw(st.integers(0, 2**32 - 1)),
        groups=groups,
        in_channels=in_channels,
        out_channels=out_channels,
        size=(draw(st.integers(1, 16)), draw(st.integers(1, 16))),
        batch=draw(st.integers(1, 3)),
        inner=draw(keep_sets(out_channels)) if inner else None,
        residual=draw(keep_sets(out_channels)),
        constants=draw(st.booleans()),
        padding=draw(st.sampled_from(paddings)),
        dtype=draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        conv=conv,
        folds=folds,
        correction=draw(st.booleans()),
    )


def deviation(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The measure in which `TOLERANCE` is stated for ``dtype``."""
    delta, expected = found.double() - expected.double(), expected.double()
    if dtype in HALF:
        return float(delta.square().mean().sqrt() / expected.square().mean().sqrt())
    return float(delta.abs().max() / expected.abs().max())


def assert_compact_equals_masked(case: Case) -> None:
    compact, masked = case.run("compact"), case.run("masked")
    assert compact.dtype == case.dtype and compact.shape == masked.shape
    if case.dtype in HALF:
        assert_half_equals_masked(case, compact, masked)
        return
    tolerance = TOLERANCE[case.dtype]
    assert deviation(compact, masked, case.dtype) <= tolerance
    if case.prunes:
        assert deviation(case.run("dense"), masked, case.dtype) >= 100 * tolerance


def assert_half_equals_masked(case: Case, compact: Tensor, masked: Tensor) -> None:
    truth = case.run("masked", torch.float64)
    rounding = deviation(masked, truth, case.dtype)
    assert deviation(compact, truth, case.dtype) <= max(TOLERANCE[case.dtype], 2 * rounding)
    if case.prunes and rounding <= TOLERANCE[case.dtype]:
        to_dense = case.run("dense", torch.float64) - truth
        position = ((compact.double() - truth) * to_dense).sum() / to_dense.square().sum()
        assert abs(float(position)) <= 0.01


def assert_bit_equal_to_masked(case: Case) -> None:
    assert torch.equal(case.run("compact"), case.run("masked"))
    if case.prunes:
        dense, masked = (case.run(how, torch.float64) for how in ("dense", "masked"))
        assert deviation(dense, masked, torch.float64) >= 1e-3


# --- the contract ---------------------------------------------------------------------------------


@thorough
@given(cases())
def test_compact_equals_masked_for_any_keep_set(case: Case) -> None:
    assert_compact_equals_masked(case)


@thorough
@given(cases(conv=rowwise_conv, inner=False))
def test_removing_only_residual_rows_is_bit_equal(case: Case) -> None:
    assert_bit_equal_to_masked(case)


@thorough
@given(cases(paddings=("zero",), conv=rowwise_conv, folds=False))
def test_without_folding_rule_zero_is_bit_equal(case: Case) -> None:
    assert_bit_equal_to_masked(case)


@thorough
@given(cases(dtypes=list(HALF), paddings=("zero",), folds=False))
def test_without_folding_rule_zero_is_bit_equal_with_the_real_half_precision_convolution(
    case: Case,
) -> None:
    assert_bit_equal_to_masked(case)


def test_without_folding_rule_zero_is_bit_equal_with_the_real_float32_convolution() -> None:
    """At a size that PyTorch gives to oneDNN and with counts as alignment leaves them."""
    keep = torch.arange(64) % 8 < 5  # 40 of 64
    for inner, residual in ((keep, None), (None, keep), (keep, keep.flip(0))):
        case = make_case(
            3, in_channels=64, out_channels=64, size=(16, 16), inner=inner, residual=residual
        )
        case.block.folds = False
        assert torch.equal(case.run("compact"), case.run("masked"))
        assert deviation(case.run("dense"), case.run("masked"), torch.float32) > 1e-2


@thorough
@given(cases(paddings=("zero",), conv=rowwise_circular_conv, folds=False))
def test_a_circular_host_is_bit_equal_under_rule_zero(case: Case) -> None:
    assert_bit_equal_to_masked(case)


@thorough
@given(cases(conv=circular_conv, folds=False))
def test_a_circular_host_equals_masked_under_both_rules(case: Case) -> None:
    assert_compact_equals_masked(case)


@thorough
@given(cases(), st.booleans(), st.booleans())
def test_all_kept_is_bit_identical_to_the_plain_block(case: Case, one: bool, two: bool) -> None:
    every = torch.ones(case.emb.shape[1], dtype=torch.bool)
    case.gate = ResBlockGate(
        case.gate.padding,
        every if one else None,
        torch.full((every.numel(),), 7.0) if one else None,
        every if two else None,
        torch.full((every.numel(),), 7.0) if two else None,
    )
    assert torch.equal(case.run("compact"), case.run("dense"))
    assert torch.equal(case.run("masked", torch.float64), case.run("dense", torch.float64)) or (
        one and case.gate.padding == "extend"  # adds a convolution of zeros
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 16), (3, 2), (5, 3), (16, 1)])
def test_every_small_map_has_its_border_right(
    size: tuple[int, int], dtype: torch.dtype, padding: Padding
) -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    case = make_case(11, size=size, inner=keep, padding=padding, dtype=dtype)
    assert case.prunes
    assert_compact_equals_masked(case)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("inner", [0, 3, 8, None])
@pytest.mark.parametrize("residual", [0, 3, 8, None])
def test_no_channel_kept_leaves_constants_and_the_skip(
    inner: int | None, residual: int | None, folds: bool, padding: Padding
) -> None:
    first = torch.arange(8)
    case = make_case(
        5,
        in_channels=4,
        inner=None if inner is None else first < inner,
        residual=None if residual is None else first < residual,
        padding=padding,
        folds=folds,
    )
    assert_compact_equals_masked(case)
    if residual == 0:
        mu = case.gate.residual_constant
        assert mu is not None
        expected = case.block.to(torch.float32).skip(case.x.float()) + mu[:, None, None]
        assert torch.equal(case.run("compact"), expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_channels_last_input_gives_the_same(padding: Padding) -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    for inner, residual in ((keep, None), (None, keep), (keep, keep.flip(0))):
        case = make_case(17, size=(7, 5), inner=inner, residual=residual, padding=padding)
        case.x = case.x.to(memory_format=torch.channels_last)
        assert case.x.float().is_contiguous(memory_format=torch.channels_last)
        assert_compact_equals_masked(case)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_weights_too_large_for_one_piece_give_the_same(
    padding: Padding, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = torch.arange(40) % 10 > 1  # 32 of 40 kept
    case = make_case(
        3, groups=4, in_channels=40, out_channels=40, inner=keep, residual=keep, padding=padding,
        bias=bias, conv=rowwise_conv,
    )  # fmt: skip
    whole, rows = case.run("compact"), []
    original = Block.conv1

    def counted(self: Block, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(weight.shape[0])
        return original(self, x, weight, bias)

    monkeypatch.setattr(Block, "conv1", counted)
    monkeypatch.setattr("ldcp_core.resblock.CPU_PIECE", 13 * 40 * 9 * 4)  # 13 rows of conv1
    assert torch.equal(case.run("compact"), whole)
    assert rows == [16, 16]  # three pieces of 11 rows, rounded up to a multiple of 8


@pytest.mark.parametrize("padding", PADDINGS)
def test_one_block_runs_on_maps_of_several_sizes_and_types(padding: Padding) -> None:
    case = make_case(19, inner=torch.arange(8) % 3 > 0, padding=padding)
    block = case.block.to(torch.float32)
    compact = CompactResBlock(case.gate, block.first, block.second)
    for size in ((4, 4), (7, 5), (5, 7), (4, 4)):
        x, emb = torch.randn(2, 8, *size), torch.randn(2, 8)
        expected = block.masked(x, emb, case.gate)
        assert deviation(compact(block, x, emb), expected, torch.float32) <= 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert deviation(compact(block, x, emb), expected, torch.bfloat16) <= 2e-2


def test_the_rules_agree_inside_and_differ_at_the_border() -> None:
    """A 3x3 window at least one position away from the border never sees the padding."""
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    zero, extend = (
        make_case(23, size=(6, 7), inner=keep, padding=padding, dtype=torch.float64).run("compact")
        for padding in PADDINGS
    )
    assert deviation(zero[..., 1:-1, 1:-1], extend[..., 1:-1, 1:-1], torch.float64) < 1e-5
    border = torch.ones(6, 7, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (zero - extend)[..., border].abs().amax((0, 1)).min() > 0.1


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_a_large_mean_does_not_cancel_in_the_group_norm(mean: float, padding: Padding) -> None:
    """E[x²] − E[x]² in float32 loses a variance of 1 beside a squared mean of 1e8 altogether.

    What is left is the input's own rounding (6e-8 · 1e4 = 6e-4), as in PyTorch's GroupNorm.
    """
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1]).bool()
    case = make_case(29, size=(8, 8), inner=keep, padding=padding, importance=1.0)
    bias = torch.full((8,), mean, dtype=torch.float64)
    case.block.first = ConvWeights(case.block.first.weight, bias)
    case.gate = replace(case.gate, inner_constant=bias.float() + torch.linspace(-1, 1, 8))
    case.emb = case.emb.round()
    truth = case.run("masked", torch.float64)
    tolerance = 1e-5 if mean == 0 else 2e-3
    assert deviation(case.run("masked"), truth, torch.float32) < tolerance
    assert deviation(case.run("compact"), truth, torch.float32) < tolerance
    assert deviation(case.run("dense", torch.float64), truth, torch.float64) >= 100 * tolerance


# --- independent oracles --------------------------------------------------------------------------


class Plain:
    """Ops for arithmetic by hand: no norms, no activation, no skip."""

    folds, groups, eps = True, 1, 0.0

    def norm1(self, x: Tensor) -> Tensor:
        return x

    norm2 = norm1

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError  # only the masked reference runs on this host, without a norm

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    conv2 = conv1

    def skip(self, x: Tensor) -> Tensor:
        return torch.zeros(1, 1, *x.shape[2:])


@pytest.mark.parametrize(
    ("padding", "pruned_plane"),
    [
        # The pruned channel is a plane of μ + emb = 1.5 + 0.5 = 2. conv2's taps for it are
        #   1 2 3
        #   4 5 6
        #   7 8 9
        # With zero padding, the top left corner sees the taps 5 6 8 9 (sum 28), the top edge
        # 4 5 6 7 8 9 (39), the top right corner 4 5 7 8 (24), the left edge 2 3 5 6 8 9 (33), the
        # middle all (45), the right edge 1 2 4 5 7 8 (27), below them 2 3 5 6 (16), 1..6 (21) and
        # 1 2 4 5 (12). Each times 2:
        ("zero", [[56.0, 78.0, 48.0], [66.0, 90.0, 54.0], [32.0, 42.0, 24.0]]),
        # Extended past the border, every position sees all nine: 2 · 45.
        ("extend", [[90.0] * 3] * 3),
    ],
)
def test_the_masked_reference_agrees_with_arithmetic_by_hand(
    padding: Padding, pruned_plane: list[list[float]]
) -> None:
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    conv1 = torch.zeros(2, 1, 3, 3)
    conv1[:, 0, 1, 1] = torch.tensor([1.0, 100.0])  # channel 0 copies x, channel 1 is pruned
    conv2 = torch.zeros(1, 2, 3, 3)
    conv2[0, 0, 1, 1] = 10.0  # channel 0: ten times its value ...
    conv2[0, 0, 1, 2] = 1.0  # ... plus its right neighbour, zero outside under either rule
    conv2[0, 1] = torch.arange(1.0, 10.0).view(3, 3)
    y = masked_resblock(
        Plain(),
        x,
        torch.tensor([[0.0, 0.5]]),
        ConvWeights(conv1, torch.tensor([0.0, 3.0])),
        ConvWeights(conv2, torch.tensor([1000.0])),
        SoftGate(torch.tensor([1.0, 0.0]), torch.tensor([-7.0, 1.5])),
        None,
        padding,
    )
    # channel 0 of x = 1..9: 10·1 + 2, 10·2 + 3, 10·3 + 0, 10·4 + 5, ...
    kept_plane = [[12.0, 23.0, 30.0], [45.0, 56.0, 60.0], [78.0, 89.0, 90.0]]
    expected = torch.tensor(kept_plane) + torch.tensor(pruned_plane) + 1000.0
    assert torch.equal(y[0, 0], expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_compact_block_agrees_with_arithmetic_by_hand(padding: Padding) -> None:
    """With norm2's weight zero every activation is s_c = silu(bias_c), so conv2 sees planes."""
    case = make_case(31, groups=1, in_channels=2, out_channels=2, size=(3, 3), batch=1)
    block = case.block.to(torch.float64)
    block.norm2_weights = (torch.zeros(2).double(), torch.tensor([1.0, 2.0]).double())
    taps = torch.arange(1.0, 10.0).double().view(3, 3)
    weight = torch.zeros(2, 2, 3, 3).double()
    weight[0, 1] = taps  # from the pruned channel to output 0
    weight[1, 0] = taps  # from the kept channel to output 1: zero outside under either rule
    block.second = ConvWeights(weight, None)
    gate = ResBlockGate(padding, torch.tensor([True, False]), torch.tensor([0.0, 4.0]))
    y = block.compact(case.x, case.emb, gate) - case.x
    s = [1 / (1 + math.exp(-1)), 2 / (1 + math.exp(-2))]
    # the sums of taps of the test above
    falls = torch.tensor([[28.0, 39.0, 24.0], [33.0, 45.0, 27.0], [16.0, 21.0, 12.0]]).double()
    flat = torch.full((3, 3), 45.0).double()
    expected = torch.stack([s[1] * (falls if padding == "zero" else flat), s[0] * falls])
    assert torch.allclose(y[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_residual_gate_leaves_the_constant_beside_the_skip(padding: Padding) -> None:
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    gate = SoftGate(torch.tensor([0.0]), torch.tensor([2.5]))
    ops = Plain()
    ops.skip = lambda x: x  # type: ignore[method-assign]
    both = ConvWeights(weight, None)
    y = masked_resblock(ops, x, torch.zeros(1, 1), both, both, None, gate, padding)
    assert torch.equal(y, x + 2.5)


def loops(case: Case) -> Tensor:
    """The block by its definition, one number at a time (a pruned tap outside: see the rule)."""
    block, gate, (batch, _, height, width) = case.block, case.gate, case.x.shape
    channels = case.emb.shape[1]
    inner = [True] * channels if gate.inner is None else gate.inner.tolist()
    residual = [True] * channels if gate.residual is None else gate.residual.tolist()

    def constant(mu: Tensor | None, c: int) -> float:
        return 0.0 if mu is None else float(mu[c])

    def norm_silu(maps: list, affine: tuple[Tensor, Tensor]) -> list:  # type: ignore[type-arg]
        per_group = len(maps) // block.groups
        out = []
        for c, plane in enumerate(maps):
            start = c // per_group * per_group
            values = [v for m in maps[start : start + per_group] for row in m for v in row]
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            scale, shift = float(affine[0][c]), float(affine[1][c])
            z = [
                [(v - mean) / math.sqrt(variance + block.eps) * scale + shift for v in r]
                for r in plane
            ]
            out.append([[v / (1 + math.exp(-v)) for v in row] for row in z])
        return out

    def conv(maps: list, weights: ConvWeights, o: int, y: int, x: int, planes: list) -> float:  # type: ignore[type-arg]
        total = 0.0 if weights.bias is None else float(weights.bias[o])
        for c, plane in enumerate(maps):
            for ky in range(3):
                for kx in range(3):
                    py, px = y + ky - 1, x + kx - 1
                    inside = 0 <= py < height and 0 <= px < width
                    if inside or planes[c]:
                        value = plane[py][px] if inside else plane[0][0]
                        total += value * weights.weight[o, c, ky, kx].item()
        return total

    out = torch.empty(batch, channels, height, width, dtype=torch.float64)
    for b in range(batch):
        x = case.x[b].tolist()
        a = norm_silu(x, block.norm1_affine)
        h = [
            [
                [
                    (
                        conv(a, block.first, c, i, j, [False] * len(a))
                        if inner[c]
                        else constant(gate.inner_constant, c)
                    )
                    + float(case.emb[b, c])
                    for j in range(width)
                ]
                for i in range(height)
            ]
            for c in range(channels)
        ]
        a = norm_silu(h, block.norm2_weights)
        planes = [gate.padding == "extend" and not kept for kept in inner]
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    y = (
                        conv(a, block.second, c, i, j, planes)
                        if residual[c]
                        else constant(gate.residual_constant, c)
                    )
                    out[b, c, i, j] = x[c][i][j] + y
    return out


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_masked_and_compact_agree_with_explicit_loops(data: st.DataObject) -> None:
    case = make_case(
        data.draw(st.integers(0, 2**32 - 1)),
        in_channels=4,
        out_channels=4,
        size=(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))),
        batch=1,
        inner=data.draw(keep_sets(4)),
        residual=data.draw(keep_sets(4)),
        padding=data.draw(st.sampled_from(PADDINGS)),
        dtype=torch.float64,
    )
    truth = loops(case)
    assert deviation(case.run("masked"), truth, torch.float64) < 1e-5
    assert deviation(case.run("compact"), truth, torch.float64) < 1e-5


# --- where it runs --------------------------------------------------------------------------------


def one_pass(maps: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`torch.batch_norm_stats`, which only GPUs have, by its meaning: float32 per channel."""
    assert maps.dim() == 4 and maps.shape[0] == 1 and maps.is_contiguous() and eps > 0
    variance, mean = torch.var_mean(maps.float(), (0, 2, 3), correction=0)
    return mean, (variance + eps).rsqrt()


@thorough
@given(cases([torch.float32, *HALF]))
def test_the_moments_of_a_gpu_give_the_same(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldcp_core.groupnorm.GPU", ("cpu",))
        patch.setattr(torch, "batch_norm_stats", one_pass)
        assert_compact_equals_masked(case)


@settings(thorough, max_examples=50)
@given(cases(), st.booleans())
def test_with_derivatives_or_on_another_device_it_is_the_same(case: Case, other: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if other:
            patch.setattr("ldcp_core.groupnorm._may_overwrite", lambda h: False)
            assert_compact_equals_masked(case)
        else:
            with torch.enable_grad():
                assert_compact_equals_masked(case)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("size", [(4, 4), (1, 1)])
def test_the_derivative_is_that_of_the_masked_reference(
    size: tuple[int, int], folds: bool, padding: Padding
) -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    case = make_case(
        47, size=size, inner=keep, residual=keep.flip(0), padding=padding, folds=folds,
        dtype=torch.float64,
    )  # fmt: skip
    case.block.conv = torch_conv if folds else circular_conv
    found = []
    for how in (case.block.compact, case.block.masked):
        x, emb = case.x.clone().requires_grad_(), case.emb.clone().requires_grad_()
        with torch.enable_grad():
            y = how(x, emb, case.gate)
            found.append(torch.autograd.grad((y * y.detach().cos()).sum(), (x, emb)))
    for compact, masked in zip(*found, strict=True):
        assert torch.allclose(compact, masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("residual", [True, False])
def test_autocast_computes_the_convolutions_in_half_precision(
    residual: bool, padding: Padding
) -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    case = make_case(
        53, size=(7, 5), inner=keep, residual=keep.flip(0) if residual else None, padding=padding
    )
    with torch.autocast("cpu", torch.bfloat16):
        compact, masked = case.run("compact"), case.run("masked")
    assert compact.dtype == masked.dtype and compact.shape == masked.shape
    case.dtype = torch.bfloat16
    assert_half_equals_masked(case, compact, masked)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("folds", [True, False])
def test_torch_compile_takes_it_whole_and_once(folds: bool, padding: Padding) -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    case = make_case(59, size=(7, 5), inner=keep, residual=keep.flip(0), padding=padding)
    case.block, x, emb = case.block.to(torch.float32), case.x.float(), case.emb.float()
    compact = CompactResBlock(case.gate, case.block.first, case.block.second, folds=folds)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x, emb: compact(case.block, x, emb), backend=graphs, fullgraph=True)
    eager = compact(case.block, x, emb)
    for _ in range(2):
        assert deviation(run(x, emb), eager, torch.float32) <= 1e-6
        assert deviation(compact(case.block, x, emb), eager, torch.float32) == 0
    assert graphs.frame_count == 1


# --- what is held ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
def test_compact_weights_do_not_alias_the_full_ones(padding: Padding) -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    for inner, residual, changed in (
        (keep, None, ("first", "second")),  # conv1 loses rows, conv2 columns
        (None, keep, ("second",)),
        (keep, keep.flip(0), ("first", "second")),
    ):
        case = make_case(37, inner=inner, residual=residual, padding=padding, dtype=torch.float64)
        compact = CompactResBlock(case.gate, case.block.first, case.block.second)
        before = compact(case.block, case.x, case.emb)
        full = [t for name in changed for t in vars(getattr(case.block, name)).values()]
        pointers = {t.untyped_storage().data_ptr() for t in full}
        held = [t for t in compact.tensors() if t.numel()]
        assert not pointers & {t.untyped_storage().data_ptr() for t in held}
        for tensor in full:
            tensor.fill_(math.nan)
        assert torch.equal(compact(case.block, case.x, case.emb), before)


def test_the_gate_tensors_may_change_after_the_block_is_built() -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    case = make_case(41, inner=keep, residual=keep.clone(), dtype=torch.float64)
    compact = CompactResBlock(case.gate, case.block.first, case.block.second)
    before = compact(case.block, case.x, case.emb)
    for tensor in (case.gate.inner, case.gate.inner_constant, case.gate.residual_constant):
        assert tensor is not None
        tensor.zero_()
    assert torch.equal(compact(case.block, case.x, case.emb), before)


def test_a_forward_pass_changes_neither_its_input_nor_its_weights() -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    case = make_case(43, inner=keep, residual=keep.flip(0), dtype=torch.float64)
    compact = CompactResBlock(case.gate, case.block.first, case.block.second)
    watched = [case.x, case.emb, *compact.tensors()]
    copies = [t.clone() for t in watched]
    first = compact(case.block, case.x, case.emb)
    assert torch.equal(compact(case.block, case.x, case.emb), first)
    assert all(torch.equal(a, b) for a, b in zip(watched, copies, strict=True))


def test_gates_are_grouped_by_block() -> None:
    keep, mu = torch.tensor([True, False]), torch.tensor([0.0, 1.0])
    grouped = block_gates(
        {
            "mid_block.resnets.0.conv1": PrunedSite(keep, mu, "extend"),
            "mid_block.resnets.1.conv2": PrunedSite(keep, padding="extend"),
        }
    )
    assert list(grouped) == ["mid_block.resnets.0", "mid_block.resnets.1"]
    first, second = grouped.values()
    assert first.inner is keep and first.inner_constant is mu and first.residual is None
    assert second.inner is None and second.residual is keep and second.residual_constant is None
    # the rule concerns the first site alone
    assert (first.padding, second.padding) == ("extend", "zero")


def test_the_mask_passes_its_gradient_to_the_gate() -> None:
    """d/dm of m·h + (1 − m)·μ is h − μ, summed over the map."""
    mask = torch.tensor([1.0, 0.0], requires_grad=True)
    h = torch.arange(8.0).view(1, 2, 2, 2)
    with torch.enable_grad():
        SoftGate(mask, torch.tensor([0.5, 2.0]))(h).sum().backward()
    # channel 0: (0 + 1 + 2 + 3) − 4 · 0.5 = 4; channel 1: (4 + 5 + 6 + 7) − 4 · 2 = 14
    assert mask.grad is not None and mask.grad.tolist() == [4.0, 14.0]


# --- a real ResnetBlock2D -------------------------------------------------------------------------


class DiffusersOps:
    """`ResBlockOps` of a diffusers ResnetBlock2D."""

    folds = True

    def __init__(self, block: ResnetBlock2D) -> None:
        self.block = block
        self.groups, self.eps = block.norm2.num_groups, block.norm2.eps
        self.first = ConvWeights(block.conv1.weight, block.conv1.bias)
        self.second = ConvWeights(block.conv2.weight, block.conv2.bias)

    def norm1(self, x: Tensor) -> Tensor:
        return self.block.nonlinearity(self.block.norm1(x))

    def norm2(self, h: Tensor) -> Tensor:
        return self.block.nonlinearity(self.block.norm2(h))

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.block.norm2.weight, self.block.norm2.bias

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.block.conv1._conv_forward(x, weight, bias)

    def conv2(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.block.conv2._conv_forward(x, weight, bias)

    def skip(self, x: Tensor) -> Tensor:
        return x if self.block.conv_shortcut is None else self.block.conv_shortcut(x)

    def emb(self, temb: Tensor) -> Tensor:
        return self.block.time_emb_proj(self.block.nonlinearity(temb))


def resnet_block(in_channels: int) -> tuple[ResnetBlock2D, Tensor, Tensor]:
    torch.manual_seed(47)
    block = ResnetBlock2D(in_channels=in_channels, out_channels=64, temb_channels=16, groups=32)
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight.normal_(1, 0.2)
            norm.bias.normal_(0, 0.2)
    return block.eval(), torch.randn(2, in_channels, 8, 6), torch.randn(2, 16)


@pytest.mark.parametrize("in_channels", [32, 64])
@torch.no_grad()
def test_dense_equals_diffusers_bit_for_bit(in_channels: int) -> None:
    block, x, temb = resnet_block(in_channels)
    ops = DiffusersOps(block)
    emb, plain = ops.emb(temb), block(x, temb)
    ungated = ResBlockGate("zero")
    masked = masked_resblock(ops, x, emb, ops.first, ops.second, None, None, "zero")
    assert torch.equal(masked, plain)
    assert torch.equal(CompactResBlock(ungated, ops.first, ops.second)(ops, x, emb), plain)


@pytest.mark.parametrize("in_channels", [32, 64])
@torch.no_grad()
def test_pruned_equals_diffusers_with_its_convolutions_masked_by_hooks(in_channels: int) -> None:
    """The seed's meaning of pruning, without any of our code: hooks that overwrite channels."""
    block, x, temb = resnet_block(in_channels)
    ops = DiffusersOps(block)
    dense = block(x, temb)
    inner, residual = torch.arange(64) % 3 > 0, torch.arange(64) % 4 > 0
    mu = torch.linspace(-1, 1, 64)

    def overwrite(keep: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda module, args, out: torch.where(keep[:, None, None], out, mu[:, None, None])

    hooks = [
        block.conv1.register_forward_hook(overwrite(inner)),
        block.conv2.register_forward_hook(overwrite(residual)),
    ]
    hooked = block(x, temb)
    for hook in hooks:
        hook.remove()
    compact = CompactResBlock(ResBlockGate("zero", inner, mu, residual, mu), ops.first, ops.second)
    assert deviation(compact(ops, x, ops.emb(temb)), hooked, torch.float32) < 1e-6
    assert deviation(dense, hooked, torch.float32) > 1e-4


def test_a_compiled_region_may_hold_blocks_of_several_widths() -> None:
    """torch.compile makes a size symbolic when it has seen two; what it then can't read crashed."""
    x = torch.randn(1, 8, 4, 4)
    run = torch.compile(lambda conv: _convolve(torch_conv, x, conv), backend="eager")
    for rows in (8, 16, 24):
        conv = ConvWeights(torch.randn(rows, 8, 3, 3), None)
        assert torch.equal(run(conv), torch_conv(x, conv.weight, None))
