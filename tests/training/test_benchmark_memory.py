"""The memory of a step, counted by hand on one layer, and on a small U-Net."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from training.benchmarking.memory import LiveBytes, fake_unet, step_memory
from training.model.load import DiffusionModel


def test_live_bytes_are_counted_by_hand() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        a = torch.empty(1024)  # 4 KiB
        b = a + 1  # 4 KiB more
        assert live.now == live.most == 8192
        view = b.view(32, 32)  # shares b's
        del b
        assert live.now == 8192
        del view
        assert live.now == 4096 and live.most == 8192
        c = a.double()  # 8 KiB beside a
        d = c[None]  # shares c's
    assert live.most == 4096 + c.numel() * 8 and d is not c


def test_views_of_what_was_there_are_not_counted() -> None:
    with FakeTensorMode():
        weight = torch.empty(8, 16)
        with LiveBytes([weight]) as live:
            view = weight.t()
            assert live.now == 0
            assert (view + 1).shape == (16, 8) and live.most == 8 * 16 * 4


def test_what_a_step_keeps_grows_with_the_batch_and_shrinks_with_checkpointing(
    model: DiffusionModel,
) -> None:
    with FakeTensorMode():
        unet = fake_unet(model.unet.config, torch.float32)
        one = step_memory(unet, "mid", 128, 1)
        two = step_memory(unet, "mid", 128, 2)
        checkpointed = step_memory(unet, "mid", 128, 2, checkpointing=True)
        wide = step_memory(unet, "all", 128, 2)
    assert one.weights == sum(p.numel() * 4 for p in unet.parameters())
    assert 1.9 < two.kept / one.kept < 2.1
    assert two.peak - two.weights >= two.kept
    assert checkpointed.kept < 0.8 * two.kept < two.kept < wide.kept
