"""Each criterion where its value is known: by hand, by finite differences, by another formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldcp_core import Site, Topology
from ldcp_core.diffusers import topology_of
from training import criteria
from training.criteria import CriterionOptions, Ladder, Subject
from training.data.encoding import FreshImages
from training.data.images import ImageData, open_dataset
from training.model.load import DiffusionModel
from training.step.denoising import Denoising

CONV1, CONV2 = "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"


class Weights(nn.Module):
    """A stand-in for a U-Net: two channels at each kind of site, weights to add up by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {
            f"{CONV1}.weight": [[[[1.0, -1.0]]], [[[2.0, 2.0]]]],  # rows of sums 2 and 4
            f"{CONV2}.weight": [[[[3.0]], [[1.0]]], [[[-3.0]], [[1.0]]]],  # columns 6, 2; rows 4, 4
            f"{FF}.proj.weight": [[1.0], [2.0], [-3.0], [4.0]],  # channel 0: 1, -3; channel 1: 2, 4
            f"{FF.removesuffix('.net.0')}.net.2.weight": [[1.0, -4.0]],  # columns 1 and 4
        }
        self.found = {k: nn.Parameter(torch.tensor(v)) for k, v in self.found.items()}

    def get_parameter(self, name: str) -> nn.Parameter:
        return self.found[name]


def sites(*names: str) -> list[Site]:
    every = Topology((2, 2, 2, 2), context_width=2).all_sites()
    return [next(site for site in every if site.name == name) for name in names]


def test_magnitude_adds_what_a_channel_owns_in_units_of_each_layer() -> None:
    found = criteria.magnitudes(Weights(), sites(CONV1, CONV2, FF), "l1")
    assert found[CONV1].tolist() == pytest.approx([2 / 3 + 6 / 4, 4 / 3 + 2 / 4])
    assert found[CONV2].tolist() == pytest.approx([1, 1])
    assert found[FF].tolist() == pytest.approx([4 / 5 + 1 / 2.5, 6 / 5 + 4 / 2.5])
    euclid = criteria.magnitudes(Weights(), sites(CONV1), "l2")[CONV1]
    rows, columns = torch.tensor([2.0, 8.0]).sqrt(), torch.tensor([18.0, 2.0]).sqrt()
    assert euclid.tolist() == pytest.approx(
        (rows / rows.mean() + columns / columns.mean()).tolist()
    )


def test_sensitivity_is_the_mean_weight_in_units_of_the_layers_deviation() -> None:
    found = criteria.sensitivity(Weights(), sites(CONV1, FF))
    # 1, -1, 2, 2: mean 1, variance (0 + 4 + 1 + 1) / 4
    assert found[CONV1].tolist() == pytest.approx([1 / 1.5**0.5, 2 / 1.5**0.5])
    # 1, -3, 2, 4: mean 1, variance (0 + 16 + 1 + 9) / 4
    assert found[FF].tolist() == pytest.approx([2 / 6.5**0.5, 3 / 6.5**0.5])


def test_percentage_is_the_mean_weight_itself() -> None:
    assert criteria.percentage(Weights(), sites(FF))[FF].tolist() == [2, 3]


def test_random_is_the_same_for_the_same_seed() -> None:
    one, two, other = (criteria.random(sites(CONV1), seed)[CONV1] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("mean", [2.5, 5.0]),
        ("spread", [0.75, 2.0]),
        # (1-2)² + (3-2)² and (3-3)² ...
        ("variance", [2 + 0.5, 8 + 8]),
    ],
)
def test_the_forms_of_diversity(form: str, expected: list[float]) -> None:
    # [samples, directions, channels]: channel 0 has 1, 3 and 2.5, 3.5; channel 1 has 2, 6 and 4, 8
    s = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[2.5, 4.0], [3.5, 8.0]]])
    assert criteria.diversity_score(s, form).tolist() == pytest.approx(expected)


def test_directions_are_principal_components_drawn_by_the_variance_they_explain() -> None:
    generator = torch.Generator().manual_seed(0)
    axis = torch.zeros(64, 12)
    axis[:, 3] = 10 * torch.randn(64, generator=generator)
    values = (axis + 1e-3 * torch.randn(64, 12, generator=generator)).view(64, 3, 4)
    for direction in criteria.principal_directions(values, 5, generator):
        assert direction.shape == (1, 3, 4)
        assert direction.norm().item() == pytest.approx(1, abs=1e-5)
        assert abs(direction.flatten()[3].item()) > 0.999


def test_where_all_values_are_equal_directions_are_random() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = criteria.principal_directions(torch.ones(3, 8), 2, generator)
    assert one.norm().item() == pytest.approx(1) and not torch.allclose(one, two)


# --- on a whole model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(images: object) -> ImageData:
    return open_dataset(str(images), resolution=16)


@pytest.fixture(scope="module")
def ladder(model: DiffusionModel, data: ImageData) -> Ladder:
    denoising = Denoising(model, 0)
    latents, context, _ = denoising.inputs(
        next(FreshImages(data, model).batches(range(len(data)), 2))
    )
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return Ladder(denoising, latents, context, noise, [100, 500, 900])


def every_kind(model: DiffusionModel) -> list[Site]:
    return topology_of(model.unet).sites("mid+ff")


def constants(chosen: list[Site]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {site.name: 0.1 * torch.randn(site.channels, generator=generator) for site in chosen}


def subject(
    ladder: Ladder, chosen: list[Site], mu: dict[str, Tensor] | None = None, **options: Any
) -> Subject:
    return Subject([ladder], chosen, mu or {}, "zero", 0, CriterionOptions(**options))


@pytest.mark.parametrize("kind", ["inner", "residual", "hidden"])
def test_taylor_agrees_with_finite_differences(
    model: DiffusionModel, ladder: Ladder, kind: str
) -> None:
    from ldcp_core import SoftGate

    chosen = every_kind(model)
    mu = constants(chosen)
    found = criteria.taylor(subject(ladder, chosen, mu))
    site = next(site for site in chosen if site.kind.name == kind)

    def loss(mask: Tensor) -> float:
        gates = {site.name: SoftGate(mask, mu[site.name])}
        with torch.no_grad():
            return sum(
                criteria.noise_loss(problem)(ladder.denoising.gated(problem, gates, "zero")).item()
                for problem in ladder
            )

    step = 0.2  # in float32 a smaller one drowns in rounding
    for channel in found[site.name].topk(3).indices.tolist():
        up, down = torch.ones(site.channels), torch.ones(site.channels)
        up[channel] += step
        down[channel] -= step
        slope = (loss(up) - loss(down)) / (2 * step)
        assert found[site.name][channel].item() == pytest.approx(abs(slope), rel=0.05)


def test_diff_pruning_stops_at_the_first_timestep_whose_loss_is_small(
    model: DiffusionModel, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = every_kind(model)
    losses = {100: 8.0, 500: 3.0, 900: 0.5}

    def scaled(problem: object) -> object:
        timestep = int(problem.timesteps[0])
        return lambda output: (
            losses[timestep] * output.square().mean() / float(output.detach().square().mean())
        )

    monkeypatch.setattr(criteria, "noise_loss", scaled)

    def measured(ladder: Ladder, threshold: float) -> tuple[dict[str, Tensor], int]:
        on = subject(ladder, chosen, loss_threshold=threshold)
        return criteria.diff_pruning(on), on.facts["stopped_at"]

    every, last = measured(ladder, 0.01)
    some, stopped = measured(ladder, 0.1)  # 0.5 < 0.1 · 8
    only, first = measured(ladder, 0.5)  # 3 < 0.5 · 8
    assert (first, stopped, last) == (500, 900, 900)
    # what came before the stop is what two timesteps, and one, would have given
    two = Ladder(ladder.denoising, ladder.latents, ladder.context, ladder.noise, [100, 500])
    again, _ = measured(two, 0.01)
    for name in some:
        assert torch.allclose(some[name], again[name])
        assert not torch.allclose(some[name], every[name])
        assert not torch.allclose(some[name], only[name])


def test_diff_pruning_multiplies_each_weight_with_its_gradient(
    model: DiffusionModel, ladder: Ladder
) -> None:
    chosen = every_kind(model)
    found = criteria.diff_pruning(subject(ladder, chosen, loss_threshold=1e-9))
    unet = model.unet
    assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
    site = next(site for site in chosen if site.kind.name == "inner")
    weights = [unet.get_parameter(site.weight)]
    weights.append(unet.get_parameter(site.weight.replace("conv1", "conv2")))
    for weight in weights:
        weight.requires_grad_(True)
    for problem in ladder:
        output = unet(problem.noisy, problem.timesteps, problem.context).sample
        (output - problem.noise).square().mean().backward()
    rows, columns = ((w * w.grad).abs().detach() for w in weights)
    expected = rows.sum((1, 2, 3)) + columns.sum((0, 2, 3))
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    assert torch.allclose(found[site.name], expected, rtol=1e-4)


def test_flap_is_the_variance_of_what_enters_the_next_layer_times_its_column(
    model: DiffusionModel, ladder: Ladder
) -> None:
    chosen, seen = every_kind(model), {}
    blocks = {s.kind.name: s for s in chosen[:3]}
    conv2 = model.unet.get_submodule(CONV2)
    after = model.unet.get_submodule(FF.replace("net.0", "net.2"))
    hooks = [
        conv2.register_forward_pre_hook(lambda m, i: seen.setdefault("in", []).append(i[0])),
        conv2.register_forward_hook(lambda m, i, o: seen.setdefault("out", []).append(o)),
        after.register_forward_pre_hook(lambda m, i: seen.setdefault("ff", []).append(i[0])),
    ]
    found = criteria.flap(subject(ladder, chosen))
    for hook in hooks:
        hook.remove()

    def variance(name: str, axis: int) -> Tensor:
        rows = torch.cat([x.movedim(axis, 0).flatten(1) for x in seen[name]], 1)
        return rows.double().var(1, correction=0)

    columns = conv2.weight.double().square().sum((0, 2, 3))
    assert torch.allclose(found[CONV1].double(), variance("in", 1) * columns, rtol=1e-4)
    assert torch.allclose(found[CONV2].double(), variance("out", 1), rtol=1e-4)
    columns = after.weight.double().square().sum(0)
    assert torch.allclose(found[FF].double(), variance("ff", -1) * columns, rtol=1e-4)
    assert set(blocks) == {"inner", "residual", "hidden"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())


def test_own_effect_is_the_squared_derivative_of_the_output(
    model: DiffusionModel, ladder: Ladder
) -> None:
    site = next(site for site in every_kind(model) if site.kind.name == "inner")
    mu = constants([site])
    # the same point of the model with many projections: other noise in place of the loss's target
    problem = ladder.problem(500)
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(problem.noise.shape, generator=generator) for _ in range(100)]
    problems = [replace(problem, noise=noise) for noise in noises]
    found = criteria.own_effect(ladder.denoising, problems, [site], mu, "zero")
    from ldcp_core import SoftGate

    def output(mask: Tensor) -> Tensor:
        with torch.no_grad():
            gates = {site.name: SoftGate(mask, mu[site.name])}
            return ladder.denoising.gated(problem, gates, "zero")

    for channel in (0, 3):
        up, down = torch.ones(site.channels), torch.ones(site.channels)
        up[channel] += 0.05
        down[channel] -= 0.05
        exact = ((output(up) - output(down)) / 0.1).square().sum().item()
        # 100 probes: χ² with one degree of freedom each, 14 percent off
        assert found[site.name][channel].item() == pytest.approx(exact, rel=0.4)


@pytest.mark.parametrize("form", ["mean", "spread", "variance"])
def test_diversity_covers_every_channel_and_is_zero_where_nothing_changes(
    model: DiffusionModel, ladder: Ladder, form: str
) -> None:
    chosen = every_kind(model)
    on = subject(ladder, chosen, constants(chosen), diversity_form=form, directions=2)
    found = criteria.diversity(on)
    for site in chosen:
        values = found[site.name]
        assert values.shape == (site.channels,) and bool((values >= 0).all())
        assert values.sum() > 0
    still = replace(on.options, alpha=1e-30)  # added to a float32, that is the same float32
    nothing = criteria.diversity(replace(on, options=still))
    assert all(values.abs().max() == 0 for values in nothing.values())
