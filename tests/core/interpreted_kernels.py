"""The Triton kernels by the contract of the compact block, on a CPU; `test_fused` runs this file.

Triton decides when it is imported whether its interpreter runs the kernels, so that this takes a
process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from test_resblock import HALF, Case, assert_compact_equals_masked, cases, make_case, thorough

from ldcp_core import PADDINGS, Padding, fused

KEEP = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
#: names of the kernels launched
launched: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """A CPU taken for a GPU, and what is launched on it."""
    original = fused.launch

    def launch(name: str, *args: object, **constants: int) -> None:
        launched.append(name)
        original(name, *args, **constants)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fused, "DEVICES", ("cpu",))
        patch.setattr(fused, "launch", launch)
        assert fused._works(torch.device("cpu"))
        yield


def uses_kernels(case: Case) -> bool:
    inner, residual = case.gate.inner, case.gate.residual
    some = inner is not None and 0 < int(inner.sum()) < inner.numel()
    return some and (residual is None or bool(residual.any()))


@settings(thorough, max_examples=40)
@given(cases([torch.float32, *HALF]))
def test_compact_equals_masked_for_any_keep_set(case: Case) -> None:
    launched.clear()
    assert_compact_equals_masked(case)
    if uses_kernels(case):
        assert launched == ["norm_silu", "join"]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 16), (3, 2), (5, 3), (33, 34)]
)
def test_every_map_has_its_border_right(
    size: tuple[int, int], dtype: torch.dtype, padding: Padding
) -> None:
    """The largest needs two rounds of a kernel's 1,024 numbers."""
    case = make_case(11, size=size, inner=KEEP, padding=padding, dtype=dtype)
    assert_compact_equals_masked(case)


def test_a_large_mean_does_not_cancel() -> None:
    case = make_case(29, size=(8, 8), inner=KEEP, importance=1.0)
    case.block.first.bias.fill_(1e4)  # type: ignore[union-attr]
    case.gate.inner_constant.add_(1e4)  # type: ignore[union-attr]
    case.emb = case.emb.round()
    truth = case.run("masked", torch.float64)
    assert float((case.run("compact") - truth).abs().max() / truth.abs().max()) < 2e-3


def test_maps_in_another_order_go_through_pytorch() -> None:
    case = make_case(17, size=(7, 5), inner=KEEP, residual=KEEP)
    case.x = case.x.to(memory_format=torch.channels_last)
    assert_compact_equals_masked(case)


def test_without_derivatives_only() -> None:
    case = make_case(17, size=(7, 5), inner=KEEP, residual=KEEP)
    launched.clear()
    with torch.enable_grad():
        assert_compact_equals_masked(case)
    assert launched == []
