"""Other ways to make the same U-Net cheaper, where they are installed: tomesd and DeepCache.

Both approximate, in ways of their own, and are run with the settings their authors recommend.
They patch a diffusers pipeline; of that they need no more than the U-Net and the timesteps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel

from training.benchmarking.timing import Variant
from training.benchmarking.variants import TIMESTEP, Inputs

TOKEN_RATIO = 0.5
CACHE_INTERVAL = 3


def peer_variants(
    unet: UNet2DConditionModel, inputs: Inputs, weight_bytes: int
) -> tuple[list[Variant], dict[str, str]]:
    """The peers that run here, and for the others the reason why not.

    Each is tried once, since both patch private parts of diffusers and break with its versions.
    """
    found: list[Variant] = []
    absent: dict[str, str] = {}
    makers: dict[str, Callable[[UNet2DConditionModel, Inputs, int], Variant]] = {
        "tomesd": _tomesd,
        "DeepCache": _deepcache,
    }
    for name, make in makers.items():
        try:
            importlib.import_module(name)
        except ImportError:
            absent[name] = "not installed"
            continue
        try:
            variant = make(unet, inputs, weight_bytes)
            with variant.prepare():
                variant.evaluate()
            found.append(variant)
        except Exception as error:  # whatever a foreign patch trips over
            reason = (str(error).splitlines() or [""])[0]
            absent[name] = f"fails with these versions ({type(error).__name__}: {reason})"
    return found, absent


def _tomesd(unet: UNet2DConditionModel, inputs: Inputs, weight_bytes: int) -> Variant:
    import tomesd

    @contextmanager
    def patched() -> Iterator[None]:
        try:
            tomesd.apply_patch(unet, ratio=TOKEN_RATIO)
            yield
        finally:
            tomesd.remove_patch(unet)

    return Variant(
        f"tomesd {TOKEN_RATIO:.0%}",
        f"{TOKEN_RATIO:.0%} of the tokens merged in the self-attention at full resolution",
        lambda: inputs.run(unet),
        patched,
        weight_bytes=weight_bytes,
    )


def _deepcache(unet: UNet2DConditionModel, inputs: Inputs, weight_bytes: int) -> Variant:
    from DeepCache import DeepCacheSDHelper

    timesteps = [TIMESTEP - step for step in range(CACHE_INTERVAL)]
    tensors = [torch.tensor(t, device=unet.device) for t in timesteps]
    pipeline = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=timesteps))

    @contextmanager
    def patched() -> Iterator[None]:
        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=CACHE_INTERVAL, cache_branch_id=0)
        try:
            helper.enable()
            yield
        finally:
            helper.cached_output.clear()
            for module in unet.modules():  # its own way back leaves a forward on each module
                module.__dict__.pop("forward", None)

    def evaluate() -> list[torch.Tensor]:
        return [inputs.run(unet, timestep) for timestep in tensors]

    return Variant(
        f"DeepCache {CACHE_INTERVAL}",
        f"all but the outermost layers taken from an earlier step in {CACHE_INTERVAL - 1} of "
        f"{CACHE_INTERVAL} steps; mean per step over {CACHE_INTERVAL} consecutive steps",
        evaluate,
        patched,
        steps=CACHE_INTERVAL,
        weight_bytes=weight_bytes,
    )
