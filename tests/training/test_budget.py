"""What a budget counts, against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from ldcp_core import Latent, Topology
from training.learning.budget import Budget

TINY = Topology(widths=(8, 8, 16, 16), context_width=8)
SITES = TINY.sites("mid+ff")  # two ResBlocks of 16 channels and a feed-forward of 64
FULL = {site.name: site.channels for site in SITES}
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"
CONV = 9 * 16 * 16 + 16  # parameters of one convolution
FEED_FORWARD = 128 * 16 + 128 + 16 * 64 + 16


def test_channels_are_all_worth_the_same() -> None:
    budget = Budget("channels", SITES)
    assert budget.remaining(FULL) == 1
    assert budget.remaining({**FULL, FF: 0}) == pytest.approx(1 - 64 / 128)
    assert budget.weights(FULL) == pytest.approx([1 / 128] * 5)


def test_parameters_are_those_of_the_gated_layers() -> None:
    budget, whole = Budget("parameters", SITES), 4 * CONV + FEED_FORWARD
    # a hidden channel: two rows with their biases, and a column
    assert budget.remaining({**FULL, FF: 63}) == pytest.approx(1 - (3 * 16 + 2) / whole)
    # rule zero keeps conv2's column and a constant: only the row of conv1 and its bias go
    inner = "mid_block.resnets.0.conv1"
    assert budget.remaining({**FULL, inner: 15}) == pytest.approx(1 - (9 * 16 + 1 - 1) / whole)
    extend = Budget("parameters", SITES, "extend")
    gone = 9 * 16 + 1 - 1 + 8 * 16  # and eight of nine taps of the column
    assert extend.remaining({**FULL, inner: 15}) == pytest.approx(1 - gone / whole)


def test_flops_depend_on_the_size_of_the_maps() -> None:
    # at a latent of 8x8 the mid block sees one position, where zero folding saves nothing
    one, many = (Budget("flops", SITES, latent=Latent(s, s, 1)) for s in (8, 64))
    inner = {**FULL, "mid_block.resnets.0.conv1": 0}
    conv, hidden = 2 * 9 * 16 * 16, 6 * 16 * 64
    assert one.remaining(inner) == pytest.approx(1 - conv / (4 * conv + hidden))
    # its columns are still evaluated once: 1/64 of what they were
    assert many.remaining(inner) == pytest.approx(1 - (2 - 1 / 64) * conv / (4 * conv + hidden))


def test_the_two_gates_of_a_block_are_counted_together() -> None:
    both = {**FULL, "mid_block.resnets.0.conv1": 8, "mid_block.resnets.0.conv2": 8}
    whole = 4 * CONV + FEED_FORWARD
    left = (9 * 16 * 8 + 8) + (9 * 8 * 8 + 8) + 9 * 8 * 8 + 16  # rows, rows, columns, constants
    expected = (whole - 2 * CONV + left) / whole
    assert Budget("parameters", SITES).remaining(both) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["channels", "parameters", "flops"])
def test_the_penalty_is_the_same_function_of_soft_counts_and_has_its_gradient(kind: str) -> None:
    budget = Budget(kind, SITES)
    counts = {name: torch.tensor(n * 0.75, requires_grad=True) for name, n in FULL.items()}
    left = budget.remaining(counts)
    left.backward()
    hard = budget.remaining({name: int(n * 0.75) for name, n in FULL.items()})
    assert float(left.detach()) == pytest.approx(hard)
    slopes = [float(count.grad) for count in counts.values()]
    weights = budget.weights({name: int(n * 0.75) for name, n in FULL.items()})
    assert slopes == pytest.approx(weights, rel=1e-4)


def test_the_most_that_a_floor_allows() -> None:
    assert Budget("channels", SITES).most({name: 8 for name in FULL}) == pytest.approx(1 - 40 / 128)
