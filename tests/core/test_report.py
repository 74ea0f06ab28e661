"""The report's figures against arithmetic done here, and what its image shows, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from families import SDXL
from PIL import ImageFont

from ldcp_core import (
    SD15,
    Correction,
    Gates,
    Latent,
    Report,
    ReportLayer,
    Schedule,
    Stage,
    Topology,
    build_report,
    gates_report,
    report_image,
)
from ldcp_core.report_image import BACKGROUND, KEPT, PANEL, PRUNED, _score_counts

SMALL = Topology((32, 64, 128, 128), context_width=64)
CONV1, CONV2 = "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"


@dataclass
class Run:
    steps: int | None = 20
    pruned_steps: set[int] = field(default_factory=lambda: set(range(5, 20)))
    evaluations: int = 20
    pruned_evaluations: int = 15
    device: str = "cuda:0"
    full_bytes: int = 100 * 2**20
    resident_bytes: int = 64 * 2**20
    kept_full: str = ""
    sampled: bool = True


def layer(kept, padding="zero", topology=SMALL, schedule=None):
    """A layer that keeps the first ``kept[site]`` channels of each site."""
    widths = {site.name: site.channels for site in topology.all_sites()}
    scores = {
        site: torch.where(torch.arange(widths[site]) < count, 0.9, 0.1)
        for site, count in kept.items()
    }
    gates = Gates(scores, {}, padding, topology)
    return ReportLayer(gates, gates.keep_sets(), schedule)


def pixels(found: Report) -> np.ndarray:
    return np.array(report_image(found))


def runs_per_row(image: np.ndarray, color: tuple[int, int, int]) -> list[int]:
    """How many unbroken stretches of ``color`` every row of the image has."""
    match = (image == color).all(-1)
    starts = match[:, 1:] & ~match[:, :-1]
    return (starts.sum(1) + match[:, 0]).tolist()


def test_one_site_of_sd15_is_counted_as_by_hand():
    found = build_report([layer({CONV2: 640}, topology=SD15)], SD15)
    # a row has 9 * 1280 weights and a bias, in whose place a constant stays: 640 * 11,520
    # parameters in half precision are 14,745,600 bytes; a multiply-add at 2 * 8 * 8 positions
    assert found.savings.saved.parameters == 7_372_800
    assert found.saved_bytes == 14_745_600
    assert found.unet_bytes == 2 * 859_520_964
    assert found.savings.saved.flops == 2 * 7_372_800 * 128
    lines = found.text().splitlines()
    assert lines[0] == "1 site, 50.0% of 1,280 channels pruned, rule 'zero'"
    assert f"{CONV2}          640/1280    50.0%   -7,372,800    -1,887.4" in lines
    assert "counted   weights: 14.1 MiB of 1,639.4 MiB left out (0.86% of the U-Net)" in lines
    assert "counted   compute: 1.9 GFLOP of 1,606.5 GFLOP left out (0.12% of the U-Net)" in lines
    assert lines[-1] == (
        "counted   per pruned evaluation, 2 bytes per parameter, 64x64 latent, batch 2"
    )


def test_every_stage_has_its_line():
    stages = (Stage(0.0, 0.25), Stage(0.5, None))
    gates = replace(layer({CONV1: 64}).gates, stages=stages)
    assert gates_report(gates).text().splitlines()[:3] == [
        "stage 1: 1 site, 25.0% of 128 channels pruned, rule 'zero', 0%-50%",
        "stage 2: 1 site, 50.0% of 128 channels pruned, rule 'zero', 50%-100%",
        "where several gate the same site, the later ones are shown",
    ]


def test_latent_and_bytes_per_parameter_are_those_asked_for():
    found = build_report([layer({CONV2: 88})], SMALL, 4, Latent(32, 48, 1))
    # 40 rows of 9 * 128 weights, 4 bytes each, at 4 * 6 positions
    assert found.saved_bytes == 40 * 1152 * 4
    assert found.savings.saved.flops == 2 * 40 * 1152 * 24
    assert "4 bytes per parameter, 32x48 latent, batch 1" in found.text()


def test_of_several_gates_the_later_wins_and_each_block_follows_its_own_rule():
    other = "mid_block.resnets.1.conv1"
    earlier = layer({CONV1: 28, other: 100}, "zero", schedule=Schedule.steps("0-4"))
    later = layer({CONV1: 78}, "extend", schedule=Schedule.steps("5-"))
    found = build_report([earlier, later], SMALL)
    assert {row.site: row.kept for row in found.savings.sites} == {CONV1: 78, other: 100}
    # of conv1 a row of 9 * 128 weights goes (its constant for its bias); of conv2 a column of
    # 9 * 128 weights goes, less what the rule leaves of it: 128 tap sums, or all nine taps
    saved = {row.site: row.saved.parameters for row in found.savings.sites}
    assert saved == {CONV1: 50 * (1152 + 1152 - 128), other: 28 * 1152}
    assert torch.equal(found.scores[CONV1], later.gates.scores[CONV1])
    assert found.text().splitlines()[:3] == [
        "gates 1: 2 sites, 50.0% of 256 channels pruned, rule 'zero', steps 0-4",
        "gates 2: 1 site, 39.1% of 128 channels pruned, rule 'extend', steps 5-",
        "where several gate the same site, the later ones are shown",
    ]


def test_sites_stand_in_the_order_of_the_unet():
    first = "down_blocks.0.resnets.0.conv1"
    found = build_report([layer({CONV1: 64}), layer({first: 16}, "extend")], SMALL)
    assert [row.site for row in found.savings.sites] == list(found.scores) == [first, CONV1]


def test_the_columns_of_the_longest_names_are_straight():
    names = [f"down_blocks.2.attentions.1.transformer_blocks.{i}.attn1.to_v" for i in (0, 9)]
    text = build_report([layer(dict.fromkeys(names, 640), topology=SDXL)], SDXL).text()
    head, rule, *rows = text.splitlines()[2:8]
    assert {len(line) for line in (head, rule, *rows)} == {79}
    assert [row.find("/") for row in rows] == [40, 40, -1, 40]


def test_a_keep_set_of_the_users_own_is_not_called_learned():
    gates = Gates({CONV2: torch.linspace(0, 1, 128)}, topology=SMALL)
    assert gates_report(gates).as_learned
    found = build_report([ReportLayer(gates, gates.keep_sets_at(0.25))], SMALL)
    assert not found.as_learned
    assert found.savings.kept == 96


def test_corrections_are_counted_where_they_are_in_use():
    found = layer({CONV1: 64, CONV2: 64})
    correction = Correction(torch.ones(128, 1), torch.ones(1, 64 * 9), torch.ones(128))
    gates = replace(found.gates, corrections={CONV1: correction})
    for stages in ((), (Stage(0.0, 0.25), Stage(0.5, None))):
        lines = gates_report(replace(gates, stages=stages)).gates_lines()
        assert "corrections in use: 1 of 1" in lines
    other = ReportLayer(gates, gates.keep_sets_at(0.25))
    lines = build_report([other], SMALL).gates_lines()
    assert "corrections in use: 0 of 1: they are for the channels that are kept as learned" in lines
    assert not any("correction" in line for line in build_report([found], SMALL).gates_lines())


def test_a_site_the_unet_lacks_is_refused():
    with pytest.raises(ValueError, match="no such sites: mid_block.resnets.7.conv1"):
        gates = Gates({"mid_block.resnets.7.conv1": torch.ones(128)}, topology=SMALL)
        build_report([ReportLayer(gates, gates.keep_sets())], SMALL)


@pytest.mark.parametrize(
    ("run", "lines"),
    [
        (
            Run(),
            [
                "steps 5-19 of 20 ran pruned (15 of 20 evaluations)",
                "gated layers on cuda:0: 64.0 MiB resident, 100.0 MiB in full",
            ],
        ),
        (
            Run(
                pruned_steps={0, 1, 7},
                pruned_evaluations=5,
                evaluations=39,
                resident_bytes=130 * 2**20,
                kept_full="other steps need them",
            ),
            [
                "steps 0-1, 7 of 20 ran pruned (5 of 39 evaluations)",
                "gated layers on cuda:0: 130.0 MiB resident, 100.0 MiB in full",
                "full weights stayed: other steps need them",
            ],
        ),
        (
            Run(pruned_steps=set(), pruned_evaluations=0, full_bytes=0, resident_bytes=0),
            ["no step of 20 ran pruned (0 of 20 evaluations)"],
        ),
        (
            Run(None, set(), 3, 2, "cpu", 1024, 1024, sampled=False),
            [
                "2 of 3 evaluations ran pruned, without a sampler",
                "gated layers on cpu: 1.0 KiB resident, 1.0 KiB in full",
            ],
        ),
        (
            Run(None, set(), 0, 0, "", 0, 0),
            ["sampled, but the model was never asked: nothing was pruned"],
        ),
        (Run(None, set(), 3, 0, "", 0, 0), ["0 of 3 evaluations ran pruned"]),
    ],
    ids=["less", "more", "none", "no sampler", "never asked", "no schedule"],
)
def test_a_run_is_described_as_it_was(run, lines):
    found = build_report([layer({CONV2: 64})], SMALL, run=run)
    assert found.measured_lines() == lines
    assert found.text().endswith("\n".join(f"measured  {line}" for line in lines))
    assert (
        np.array(report_image(found)).shape[0]
        > pixels(gates_report(found.layers[0].gates)).shape[0]
    )


def test_nothing_pruned_saves_nothing_and_says_so():
    found = build_report([layer({CONV1: 128, CONV2: 128})], SMALL)
    assert "nothing is pruned: all channels are kept" in found.text().splitlines()
    assert "-0" not in found.text()
    assert found.saved_bytes == found.savings.saved.flops == 0
    # of what is pruned there is no more than the 16x16 swatch of the legend
    assert (pixels(found) == PRUNED).all(-1).sum() == 16 * 16


def test_a_score_of_one_half_counts_below_the_threshold():
    scores = torch.tensor([0.0, 0.02, 0.5, 0.51, 1.0] + [0.7] * 123)
    found = gates_report(Gates({CONV2: scores}, topology=SMALL))
    kept, pruned = _score_counts(found, True), _score_counts(found, False)
    # forty bins of 0.025: 0 and 0.02 in the first, 0.5 the last of the lower half
    assert [(place, n) for place, n in enumerate(pruned) if n] == [(0, 2), (19, 1)]
    assert [(place, n) for place, n in enumerate(kept) if n] == [(20, 1), (27, 123), (39, 1)]


def test_a_bar_is_divided_as_the_channels_are():
    image = pixels(build_report([layer({CONV1: 96, CONV2: 32})], SMALL))
    kept, pruned = ((image == color).all(-1).sum(1) for color in (KEPT, PRUNED))
    whole = (kept + pruned).max()  # the rows of the bars are the only ones filled that far
    bars = [(k / whole, p / whole) for k, p in zip(kept, pruned, strict=True) if k + p == whole]
    assert len(bars) == 2 * 21  # both bars, 21 pixels high
    assert bars[0] == pytest.approx((0.75, 0.25), abs=2 / whole)
    assert bars[-1] == pytest.approx((0.25, 0.75), abs=2 / whole)


def test_sixty_sites_have_a_column_each():
    topology = Topology((32, 64, 128, 128), context_width=64)
    widths = {site.name: site.channels for site in topology.all_sites()}
    assert len(widths) == 60
    found = build_report(
        [layer({s: w // 2 for s, w in widths.items()}, topology=topology)], topology
    )
    image = pixels(found)
    assert image.shape[1] == 768 and image.shape[0] < 1200
    # half of a column of 180 pixels each
    assert runs_per_row(image, KEPT).count(60) == runs_per_row(image, PRUNED).count(60) == 90


def test_the_steps_of_the_run_are_cells():
    image = pixels(build_report([layer({CONV2: 64})], SMALL, run=Run(pruned_steps={0, 1, 7})))
    rows = [y for y, count in enumerate(runs_per_row(image, PANEL)) if count == 17]
    assert rows and all(runs_per_row(image, PRUNED)[y] == 3 for y in rows)


def test_an_older_pillow_draws_the_same_bars(monkeypatch):
    found = build_report([layer({CONV1: 96, CONV2: 32})], SMALL, run=Run())
    new, default = pixels(found), ImageFont.load_default_imagefont()

    def load_default(**options):
        if options:
            raise TypeError("load_default() got an unexpected keyword argument 'size'")
        return default

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    old = pixels(found)
    assert old.shape == new.shape and (old != new).any()
    assert (old == BACKGROUND).all(-1).mean() > 0.3
    assert max((old == KEPT).all(-1).sum(1)) > 200
