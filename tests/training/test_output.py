"""No command writes over anything but its own kind of file, nor over what it reads."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from training import benchmark, evaluate, export, fit, inspect, sample, score, sweep
from training.demo import build, draw
from training.errors import UserError
from training.output import GATES, PICTURE, claimed, output_file, write

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "core" / "golden" / "gates_v1.safetensors"
PRECIOUS = b"years of work"
Main = Callable[[list[str]], int]

#: a command, and its options before that of the output
COMMANDS: dict[str, tuple[Main, list[str], str]] = {
    "fit": (fit.main, ["--demo", "--output"], "a.safetensors"),
    "score": (score.main, ["--demo", "--criterion", "random", "--output"], "a.safetensors"),
    "sample": (sample.main, ["--demo", "--output"], "a"),
    "evaluate": (evaluate.main, ["--demo", "none.safetensors", "--output"], "a"),
    "sweep": (sweep.main, ["--demo", "--criteria", "random", "--output"], "a"),
    "benchmark": (benchmark.main, ["--output"], "a"),
    "export": (export.main, ["none.safetensors", "--demo", "--output"], "a"),
    "inspect": (inspect.main, ["none.safetensors", "--image"], "a.png"),
}


@pytest.mark.parametrize(
    ("command", "precious"),
    [
        ("fit", "a.safetensors"),
        ("fit", "a.history.csv"),
        ("fit", "a.curves.png"),
        ("fit", "a.html"),
        ("fit", "a.checkpoints"),
        ("fit", "a.samples/step-00000001.png"),
        ("score", "a.safetensors"),
        ("sample", "a/dense/000_42.png"),
        ("evaluate", "a.md"),
        ("evaluate", "a.json"),
        ("evaluate", "a.grid.png"),
        ("sweep", "a/random_global_mid_30.safetensors"),
        ("sweep", "a/heatmap.png"),
        ("sweep", "a/evaluation.md"),
        ("benchmark", "a.md"),
        ("benchmark", "a.json"),
        ("export", "a/unet/diffusion_pytorch_model.safetensors"),
        ("inspect", "a.png"),
    ],
)
def test_no_command_replaces_what_it_does_not_write(
    command: str, precious: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, options, name = COMMANDS[command]
    file = tmp_path / precious
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(PRECIOUS)
    assert main([*options, str(tmp_path / name)]) == 1
    assert file.read_bytes() == PRECIOUS
    error = capsys.readouterr().err
    assert str(file) in error and "Next step" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, options, name = COMMANDS[command]
    (tmp_path / "file").touch()
    assert main([*options, str(tmp_path / "file" / "deep" / name)]) == 1
    assert f"{tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_a_missing_folder_is_made_when_something_is_written(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "deep" / "a.png"
    assert inspect.main(["none.safetensors", "--image", str(picture)]) == 1
    assert not (tmp_path / "new").exists()  # nothing was written
    assert inspect.main([str(GOLDEN), "--image", str(picture)]) == 0
    assert picture.exists()
    with claimed(tmp_path / "other" / "deep" / "a.safetensors"):
        assert (tmp_path / "other" / "deep").is_dir()


@pytest.mark.parametrize(
    ("command", "name"), [*((of, "") for of in COMMANDS), ("evaluate", "a/"), ("benchmark", "a/")]
)
def test_an_output_without_a_name_is_told(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main, options, _ = COMMANDS[command]
    assert main([*options, name]) == 1
    assert f"{options[-1]} is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_input_is_not_the_output_under_any_name(
    link: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tmp_path / "model.safetensors", tmp_path / "output.safetensors"
    model.write_bytes(GOLDEN.read_bytes())  # a gate file, which could be replaced otherwise
    link(model, output)
    assert fit.main(["--demo", "--model", str(model), "--output", str(output)]) == 1
    assert "which this command reads" in capsys.readouterr().err
    assert output.read_bytes() == GOLDEN.read_bytes()


def test_what_a_command_wrote_it_may_write_again(tmp_path: Path) -> None:
    gates, picture, empty = (tmp_path / name for name in ("a.safetensors", "a.png", "b.png"))
    gates.write_bytes(GOLDEN.read_bytes())
    assert output_file("--output", gates, GATES, ()) == gates
    png = io.BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(png, "PNG")
    picture.write_bytes(png.getvalue())
    with pytest.raises(UserError, match="is not a picture of an earlier run"):
        output_file("--image", picture, PICTURE, ())
    write(picture, png.getvalue())
    assert output_file("--image", picture, PICTURE, ()) == picture
    with Image.open(picture) as image:
        image.load()
        assert image.text["Software"] == "LDCP" and image.getpixel((2, 1)) == (1, 2, 3)
    empty.touch()  # nothing is lost
    assert output_file("--image", empty, PICTURE, ()) == empty


@pytest.mark.parametrize("folder", ["faces", "else"])
def test_faces_are_not_drawn_into_a_folder_of_others(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = tmp_path / "metadata.jsonl" if folder == "faces" else tmp_path / "notes.txt"
    metadata.write_bytes(PRECIOUS)
    options = ["--output", str(tmp_path), "--size", "8", "--workers", "1"]
    assert draw.main(["--images", "1", *options]) == 1
    assert "holds other files than these faces" in capsys.readouterr().err
    assert metadata.read_bytes() == PRECIOUS and len(list(tmp_path.iterdir())) == 1


def test_fewer_faces_take_no_captions_away(tmp_path: Path) -> None:
    options = ["--output", str(tmp_path), "--size", "8", "--workers", "1"]
    assert draw.main(["--images", "2", *options]) == draw.main(["--images", "1", *options]) == 0
    assert (tmp_path / "metadata.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("option", ["--output", "--work", "--images"])
def test_the_demo_is_not_built_over_other_files(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / option[2:] / "unet" / "config.json"
    precious.parent.mkdir(parents=True)
    precious.write_text('{"block_out_channels": [320, 640, 1280, 1280]}')
    folders = {name: str(tmp_path / name[2:]) for name in ("--output", "--work", "--images")}
    monkeypatch.setattr(
        sys, "argv", ["build", *(word for pair in folders.items() for word in pair)]
    )
    assert build.main() == 1
    assert precious.exists()


# --- two at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "score"])
def test_the_second_of_two_runs_with_one_output_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, options, name = COMMANDS[command]
    with claimed(tmp_path / name):
        assert main([*options, str(tmp_path / name)]) == 1
    assert "Another process is making" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from training.output import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_process_that_dies_lets_go(tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", HOLD, str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="Another process"), claimed(output):
        pass
    process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with claimed(output):
        pass
    assert list(tmp_path.iterdir()) == []
