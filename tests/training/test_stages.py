"""stages: sparsity is moved to where the pictures bear it, at the same mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldcp_core import Gates, Stage, load_gates, save_gates
from training import benchmark, sample, stages

QUICK = ["--steps", "4", "--guidance", "1", "--seeds", "2", "--correction-rank", "2"]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CORRECTION_SAMPLES", 20)
    monkeypatch.setattr(sample, "PROMPTS", ("a face", "another face"))


def test_a_move_leaves_the_mean_and_stays_within_bounds() -> None:
    assert list(stages.moved((0.5, 0.5), 0.1)) == [(0.4, 0.6), (0.6, 0.4)]
    assert list(stages.moved((0.05, 0.75), 0.1)) == [(0.15, 0.65)]
    three = list(stages.moved((0.3, 0.4, 0.5), 0.05))
    assert len(three) == 6 and all(sum(shares) == pytest.approx(1.2) for shares in three)


@pytest.mark.parametrize("weights", [(9.0, 1.0), (1.0, 1.0), (8.0, 4.0, 1.0)])
def test_the_best_shares_are_found_where_the_distance_is_convex(weights: tuple[float, ...]) -> None:
    """The least of sum(w·s²) at a mean of 0.4 has s in proportion to 1/w."""
    asked: list[stages.Shares] = []

    def distance(shares: stages.Shares) -> float:
        asked.append(shares)
        return sum(w * s * s for w, s in zip(weights, shares, strict=True))

    found = stages.best_shares(distance, 0.4, len(weights))
    inverse = [1 / w for w in weights]
    best = [0.4 * len(weights) * i / sum(inverse) for i in inverse]
    assert found == pytest.approx(best, abs=0.051) and sum(found) == pytest.approx(
        0.4 * len(weights)
    )
    assert len(asked) == len(set(asked))  # nothing is drawn twice


def test_stages_keep_the_order_of_channels_and_cut_it_at_their_shares(given: Path) -> None:
    gates = load_gates(given)
    staged = stages.in_stages(gates, (0.2, 0.5))
    (_, early), (_, late) = staged.by_stage()
    for kept, share in ((early, 0.2), (late, 0.5)):
        pruned = 1 - sum(int(keep.sum()) for keep in kept.values()) / gates.channels
        assert pruned == pytest.approx(share, abs=0.02)
    assert all(bool((early[site] | ~late[site]).all()) for site in gates.scores)  # nested
    for site, scores in gates.scores.items():
        order = torch.sort(scores, descending=True, stable=True).indices
        assert bool((staged.scores[site][order].diff() <= 0).all())


def test_the_command_writes_gates_that_draw_nearer_to_dense(
    source: list[str], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "staged.safetensors"
    assert stages.main([str(given), *source, *QUICK, "--output", str(output)]) == 0
    printed, staged = capsys.readouterr().out, load_gates(output)
    assert "in stages" in printed and f"wrote {output}" in printed
    assert [stage.start for stage in staged.stages] == [0.0, 0.5]
    shares = [
        1 - sum(int(keep.sum()) for keep in kept.values()) / staged.channels
        for _, kept in staged.by_stage()
    ]
    assert shares[0] != shares[1] and sum(shares) / 2 == pytest.approx(0.4, abs=0.02)
    told = staged.info["stages"]["distances"]
    assert min(told["in stages"], told["in stages, corrected"]) < told["as given"]

    drawn = tmp_path / "drawn"
    options = ["--gates", str(given), str(output), "--output", str(drawn), *QUICK[:6]]
    assert sample.main([*source[:2], *options]) == 0
    images = [(drawn / name / "000_2.png").read_bytes() for name in ("gates", "staged", "dense")]
    assert len(set(images)) == 3


def test_equal_stages_are_not_written(
    source: list[str],
    given: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where new corrections bring the pictures nearer: they need no stages."""
    monkeypatch.setattr(stages, "best_shares", lambda distance, mean, count: (mean,) * count)
    output = tmp_path / "staged.safetensors"
    assert stages.main([str(given), *source, *QUICK, "--output", str(output)]) == 1
    assert "No stages bring" in capsys.readouterr().err and not output.exists()


def test_other_commands_refuse_stages(
    source: list[str], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staged, output = tmp_path / "staged.safetensors", str(tmp_path / "out.safetensors")
    gates: Gates = replace(load_gates(given), stages=(Stage(0.0, 0.1), Stage(0.5, None)))
    save_gates(gates, staged)
    for main, options in (
        (stages.main, [str(staged), *source, "--output", output]),
        (benchmark.main, ["--gates", str(staged), *source[:2]]),
    ):
        assert main(options) == 1
        assert "has 2 stages" in capsys.readouterr().err
    assert not Path(output).exists()
