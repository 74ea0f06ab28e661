"""sweep, from its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training import sweep


@pytest.fixture(scope="module")
def source(pipeline: Path, images: Path) -> list[str]:
    return ["--model", str(pipeline), "--data", str(images)]


def test_a_sweep_makes_what_is_missing_and_ends_in_one_table(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--criteria", "learned", "random", "--targets", "0.3", "--budget", "channels"]
    options += ["--weights", "0.01", "--steps", "3", "--samples", "2", "--output", str(tmp_path)]
    assert sweep.main([*source, *options]) == 0
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["learned_0.01_mid_30.safetensors", "random_global_mid_30.safetensors"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]][1:] == [Path(name).stem for name in files]
    assert result["rows"][0]["parameters_left"] == 1 > result["rows"][2]["parameters_left"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000
    assert "| random_global_mid_30 | random | mid |" in capsys.readouterr().out

    assert sweep.main([*source, *options]) == 0  # everything is there
    assert {p: p.stat().st_mtime_ns for p in times} == times
    options[options.index("0.3")] = "0.5"
    assert sweep.main([*source, *options]) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
