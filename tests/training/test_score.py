"""score, from its command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldcp_core import load_gates
from training import score
from training.criteria import CRITERIA

QUICK = ["--samples", "2", "--timesteps", "2", "--batch-size", "2", "--directions", "1"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_writes_a_gate_file_with_its_importances(
    source: list[str], tmp_path: Path, criterion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gates.safetensors"
    options = ["--criterion", criterion, "--scope", "mid+ff+heads", "--output", str(output)]
    assert score.main([*source, *options, *QUICK, "--target-sparsity", "0.5"]) == 0
    gates = load_gates(output)
    assert gates.sparsity == pytest.approx(0.5, abs=0.05)
    assert gates.info["criterion"] == criterion and len(gates.scores) == 7
    assert set(gates.importances) == set(gates.scores) == set(gates.constants)
    for site, values in gates.importances.items():  # within a site the order is the criterion's
        order = gates.scores[site][values.argsort()]
        assert bool((order[1:] >= order[:-1]).all())
    printed = capsys.readouterr().out
    assert str(output) in printed
    table = "| layer | type | parameters | non-zero | sparsity |"
    assert (table in printed) == (criterion in ("sensitivity", "percentage"))


@pytest.mark.parametrize("budget", ["parameters", "flops"])
def test_a_budget_is_met(source: list[str], tmp_path: Path, budget: str) -> None:
    output = tmp_path / "gates.safetensors"
    options = ["--criterion", "random", "--scope", "all+ff+heads", "--budget", budget]
    assert score.main([*source, *options, *QUICK, "--output", str(output)]) == 0
    assert load_gates(output).info["achieved_budget"] == pytest.approx(0.3, abs=0.03)


def test_a_threshold_decides_instead_of_a_target(source: list[str], tmp_path: Path) -> None:
    found = []
    for criterion, threshold in (("sensitivity", "0.8"), ("percentage", "25")):
        output = tmp_path / f"{criterion}.safetensors"
        options = ["--criterion", criterion, "--threshold", threshold, "--output", str(output)]
        assert score.main([*source, *options, *QUICK]) == 0
        found.append(load_gates(output))
        assert found[-1].info["target_sparsity"] is None
    assert all(int(keep.sum()) == 24 for keep in found[1].keep_sets().values())  # 32 channels
    wanted = sum(int((v >= 0.8).sum()) for v in found[0].importances.values())
    kept = sum(int(keep.sum()) for keep in found[0].keep_sets().values())
    assert abs(kept - wanted) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--criterion", "taylor", "--threshold", "1"], "only with criterion sensitivity"),
        (["--criterion", "taylor", "--scope", "sides"], "unknown scope or site 'sides'"),
        (["--criterion", "taylor", "--target-sparsity", "1.5"], "from 0 up to 1"),
        (["--criterion", "taylor", "--floor", "0.8"], "but with --floor 0.8 at most 0.0%"),
        (["--criterion", "taylor", "--output", "gates.txt"], "ending in .safetensors"),
        (["--criterion", "taylor", "--timesteps", "9" * 30], "1 or more, below 2**31"),
        (["--criterion", "diversity", "--alpha", "nan"], "--alpha is nan"),
    ],
)
def test_bad_options_are_answered(
    source: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*source, *QUICK, *options]
    given += [] if "--output" in options else ["--output", "unused.safetensors"]
    assert score.main(given) == 1
    assert message in capsys.readouterr().err
    assert not Path("unused.safetensors").exists()
