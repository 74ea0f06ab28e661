"""Every criterion of the field as one function, and the registry `CRITERIA` of them all.

Each returns site -> importance, float32 [C], finite and not negative: how much each channel
matters. What to prune is decided afterwards (`training.score`), so that all criteria meet the same
rule. A channel owns, for an inner
site, row c of conv1 and column c of conv2; for a residual site row c of conv2; for the hidden
channels of a feed-forward two rows of the projection and a column of the layer after it.

Gradients are those of a unit gate m per channel, h ← m·h + (1 − m)·μ, at m = 1: the first-order
effect of replacing the channel by its constant, the same for every kind of site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldcp_core import Magnitude, Padding, Site, SoftGate, magnitude
from training.console import progress
from training.model.gating import masked, watched
from training.options import COUNT, POSITIVE, WITHIN_ONE, Options, option
from training.step.denoising import Denoising, Problem

Importances = dict[str, Tensor]
DiversityForm = Literal["mean", "spread", "variance"]


@dataclass(frozen=True)
class CriterionOptions(Options):
    """The settings that single criteria have."""

    loss_threshold: float = option("diff-pruning: T, relative to the largest loss", 0.1, WITHIN_ONE)
    diversity_form: DiversityForm = option("diversity: what is made of the sensitivities", "mean")
    directions: int = option("diversity: of the noise, and as many of the text", 10, COUNT)
    alpha: float = option("diversity: how far along a direction", 5.0, POSITIVE)


@dataclass(frozen=True)
class Ladder:
    """The same images at ascending timesteps, each time with the same noise.

    ``latents`` and ``noise`` [B, 4, h, w], ``context`` [B, T, D]; ``added`` as in `Problem`.
    """

    denoising: Denoising
    latents: Tensor
    context: Tensor
    noise: Tensor
    timesteps: Sequence[int]
    added: dict[str, Tensor] = field(default_factory=dict)

    def problem(self, timestep: int) -> Problem:
        """All images at one timestep."""
        steps = torch.full((len(self.latents),), timestep, device=self.latents.device)
        noisy, target = self.denoising.noised(self.latents, self.noise, steps)
        return Problem(noisy, steps, self.context, self.noise, target, self.added)

    def __iter__(self) -> Iterator[Problem]:
        return map(self.problem, self.timesteps)

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Subject:
    """What criteria measure on: a frozen model, its sites, and images.

    ``ladders`` hold the images in the batches that were encoded, ``ladder`` all of them at once.
    What is worth knowing besides the importances goes into ``facts``, and from there into the gate
    file.
    """

    ladders: Sequence[Ladder]
    sites: Sequence[Site]
    constants: Importances
    padding: Padding
    seed: int
    options: CriterionOptions
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def denoising(self) -> Denoising:
        return self.ladders[0].denoising

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.denoising.model.unet

    @property
    def ladder(self) -> Ladder:
        first = self.ladders[0]
        return Ladder(
            first.denoising,
            torch.cat([ladder.latents for ladder in self.ladders]),
            torch.cat([ladder.context for ladder in self.ladders]),
            torch.cat([ladder.noise for ladder in self.ladders]),
            first.timesteps,
            {n: torch.cat([ladder.added[n] for ladder in self.ladders]) for n in first.added},
        )

    def gradients(self, problem: Problem, loss: Callable[[Tensor], Tensor]) -> Importances:
        """`gate_gradients` of all sites."""
        return gate_gradients(
            self.denoising, problem, self.sites, self.constants, self.padding, loss
        )


# --- from the weights alone -----------------------------------------------------------------------


def owned(unet: nn.Module, site: Site, of: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
    """What each channel of ``site`` owns, as [C, ...], of ``of(weight)`` for its layers.

    ``of`` takes a weight parameter and returns a tensor of its shape: the weight, its gradient.
    """
    own = site.kind.rows_of(of(unet.get_parameter(site.weight)))
    if site.reader is None:
        return [own]
    return [own, of(unet.get_parameter(f"{site.reader}.weight")).transpose(0, 1)]


def magnitudes(unet: nn.Module, sites: Sequence[Site], norm: Magnitude) -> Importances:
    """‖W1[c]‖ + ‖W2[:, c]‖, each in units of its layer's mean (Li et al. 2017, arXiv:1608.08710).

    ``norm`` is "l1" or "l2"; a residual channel owns a row of conv2 only.
    """
    found = {}
    for site in sites:
        parts = [magnitude(part, norm) for part in owned(unet, site, lambda weight: weight)]
        found[site.name] = torch.stack([part / part.mean() for part in parts]).sum(0)
    return found


def random(sites: Sequence[Site], seed: int) -> Importances:
    """Uniform in [0, 1): what any criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: torch.rand(site.channels // site.group, generator=generator).repeat_interleave(
            site.group
        )
        for site in sites
    }


def sensitivity(unet: nn.Module, sites: Sequence[Site]) -> Importances:
    """mean |W[c]| in units of the layer's σ: the channel form of sensitivity pruning.

    Han et al. 2015 (arXiv:1506.02626, §3) prune weights below s·σ of their layer; a channel is
    kept iff its mean absolute weight reaches s·σ, so s is the threshold on this importance.
    """
    found = {}
    for site in sites:
        rows = _rows(unet, site)
        found[site.name] = rows.abs().mean(1) / rows.std(correction=0)
    return found


def percentage(unet: nn.Module, sites: Sequence[Site]) -> Importances:
    """mean |W[c]| of a channel's own rows; a percentile of it, layer by layer, is the cut."""
    return {site.name: _rows(unet, site).abs().mean(1) for site in sites}


def _rows(unet: nn.Module, site: Site) -> Tensor:
    weight = unet.get_parameter(site.weight).detach().float().cpu()
    return site.kind.rows_of(weight).flatten(1)


# --- from gradients -------------------------------------------------------------------------------


def gate_gradients(
    denoising: Denoising,
    problem: Problem,
    sites: Sequence[Site],
    constants: Importances,
    padding: Padding,
    loss: Callable[[Tensor], Tensor],
) -> Importances:
    """∂ loss(output) / ∂ m of a unit gate per channel at m = 1: site -> float32 [C] on the CPU.

    Channels that go together have one gate, and each of them its gradient.
    """
    device = problem.noisy.device
    masks = [torch.ones(s.channels // s.group, device=device).requires_grad_() for s in sites]
    gates = {
        site.name: SoftGate(mask.repeat_interleave(site.group), constants[site.name])
        for site, mask in zip(sites, masks, strict=True)
    }
    with masked(denoising.model.unet, gates, padding):
        gradients = torch.autograd.grad(loss(denoising.predict(problem)), masks)
    return {
        site.name: gradient.float().repeat_interleave(site.group).cpu()
        for site, gradient in zip(sites, gradients, strict=True)
    }


def noise_loss(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The denoising loss L_t = MSE(ε_θ(x_t, t), ε), or the same of v."""
    return lambda output: (output - problem.target).float().square().mean()


def taylor(on: Subject) -> Importances:
    """|Σ_t ∂L_t/∂m|: the first-order change of the loss (Molchanov et al. 2019, arXiv:1906.10771).

    With μ = 0 this is |Σ w·∂L/∂w| over the channel's row and bias, summed over all timesteps.
    """
    total: Importances = {site.name: torch.zeros(site.channels) for site in on.sites}
    for problem in progress(on.ladder, "taylor", unit="timestep"):
        found = on.gradients(problem, noise_loss(problem))
        total = {name: total[name] + found[name] for name in total}
    return {name: values.abs() for name, values in total.items()}


def diff_pruning(on: Subject) -> Importances:
    """Σ |w · Σ_t ∂L_t/∂w| over what a channel owns (Fang et al. 2023, arXiv:2305.10924, eq. 6-8).

    Gradients are accumulated over ascending timesteps until the loss falls below the option
    ``loss_threshold`` of the largest loss met: late timesteps carry little more than noise. The
    fact ``stopped_at`` is the timestep at which that happened, which does not count itself, or the
    last one.
    """
    ladder = on.ladder
    parameters = _owned_parameters(on.unet, on.sites)
    largest = 0.0
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        problems = progress(ladder, "diff-pruning", unit="timestep")
        for timestep, problem in zip(ladder.timesteps, problems, strict=True):
            on.facts["stopped_at"] = timestep
            loss = noise_loss(problem)(on.denoising.predict(problem))
            largest = max(largest, loss.item())
            if loss.item() < on.options.loss_threshold * largest:
                break
            loss.backward()
        found = {}
        for site in on.sites:
            sums = [part.flatten(1).sum(1) for part in owned(on.unet, site, _times_gradient)]
            found[site.name] = sum(sums, torch.zeros(site.channels))
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    return found


def _times_gradient(weight: nn.Parameter) -> Tensor:
    """|w · ∂L/∂w| on the CPU."""
    assert weight.grad is not None
    return (weight * weight.grad).detach().float().cpu().abs()


def _owned_parameters(unet: nn.Module, sites: Sequence[Site]) -> list[nn.Parameter]:
    names = {site.weight for site in sites}
    names |= {f"{site.reader}.weight" for site in sites if site.reader is not None}
    return [unet.get_parameter(name) for name in sorted(names)]


def own_effect(
    denoising: Denoising,
    problems: Sequence[Problem],
    sites: Sequence[Site],
    constants: Importances,
    padding: Padding,
    sum_: Callable[[Sequence[Tensor]], None] = lambda tensors: None,
) -> Importances:
    """E‖∂ε_θ/∂m‖²: what replacing a channel alone does to the output, to first order.

    Of channels that go together each has its part of what replacing all of them does.
    The diagonal of the Gauss-Newton matrix of the reconstruction loss, a sum over the outputs of a
    batch, estimated with one random projection v of the output per batch (Hutchinson 1990):
    E_v (∂(v·ε_θ)/∂m)² = ‖∂ε_θ/∂m‖². For v each image's own noise serves, turned upside down so
    that it has nothing to do with what the model sees in a place. ``sum_`` adds tensors up in place
    over the processes that share the batches.
    """
    total: Importances = {site.name: torch.zeros(site.channels) for site in sites}
    for problem in progress(problems, "own effect of each channel", unit="batch"):
        found: Importances = {site.name: torch.zeros(site.channels) for site in sites}
        if len(problem):
            probe = problem.noise.flip(2, 3)

            def projection(output: Tensor, probe: Tensor = probe) -> Tensor:
                return (output * probe).float().sum()

            found = gate_gradients(denoising, problem, sites, constants, padding, projection)
        sum_(list(found.values()))
        total = {name: total[name] + found[name].square() for name in total}
    return {site.name: total[site.name] / (len(problems) * site.group) for site in sites}


def diversity(on: Subject) -> Importances:
    """How much each channel carries the change that a change of the input makes.

    DCP-GAN (Chung et al. 2024), carried over to latent diffusion: with G the one-step prediction
    of the clean latent x̂0, ℓ_i = mean |G(input + α·d_i) − G(input)| and s_{n,i,c} = |∂ℓ_i/∂m_c| of
    a unit gate for sample n and direction d_i. ``mean`` is the mean of s over directions and
    samples, ``spread`` its standard deviation over the directions, ``variance`` the released form
    Σ_n Σ_i (s − mean_i s)². Images are taken one at a time, at the ladder's timesteps in turn.

    ``directions`` unit vectors of the initial noise and as many of the text embedding are drawn,
    with probability proportional to the variance they explain among the images' latents and among
    the captions' embeddings; ``alpha`` is how far to go along them.
    """
    ladder, options = on.ladder, on.options
    generator = torch.Generator().manual_seed(on.seed)
    of_noise = principal_directions(ladder.latents, options.directions, generator)
    of_text = principal_directions(ladder.context, options.directions, generator)
    changes = [(d, None) for d in of_noise] + [(None, d) for d in of_text]
    samples: list[dict[str, Tensor]] = []
    for number in progress(range(len(ladder.latents)), "diversity", unit="image"):
        timestep = ladder.timesteps[number % len(ladder.timesteps)]
        rows = []
        for noise_direction, text_direction in changes:
            problem = _pair(
                ladder, number, timestep, noise_direction, text_direction, options.alpha
            )
            loss = _change_of_prediction(problem, on.denoising, timestep)
            rows.append(on.gradients(problem, loss))
        samples.append({s.name: torch.stack([row[s.name].abs() for row in rows]) for s in on.sites})
    stacked = {site.name: torch.stack([s[site.name] for s in samples]) for site in on.sites}
    return {name: diversity_score(s, options.diversity_form) for name, s in stacked.items()}


def diversity_score(s: Tensor, form: DiversityForm) -> Tensor:
    """One score per channel of the sensitivities ``s`` [samples, directions, C]."""
    if form == "mean":
        return s.mean((0, 1))
    if form == "spread":
        return s.std(1, correction=0).mean(0)
    return (s - s.mean(1, keepdim=True)).square().sum((0, 1))


def principal_directions(values: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """``count`` unit directions [1, ...] among ``values`` [N, ...].

    Principal components, drawn with replacement with probability proportional to the variance they
    explain. Where all values are equal (one caption for all images) directions are random.
    """
    flat = values.detach().float().cpu().flatten(1)
    _, sizes, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    variances = sizes.square()
    if not variances.sum() > 1e-10 * flat.square().sum():
        components = torch.randn(count, flat.shape[1], generator=generator)
        components = components / components.norm(dim=1, keepdim=True)
        variances = torch.ones(count)
    drawn = torch.multinomial(variances, count, replacement=True, generator=generator)
    return [components[i].view(1, *values.shape[1:]).to(values) for i in drawn.tolist()]


def _pair(
    ladder: Ladder,
    number: int,
    timestep: int,
    noise_direction: Tensor | None,
    text_direction: Tensor | None,
    alpha: float,
) -> Problem:
    """A batch of two: one image as it is, and the same with a changed input."""
    one = slice(number, number + 1)

    def twice(values: Tensor, direction: Tensor | None) -> Tensor:
        return torch.cat([values, values if direction is None else values + alpha * direction])

    single = Ladder(
        ladder.denoising,
        twice(ladder.latents[one], None),
        twice(ladder.context[one], text_direction),
        twice(ladder.noise[one], noise_direction),
        [timestep],
        {name: twice(values[one], None) for name, values in ladder.added.items()},
    )
    return single.problem(timestep)


def _change_of_prediction(
    problem: Problem, denoising: Denoising, timestep: int
) -> Callable[[Tensor], Tensor]:
    """mean |x̂0 of the second − x̂0 of the first|."""

    def loss(output: Tensor) -> Tensor:
        clean = denoising.clean(problem.noisy, output, timestep)
        return (clean[1] - clean[0]).float().abs().mean()

    return loss


# --- from activations -----------------------------------------------------------------------------


def flap(on: Subject) -> Importances:
    """Var(a_c) · ‖W[:, c]‖²: how much what reads the channel changes with it.

    FLAP (An et al. 2024, arXiv:2312.11983, eq. 4): a is the activation that enters the layer after
    the site (conv2, or the feed-forward's second linear layer) and W[:, c] the column that reads
    it. A residual channel is read by all that follows with weight one: Var of its own output. The
    variance is taken over images, positions and timesteps.
    """
    with watched(on.unet, on.sites) as seen:
        for problem in progress(on.ladder, "flap", unit="timestep"):
            on.denoising.dense(problem)
    return seen.importances()


# --- the registry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """A cut that a criterion has of its own: what it is, below what, and in a layer's importances.

    ``cut`` takes the importances [C] of a layer and the threshold; channels that reach it are kept.
    """

    help: str
    largest: float
    cut: Callable[[Tensor, float], float]


@dataclass(frozen=True)
class Criterion:
    measure: Callable[[Subject], Importances]
    help: str
    threshold: Threshold | None = None


def _own_effect(on: Subject) -> Importances:
    problems = [problem for ladder in on.ladders for problem in ladder]
    return own_effect(on.denoising, problems, on.sites, on.constants, on.padding)


CRITERIA: dict[str, Criterion] = {
    "magnitude-l1": Criterion(
        lambda on: magnitudes(on.unet, on.sites, "l1"), "sum of the sizes of its weights"
    ),
    "magnitude-l2": Criterion(
        lambda on: magnitudes(on.unet, on.sites, "l2"), "Euclidean length of its weights"
    ),
    "random": Criterion(lambda on: random(on.sites, on.seed), "chance"),
    "own-effect": Criterion(_own_effect, "change of the output without it, to first order"),
    "taylor": Criterion(taylor, "change of the loss without it, to first order"),
    "diff-pruning": Criterion(diff_pruning, "Taylor of its weights, up to the timestep of T"),
    "diversity": Criterion(diversity, "its part in what a change of the input changes"),
    "sensitivity": Criterion(
        lambda on: sensitivity(on.unet, on.sites),
        "mean size of its weights, in σ of the layer",
        Threshold("s in σ of the layer", inf, lambda values, s: s),
    ),
    "percentage": Criterion(
        lambda on: percentage(on.unet, on.sites),
        "mean size of its weights",
        Threshold("the percentile q", 100.0, lambda v, q: float(torch.quantile(v, q / 100))),
    ),
    "flap": Criterion(flap, "variance times its readers' weights"),
}
