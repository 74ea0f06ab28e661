"""Images become denoising problems: latents, prompts, noise, timesteps, and the U-Net's answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from ldcp_core import Padding, SoftGate, blocks_of
from training.console import progress
from training.data.encoding import Batch
from training.model.gating import masked
from training.model.load import DiffusionModel
from training.step.frozen import frozen_layers
from training.step.replay import recording, replaying


@dataclass(frozen=True)
class Problem:
    """One batch: ``noisy`` and ``noise`` [B, 4, h, w], ``timesteps`` [B], ``context`` [B, T, D].

    ``target`` is what the U-Net was trained to answer: the noise, or v (see `Denoising.noised`).
    ``added`` is what `added_conditions` gives. ``share`` is this process's part of the whole batch,
    1 where there is only one.
    """

    noisy: Tensor
    timesteps: Tensor
    context: Tensor
    noise: Tensor
    target: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)
    share: float = 1.0

    def __len__(self) -> int:
        return self.noisy.shape[0]

    def part(self, rows: slice) -> Problem:
        """Some of its samples."""
        return Problem(**tree_map_only(Tensor, lambda tensor: tensor[rows], vars(self)))


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


class Denoising:
    """Draws noise and timesteps for images and asks the U-Net about them."""

    def __init__(self, model: DiffusionModel, seed: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)
        self._alphas = model.alphas_cumprod.to(torch.float64)
        self._predicts_v = model.scheduler.config.prediction_type == "v_prediction"
        self._layers = list(model.unet.modules())

    def inputs(
        self, batch: Batch, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, context and `added_conditions` where the U-Net is.

        In its precision or in ``dtype``, the sizes among them in float32: half precision would
        round them.
        """
        first = self.model.unet.conv_in.weight  # the U-Net's own `dtype` looks at every module
        to = {"device": first.device, "dtype": dtype or first.dtype}
        added = {name: values.to(first.device) for name, values in batch.added.items()}
        return batch.latents.to(**to), batch.context.to(**to), added

    def problem(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> Problem:
        """Noise the images of a batch at timesteps spread evenly over the schedule.

        Within a batch the timesteps are stratified, one per equal share of the schedule: as
        uniform as independent draws, with less variance. Of a batch that several processes share
        each draws all, and uses what belongs to its own images. ``dtype`` is that of the problem
        (None: the U-Net's).
        """
        generator = generator or self.generator
        latents, context, added = self.inputs(batch, dtype)
        count, rows = batch.total, batch.rows
        steps = self._alphas.numel()
        strata = torch.randperm(count, generator=generator)
        share = (strata + torch.rand(count, generator=generator)) / count
        timesteps = (share * steps).long().clamp(max=steps - 1)[rows]
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)[rows].to(latents)
        noisy, target = self.noised(latents, noise, timesteps)
        part = len(latents) / count
        on_device = timesteps.to(latents.device)
        return Problem(noisy, on_device, context, noise, target, added, part)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents noised at ``timesteps`` [B], and what the U-Net should answer.

        That is the noise ε, or v = √ᾱ·ε − √(1−ᾱ)·x (Salimans & Ho 2022, arXiv:2202.00512, §4).
        """
        alphas = self._alphas[timesteps.cpu()][:, None, None, None]
        signal, sigma = alphas.sqrt().to(latents), (1 - alphas).sqrt().to(latents)
        noisy = signal * latents + sigma * noise
        return noisy, signal * noise - sigma * latents if self._predicts_v else noise

    def clean(self, noisy: Tensor, output: Tensor, timestep: int) -> Tensor:
        """The latents x̂ that ``output`` predicts: (x_t − √(1−ᾱ)·ε) / √ᾱ, or √ᾱ·x_t − √(1−ᾱ)·v."""
        alpha = float(self._alphas[timestep])
        signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
        if self._predicts_v:
            return signal * noisy - sigma * output
        return (noisy - sigma * output) / signal

    def dense(self, problem: Problem) -> Tensor:
        """The unpruned U-Net's prediction, without gradient."""
        with torch.no_grad():
            return self.predict(problem)

    def gated(self, problem: Problem, gates: dict[str, SoftGate], padding: Padding) -> Tensor:
        """The prediction under gates, without gradient.

        With one, hold `masked` around `predict` and the backward pass: under gradient checkpointing
        blocks are evaluated again in it.
        """
        with torch.no_grad(), masked(self.model.unet, gates, padding):
            return self.predict(problem)

    def answered(self, problem: Problem, sites: Iterable[str]) -> Answered:
        """The problem with its dense prediction and what gates at these sites do not change."""
        unet = self.model.unet
        with torch.no_grad(), recording(unet, blocks_of(sites)) as shared:
            dense = self.predict(problem)
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
            frozen_layers(self._layers),
            replaying(unet, answered.shared),
            masked(unet, gates, padding),
        ):
            yield self.predict(answered.problem)

    def predict(self, problem: Problem) -> Tensor:
        """The prediction of the U-Net as it runs now."""
        result: Tensor = self.model.unet(
            problem.noisy,
            problem.timesteps,
            encoder_hidden_states=problem.context,
            added_cond_kwargs=problem.added,
        ).sample
        return result


class FixedProblems:
    """Problems in float32 and their dense answers: all gates meet the same images and noise.

    Of ``samples`` images or more, those of the first ``batches``. The answers are those of the
    U-Net as it runs now, to ``at_once`` of them (default: to a batch).
    """

    def __init__(
        self,
        denoising: Denoising,
        batches: Iterator[Batch],
        samples: int,
        seed: int,
        at_once: int | None = None,
        label: str = "held-out images",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._denoising = denoising
        self._problems: list[Problem] = []
        self._dense: list[Tensor] = []
        with progress(None, f"{label}, dense", samples, unit="sample") as bar:
            for batch in _at_least(batches, samples):
                problem = denoising.problem(batch, generator, torch.float32)
                size = at_once or len(problem)
                for first in range(0, len(problem), size):
                    part = problem.part(slice(first, first + size))
                    self._problems.append(part)
                    self._dense.append(self._answer(part))
                    bar.update(len(part))

    def refer_to_this(self) -> Tensor:
        """Take the answers of the U-Net as it runs now for what deviations are from.

        Returns the deviations of these from those before, float32 [N].
        """
        before = self._dense
        self._dense = [self._answer(p) for p in progress(self._problems, "the reference")]
        pairs = zip(self._dense, before, strict=True)
        return torch.cat([_distance(after, earlier) for after, earlier in pairs]).cpu()

    def as_it_is(self, label: str | tqdm[Any]) -> tuple[Tensor, Tensor]:
        """Deviations from dense and denoising losses of the U-Net as it runs now, float32 [N] each.

        Within a context that prunes or quantizes it, that is. A deviation is the mean squared
        distance from the dense output, a loss (the usual one) that from the true answer; ``label``
        says in the progress what it is, or is the caller's own bar, which then counts the batches.
        """
        if isinstance(label, str):
            with progress(None, label, len(self._problems), unit="batch") as bar:
                return self.as_it_is(bar)
        deviations, losses = [], []
        for problem, dense in zip(self._problems, self._dense, strict=True):
            output = self._answer(problem)
            deviations.append(_distance(output, dense))
            losses.append(_distance(output, problem.target))
            label.update()
        return torch.cat(deviations).cpu(), torch.cat(losses).cpu()

    @property
    def dense_losses(self) -> Tensor:
        """The denoising losses of the dense answers, float32 [N]."""
        pairs = zip(self._dense, self._problems, strict=True)
        return torch.cat([_distance(dense, problem.target) for dense, problem in pairs]).cpu()

    @property
    def timesteps(self) -> Tensor:
        """The timestep of each held-out sample, int64 [N]."""
        return torch.cat([problem.timesteps for problem in self._problems]).cpu()

    def _answer(self, problem: Problem) -> Tensor:
        """The prediction, without the ten-bit products (TF32) that cuDNN takes for float32."""
        cudnn = torch.backends.cudnn
        allowed, cudnn.allow_tf32 = cudnn.allow_tf32, False
        try:
            return self._denoising.dense(problem)
        finally:
            cudnn.allow_tf32 = allowed


def without_prompts(problem: Problem, context: Tensor, pooled: Tensor, first: int = 0) -> Problem:
    """The problem with the empty prompt [1, T, D], [1, P] in the place of every second one.

    With a ``first`` that counts up, also where a problem has one image.

    Guidance asks the model with and without a prompt; trained with prompts alone, the two answers
    would drift apart.
    """
    empty = (first + torch.arange(len(problem))) % 2 == 1
    contexts, added = problem.context.clone(), dict(problem.added)
    contexts[empty] = context.to(contexts)
    if "text_embeds" in added:
        added["text_embeds"] = added["text_embeds"].clone()
        added["text_embeds"][empty] = pooled.to(added["text_embeds"])
    return replace(problem, context=contexts, added=added)


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of each sample, float32 [N]."""
    return (output.float() - target.float()).square().mean((1, 2, 3))


def _at_least(batches: Iterator[Batch], samples: int) -> Iterator[Batch]:
    """As many of the batches as have ``samples`` images."""
    seen = 0
    while seen < samples:
        batch = next(batches)
        if batch.ids:  # else none of these rows of a stream can be read
            seen += len(batch.ids)
            yield batch
