"""What the layer that reads a site would be fed if the site were pruned, and what it would lack.

Both are seen by hooks while a host runs its dense model; `ldcp_core.gathering` makes corrections of
them. A host says how its weights are read and how its norm is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .blocks import Padding, SoftGate
from .linear import LinearWeights
from .resblock import ConvWeights, ResBlockOps, masked_conv2

#: gets what a reader would be fed and what its output would lack
See = Callable[[Tensor, Tensor], None]


def watch_linear(
    layer: nn.Module,
    weights: Callable[[Tensor], LinearWeights],
    gate: SoftGate,
    axis: int,
    see: See,
) -> AbstractContextManager[None]:
    """Context in which each call of a linear layer, whose inputs the gate prunes, is seen.

    ``weights`` are those that it computes with, for an input like the one given.
    """

    def read(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        fed = gate(inputs[0], axis=axis)
        found = weights(fed)
        see(fed, output - F.linear(fed, *gate.reader(found.weight, found.bias)))

    return hooked(layer.register_forward_hook(read))


def watch_conv2(
    ops: ResBlockOps,
    layers: tuple[nn.Module, nn.Module, nn.Module],
    weights: Callable[[Tensor], ConvWeights],
    inner: SoftGate,
    residual: SoftGate | None,
    padding: Padding,
    see: See,
) -> AbstractContextManager[None]:
    """The same of conv2 of a ResBlock, of whose ``layers`` conv1, norm2 and conv2 are needed.

    Nothing is missing where the residual gate replaces the output.
    """
    came: list[Tensor] = []  # out of conv1 and into norm2

    def read(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        h, with_emb = came
        fed = ops.norm2(inner(h) + (with_emb - h))
        came.clear()  # of what the norm has just been given, too
        missing = output - masked_conv2(ops, fed, weights(fed), inner, padding)
        if residual is not None:
            missing = missing * residual.mask.to(missing)[:, None, None]
        see(fed, missing)

    conv1, norm2, conv2 = layers
    return hooked(
        conv1.register_forward_hook(lambda module, inputs, output: came.append(output)),
        norm2.register_forward_pre_hook(lambda module, inputs: came.append(*inputs)),
        conv2.register_forward_hook(read),
    )


@contextmanager
def hooked(*hooks: RemovableHandle) -> Iterator[None]:
    """Context that removes these hooks in the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
