"""The site map against ComfyUI's real U-Net, and every model that is refused."""

from __future__ import annotations

import doctest

import full_checkpoint
import pytest
import torch

pytestmark = pytest.mark.comfyui


def test_every_site_is_the_conv_of_that_width_and_every_res_block_is_named(comfy):
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    unet, blocks = full_checkpoint.unet(), comfy.core.SD15.res_blocks()
    for block in blocks:
        conv1 = unet.get_submodule(comfy.model.layer_path(f"{block.name}.conv1"))
        conv2 = unet.get_submodule(comfy.model.layer_path(f"{block.name}.conv2"))
        assert (conv1.in_channels, conv1.out_channels) == (block.in_channels, block.out_channels)
        assert (conv2.in_channels, conv2.out_channels) == (block.out_channels, block.out_channels)
    mapped = {comfy.model.module_path(block.name) for block in blocks}
    assert mapped == {n for n, m in unet.named_modules() if isinstance(m, ResBlock)}
    assert len(mapped) == len(blocks) == 22


def test_every_feed_forward_is_named_with_its_widths(comfy):
    from comfy.ldm.modules.attention import FeedForward

    unet, found = full_checkpoint.unet(), set()
    for block in comfy.core.SD15.blocks():
        path = comfy.model.module_path(block.name)
        assert comfy.model.HOST_BLOCKS[type(block)](unet, path).check(block) is None
        if isinstance(block, comfy.core.FeedForward):
            (site,) = block.sites
            proj = unet.get_submodule(comfy.model.layer_path(site.name))
            assert proj.weight.shape == (2 * site.channels, block.channels)
            found.add(path)
    assert found == {n for n, m in unet.named_modules() if isinstance(m, FeedForward)}
    assert len(found) == 16


def test_the_examples_in_the_site_map_are_right(comfy):
    found = doctest.testmod(comfy.model)
    assert found.attempted and not found.failed


def test_the_blocks_run_in_the_order_of_the_topology(comfy, model):
    order, handles = [], []
    unet = model.model.diffusion_model
    blocks = comfy.core.Topology((32, 64, 128, 128), context_width=64, heads=(8, 8, 8, 8)).blocks()
    for block in blocks:
        module = unet.get_submodule(comfy.model.module_path(block.name))
        handles.append(module.register_forward_hook(lambda *_, name=block.name: order.append(name)))
    unet(torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.randn(1, 77, 64))
    for handle in handles:
        handle.remove()
    assert order == [block.name for block in blocks]


def test_the_topology_is_read_from_the_model(comfy, model):
    expected = comfy.core.Topology((32, 64, 128, 128), context_width=64, heads=(8, 8, 8, 8))
    assert comfy.model.model_topology(model.model) == expected


def test_an_inpainting_model_is_accepted(comfy, small_model, make_gates):
    gates = make_gates()
    comfy.patch.attach(small_model(in_channels=9), comfy.patch.Layer(gates, gates.keep_sets()))


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("SVD_img2vid", {"use_temporal_attention": True}, "a video model"),
        ("SD_X4Upscaler", {"num_classes": 1000}, "a U-Net of 1000 classes"),
        ("Odd", {"num_res_blocks": [2, 1, 2, 2]}, "different depth"),
        ("Small", {"channel_mult": [1, 2]}, "three or four levels"),
        ("Flux", None, "not a convolutional U-Net"),
    ],
)
def test_another_family_is_refused(comfy, model, make_gates, monkeypatch, family, config, reason):
    real = model.model.model_config.unet_config
    fake = type(family, (), {})()
    fake.unet_config = {"image_model": "flux"} if config is None else {**real, **config}
    monkeypatch.setattr(model.model, "model_config", fake)
    gates = make_gates()
    with pytest.raises(comfy.model.ModelError) as error:
        comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    message = str(error.value)
    assert f"this model is {family}" in message and reason in message
    assert "connect a checkpoint of one of these" in message


def test_gates_of_another_width_are_refused(comfy, model, make_gates):
    gates = make_gates(topology=comfy.core.SD15)
    with pytest.raises(comfy.model.ModelError) as error:
        comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    assert str(error.value).startswith(
        "LDCP: the gates have 1280 channels at mid_block.resnets.0.conv1, the model has 128; "
    )
    assert "Choose gates that were trained for this model" in str(error.value)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("use_scale_shift_norm", True, "scales by the embedding"),
        ("updown", True, "resamples inside"),
        ("skip_t_emb", True, "takes no time embedding"),
        ("time_stack", torch.nn.Identity(), "video model"),
    ],
)
def test_a_res_block_of_another_kind_is_refused(
    comfy, model, make_gates, monkeypatch, attribute, value, reason
):
    block, gates = model.model.diffusion_model.middle_block[0], make_gates()
    monkeypatch.setattr(block, attribute, value, raising=False)
    with pytest.raises(comfy.model.ModelError, match=reason) as error:
        comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    assert "middle_block.0 (mid_block.resnets.0) cannot be pruned" in str(error.value)


def test_a_block_without_a_part_of_itself_is_refused(comfy, model, make_gates, monkeypatch):
    monkeypatch.delattr(model.model.diffusion_model.middle_block[0], "updown")
    with pytest.raises(comfy.model.ModelError, match="has no attribute 'updown'; remove the node"):
        gates = make_gates()
        comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
