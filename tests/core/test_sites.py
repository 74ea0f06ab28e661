"""The sites of the U-Net against diffusers' own model, built on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from families import (
    FAMILIES,
    INPAINTING,
    REFINER,
    SD2,
    SDXL,
    SMALL_XL,
    SSD_1B,
    diffusers_unet,
    name_of,
)

from ldcp_core import (
    DEFAULT_SCOPE,
    SCOPES,
    SD15,
    ResBlock,
    Topology,
    block_of,
    sites_of,
)
from ldcp_core.diffusers import topology_of

every_family = pytest.mark.parametrize("topology", FAMILIES, ids=name_of)


def test_sd15_has_22_res_blocks_32_attentions_16_feed_forwards_and_92_sites() -> None:
    kinds = [type(block).__name__ for block in SD15.blocks()]
    counts = [kinds.count(kind) for kind in ("ResBlock", "Attention", "FeedForward")]
    assert counts == [22, 32, 16]
    assert len(SD15.all_sites()) == 92
    assert len({site.name for site in SD15.all_sites()}) == 92


def modules_parameter(modules: dict[str, Any], name: str) -> Any:
    module, _, parameter = name.rpartition(".")
    return getattr(modules[module], parameter)


@every_family
def test_names_and_widths_are_those_of_diffusers(topology: Topology) -> None:
    modules = dict(diffusers_unet(topology).named_modules())
    theirs = {
        name: (module.conv1.in_channels, module.conv1.out_channels)
        for name, module in modules.items()
        if type(module).__name__ == "ResnetBlock2D"
    }
    ours = {b.name: (b.in_channels, b.out_channels) for b in topology.res_blocks()}
    assert ours == theirs
    feed_forwards = {n for n, m in modules.items() if type(m).__name__ == "FeedForward"}
    attentions = {n for n, m in modules.items() if type(m).__name__ == "Attention"}
    assert {b.name for b in topology.blocks()} == {*theirs, *feed_forwards, *attentions}
    for site in topology.all_sites():
        layer = modules[site.name]
        if site.kind.name == "hidden":
            assert type(layer).__name__ == "GEGLU"
            assert layer.proj.weight.shape == (2 * site.channels, site.block.channels)
            assert layer.proj.weight is modules_parameter(modules, site.weight)
        elif site.kind.name == "heads":
            attention = modules[site.block.name]
            assert (attention.heads, layer.out_features) == (site.block.heads, site.channels)
            assert site.group == layer.out_features // attention.heads
            assert layer.in_features == site.block.widths(site.kind)[0]
            assert layer.weight is modules_parameter(modules, site.weight)
        else:
            assert (layer.out_channels, layer.kernel_size) == (site.channels, (3, 3))
            assert layer.weight is modules_parameter(modules, site.weight)


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    names = [block.name for block in SD15.res_blocks()]
    rooms = [name.partition("_")[0] for name in names]
    assert rooms == ["down"] * 8 + ["mid"] * 2 + ["up"] * 12
    for room in ("down", "up"):
        part = [name for name in names if name.startswith(room)]
        assert part == sorted(part)


def test_depths_follow_the_levels() -> None:
    depth = {block.name: block.downsample for block in SD15.res_blocks()}
    assert [depth[f"down_blocks.{level}.resnets.1"] for level in range(4)] == [1, 2, 4, 8]
    assert [depth[f"up_blocks.{level}.resnets.2"] for level in range(4)] == [8, 4, 2, 1]
    assert depth["mid_block.resnets.0"] == 8


def test_the_first_up_block_takes_its_skip_connection_by_concatenation() -> None:
    # SD1.5: 1280 from the mid block and 1280 from the last down block
    assert SD15.res_blocks()[10] == ResBlock("up_blocks.0.resnets.0", 8, 2560, 1280)


def test_the_mid_scope_is_exactly_the_four_convolutions_of_the_mid_block() -> None:
    assert DEFAULT_SCOPE == "mid"
    assert [site.name for site in SD15.sites()] == [
        "mid_block.resnets.0.conv1",
        "mid_block.resnets.0.conv2",
        "mid_block.resnets.1.conv1",
        "mid_block.resnets.1.conv2",
    ]
    assert [site.kind.name for site in SD15.sites("mid")] == ["inner", "residual"] * 2
    assert {site.channels for site in SD15.sites("mid")} == {1280}


@pytest.mark.parametrize(
    ("scope", "inner", "residual", "hidden", "heads"),
    [
        ("mid", 2, 2, 0, 0),
        ("up", 12, 12, 0, 0),
        ("down", 8, 8, 0, 0),
        ("mid+up", 14, 14, 0, 0),
        ("all", 22, 22, 0, 0),
        ("mid+ff", 2, 2, 1, 0),
        ("up+ff", 12, 12, 9, 0),
        ("all+ff", 22, 22, 16, 0),
        ("ff + down", 8, 8, 6, 0),
        ("ff", 0, 0, 16, 0),
        ("all+ff+heads", 22, 22, 16, 32),
        ("mid+heads", 2, 2, 0, 2),
        ("heads, ff", 0, 0, 16, 32),
        ("*.attn2.to_v", 0, 0, 0, 16),
        ("mid_block.resnets.1.conv2", 0, 1, 0, 0),
        ("mid_block.*.conv1, up_blocks.3.attentions.*", 2, 0, 3, 6),
    ],
)
def test_a_scope_is_parts_kinds_or_names(
    scope: str, inner: int, residual: int, hidden: int, heads: int
) -> None:
    sites = SD15.sites(scope)
    kinds = [site.kind.name for site in sites]
    counts = [kinds.count(kind) for kind in ("inner", "residual", "hidden", "heads")]
    assert counts == [inner, residual, hidden, heads]
    order = [site.name for site in SD15.all_sites()]
    assert [site.name for site in sites] == [n for n in order if n in {s.name for s in sites}]


def test_every_named_scope_is_a_scope() -> None:
    for scope in SCOPES:
        assert SD15.sites(scope)


@pytest.mark.parametrize(
    "scope", ["sides", "", "mid+sides", '""', "mid_block.resnets.2.conv1", "mid_block.*,x.*"]
)
def test_an_unknown_scope_names_itself_and_what_there_is(scope: str) -> None:
    with pytest.raises(ValueError, match="unknown scope or site '.*'; a scope is mid, up"):
        SD15.sites(scope)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("mid, up", "mid+up"),
        ("mid,up,", "mid+up"),
        ("mid up", "mid+up"),
        ("MID", "mid"),
        ('"mid"', "mid"),
        ("'mid' + 'ff'", "mid+ff"),
        ("\u201cmid\u201d", "mid"),
        ("mid, ff", "mid+ff"),
        ("Mid_Block.Resnets.0.Conv1;\n", "mid_block.resnets.0.conv1"),
    ],
)
def test_a_scope_may_be_written_as_people_write_lists(typed: str, meant: str) -> None:
    assert SD15.sites(typed) == SD15.sites(meant)


def test_a_scope_may_hold_parts_and_names() -> None:
    names = [site.name for site in SD15.sites("mid, up_blocks.0.resnets.0.conv1")]
    assert names == [*(s.name for s in SD15.sites("mid")), "up_blocks.0.resnets.0.conv1"]


@every_family
def test_all_names_of_a_family_are_a_scope(topology: Topology) -> None:
    sites = topology.all_sites()
    assert topology.sites(", ".join(site.name for site in sites)) == sites


@pytest.mark.parametrize("scope", ["x" * 10**6, "x" * 9_000, "mid," * 10**6, "\x1b[2J"])
def test_a_scope_is_not_echoed_at_length_nor_with_control_characters(scope: str) -> None:
    with pytest.raises(ValueError, match="a scope is mid, up") as error:
        SD15.sites(scope)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_the_blocks_and_sites_of_each_other() -> None:
    for block in SD15.blocks():
        names = tuple(site.name for site in block.sites)
        assert sites_of(block.name) == names
        assert {block_of(name) for name in names} == {block.name}
    with pytest.raises(ValueError, match="not the name of a site"):
        block_of("mid_block.resnets.0")


@every_family
def test_a_topology_survives_json(topology: Topology) -> None:
    assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology


@pytest.mark.parametrize("key", SDXL.to_json())
@pytest.mark.parametrize("value", [None, "8", -1, 1.5, 10**6, ["a"] * 4, "four", {}, [[0] * 4]])
def test_a_topology_with_a_wrong_value_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError):
        Topology.from_json({**SDXL.to_json(), key: value})


@pytest.mark.parametrize("key", SD15.to_json())
def test_a_topology_with_a_missing_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not the description of a U-Net"):
        Topology.from_json({k: v for k, v in SD15.to_json().items() if k != key})


@pytest.mark.parametrize("value", [None, [], "topology", 3, True, [1, 2]])
def test_anything_else_is_no_topology(value: object) -> None:
    with pytest.raises(ValueError, match="not the description of a U-Net"):
        Topology.from_json(value)


@pytest.mark.parametrize("widths", [(8,), (8, 8, 8), (8,) * 5])
def test_a_u_net_with_another_number_of_levels_is_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three or four levels"):
        Topology(widths=widths)


def test_families_are_told_apart_by_their_shape_and_not_by_their_widths() -> None:
    families = [topology.family for topology in (SD15, SD2, SDXL, SSD_1B, SMALL_XL, REFINER)]
    assert families == [
        "Stable Diffusion 1.5",
        "Stable Diffusion 2",
        "SDXL",
        "SDXL",
        "SDXL",
        "SDXL refiner",
    ]


def test_a_description_that_names_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="a U-Net of SDXL says that it is one of Stable Diffusion"):
        Topology.from_json({**SDXL.to_json(), "family": "Stable Diffusion 1.5"})


@every_family
def test_a_topology_is_read_off_the_modules_of_diffusers(topology: Topology) -> None:
    assert topology_of(diffusers_unet(topology)) == topology


def test_sdxl_has_17_res_blocks_140_attentions_70_feed_forwards_and_244_sites() -> None:
    kinds = [type(block).__name__ for block in SDXL.blocks()]
    counts = [kinds.count(kind) for kind in ("ResBlock", "Attention", "FeedForward")]
    assert counts == [17, 140, 70]
    assert len(SDXL.all_sites()) == len({site.name for site in SDXL.all_sites()}) == 244


@pytest.mark.parametrize(
    "heads", [(8, 8, 8), (8, 8, 8, 7), (8, 8, 8, 0), (0, 8, 8, 8), (True, 8, 8, 8), (-8, 8, 8, 8)]
)
def test_a_level_has_heads_that_divide_its_width_and_none_without_attention(
    heads: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match="heads"):
        Topology(heads=heads)


def test_gates_fit_where_inputs_differ_or_one_side_does_not_know_the_heads() -> None:
    unknown = Topology()
    assert SD15.fits(SD15) and SD15.fits(INPAINTING) and SD15.fits(unknown) and unknown.fits(SD15)
    assert not SD15.fits(replace(SD15, heads=(4, 8, 8, 8)))
    assert not SD15.fits(SD2) and not unknown.fits(SD2)
    assert not unknown.sites("heads")


VERSION_1 = {
    "widths": [8, 8, 16, 16],
    "attention": [True, True, True, False],
    "layers_per_block": 2,
    "context_width": 8,
    "in_channels": 4,
    "out_channels": 4,
}


def test_version_1_of_the_gate_file_describes_sd15_at_any_width() -> None:
    assert Topology.from_version_1(VERSION_1) == Topology((8, 8, 16, 16), context_width=8)


@pytest.mark.parametrize("key", VERSION_1)
@pytest.mark.parametrize("value", [None, "8", -1, 0, 1.5, 10**6, [], ["a"] * 4, "four", {}])
def test_a_wrong_value_of_version_1_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError):
        Topology.from_version_1({**VERSION_1, key: value})


@pytest.mark.parametrize("key", VERSION_1)
def test_a_missing_key_of_version_1_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not the description of an SD1.5 U-Net"):
        Topology.from_version_1({k: v for k, v in VERSION_1.items() if k != key})
