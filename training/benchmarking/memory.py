"""How much memory a step of learning takes, computed: nothing is allocated, every byte is counted.

    python -m training.benchmark memory --resolution 512 --batch 1 2 --precision bf16

A step runs on tensors without contents (PyTorch's FakeTensorMode), and the bytes of all tensors
alive are added up after each operation. What a device needs beside its tensors is not in it: the
context of CUDA, workspaces of its convolutions, and what its allocator keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldcp_core import DEFAULT_SCOPE, SoftGate, blocks_of
from ldcp_core.diffusers import topology_of
from training.arguments import parse_count
from training.console import explaining
from training.model.configs import SD15
from training.model.gating import deviation, masked
from training.model.load import DTYPES, check_resolution
from training.step.frozen import frozen_layers
from training.step.replay import recording, replaying

PIXELS_PER_LATENT = 8
TOKENS = 77
MIB = 2**20


@dataclass(frozen=True)
class StepMemory:
    """Bytes: of the U-Net's weights, what is kept for backward, and the most alive at one time.

    ``peak`` includes the weights.
    """

    weights: int
    kept: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within the context that are alive, and the most.

    Views of ``there``, tensors that were there before, are not counted.
    """

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.most = 0
        self._there = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in there}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        self._storages = {
            key: found for key, found in self._storages.items() if not found[0].expired()
        }
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._there:
                    self._storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.most = max(self.most, self.now)
        return result


def step_memory(
    unet: UNet2DConditionModel, scope: str, resolution: int, batch: int, checkpointing: bool = False
) -> StepMemory:
    """What one step of a fit takes: dense answer, gated forward, and backward to the masks.

    ``unet`` is frozen and lies on any device, also made of fake tensors; the step runs in a
    FakeTensorMode, which must be the one that made it.
    """
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    side = resolution // PIXELS_PER_LATENT
    like = {"dtype": unet.dtype}
    with LiveBytes(unet.parameters()) as live:
        noisy = torch.empty(batch, unet.config.in_channels, side, side, **like)
        context = torch.empty(batch, TOKENS, unet.config.cross_attention_dim, **like)
        timesteps = torch.zeros(batch, dtype=torch.int64)
        gates = {
            site.name: SoftGate(
                torch.ones(site.channels, requires_grad=True), torch.zeros(site.channels)
            )
            for site in topology_of(unet).sites(scope)
        }
        with torch.no_grad(), recording(unet, blocks_of(gates)) as shared:
            dense = unet(noisy, timesteps, encoder_hidden_states=context).sample
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with frozen_layers(unet.modules()), replaying(unet, shared), masked(unet, gates, "zero"):
            output = unet(noisy, timesteps, encoder_hidden_states=context).sample
            kept = live.now
            deviation(output, dense).backward()
        if checkpointing:
            unet.disable_gradient_checkpointing()
        return StepMemory(weights, kept, weights + live.most)


def fake_unet(config: Mapping[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen U-Net of this configuration; within a FakeTensorMode one without contents."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters can't be converted in place
    try:
        return UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(usual)


def sd15_step_memory(
    scope: str, resolution: int, batch: int, dtype: torch.dtype, checkpointing: bool = False
) -> StepMemory:
    """`step_memory` of Stable Diffusion 1.5's U-Net."""
    config = UNet2DConditionModel.load_config(SD15 / "unet", local_files_only=True)
    with FakeTensorMode():
        return step_memory(fake_unet(config, dtype), scope, resolution, batch, checkpointing)


@explaining
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark memory")
    add = parser.add_argument
    add("--scope", default=DEFAULT_SCOPE, help=f"({DEFAULT_SCOPE})")
    add("--resolution", type=parse_count, default=512, help="pixels (512)")
    add("--batch", type=parse_count, nargs="+", default=[1, 2], help="images per step (1 2)")
    add("--precision", choices=DTYPES, default="bf16", help="of the U-Net (bf16)")
    arguments = parser.parse_args(argv)
    check_resolution(arguments.resolution, PIXELS_PER_LATENT)
    print("Computed, not measured: the tensors of one step of learning on SD1.5's U-Net,")
    print(f"scope {arguments.scope}, {arguments.resolution} pixels, {arguments.precision}.\n")
    print("| batch | checkpointing | weights, MiB | kept for backward, MiB | peak, MiB |")
    print("|---|---|---|---|---|")
    for batch in arguments.batch:
        for checkpointing in (False, True):
            found = sd15_step_memory(
                arguments.scope,
                arguments.resolution,
                batch,
                DTYPES[arguments.precision],
                checkpointing,
            )
            sizes = " | ".join(f"{n / MIB:,.0f}" for n in (found.weights, found.kept, found.peak))
            print(f"| {batch} | {'yes' if checkpointing else 'no'} | {sizes} |")
    return 0
