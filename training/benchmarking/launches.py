"""What an evaluation of a U-Net asks of a GPU, counted without one: launches, bytes, FLOPs.

    python -m training.benchmark launches
    python -m training.benchmark launches --family sdxl --resolution 1024 --sparsity 0.3 0.5

A fast card computes an operation sooner than the host can launch the next, so that pruning which
saves arithmetic but needs more operations is slower than the dense model. The U-Net runs on tensors
without contents (PyTorch's meta device), for which `ldcp_core` computes as it does on a GPU. What
one operation launches is taken from PyTorch's sources; the times are estimated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ldcp_core import Padding, fused
from ldcp_core.diffusers import CompactBlock, compact_blocks, topology_of
from training.benchmarking.timing import DENSE
from training.benchmarking.variants import (
    PIXELS_PER_LATENT,
    Inputs,
    meta_unet,
    random_pruning,
)
from training.console import explaining, table
from training.model.configs import NAMES
from training.model.gating import running
from training.model.load import DTYPES, check_resolution
from training.options import BELOW_ONE, COUNT, Options, Precision, option, parsed

Family = Literal["sd15", "sd2", "sdxl"]
GIGA, TERA = 1e9, 1e12
#: seconds the host needs to launch a kernel, and the least a kernel takes
LAUNCH, KERNEL = 5e-6, 2e-6
#: launches of what is more than one: a GroupNorm takes moments, scales and applies; cuDNN's
#: convolution leaves its bias to an addition
SEVERAL = {"native_group_norm": 3}
#: what launches nothing beside views
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


@dataclass(frozen=True)
class Card:
    """What a card reaches in practice: bytes and half-precision FLOPs per second."""

    name: str
    bandwidth: float
    flops: float


CARDS = (
    Card("8 GB card", 300 * GIGA, 10 * TERA),
    Card("3090-like", 900 * GIGA, 60 * TERA),
    Card("H100-like", 2000 * GIGA, 350 * TERA),
)


@dataclass(frozen=True)
class Operation:
    """One operation on the device: its kernels, the bytes it reads and writes, its FLOPs."""

    name: str
    launches: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Count:
    """Totals of one evaluation; ``elementwise`` is bytes of operations that are no products."""

    launches: int
    elementwise: int
    flops: int
    host_seconds: float
    device_seconds: dict[str, float]

    @classmethod
    def of(cls, operations: Sequence[Operation]) -> Count:
        launches = sum(op.launches for op in operations)
        return cls(
            launches,
            sum(op.bytes for op in operations if not op.flops),
            sum(op.flops for op in operations),
            launches * LAUNCH,
            {card.name: sum(_seconds(op, card) for op in operations) for card in CARDS},
        )


def _seconds(op: Operation, card: Card) -> float:
    return max(KERNEL * op.launches, op.bytes / card.bandwidth, op.flops / card.flops)


class Operations(TorchDispatchMode):
    """Lists the operations within the context. Views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name == "batch_norm_stats":  # PyTorch knows no shape of it
            shape = args[0].shape[1]
            result = tuple(args[0].new_empty(shape, dtype=torch.float32) for _ in range(2))
        else:
            result = func(*args, **kwargs)
        if name not in NOTHING and not func.is_view:
            self._add(func, name, args, kwargs, result)
        return result

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        written = _tensors(result)
        read = _tensors((args, {k: v for k, v in kwargs.items() if k != "out"}))
        size = _bytes(read) + _bytes(written)
        if name in ("index_add_", "index_copy_"):  # touches only what it adds to
            size = _bytes([args[3]]) * (3 if name == "index_add_" else 2)
        elif name in ("index_select", "copy_"):
            size = 2 * _bytes(written)
        launches, flops = SEVERAL.get(name, 1), 0
        product = getattr(torch.ops.aten, name.rstrip("_"), None)
        if product in flop_registry:
            flops = flop_registry[product](*args, **kwargs, out_val=result)
        if name == "convolution" and args[2] is not None:
            launches, size = 2, size + 2 * _bytes(written)
        elif name == "native_group_norm":
            size += _bytes(read[:1])  # once for the moments, once to apply them
        self.operations.append(Operation(name, launches, size, flops))


class _OneAttention(TorchFunctionMode):
    """Attention as the one kernel that it is on a GPU."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        result = torch.empty_like(query)
        flops = 4 * query.numel() * key.shape[2]
        self._operations.operations.append(
            Operation("attention", 1, _bytes([query, key, value, result]), flops)
        )
        return result


def _triton(operations: Operations) -> Any:
    """Context in which `ldcp_core.fused` launches its kernels here, as it does on a GPU."""

    def launch(name: str, grid: tuple[int, ...], *args: Any, **constants: int) -> None:
        read_again = 3 if name == "norm_silu" else 0  # twice more, and written
        size = _bytes(_tensors(args)) + read_again * _bytes(args[:1])
        operations.operations.append(Operation(name, 1, size, 0))

    return mock.patch.multiple(fused, usable=lambda *maps: True, launch=launch)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that lie in memory: what is expanded counts once."""
    total = 0
    for tensor in tensors:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        total += math.prod(size for size, stride in sizes if stride) * tensor.element_size()
    return total


def operations(
    unet: UNet2DConditionModel,
    blocks: Mapping[str, CompactBlock],
    resolution: int,
    batch: int,
    triton: bool = False,
) -> list[Operation]:
    """What one evaluation does; ``unet`` and ``blocks`` lie on the meta device."""
    inputs = Inputs.random(unet, batch, resolution // PIXELS_PER_LATENT, seed=0)
    with ExitStack() as stack:
        stack.enter_context(running(unet, blocks))
        counted = stack.enter_context(Operations())
        stack.enter_context(_OneAttention(counted))
        if triton:
            stack.enter_context(_triton(counted))
        inputs.run(unet)
    return counted.operations


@dataclass(frozen=True)
class LaunchOptions(Options):
    """What to count."""

    family: Family = option("whose U-Net", "sd15")
    scope: tuple[str, ...] = option("which layers", ("mid", "all", "all+ff", "all+ff+heads"))
    sparsity: tuple[float, ...] = option("shares pruned at random", (0.4,), BELOW_ONE)
    padding: tuple[Padding, ...] = option("how constants meet the border", ("zero",))
    resolution: int = option("pixels, a multiple of 64", 512, COUNT)
    batch: int = option("two are one image with guidance", 2, COUNT)
    precision: Precision = option("of the U-Net", "fp16")


def count(given: LaunchOptions) -> dict[str, Count]:
    """Dense and each pruned form of a family, with random keep-sets of aligned counts.

    Each once from PyTorch's own operations and once with the Triton kernels.
    """
    unet = meta_unet(DTYPES[given.precision], given.family)
    resolution, batch = given.resolution, given.batch
    found = {DENSE: Count.of(operations(unet, {}, resolution, batch))}
    for scope, share, rule in product(given.scope, given.sparsity, given.padding):
        pruning = random_pruning(topology_of(unet).sites(scope), share, seed=0)
        blocks = compact_blocks(unet, pruning.pruned(rule))
        name = f"{scope} {pruning.label}, {rule}"
        operations(unet, blocks, resolution, batch)  # makes what is kept for this size
        for form, triton in ((name, False), (f"{name}, Triton", True)):
            found[form] = Count.of(operations(unet, blocks, resolution, batch, triton))
    return found


def render(counts: Mapping[str, Count]) -> str:
    """Markdown: a row per form."""
    cards = [f"{card.name}, ms" for card in CARDS]
    header = ["form", "launches", "elementwise, GB", "TFLOP", *cards, "launching, ms"]
    rows = []
    for name, form in counts.items():
        milliseconds = [1000 * s for s in (*form.device_seconds.values(), form.host_seconds)]
        cells = [name, f"{form.launches:,}", f"{form.elementwise / GIGA:.2f}"]
        cells += [f"{form.flops / TERA:.3f}", *(f"{ms:.1f}" for ms in milliseconds)]
        rows.append(cells)
    return "\n".join(table(header, rows))


ASSUMPTIONS = (
    "Launches, bytes and FLOPs are counted, the times estimated, not measured: an operation takes "
    f"the longest of {KERNEL * 1e6:g} µs a kernel, its bytes and its FLOPs on a card that reaches "
    + "; ".join(
        f"{card.bandwidth / GIGA:,.0f} GB/s and {card.flops / TERA:,.0f} TFLOP/s ({card.name})"
        for card in CARDS
    )
    + f". The host launches one in {LAUNCH * 1e6:g} µs; an evaluation takes the longer of device "
    "and launching (Triton's launcher takes longer than that). "
    "Elementwise means all that is no convolution, linear layer or attention."
)


@explaining
def main(argv: Sequence[str]) -> int:
    given = parsed(LaunchOptions, argv, "benchmark launches", __doc__)
    check_resolution(given.resolution, PIXELS_PER_LATENT)
    found = count(given)
    facts = f"{given.resolution} pixels, batch {given.batch}, {given.precision}"
    print(f"{NAMES[given.family]}'s U-Net, {facts}, on a CUDA device.\n")
    print(render(found))
    print(f"\n{ASSUMPTIONS}\n")
    counts = {name: asdict(form) for name, form in found.items()}
    print(json.dumps({"options": asdict(given), **counts}))
    return 0
