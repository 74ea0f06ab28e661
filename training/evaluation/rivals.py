"""What others do with as many weights: channels removed for good, the weights that stay changed.

Unlike gates a rival is another U-Net. A removed channel leaves nothing behind, no constant and no
part in the statistics of a GroupNorm, and all steps of a sampler use the smaller layers.

- ``obs``: OBS-Diff (arXiv:2510.06751), structured: importance and closed-form update of the layer
  that reads the channels (`training.evaluation.surgeon`), without training. Layers are pruned in
  four packages in the order in which they run, on what the U-Net pruned so far feeds them (§4.2).
  Step t of T counts α_t = α_min + (α_max − α_min) ln(T − t + 1) / ln T, with t = 1 the noisiest
  (eq. 4), on noised training images in place of a sampler's steps.
- ``structural``: Diff-Pruning (Fang et al. 2023, arXiv:2305.10924): Taylor importance over the
  timesteps below its threshold (`training.criteria.diff_pruning`), removal, then fine-tuning of all
  weights by the usual loss.

Neither prunes residual channels, which a sum reads, so they take more from the other sites: as many
weights are left as gates leave. *Per layer* each layer gives the same share, as in the papers;
*global*, the shares are those that the gates found. A GroupNorm keeps its groups, and an equal
number of channels in each, since it knows equal groups alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import lcm, log
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldcp_core import Gates, Latent, Site, aligned_counts, savings, top_channels
from training.console import progress
from training.criteria import (
    CriterionOptions,
    Importances,
    Ladder,
    Subject,
    diff_pruning,
    noise_loss,
)
from training.data.cache import weights_digest
from training.data.encoding import Batch, Images
from training.errors import UserError
from training.evaluation.surgeon import removed
from training.model.encode import embed_prompts
from training.model.gating import overridden
from training.model.precision import in_precision
from training.sample import Candidate
from training.step.denoising import Denoising, Problem, without_prompts

KINDS = ("obs", "structural")
#: OBS-Diff's number of module packages (appendix B), and bounds of α, which the paper does not give
PACKAGES, ALPHA = 4, (0.5, 1.0)
#: images that are noised for ``obs``; images and timesteps of each for ``structural``
SAMPLES, TAYLOR_SAMPLES, TIMESTEPS = 128, 16, 20
#: share of all weights by which a rival may differ from the gates
SLACK = 0.0005
#: fine-tuning: images per step and Adam's learning rate, falling to zero
BATCH, LEARNING_RATE = 8, 2e-4


@dataclass(frozen=True)
class Rival:
    """A smaller U-Net beside `sample.Candidate`; ``kept`` are the channels left at its sites."""

    unet: UNet2DConditionModel
    criterion: str
    kept: Mapping[str, int]
    of: Gates
    beside: str
    precision: str = "fp32"
    gates: ClassVar[None] = None

    @contextmanager
    def running(self, unet: UNet2DConditionModel) -> Iterator[int]:
        """Context in which the U-Net is this one; yields its bytes (`in_precision`)."""
        with in_precision(self.unet, self.precision, {}) as size:
            with overridden(unet, {"": self.unet.forward}):
                yield size

    def stamp(self) -> str:
        """What tells its images from those of another."""
        return f"{weights_digest(self.unet)} {self.precision}"

    def described(self) -> dict[str, Any]:
        """What a row of a comparison says of it."""
        gone = sum(self.of.scores[site].numel() - count for site, count in self.kept.items())
        return {
            "precision": self.precision,
            "criterion": self.criterion,
            "scope": self.of.info.get("scope", ""),
            "target": None,
            "channels_pruned": gone / self.of.channels,
            "zeroed": False,
            "beside": self.beside,
        }

    def counted(self, parameters: int, side: int) -> dict[str, float]:
        """Shares left of a U-Net's ``parameters`` and, by the cost model, of its FLOPs."""
        cost = savings(self.of.topology, self.kept, "extend", Latent(side, side))
        left = sum(p.numel() for p in self.unet.parameters())
        return {"parameters_left": left / parameters, "flops_left": 1 - cost.flop_share}


def rivals(
    kinds: Sequence[str],
    name: str,
    beside: Candidate,
    left: float,
    denoising: Denoising,
    images: Images,
    seen: Sequence[int],
    steps: int,
    seed: int,
) -> dict[str, Rival]:
    """Name -> rival ``beside`` the gates of this name, with the share ``left`` of all weights.

    Measured and fine-tuned, ``steps`` steps, on the images ``seen``, which no comparison uses.
    Raises UserError where the gates prune nothing that a rival could.
    """
    gates, unet = beside.gates, denoising.model.unet
    assert gates is not None
    sites = [s for s in gates.topology.all_sites() if s.reader and s.name in gates.scores]
    learned = {site: float(keep.float().mean()) for site, keep in gates.keep_sets().items()}
    if not sites:
        raise UserError(
            f"{name} prunes no channels that another layer reads, so --rivals has none to prune.",
            "gates of ResBlocks, feed-forwards or heads",
            "leave --rivals out",
        )
    taylor: Importances = {}
    found = {}
    for how, shares in (("per layer", dict.fromkeys(learned, 0.5)), ("global", learned)):
        kept = kept_counts(unet, sites, shares, left)
        for kind in kinds:
            model = replace(denoising.model, unet=copy.deepcopy(unet))
            smaller = Denoising(model, seed)
            if kind == "obs":
                stream = images.batches(seen, 2, seed=seed, epochs=None)
                problems = [smaller.problem(next(stream)) for _ in range(SAMPLES // 2)]
                obs_(smaller, problems, sites, kept)
            else:
                taylor = taylor or importances(denoising, images, seen, sites, seed)
                structural_(model.unet, taylor, sites, kept)
                stream = images.batches(seen, BATCH, seed=seed, epochs=None)
                fine_tune_(smaller, stream, steps)
            label = f"{name}-{kind}-{how}".replace(" ", "-")
            found[label] = Rival(model.unet, f"{kind}, {how}", kept, gates, name, beside.precision)
    return found


# --- what a channel has, and removing it ----------------------------------------------------------


def norm_groups(unet: nn.Module, site: Site) -> int:
    """The groups of the norm between a site and its reader; 1 where there is none."""
    block: Any = unet.get_submodule(site.block.name)
    return int(block.norm2.num_groups) if site.kind.name == "inner" else 1


def owners(unet: nn.Module, site: Site) -> list[Any]:
    """The layers that have rows of each channel."""
    block: Any = unet.get_submodule(site.block.name)
    if site.kind.name == "inner":
        return [block.conv1, block.time_emb_proj, block.norm2]
    return (
        [block.net[0].proj] if site.kind.name == "hidden" else [block.to_q, block.to_k, block.to_v]
    )


def weights_per_channel(unet: nn.Module, site: Site) -> float:
    """Weights that go with a channel of the site."""
    rows = sum(p.numel() for layer in owners(unet, site) for p in layer.parameters())
    return (rows + unet.get_parameter(f"{site.reader}.weight").numel()) / site.channels


def remove_(unet: nn.Module, site: Site, keep: Tensor) -> None:
    """Take all channels of the site but ``keep``, bool [C], out of the layers around it."""
    keep = keep.to(unet.get_parameter(site.weight).device)
    for layer in owners(unet, site):
        for name, value in list(layer.named_parameters()):
            setattr(
                layer, name, nn.Parameter(value[keep.repeat(site.kind.rows)], value.requires_grad)
            )
    reader: Any = unet.get_submodule(site.reader or "")
    reader.weight = nn.Parameter(reader.weight[:, keep], reader.weight.requires_grad)
    if site.kind.name == "heads":
        block: Any = unet.get_submodule(site.block.name)
        block.heads = int(keep.sum()) // site.group


def kept_counts(
    unet: nn.Module, sites: Sequence[Site], shares: Mapping[str, float], left: float
) -> dict[str, int]:
    """Site -> channels to keep, so that the share ``left`` of all weights stays.

    Of each site share^γ, with one γ for all, and rounded to what its norm and its kind allow.
    """
    per = [weights_per_channel(unet, site) for site in sites]
    steps = [lcm(norm_groups(unet, site), site.multiple) for site in sites]
    widths = [site.channels for site in sites]
    whole = sum(p.numel() for p in unet.parameters())
    total = sum(w * c for w, c in zip(widths, per, strict=True)) - (1 - left) * whole
    low, high = 0.0, 64.0
    for _ in range(50):
        middle = (low + high) / 2
        wanted = [w * shares[site.name] ** middle for w, site in zip(widths, sites, strict=True)]
        enough = sum(k * c for k, c in zip(wanted, per, strict=True)) >= total
        low, high = (middle, high) if enough else (low, middle)

    def changed(site: int, count: int) -> float:
        """How far a site is from its share, so that no narrow one pays for the rounding."""
        return abs(count - wanted[site]) / widths[site]

    counts = aligned_counts(
        [round(count) for count in wanted],
        widths,
        total,
        steps,
        least=[min(step, width) for step, width in zip(steps, widths, strict=True)],
        weights=per,
        cost=changed,
        slack=SLACK * whole,
    )
    return {site.name: count for site, count in zip(sites, counts, strict=True)}


# --- OBS-Diff -------------------------------------------------------------------------------------


def obs_(
    denoising: Denoising,
    problems: Sequence[Problem],
    sites: Sequence[Site],
    kept: Mapping[str, int],
) -> None:
    """Prune the sites to so many channels each, package by package, and update their readers."""
    unet = denoising.model.unet
    size = -(-len(sites) // PACKAGES)
    for start in progress(range(0, len(sites), size), "obs", unit="package"):
        package = sites[start : start + size]
        for site, hessian in zip(package, hessians(denoising, problems, package), strict=True):
            reader: Any = unet.get_submodule(site.reader or "")
            structures = site.channels // site.group
            bands = norm_groups(unet, site)
            keep, weight = removed(
                reader.weight.flatten(1), hessian, kept[site.name] // site.group, structures, bands
            )
            reader.weight = nn.Parameter(weight.view_as(reader.weight).to(reader.weight), False)
            remove_(unet, site, keep.repeat_interleave(site.group))


def hessians(
    denoising: Denoising, problems: Sequence[Problem], sites: Sequence[Site]
) -> list[Tensor]:
    """Σ α_t x xᵀ, [n, n], of what the reader of each site is fed, as its weight [O, n] has it."""
    unet, steps = denoising.model.unet, denoising.model.alphas_cumprod.numel()
    sums: dict[str, Tensor] = {}
    alpha = torch.ones(1)

    def see(name: str, x: Tensor) -> None:
        x = x.float()
        rows = F.unfold(x, 3, padding=1).movedim(1, -1) if x.dim() == 4 else x
        rows = (rows * alpha.sqrt()[:, None, None]).flatten(0, 1)
        sums[name] = sums.get(name, 0) + rows.T @ rows

    with ExitStack() as hooks:
        for site in sites:
            reader = unet.get_submodule(site.reader or "")
            hook = reader.register_forward_pre_hook(lambda m, x, name=site.name: see(name, x[0]))
            hooks.enter_context(hook)
        for problem in problems:
            low, high = ALPHA
            later = torch.log(problem.timesteps + 1.0) / log(steps)  # T − t + 1 is timestep + 1
            alpha = low + (high - low) * later
            denoising.dense(problem)
    return [sums[site.name] for site in sites]


# --- Diff-Pruning ---------------------------------------------------------------------------------


def importances(
    denoising: Denoising, images: Images, seen: Sequence[int], sites: Sequence[Site], seed: int
) -> Importances:
    """Taylor importance of each channel over the timesteps whose loss is above the threshold."""
    batch = next(images.batches(seen, TAYLOR_SAMPLES, seed=seed, epochs=None))
    latents, context, added = denoising.inputs(batch)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    steps = torch.linspace(0, denoising.model.alphas_cumprod.numel() - 1, TIMESTEPS)
    ladder = Ladder(denoising, latents, context, noise, steps.round().long().tolist(), added)
    found = diff_pruning(Subject([ladder], sites, {}, "zero", seed, CriterionOptions()))
    return {site.name: site.shared(found[site.name]) for site in sites}


def structural_(
    unet: nn.Module, values: Importances, sites: Sequence[Site], kept: Mapping[str, int]
) -> None:
    """Keep so many channels of the greatest importance, as many in each group of a norm."""
    for site in sites:
        parts = values[site.name].chunk(norm_groups(unet, site))
        keep = [top_channels(part, kept[site.name] // len(parts)) for part in parts]
        remove_(unet, site, torch.cat(keep))


def fine_tune_(denoising: Denoising, stream: Iterator[Batch], steps: int) -> list[float]:
    """Train all weights by the denoising loss, every second image without its prompt.

    Guidance asks for both. Returns the losses.
    """
    unet, losses = denoising.model.unet, []
    empty = embed_prompts(denoising.model, [""])
    unet.requires_grad_(True)
    optimizer = torch.optim.Adam(unet.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in progress(range(steps), "fine-tuning", unit="step"):
        problem = without_prompts(denoising.problem(next(stream)), *empty)
        loss = noise_loss(problem)(denoising.predict(problem))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    unet.requires_grad_(False).zero_grad()
    return losses
