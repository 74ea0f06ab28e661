"""The closed-form cost model against diffusers, PyTorch's counter, and the compact block itself."""

from __future__ import annotations

import pytest
import torch
from families import (
    FAMILIES,
    NO_MID,
    PARAMETERS,
    REFINER,
    SD2,
    SDXL,
    SMALL,
    SMALL_XL,
    SSD_1B,
    diffusers_unet,
    inputs,
    name_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ldcp_core import (
    PADDINGS,
    SD15,
    CompactResBlock,
    ConvWeights,
    Cost,
    Latent,
    Padding,
    ResBlock,
    ResBlockGate,
    Topology,
    savings,
    unet_cost,
)

TINY = Topology(widths=(8, 8, 16, 16), context_width=8)
A1, A2, B1, B2 = (f"mid_block.resnets.{r}.conv{c}" for r in (0, 1) for c in (1, 2))

quick = settings(max_examples=100, deadline=None, derandomize=True)
counts = st.integers(0, 16)
paddings = st.sampled_from(PADDINGS)
latents = st.builds(Latent, st.integers(8, 72), st.integers(8, 72), st.integers(1, 4))


def diffusers_flops(topology: Topology, latent: Latent) -> int:
    given = inputs(topology, latent.batch, (latent.height, latent.width))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        diffusers_unet(topology)(**given)
    return counter.get_total_flops()


# --- the whole U-Net ------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", FAMILIES, ids=name_of)
def test_parameters_equal_diffusers_exactly(topology: Topology) -> None:
    theirs = sum(p.numel() for p in diffusers_unet(topology).parameters())
    assert unet_cost(topology, Latent()).parameters == theirs


@pytest.mark.parametrize("topology", [SD15, SD2, SDXL], ids=name_of)
def test_each_family_has_the_published_number_of_parameters(topology: Topology) -> None:
    assert unet_cost(topology, Latent()).parameters == PARAMETERS[topology.family]


@pytest.mark.parametrize(
    ("topology", "latent"),
    [
        (SD15, Latent(64, 64, 2)),
        (SD15, Latent(96, 64, 1)),
        (SD2, Latent(96, 96, 1)),
        (SDXL, Latent(128, 128, 1)),
        (REFINER, Latent(128, 128, 2)),
        (SSD_1B, Latent(128, 96, 1)),
        (NO_MID, Latent(32, 32, 1)),
        (SMALL, Latent(32, 32, 1)),
        (SMALL, Latent(64, 40, 3)),
        (SMALL_XL, Latent(64, 40, 3)),
    ],
)
def test_flops_equal_the_flop_counter_exactly(topology: Topology, latent: Latent) -> None:
    assert unet_cost(topology, latent).flops == diffusers_flops(topology, latent)


def test_positions_round_up_at_each_halving() -> None:
    # 9 x 17 at half resolution: 5 x 9 = 45, at an eighth: 2 x 3 = 6; times the batch of 2
    latent = Latent(9, 17, 2)
    assert [latent.positions(d) for d in (1, 2, 8)] == [306, 90, 12]


# --- savings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
def test_one_block_by_hand(padding: Padding) -> None:
    """A mid block of TINY: 16 to 16 channels, map 8 x 8 / 8 = 1 x 2, batch 3; 10 and 12 kept.

    dense       conv1 9·16·16 = 2304 weights, 16 biases; conv2 the same: 4640 parameters,
                2·(2304 + 2304)·6 positions = 55,296 FLOPs
    inner 10    conv1 9·16·10 = 1440 and 10 biases; conv2 9·10·16 = 1440 and 16 biases; 6
                constants; 6·16 = 96 pruned columns of 9 taps (864) or one tap-sum (96)
                  zero    1440 + 10 + 1440 + 16 + 6 + 864 = 3776: saves  864
                  extend  1440 + 10 + 1440 + 16 + 6 +  96 = 3008: saves 1632
                FLOPs 2·2880·6 = 34,560, plus 2·864·3 = 5184 or 2·96·3 = 576 for the columns:
                39,744 or 35,136, saves 15,552 or 20,160
    and 12      conv2 9·10·12 = 1080 and 12 biases; 6 + 4 constants; 72 columns: 648 or 72
                  zero    1440 + 10 + 1080 + 12 + 10 + 648 = 3200: saves 576 more
                  extend  1440 + 10 + 1080 + 12 + 10 +  72 = 2624: saves 384 more
                FLOPs 2·2520·6 = 30,240, plus 2·648·3 = 3888 or 2·72·3 = 432: 34,128 or 30,672,
                saves 5616 or 4464 more
    """
    found = savings(TINY, {A1: 10, A2: 12}, padding, Latent(8, 16, 3))
    inner, residual = found.sites
    assert (inner.site, inner.kept, inner.channels) == (A1, 10, 16)
    assert (residual.site, residual.kept, residual.channels) == (A2, 12, 16)
    if padding == "zero":
        assert (inner.saved, residual.saved) == (Cost(864, 15_552), Cost(576, 5_616))
        assert found.saved == Cost(1_440, 21_168)
    else:
        assert (inner.saved, residual.saved) == (Cost(1_632, 20_160), Cost(384, 4_464))
        assert found.saved == Cost(2_016, 24_624)
    assert (found.kept, found.channels) == (22, 32)
    assert found.sparsity == 1 - 22 / 32
    assert found.saved_bytes(2) == 2 * found.saved.parameters
    assert found.parameter_share == found.saved.parameters / unet_cost(TINY, Latent()).parameters


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_fully_kept_site_saves_nothing(padding: Padding) -> None:
    found = savings(SD15, {A1: 1280, B2: 1280}, padding)
    assert found.saved == Cost(0, 0) and found.sparsity == 0.0
    assert [s.saved for s in found.sites] == [Cost(0, 0)] * 2
    assert savings(SD15, {}, padding).sites == () and savings(SD15, {}, padding).sparsity == 0.0


@quick
@given(counts, counts, paddings, latents)
def test_overlapping_savings_add_up_to_the_whole(
    inner: int, residual: int, padding: Padding, latent: Latent
) -> None:
    block = TINY.res_blocks()[8]
    whole = block.cost([16, 16], padding, latent) - block.cost([inner, residual], padding, latent)
    both = savings(TINY, {A1: inner, A2: residual}, padding, latent)
    assert both.saved == whole
    # blocks do not overlap: two of them save twice as much
    twice = {A1: inner, A2: residual, B1: inner, B2: residual}
    assert savings(TINY, twice, padding, latent).saved == whole * 2


@quick
@given(counts, counts, counts, counts, paddings, latents)
def test_savings_fall_as_more_is_kept(
    a: int, b: int, c: int, d: int, padding: Padding, latent: Latent
) -> None:
    fewer, more = (min(a, b), min(c, d)), (max(a, b), max(c, d))
    low, high = (
        savings(TINY, {A1: inner, A2: residual}, padding, latent).saved
        for inner, residual in (more, fewer)
    )
    assert low.parameters <= high.parameters and low.flops <= high.flops
    if fewer[0] < more[0]:  # each pruned inner channel frees at least its row of conv1
        assert low.parameters < high.parameters and low.flops < high.flops


@quick
@given(counts, counts, latents)
def test_extend_never_costs_more_than_zero(inner: int, residual: int, latent: Latent) -> None:
    block = TINY.res_blocks()[8]
    zero, extend = (block.cost([inner, residual], p, latent) for p in PADDINGS)
    assert extend.parameters <= zero.parameters and extend.flops <= zero.flops


# --- against the compact block --------------------------------------------------------------------


class ConvOnly:
    """Ops of which only the convolutions count."""

    folds, groups, eps = True, 1, 1e-5

    def norm1(self, x: torch.Tensor) -> torch.Tensor:
        return x

    norm2 = skip = norm1

    def norm2_affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(8), torch.zeros(8)

    def conv1(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, bias, padding=1)

    conv2 = conv1


@st.composite
def gated_blocks(draw: st.DrawFn) -> tuple[ResBlock, ResBlockGate, CompactResBlock]:
    flags = st.lists(st.booleans(), min_size=8, max_size=8).map(torch.tensor)
    block = ResBlock("block", 1, draw(st.sampled_from([4, 8])), 8)
    gate = ResBlockGate(
        draw(paddings), draw(st.none() | flags), None, draw(st.none() | flags), None
    )
    conv1 = ConvWeights(torch.randn(8, block.in_channels, 3, 3), torch.randn(8))
    conv2 = ConvWeights(torch.randn(8, 8, 3, 3), torch.randn(8))
    return block, gate, CompactResBlock(gate, conv1, conv2)


def kept_counts(gate: ResBlockGate) -> tuple[int, int]:
    inner, residual = (8 if k is None else int(k.sum()) for k in (gate.inner, gate.residual))
    return inner, residual


@quick
@given(gated_blocks())
def test_parameters_equal_what_the_compact_block_holds(
    case: tuple[ResBlock, ResBlockGate, CompactResBlock],
) -> None:
    block, gate, compact = case
    # which channels are kept is bookkeeping; weights, biases, constants and columns are floats
    channels = [c for c in (compact.inner, compact.residual) if c is not None]
    bookkeeping = {id(t) for c in channels for t in c.tensors()}
    floats = [t for t in compact.tensors() if t.is_floating_point() and id(t) not in bookkeeping]
    held = sum(t.numel() for t in floats)
    if compact.inner is None and compact.residual is not None:
        held -= compact.residual.kept.numel()  # zeros between the constants: the bias is beside
    assert held == block.cost(kept_counts(gate), gate.padding, Latent()).parameters


@quick
@given(gated_blocks(), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_flops_equal_what_the_compact_block_computes(
    case: tuple[ResBlock, ResBlockGate, CompactResBlock], height: int, width: int, batch: int
) -> None:
    """Exactly, but for the spread of the nine taps under rule zero, which the model leaves out.

    It is one product, [9] with [9, H·W], per image and kept output; less than a thousandth of a
    full-size block.
    """
    block, gate, compact = case
    inner, residual = kept_counts(gate)
    x = torch.randn(batch, block.in_channels, height, width)
    ops = ConvOnly()
    ops.skip = lambda x: x.new_zeros(batch, 8, height, width)  # type: ignore[method-assign]
    in_place = {torch.ops.aten.baddbmm_: lambda y, a, b, **_: 2 * a.numel() * b.shape[2]}
    in_place[torch.ops.aten.baddbmm_]._get_raw = True  # type: ignore[attr-defined]
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        compact(ops, x, torch.randn(batch, 8))
    found = counter.get_total_flops()
    latent = Latent(height, width, batch)
    expected = block.cost([inner, residual], gate.padding, latent).flops
    if residual == 0:  # nothing is computed at all; the model still counts conv1's rows
        assert found == 0 <= expected
        return
    if gate.padding == "zero" and inner < 8:
        expected += 2 * batch * residual * 9 * height * width
    assert found == expected
