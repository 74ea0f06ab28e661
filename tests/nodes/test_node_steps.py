"""The step that pruning sees is the step that ComfyUI's progress bar counts, for every sampler.

The real sampler stack runs every sampler with every scheduler that ComfyUI lists, at 1, 2, 20 and
50 steps, from pure noise and from half-way. Only two things are replaced, because the noise levels
do not depend on them: the U-Net, by a function that costs nothing, and the SDE samplers' noise.

Samplers report a step right after its first evaluation, and make any others of that step after it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfyui
STEPS = (1, 2, 20, 50)
REPOSITORY = Path(__file__).resolve().parents[2]

#: samplers whose further evaluations of a step land on, or below, the next step's noise level:
#: how many steps further on these are counted
AHEAD = {
    "heun": {1},
    "heunpp2": {1, 2},
    "dpm_2_ancestral": {1},
    "dpmpp_2s_ancestral": {1},
    "dpmpp_2s_ancestral_cfg_pp": {1},
    "exp_heun_2_x0": {1},  # these two: not in ComfyUI 0.3.64
    "exp_heun_2_x0_sde": {1},
}
#: samplers whose further evaluations are counted with their own step
WITHIN = {"dpm_2", "dpmpp_sde", "dpmpp_sde_gpu", "seeds_2", "seeds_3", "sa_solver_pece"}
#: samplers that choose noise levels of their own, which have no steps to speak of
OWN_LEVELS = {"dpm_fast", "dpm_adaptive"}


@pytest.fixture(scope="module")
def run(comfy, model, make_gates, conditioning):
    """Sample once: how many steps were reported; (reported before, step seen) per evaluation."""
    reported, seen, known = [], [], {}

    @dataclasses.dataclass(frozen=True)
    class Probe(comfy.core.Schedule):
        def is_active(self, step, sigma, percent_to_sigma):
            seen.append((len(reported), step))
            return False

    gates = make_gates()
    patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets(), Probe(())))
    latent, conditions = torch.zeros(1, 4, 8, 8), (conditioning(5), conditioning(6))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))

    def sample(*settings):
        if settings in known:
            return known[settings]
        sampler, scheduler, steps, denoise = settings
        reported.clear()
        seen.clear()
        comfy.root.sample.sample(
            patched,
            noise,
            steps,
            1.0,
            sampler,
            scheduler,
            *conditions,
            latent,
            denoise=denoise,
            callback=lambda step, *_: reported.append(step),
            disable_pbar=True,
            seed=3,
        )
        assert reported == list(range(len(reported)))
        known[settings] = len(reported), list(seen)
        return known[settings]

    with pytest.MonkeyPatch.context() as replaced:
        unet, k_diffusion = model.model.diffusion_model, comfy.root.k_diffusion.sampling
        replaced.setattr(unet, "forward", lambda x, *_, **__: 0.1 * x)
        replaced.setattr(k_diffusion, "BrownianTreeNoiseSampler", CheapNoise)
        yield sample
    assert "forward" not in vars(unet)


class CheapNoise:
    def __init__(self, x, *_, **__):
        self.x = x

    def __call__(self, *_):
        return torch.randn_like(self.x)


@pytest.fixture
def samplers(comfy):
    return comfy.root.samplers.KSampler.SAMPLERS


@pytest.fixture
def schedulers(comfy):
    return comfy.root.samplers.KSampler.SCHEDULERS


@pytest.fixture
def usable(comfy, model):
    """Whether ComfyUI makes noise levels for this; kl_optimal divides by zero for a single one."""

    def check(sampler, scheduler, steps, denoise):
        inner = comfy.root.samplers.KSampler(model, steps, "cpu", sampler, scheduler, denoise)
        single = (
            steps == 1 and denoise == 1 and sampler not in inner.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
        )
        finite = bool(torch.isfinite(inner.sigmas).all())
        assert finite != (scheduler == "kl_optimal" and single)
        return finite

    return check


@pytest.mark.parametrize("denoise", [1.0, 0.5])
@pytest.mark.parametrize("steps", STEPS)
def test_the_first_evaluation_of_every_step_is_seen_as_the_step_that_is_counted(
    samplers, schedulers, usable, run, steps, denoise
):
    wrong, checked = [], 0
    for sampler in (s for s in samplers if s not in OWN_LEVELS):
        for scheduler in (s for s in schedulers if usable(sampler, s, steps, denoise)):
            counted, evaluations = run(sampler, scheduler, steps, denoise)
            # of the evaluations between two reports the last one is the first of its step
            first = {reported: step for reported, step in evaluations if reported < counted}
            if first != {step: step for step in range(counted)}:
                wrong.append((sampler, scheduler, first))
            checked += 1
    assert wrong == []
    assert checked >= (len(samplers) - len(OWN_LEVELS)) * (len(schedulers) - 1)


def test_what_is_counted_with_the_next_step_is_what_the_documentation_says(
    samplers, schedulers, run
):
    ahead, within = {}, set()
    for sampler in (s for s in samplers if s not in OWN_LEVELS):
        for scheduler in schedulers:
            counted, evaluations = run(sampler, scheduler, 20, 1.0)
            first = {reported: number for number, (reported, _) in enumerate(evaluations)}
            for number, (reported, step) in enumerate(evaluations):
                if reported == counted or first[reported] != number:
                    assert step < counted
                    if step == reported - 1 < counted - 1:
                        within.add(sampler)
                    elif step != reported - 1:
                        ahead.setdefault(sampler, set()).add(step - (reported - 1))
    assert ahead == {s: further for s, further in AHEAD.items() if s in samplers}
    assert within == {s for s in WITHIN if s in samplers}
    page = (REPOSITORY / "nodes/web/docs/LDCPStepSchedule.md").read_text(encoding="utf-8")
    docs = (REPOSITORY / "docs" / "nodes.md").read_text(encoding="utf-8")
    for sampler in (*AHEAD, *WITHIN, *OWN_LEVELS):
        assert f"`{sampler}`" in page
    for sampler in (*AHEAD, *OWN_LEVELS):
        assert f"`{sampler}`" in docs


@pytest.mark.parametrize("steps", STEPS)
def test_samplers_with_levels_of_their_own_run_and_see_steps_of_the_schedule(
    samplers, schedulers, usable, run, steps
):
    """What they report are no steps: dpm_fast a third of them, dpm_adaptive as many as it needs."""
    others = 0
    for sampler in OWN_LEVELS & set(samplers):
        for scheduler in (s for s in schedulers if usable(sampler, s, steps, 1.0)):
            counted, evaluations = run(sampler, scheduler, steps, 1.0)
            seen = [step for _, step in evaluations]
            assert seen[:1] == [0] or steps == 1  # dpm_adaptive then evaluates nothing
            assert all(0 <= step < steps for step in seen)
            others += counted != steps
    assert steps < 20 or others
