"""Images become denoising problems: latents, prompts, noise, timesteps, and the U-Net's answer.

Latents and prompt embeddings come from a cache on disk (`EncodedImages`), or are computed once per
image and kept in memory: every epoch after the first costs neither VAE nor text encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ldcp_core import SoftGate, blocks_of
from ldcp_core.gates import Padding
from training.data import Batch, ImageData
from training.encoding import EncodedBatch, EncodedImages
from training.frozen import thrifty_layers
from training.gating import masked
from training.kernels import fast_layers
from training.models import DiffusionModel, embed_prompts, encode_images
from training.thrift import recording, replaying


@dataclass(frozen=True)
class Problem:
    """One batch: ``noisy`` and ``noise`` [B, 4, h, w], ``timesteps`` [B], ``context`` [B, T, D].

    ``share`` is this process's part of the whole batch, 1 where there is only one.
    """

    noisy: Tensor
    timesteps: Tensor
    context: Tensor
    noise: Tensor
    share: float = 1.0

    def __len__(self) -> int:
        return self.noisy.shape[0]


@dataclass(frozen=True)
class Answered:
    """A problem, the dense model's answer, and the outputs of parts that no gate changes."""

    problem: Problem
    dense: Tensor
    shared: dict[str, Any]

    def to(self, device: torch.device) -> Answered:
        """The same on another device."""
        problem, dense, shared = tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (vars(self.problem), self.dense, self.shared)
        )
        return Answered(Problem(**problem), dense, shared)


class Encoder:
    """Latents and prompt embeddings of images, each computed once.

    One by one: the bits of a convolution depend on how many images it gets at once, and an image's
    latent must not depend on what it first came together with (after a resume, that differs).
    """

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        self._latents: dict[str, Tensor] = {}
        self._contexts: dict[str, Tensor] = {}

    def __call__(self, batch: Batch | EncodedBatch) -> tuple[Tensor, Tensor]:
        """Latents [B, 4, h, w] and context [B, T, D], in the U-Net's precision and place."""
        unet = self._model.unet
        if isinstance(batch, EncodedBatch):
            return (
                batch.latents.to(unet.device, unet.dtype),
                batch.context.to(unet.device, unet.dtype),
            )
        for pixels, id in zip(batch.pixels, batch.ids, strict=True):
            if id not in self._latents:
                self._latents[id] = encode_images(self._model, pixels[None])[0].cpu()
        for caption in dict.fromkeys(batch.captions):
            if caption not in self._contexts:
                self._contexts[caption] = embed_prompts(self._model, [caption])[0].cpu()
        latents = torch.stack([self._latents[id] for id in batch.ids])
        context = torch.stack([self._contexts[caption] for caption in batch.captions])
        return latents.to(unet.device, unet.dtype), context.to(unet.device, unet.dtype)


class Denoising:
    """Draws noise and timesteps for images and asks the U-Net about them."""

    def __init__(self, model: DiffusionModel, seed: int) -> None:
        self.model = model
        self.encoder = Encoder(model)
        self.generator = torch.Generator().manual_seed(seed)
        self._alphas = model.alphas_cumprod.to(torch.float64)
        self._layers = list(model.unet.modules())

    def problem(
        self, batch: Batch | EncodedBatch, generator: torch.Generator | None = None
    ) -> Problem:
        """Noise the images of a batch at timesteps spread evenly over the schedule.

        Within a batch the timesteps are stratified, one per equal share of the schedule: as
        uniform as independent draws, with less variance. Of a batch that several processes share
        each draws all, and uses what belongs to its own images.
        """
        generator = generator or self.generator
        latents, context = self.encoder(batch)
        encoded = isinstance(batch, EncodedBatch)
        count, rows = (batch.total, batch.rows) if encoded else (len(latents), slice(None))
        steps = self._alphas.numel()
        strata = torch.randperm(count, generator=generator)
        share = (strata + torch.rand(count, generator=generator)) / count
        timesteps = (share * steps).long().clamp(max=steps - 1)[rows]
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)[rows].to(latents)
        alphas = self._alphas[timesteps][:, None, None, None]
        noisy = alphas.sqrt().to(latents) * latents + (1 - alphas).sqrt().to(latents) * noise
        part = len(latents) / count
        return Problem(noisy, timesteps.to(latents.device), context, noise, part)

    def dense(self, problem: Problem) -> Tensor:
        """The unpruned U-Net's prediction of the noise, without gradient."""
        with torch.no_grad(), fast_layers(self._layers):
            return self._predict(problem)

    def gated(self, problem: Problem, gates: dict[str, SoftGate], padding: Padding) -> Tensor:
        """The prediction under gates, differentiable in their masks."""
        with fast_layers(self._layers), masked(self.model.unet, gates, padding):
            return self._predict(problem)

    def answered(self, problem: Problem, sites: Iterable[str]) -> Answered:
        """The problem with its dense prediction and what gates at these sites do not change."""
        unet = self.model.unet
        with (
            torch.no_grad(),
            fast_layers(self._layers),
            recording(unet, blocks_of(sites)) as shared,
        ):
            dense = self._predict(problem)
        return Answered(problem, dense, shared)

    @contextmanager
    def pruned(
        self, answered: Answered, gates: Mapping[str, SoftGate], padding: Padding
    ) -> Iterator[Tensor]:
        """The prediction with gates at the sites of ``answered``, differentiable in the masks.

        Run its backward within the context: under gradient checkpointing blocks are evaluated
        again, with their gates.
        """
        unet = self.model.unet
        with (
            thrifty_layers(self._layers),
            fast_layers(self._layers),
            replaying(unet, answered.shared),
            masked(unet, gates, padding),
        ):
            yield self._predict(answered.problem)

    @contextmanager
    def compared(
        self, problem: Problem, gates: Mapping[str, SoftGate], padding: Padding
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The predictions without and with gates: `answered` and `pruned` in one."""
        answered = self.answered(problem, gates)
        with self.pruned(answered, gates, padding) as output:
            yield answered.dense, output

    def _predict(self, problem: Problem) -> Tensor:
        result: Tensor = self.model.unet(
            problem.noisy, problem.timesteps, encoder_hidden_states=problem.context
        ).sample
        return result


class HeldOut:
    """Fixed held-out problems and their dense answers: every keep-set meets the same noise."""

    def __init__(
        self,
        denoising: Denoising,
        data: ImageData | EncodedImages,
        indices: Sequence[int],
        samples: int,
        batch_size: int,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._denoising = denoising
        self._problems: list[Problem] = []
        self._dense: list[Tensor] = []
        for batch in _at_least(data, indices, batch_size, samples):
            problem = denoising.problem(batch, generator)
            self._problems.append(problem)
            self._dense.append(denoising.dense(problem))

    def deviations(self, gates: dict[str, SoftGate], padding: Padding) -> Tensor:
        """Mean squared deviation from the dense output of each held-out sample, float32 [N]."""
        with torch.no_grad():
            parts = [
                (self._denoising.gated(problem, gates, padding) - dense).float().square()
                for problem, dense in zip(self._problems, self._dense, strict=True)
            ]
        return torch.cat([part.mean((1, 2, 3)) for part in parts]).cpu()

    def refer_to_this(self) -> None:
        """Take the answers of the U-Net as it runs now for what deviations are from."""
        self._dense = [self._denoising.dense(problem) for problem in self._problems]

    def as_it_is(self) -> tuple[Tensor, Tensor]:
        """Deviations and losses, float32 [N] each, of the U-Net as it runs now.

        Within a context that prunes or quantizes it, that is; see `deviations` and `losses`.
        """
        deviations, losses = [], []
        for problem, dense in zip(self._problems, self._dense, strict=True):
            output = self._denoising.dense(problem).float()
            deviations.append((output - dense.float()).square().mean((1, 2, 3)))
            losses.append((output - problem.noise.float()).square().mean((1, 2, 3)))
        return torch.cat(deviations).cpu(), torch.cat(losses).cpu()

    @property
    def timesteps(self) -> Tensor:
        """The timestep of each held-out sample, int64 [N]."""
        return torch.cat([problem.timesteps for problem in self._problems]).cpu()

    def noise_loss(self, gates: dict[str, SoftGate] | None, padding: Padding) -> float:
        """Mean of `losses`."""
        return float(self.losses(gates, padding).mean())

    def losses(self, gates: dict[str, SoftGate] | None, padding: Padding) -> Tensor:
        """The usual denoising loss (MSE against the true noise) of each sample, float32 [N].

        ``gates=None``: of the dense model.
        """
        losses = []
        with torch.no_grad():
            for problem, dense in zip(self._problems, self._dense, strict=True):
                output = dense if gates is None else self._denoising.gated(problem, gates, padding)
                losses.append((output - problem.noise).float().square().mean((1, 2, 3)))
        return torch.cat(losses).cpu()


def _at_least(
    data: ImageData | EncodedImages, indices: Sequence[int], batch_size: int, samples: int
) -> Iterator[Batch | EncodedBatch]:
    """Batches in a fixed order, going round until ``samples`` images have come."""
    seen = 0
    for batch in data.batches(indices, batch_size, epochs=None):
        yield batch
        seen += len(batch.ids)
        if seen >= samples:
            return
