"""The report from the shell: its figures, its image, and what it says about a bad file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldcp_core import Gates, save_gates
from training.inspect import main

ROOT = Path(__file__).parents[2]
SITE = "mid_block.resnets.1.conv2"


@pytest.fixture
def gate_file(tmp_path):
    """640 of 1280 channels of one site of SD1.5 pruned."""
    scores = torch.where(torch.arange(1280) < 640, 0.9, 0.1)
    path = tmp_path / "gates.safetensors"
    save_gates(Gates({SITE: scores}), path)
    return path


def test_the_report_is_printed(gate_file, capsys):
    assert main([str(gate_file)]) == 0
    out = capsys.readouterr().out
    # 640 rows of 9 * 1280 weights; 2 FLOPs each at 2 * 8 * 8 positions: 1,887.4 million
    assert f"{SITE}          640/1280    50.0%   -7,372,800    -1,887.4\n" in out
    assert "weights: 14.1 MiB of 1,639.4 MiB left out (0.86% of the U-Net)" in out
    assert "64x64 latent, batch 2" in out


def test_resolution_and_batch_count(gate_file, capsys):
    assert main([str(gate_file), "--resolution", "1024", "--batch", "6"]) == 0
    out = capsys.readouterr().out
    # 128x128 latent, 16x16 at the mid block: 2 * 7,372,800 * 6 * 256 = 22,649.2 million
    assert "-7,372,800   -22,649.2\n" in out and "128x128 latent, batch 6" in out


def test_the_image_is_written(gate_file, tmp_path, capsys):
    path = tmp_path / "report.png"
    assert main([str(gate_file), "--image", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width == 768 and len(image.getcolors(10**6)) > 20


def test_a_bad_file_is_named_without_a_traceback(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_text("<!DOCTYPE html><html></html>")
    run = subprocess.run(
        [sys.executable, "-m", "training.inspect", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith(f"error: {path}: not a readable")
    assert "Traceback" not in run.stderr


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "gone.safetensors")]) == 1
    assert "gone.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "500"], "--resolution is 500.\n  Expected: a positive multiple of 8"),
        (["--resolution", "0"], "--resolution is 0.\n  Expected: a positive multiple of 8"),
        (["--batch", "0"], "--batch is 0.\n  Expected: 1 or more"),
        (["--image", f"{__file__}/report.png"], f"{__file__} is no folder."),
    ],
)
def test_options_that_cannot_be_meant_are_refused(gate_file, capsys, options, message):
    assert main([str(gate_file), *options]) == 1
    assert message in capsys.readouterr().err
