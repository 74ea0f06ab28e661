"""What a pruned evaluation asks of a GPU has bounds, so that nobody adds a launch unseen."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from training import benchmark
from training.benchmarking.launches import (
    CARDS,
    Count,
    LaunchOptions,
    Operation,
    Operations,
    _OneAttention,
    count,
)

#: of Stable Diffusion 1.5 at 512 pixels, batch 2, half precision, 40% pruned under rule zero
MOST_LAUNCHES = {
    "all+ff 40%, zero": 1190,
    "all+ff 40%, zero, Triton": 816,
    "all+ff+heads 40%, zero": 1134,
    "all+ff+heads 40%, zero, Triton": 777,
    "mid 40%, zero": 970,
}


@pytest.fixture(scope="module")
def counted() -> dict[str, Count]:
    return count(LaunchOptions(scope=("all+ff", "all+ff+heads", "mid")))


def test_a_launch_and_its_bytes_are_counted_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    with torch.no_grad(), Operations() as seen, _OneAttention(seen):
        x = torch.empty(2, 32, 8, 8, **half)  # 8 KiB
        F.silu(x[:, :16]).view(2, -1)  # half of it, read and written
        x.add_(torch.empty(32, 1, 1, **half).expand(2, 32, 8, 8))  # 2 · 8 KiB and 64 bytes
        F.conv2d(x, torch.empty(64, 32, 1, 1, **half), torch.empty(64, **half))
        F.group_norm(x, 4)
        torch.empty(2, 32, 8, 8, **half).index_add_(
            1, torch.empty(8, device="meta").long(), x[:, :8]
        )
        F.scaled_dot_product_attention(*(torch.empty(1, 2, 4, 16, **half) for _ in range(3)))
    rows = {op.name: op for op in seen.operations}
    kib = 1024
    assert rows["silu"] == Operation("silu", 1, 2 * 4 * kib, 0)
    assert rows["add_"] == Operation("add_", 1, 2 * 8 * kib + 64, 0)
    # 2 · 8 · 8 positions of 64 · 32 multiplications and additions; the bias goes over 16 KiB again
    weights = 2 * (64 * 32 + 64)
    assert rows["convolution"] == Operation(
        "convolution", 2, (8 + 16 + 2 * 16) * kib + weights, 2 * 128 * 64 * 32
    )
    # x for the moments and to apply them, what comes out, and two moments of 2 · 4 groups
    assert rows["native_group_norm"] == Operation("native_group_norm", 3, 24 * kib + 2 * 8 * 2, 0)
    assert rows["index_add_"] == Operation("index_add_", 1, 3 * 2 * kib, 0)
    # query with key, and that with value: 2 heads, 4 · 4 pairs of 16 numbers
    assert rows["attention"] == Operation("attention", 1, 4 * 256, 2 * 2 * 2 * 4 * 4 * 16)


@pytest.mark.parametrize("form", MOST_LAUNCHES)
def test_pruning_launches_no_more_than_it_did(counted: dict[str, Count], form: str) -> None:
    assert counted[form].launches <= MOST_LAUNCHES[form]


def test_pruning_everything_is_estimated_below_dense_on_every_card(
    counted: dict[str, Count],
) -> None:
    dense, pruned = counted["dense"], counted["all+ff 40%, zero"]
    for card in CARDS:
        assert pruned.device_seconds[card.name] < dense.device_seconds[card.name]
    # no float32 copies of maps: less is moved than without pruning
    assert pruned.elementwise < 0.82 * dense.elementwise
    assert pruned.flops < 0.73 * dense.flops


def test_the_command_prints_a_table_and_the_same_as_json(capsys: pytest.CaptureFixture) -> None:
    options = "--family sdxl --scope mid --sparsity 0.5 --padding extend --resolution 64 --batch 1"
    assert benchmark.main(["launches", *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "estimated, not measured" in printed
    found = json.loads(printed.splitlines()[-1])
    assert f"| mid 50%, extend | {found['mid 50%, extend']['launches']:,} |" in printed
    assert set(found["dense"]["device_seconds"]) == {card.name for card in CARDS}
