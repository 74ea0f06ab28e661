"""Pruning in a diffusers pipeline: exact, only in its steps, with LoRA, and without a trace."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families import NO_MID, SMALL_XL, diffusers_unet, inputs, name_of
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from ldcp_core import CompactResBlock, Correction, Gates, Schedule, Stage, Topology, save_gates
from ldcp_core.diffusers import Pruning, UnsupportedModel, pruned, topology_of
from training.model.gating import hard_gates, masked

# those of diffusers' own schedulers
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TOLERANCE = 1e-5
STEPS = 6


@pytest.fixture
def pipe(pipeline: Path) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    found = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(pipeline / "vae"),
        CLIPTextModel.from_pretrained(pipeline / "text_encoder"),
        CLIPTokenizer.from_pretrained(pipeline / "tokenizer"),
        UNet2DConditionModel.from_pretrained(pipeline / "unet"),
        DDIMScheduler.from_pretrained(pipeline / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    return found


def gates_of(unet: UNet2DConditionModel, scope: str = "all+ff+heads", seed: int = 0) -> Gates:
    generator = torch.Generator().manual_seed(seed)
    topology = topology_of(unet)
    sites = topology.sites(scope)
    scores = {s.name: s.shared(torch.rand(s.channels, generator=generator)) for s in sites}
    constants = {s.name: torch.randn(s.channels, generator=generator) for s in sites}
    corrections = {}
    for site in sites:
        if site.reader is not None:
            kept = int((scores[site.name] > 0.5).sum()) * site.kind.reader_taps
            right = torch.randn(2, kept, generator=generator) / kept**0.5
            parts = torch.randn(site.block.outputs(), 3, generator=generator) / 4
            corrections[site.name] = Correction(parts[:, :2].half(), right.half(), parts[:, 2])
    return Gates(scores, constants, "zero", topology, corrections=corrections)


SMALL_2 = Topology((32, 64, 64, 64), context_width=24, linear_projections=True, heads=(4, 4, 4, 4))


@pytest.mark.parametrize("topology", [SMALL_2, SMALL_XL, NO_MID], ids=name_of)
@torch.no_grad()
def test_every_family_is_the_masked_reference_where_on_and_itself_where_off(
    topology: Topology,
) -> None:
    torch.manual_seed(0)
    unet = diffusers_unet(topology, "cpu")
    given = inputs(topology, 2, (16, 24), "cpu")
    gates = gates_of(unet)
    dense = unet(**given).sample
    with masked(unet, hard_gates(gates.pruned()), "zero"):
        reference = unet(**given).sample
    with pruned(unet, gates):
        found = unet(**given).sample
    assert torch.equal(unet(**given).sample, dense)
    scale = float(reference.abs().max())
    assert float((found - reference).abs().max()) <= TOLERANCE * scale
    assert float((dense - reference).abs().max()) >= 100 * TOLERANCE * scale


@torch.no_grad()
def evaluated(unet: UNet2DConditionModel, timestep: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 24, generator=generator)
    context = torch.randn(2, 7, 16, generator=generator)
    return unet(latents, timestep, encoder_hidden_states=context).sample


def reference(unet: UNet2DConditionModel, gates: Gates) -> torch.Tensor:
    with masked(unet, hard_gates(gates.pruned()), gates.padding):
        return evaluated(unet)


def far(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def course(pipe: Any, pruning: Pruning | None = None, **call: Any) -> list[tuple[bool, Any]]:
    """Of every step whether it was pruned, and the latents after it."""
    found = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        found.append((pruning is not None and pruning.active, values["latents"].clone()))
        return values

    size = {} if "image" in call else {"height": 32, "width": 32}
    call = {**size, "num_inference_steps": STEPS, "callback_on_step_end": look, **call}
    pipe("a face", generator=torch.manual_seed(3), **call)
    return found


def test_an_evaluation_equals_the_masked_one_and_afterwards_the_unet_is_as_before(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet)
    save_gates(gates, tmp_path / "gates.safetensors")
    dense, expected = evaluated(unet), reference(unet, gates)
    before = {name: dict(vars(module)) for name, module in unet.named_modules()}
    with pruned(unet, tmp_path / "gates.safetensors") as pruning:
        found = evaluated(unet)
        assert pruning.active
    assert far(found, expected) < TOLERANCE
    assert far(found, dense) > 100 * TOLERANCE
    assert torch.equal(evaluated(unet), dense)
    after = {name: dict(vars(module)) for name, module in unet.named_modules()}
    assert {n: v.keys() for n, v in after.items()} == {n: v.keys() for n, v in before.items()}
    assert not unet._forward_pre_hooks


def test_a_share_is_pruned_by_rank(pipe: StableDiffusionPipeline) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet, "mid")
    fewer = Gates(
        {site: keep.float() for site, keep in gates.keep_sets_at(0.25).items()}, gates.constants
    )
    with pruned(unet, gates, sparsity=0.25):
        assert far(evaluated(unet), reference(unet, fewer)) < TOLERANCE
    with pytest.raises(ValueError, match=r"outside 0\.0 to 1\.0"):
        pruned(unet, gates, sparsity=1.5)


def test_a_stage_prunes_its_own_channels_in_its_stretch(pipe: StableDiffusionPipeline) -> None:
    stages = (Stage(0.0, 0.125), Stage(0.5, None))
    unet, gates = pipe.unet, replace(gates_of(pipe.unet), stages=stages)
    dense = {t: evaluated(unet, t) for t in (800, 500, 200)}
    early = gates.pruned(gates.keep_sets_at(0.125))
    expected = {}
    for timestep, which in ((800, early), (500, early), (200, gates.pruned())):
        with masked(unet, hard_gates(which), gates.padding):
            expected[timestep] = evaluated(unet, timestep)
    with pruned(unet, gates, steps="0-") as pruning:
        for timestep in (800, 200, 500, 200):  # back and forth
            assert far(evaluated(unet, timestep), expected[timestep]) < TOLERANCE
            assert far(dense[timestep], expected[timestep]) > 100 * TOLERANCE
            assert pruning.active
    assert all(torch.equal(evaluated(unet, t), dense[t]) for t in dense)


def test_stages_prune_within_the_steps_that_are_asked_for(pipe: StableDiffusionPipeline) -> None:
    gates = replace(gates_of(pipe.unet), stages=(Stage(0.0, 0.125), Stage(0.5, None)))
    with pruned(pipe.unet, gates, steps="2-3", scheduler=pipe.scheduler) as pruning:
        found = course(pipe, pruning)
    assert [active for active, _ in found] == [False, False, True, True, False, False]
    with pruned(pipe.unet, gates, sparsity=0.3) as pruning:  # a share is one for all steps
        assert all(active for active, _ in course(pipe, pruning))


def test_only_the_steps_of_the_schedule_are_pruned(pipe: StableDiffusionPipeline) -> None:
    gates, dense = gates_of(pipe.unet), course(pipe)
    with pruned(pipe.unet, gates, steps="2-3", scheduler=pipe.scheduler) as pruning:
        found = course(pipe, pruning)
        again = course(pipe, pruning)
    assert [active for active, _ in found] == [False, False, True, True, False, False]
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(found, dense, strict=True)]
    assert same == [True, True, False, False, False, False]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, again, strict=True))


def test_the_pipelines_own_callback_can_put_it_in_and_take_it_out(
    pipe: StableDiffusionPipeline,
) -> None:
    gates, dense, active, inside = gates_of(pipe.unet), course(pipe), [], []

    def decide(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        active.append([pruning.active for pruning in inside])
        if step == 1:
            inside.append(pruned(pipe.unet, gates))
        if step == 3:
            inside.pop().remove()
        latents.append(values["latents"].clone())
        return values

    latents: list[torch.Tensor] = []
    size = {"height": 32, "width": 32, "num_inference_steps": STEPS}
    pipe("a face", generator=torch.manual_seed(3), callback_on_step_end=decide, **size)
    assert active == [[], [], [True], [True], [], []]
    same = [torch.equal(found, of) for found, (_, of) in zip(latents, dense, strict=True)]
    assert same == [True, True, False, False, False, False]


def test_a_stretch_in_percent_needs_no_scheduler(pipe: StableDiffusionPipeline) -> None:
    with pruned(pipe.unet, gates_of(pipe.unet), steps=Schedule.percent(0.0, 0.6)) as pruning:
        active = [active for active, _ in course(pipe, pruning)]
    assert active == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("scheduler", "pruned_evaluations"),
    [
        (
            HeunDiscreteScheduler,
            [1, 2],
        ),  # the second evaluation is at the timestep of the next step
        (KDPM2DiscreteScheduler, [2, 3]),  # and its own on the way there
    ],
)
def test_a_step_of_second_order_is_one_step(
    pipe: StableDiffusionPipeline, scheduler: Any, pruned_evaluations: list[int]
) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with pruned(pipe.unet, gates_of(pipe.unet), steps="1", scheduler=pipe.scheduler) as pruning:
        found = course(pipe, pruning)
    assert len(found) == 2 * STEPS - 1
    assert [i for i, (active, _) in enumerate(found) if active] == pruned_evaluations


@pytest.mark.parametrize(
    ("scheduler", "settings", "steps"),
    [
        (PNDMScheduler, {"skip_prk_steps": True}, [0, 1, 1, 2, 3, 4, 5]),  # SD1.5's own
        (DDIMInverseScheduler, {}, [0, 1, 2, 3, 4, 5]),
        (EDMEulerScheduler, {}, [0, 1, 2, 3, 4, 5]),  # has timesteps below zero
    ],
)
def test_every_timestep_belongs_to_one_of_the_steps_asked_for(
    pipe: StableDiffusionPipeline, scheduler: Any, settings: dict[str, Any], steps: list[int]
) -> None:
    scheduler = scheduler(**settings)
    scheduler.set_timesteps(STEPS)
    found = []
    for step in range(STEPS):
        with pruned(pipe.unet, gates_of(pipe.unet), steps=f"{step}", scheduler=scheduler) as now:
            for place, timestep in enumerate(scheduler.timesteps):
                evaluated(pipe.unet, timestep)
                found += [(place, step)] if now.active else []
    assert sorted(found) == list(enumerate(steps))


def test_steps_are_counted_from_where_the_pipeline_begins(pipe: StableDiffusionPipeline) -> None:
    image_to_image = StableDiffusionImg2ImgPipeline(**pipe.components)
    image_to_image.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (32, 32))
    with pruned(pipe.unet, gates_of(pipe.unet), steps="0", scheduler=pipe.scheduler) as pruning:
        found = course(image_to_image, pruning, image=image, strength=0.5)
    assert [active for active, _ in found] == [True, False, False]


def test_steps_past_the_last_one_are_mentioned(pipe: StableDiffusionPipeline) -> None:
    with pruned(pipe.unet, gates_of(pipe.unet), steps="0-1, 9-", scheduler=pipe.scheduler):
        with pytest.warns(UserWarning, match="9- lies past the last step, 5"):
            course(pipe)


@pytest.mark.parametrize("early", [True, False])
def test_lora_is_pruned_with_the_weights_whenever_it_is_loaded_or_changed(
    pipe: StableDiffusionPipeline, early: bool
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet)
    plain = reference(unet, gates)
    if early:
        add_lora(unet)
    with pruned(unet, gates) as pruning:
        if not early:
            assert far(evaluated(unet), plain) < TOLERANCE
            add_lora(unet)
        found = evaluated(unet)
        unet.set_adapters(["one"], [0.3])
        weaker = evaluated(unet)
        unet.disable_adapters()
        without = evaluated(unet)
        unet.enable_adapters()
        unet.fuse_lora()
        fused = evaluated(unet)
        unet.unfuse_lora()
        assert pruning.active
    expected = reference_with_lora(unet, gates, 0.3)
    assert far(weaker, expected) < TOLERANCE and far(fused, expected) < TOLERANCE
    assert far(found, reference_with_lora(unet, gates, 1.0)) < TOLERANCE
    assert far(without, plain) < TOLERANCE
    assert far(found, plain) > 100 * TOLERANCE and far(weaker, found) > 100 * TOLERANCE


def test_a_lora_that_is_fused_between_two_evaluations_is_pruned_too(
    pipe: StableDiffusionPipeline,
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet)
    found = []
    with pruned(unet, gates):
        evaluated(unet)
        for scale in (1.0, 0.3):
            add_lora(unet)
            unet.set_adapters(["one"], [scale])
            unet.fuse_lora()
            unet.unload_lora()  # nothing but the weights themselves tells
            found.append(evaluated(unet))
            expected = reference(unet, gates)
            assert far(found[-1], expected) < TOLERANCE
    assert far(found[0], found[1]) > 100 * TOLERANCE


def test_a_lora_that_is_swapped_in_place_is_pruned_too(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet)
    unet._compiled_call_impl = unet._call_impl  # what tells PEFT to write into the same tensors
    add_lora(unet)
    with torch.no_grad():
        swapped = {
            name.replace(".one", ""): 2 * weight
            for name, weight in unet.state_dict().items()
            if "lora" in name
        }
    with pruned(unet, gates):
        evaluated(unet)
        unet.load_lora_adapter(swapped, prefix=None, adapter_name="one", hotswap=True)
        found = evaluated(unet)
    assert far(found, reference_with_lora(unet, gates, 1.0)) < TOLERANCE


def add_lora(unet: UNet2DConditionModel, **options: Any) -> None:
    from peft import LoraConfig

    layers = ["conv1", "conv2", "ff.net.0.proj", "ff.net.2", "conv_shortcut"]
    layers += ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False, **options
    )
    torch.manual_seed(5)
    unet.add_adapter(config, adapter_name="one")


def reference_with_lora(unet: UNet2DConditionModel, gates: Gates, scale: float) -> torch.Tensor:
    """The masked reference of a U-Net into whose weights PEFT merged its LoRA."""
    unet.set_adapters(["one"], [scale])
    unet.fuse_lora()
    try:
        return reference(unet, gates)
    finally:
        unet.unfuse_lora()


def test_what_was_selected_in_inference_mode_has_derivatives_too(
    pipe: StableDiffusionPipeline,
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet)
    latents, context = torch.randn(2, 4, 16, 24, requires_grad=True), torch.randn(2, 7, 16)

    def derivative() -> torch.Tensor:
        found = unet(latents, 500, encoder_hidden_states=context).sample.square().sum()
        return torch.autograd.grad(found, latents)[0]

    with masked(unet, hard_gates(gates.pruned()), gates.padding):
        expected = derivative()
    with pruned(unet, gates):
        with torch.inference_mode():
            unet(latents, 500, encoder_hidden_states=context)
        assert far(derivative(), expected) < 10 * TOLERANCE


def test_a_stage_that_has_ended_leaves_its_copies_before_the_next_are_made(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (Stage(0.0, 0.25), Stage(0.5, None))
    gates = replace(gates_of(pipe.unet, "mid"), stages=stages)
    select, copies, found = CompactResBlock.__init__, WeakSet[Any](), []

    def count(block: CompactResBlock, *given: Any) -> None:
        found.append(len(copies))
        select(block, *given)
        copies.add(block)

    monkeypatch.setattr(CompactResBlock, "__init__", count)
    with pruned(pipe.unet, gates):
        for timestep in (800, 200):
            evaluated(pipe.unet, timestep)
    assert found == [0, 1, 0, 1]


def test_weights_that_are_moved_when_an_evaluation_begins_are_selected_where_they_went(
    pipe: StableDiffusionPipeline,
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet)
    expected, own = reference(unet, gates), unet.forward

    def loaded(*args: Any, **kwargs: Any) -> Any:  # as a hook that offloads the model does
        unet.float()
        try:
            return own(*args, **kwargs)
        finally:
            unet.double()

    unet.double().forward = loaded
    with pruned(unet, gates):
        for _ in range(2):
            assert far(evaluated(unet), expected) < TOLERANCE


def test_a_lora_that_is_no_plain_one_is_refused(pipe: StableDiffusionPipeline) -> None:
    from peft import LoHaConfig

    unet, gates = pipe.unet, gates_of(pipe.unet)
    with pruned(unet, gates):
        add_lora(unet, use_dora=True)
        with pytest.raises(UnsupportedModel, match="DoRA"):
            evaluated(unet)
        unet.unload_lora()
        unet.add_adapter(LoHaConfig(r=2, target_modules=["conv1"], init_weights=False))
        with pytest.raises(UnsupportedModel, match="LoHa"):
            evaluated(unet)
        unet.fuse_lora()
        found = evaluated(unet)
    assert far(found, reference(unet, gates)) < TOLERANCE


def test_of_two_prunings_the_later_counts_and_either_may_go_first(
    pipe: StableDiffusionPipeline,
) -> None:
    unet = pipe.unet
    first, second = (gates_of(unet, "all+ff", seed) for seed in (0, 7))  # no site as a whole
    dense, expected = evaluated(unet), reference(unet, second)
    outer, inner = pruned(unet, first), pruned(unet, second)
    assert far(evaluated(unet), expected) < TOLERANCE
    outer.remove()
    outer.remove()
    assert far(evaluated(unet), expected) < TOLERANCE
    inner.remove()
    assert torch.equal(evaluated(unet), dense)
    assert not any("forward" in vars(module) for module in unet.modules())
    with pytest.raises(RuntimeError, match="was removed; make another"), inner:
        pass


def test_what_does_not_fit_is_refused_before_anything_changes(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet)
    sizes = {"norm_num_groups": 8, "attention_head_dim": 2, "block_out_channels": (16, 16, 32, 32)}
    other = UNet2DConditionModel(cross_attention_dim=24, **sizes)  # as SD2's text is wider
    levels = UNet2DConditionModel(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **{**sizes, "block_out_channels": (16, 32)},
    )
    with pytest.raises(UnsupportedModel, match="made for"):
        pruned(other, gates)
    with pytest.raises(UnsupportedModel, match="made for Stable Diffusion 1.5 .* is SDXL"):
        pruned(diffusers_unet(SMALL_XL), gates)
    with pytest.raises(UnsupportedModel, match="three or four levels"):
        pruned(levels, gates)
    with pytest.raises(UnsupportedModel, match="ResnetBlock2D that Stable Diffusion does not have"):
        pruned(UNet2DConditionModel(cross_attention_dim=16, act_fn="gelu", **sizes), gates)
    with pytest.raises(UnsupportedModel, match=r"pipe\.unet"):
        pruned(pipe, gates)
    with pytest.raises(ValueError, match=r"scheduler=pipe\.scheduler"):
        pruned(unet, gates, steps="0-3")
    with pytest.raises(FileNotFoundError):
        pruned(unet, tmp_path / "gone.safetensors")
    unet.mid_block.resnets[0].conv1.forward = lambda x: x
    with pytest.raises(UnsupportedModel, match="plain convolution"):
        pruned(unet, gates)
    del unet.mid_block.resnets[0].conv1.forward
    layer = unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    layer.weight = type("Int8Tensor", (torch.nn.Parameter,), {})(layer.weight)  # as torchao does
    with pytest.raises(UnsupportedModel, match="Linear with a weight of the type Int8Tensor"):
        pruned(unet, gates)
    assert not any("forward" in vars(module) for module in unet.modules())


@pytest.mark.skipif("LDCP_TEST_COMPILE" not in os.environ, reason="LDCP_TEST_COMPILE=eager")
def test_a_compiled_unet_is_pruned_all_the_same(pipe: StableDiffusionPipeline) -> None:
    gates = gates_of(pipe.unet, "mid")
    dense, expected = evaluated(pipe.unet), reference(pipe.unet, gates)
    compiled = torch.compile(pipe.unet, backend=os.environ["LDCP_TEST_COMPILE"])
    with pruned(compiled, gates):
        assert far(evaluated(compiled), expected) < TOLERANCE
    assert torch.equal(evaluated(compiled), dense)


def test_an_inpainting_unet_is_accepted(pipe: StableDiffusionPipeline) -> None:
    sizes = {"norm_num_groups": 8, "attention_head_dim": 2, "block_out_channels": (16, 16, 32, 32)}
    inpainting = UNet2DConditionModel(in_channels=9, cross_attention_dim=16, **sizes)
    pruned(inpainting, gates_of(pipe.unet)).remove()


def test_attention_that_is_not_plain_is_refused_where_heads_are_pruned(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, gates = pipe.unet, gates_of(pipe.unet, "heads")
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2

    class IPAdapterAttnProcessor:
        """One by its name."""

    with pruned(unet, gates):
        monkeypatch.setattr(attention, "processor", IPAdapterAttnProcessor())
        with pytest.raises(UnsupportedModel, match="attn2 runs IPAdapterAttnProcessor.*without"):
            evaluated(unet)
    with pytest.raises(UnsupportedModel, match="IPAdapterAttnProcessor"):
        pruned(unet, gates)
    with pruned(unet, gates_of(unet, "all+ff")):  # heads left alone: whatever they compute
        monkeypatch.undo()
        evaluated(unet)
    with pruned(unet, gates), pytest.raises(UnsupportedModel, match="attn2 is given a mask"):
        unet(
            torch.zeros(1, 4, 16, 16),
            500,
            encoder_hidden_states=torch.zeros(1, 7, 16),
            encoder_attention_mask=torch.ones(1, 7),
        )
    with monkeypatch.context() as patch:
        patch.setattr(attention, "heads", 2 * attention.heads)
        with pytest.raises(UnsupportedModel, match="heads"):
            pruned(unet, gates)
