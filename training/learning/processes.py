"""One fit on several processes, each with its share of every batch.

All processes hold the same gates and draw the same random numbers; each evaluates its own images of
the global batch, and the gradients of the logits (a few thousand numbers) are summed. So the result
is that of one process at the same global batch, up to the order of summation, and one step needs
one small exchange. Launching and talking is left to `accelerate`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: where torchrun, Open MPI, MPICH and Intel MPI, and MVAPICH say how many processes there are
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """The processes of this run: which one this is, and what they do together.

    ``state`` is accelerate's; None means that there is this process alone.
    """

    def __init__(self, state: Any = None) -> None:
        self._state = state
        self.rank = 0 if state is None else state.process_index
        self.world = 1 if state is None else state.num_processes

    @classmethod
    def launched(cls, cpu: bool) -> Processes:
        """The processes that `accelerate launch`, torchrun or mpirun started, or just this one."""
        if not any(int(os.environ.get(name, "1")) > 1 for name in SIZES):
            return cls()
        from accelerate import PartialState

        return cls(PartialState(cpu=cpu))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """The device this process should use; None leaves the choice open."""
        return None if self._state is None else self._state.device

    def share(self, count: int) -> slice:
        """The rows of this process among ``count`` rows of a batch: disjoint, and all of them.

        >>> Processes().share(5)
        slice(0, 5, None)
        """
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, in place, by their sum over the processes, in one exchange."""
        parts = list(tensors)
        if self._state is None or not parts:
            return
        wide = torch.float32 if self._state.device.type == "mps" else torch.float64
        flat = torch.cat([part.detach().reshape(-1).to(self.device, wide) for part in parts])
        torch.distributed.all_reduce(flat)
        for part, found in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.detach().copy_(found.view_as(part))

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        value = torch.tensor(float(flag), device=self.device)
        self.sum_([value])
        return bool(value > 0)

    def sum_gradients_(self, module: nn.Module, loss: float) -> float:
        """Sum the gradients of a module's parameters in place; returns the sum of the losses.

        A process that had no images counts as zero.
        """
        for parameter in module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        whole = torch.tensor(loss, dtype=torch.float64)
        self.sum_([*(p.grad for p in module.parameters() if p.grad is not None), whole])
        return whole.item()
