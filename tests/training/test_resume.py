"""A run that was cut short goes on to the same bits, whatever cut it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ldcp_core import load_gates
from training import fit
from training.config import RunOptions
from training.errors import UserError
from training.fit import main
from training.learning import checkpoint, loop
from training.learning import result as outcome
from training.learning.checkpoint import Checkpoints
from training.learning.loop import Learning

ROOT = Path(__file__).parents[2]
STEPS = 9
KILLS = int(os.environ.get("LDCP_TEST_KILLS", "12"))


@pytest.fixture(autouse=True)
def quick(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_pictures: None
) -> None:
    """No pictures, and few samples: they take most of the time and are not what is tested."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parse = fit.parse_arguments
    few = {"calibration_batches": 2, "validation_samples": 4, "correction_samples": 15}
    monkeypatch.setattr(fit, "parse_arguments", lambda argv: replace(parse(argv), **few))


Run = Callable[..., int]


@pytest.fixture
def run(pipeline: Path, images: Path, tmp_path: Path) -> Run:
    """Run a short fit that writes ``name``; a later option wins over an earlier one."""

    def run(name: str, *more: str) -> int:
        return main([
            "--model", str(pipeline), "--data", str(images), "--output", str(tmp_path / name),
            "--batch-size", "3", "--gradient-accumulation", "1", "--max-steps", str(STEPS),
            "--checkpoint-every", "3", *more,
        ])  # fmt: skip

    return run


@pytest.fixture
def whole(run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gate file of an uninterrupted run with nothing but the options of `run`; made once."""
    file = tmp_path_factory.getbasetemp() / "whole.safetensors"
    if not file.exists():
        assert run("whole.safetensors") == 0
        file.write_bytes((tmp_path / "whole.safetensors").read_bytes())
    return file


def tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def assert_same(a: Path, b: Path) -> None:
    """The same tensors to the bit, and the same course of the loss."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_gates(a).info["history"] == load_gates(b).info["history"]


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Let the run break down in the given step."""
    whole = Learning.advance

    def advance(self: Learning) -> None:
        if self.step == step:
            raise error
        whole(self)

    monkeypatch.setattr(Learning, "advance", advance)


@pytest.fixture
def interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A run that broke down in its sixth step, after a checkpoint at the third; made once."""
    made = tmp_path_factory.getbasetemp() / "cut.checkpoints"
    found = tmp_path / "cut.checkpoints"
    if not made.exists():
        with monkeypatch.context() as patch:
            fail_at(patch, 5, RuntimeError("a defect"))
            with pytest.raises(RuntimeError):
                run("cut.safetensors")
        found.rename(made)
    shutil.copytree(made, found)
    return found


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ["--reconstruction", "noise", "--gradient-accumulation", "2"],
        # ten images: batches of 3, 3, 3 and 1, epochs cross
        ["--target-sparsity", "none", "--validation-fraction", "0.5"],
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    assert run("whole.safetensors", *more) == 0
    with monkeypatch.context() as patch:
        fail_at(patch, 5, RuntimeError("a defect"))
        with pytest.raises(RuntimeError):
            run("cut.safetensors", *more)
    assert run("cut.safetensors", *more, "--resume") == 0
    assert_same(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")


def test_every_so_many_steps_and_the_last_few_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    save = Checkpoints.save

    def watched(self: Checkpoints, *arguments: Any) -> Path:
        path = save(self, *arguments)
        seen.append(sorted(file.name for file in self.folder.iterdir()))
        return path

    monkeypatch.setattr(Checkpoints, "save", watched)
    assert run("a.safetensors", "--checkpoint-every", "4", "--keep-checkpoints", "2") == 0
    names = [f"step-{step:08d}.safetensors" for step in (4, 8, 9)]
    assert seen == [names[:1], names[:2], names[1:]]  # the last step as well
    assert not (tmp_path / "a.checkpoints").exists()  # finished: nothing to go on with


def test_a_run_without_checkpoints_writes_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "save", lambda *_: pytest.fail("a checkpoint was written"))
    assert run("a.safetensors", "--checkpoint-every", "0") == 0


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "1"], ["--seed 1 is asked for now", "Expected: --seed 0"]),
        (["--max-steps", "13"], ["--max-steps 13", "Expected: --max-steps 9"]),
        (["--batch-size", "2"], ["--batch-size 2", "--batch-size 3"]),
        (["--precision", "bf16"], ["--precision 'bf16'", "--precision 'fp32'"]),
    ],
)
def test_other_settings_are_refused(
    interrupted: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: list[str],
) -> None:
    before = {file: file.read_bytes() for file in interrupted.iterdir()}
    assert run("cut.safetensors", "--resume", *more) == 1
    error = capsys.readouterr().err
    assert all(words in error for words in said) and "Next step: resume with the settings" in error
    assert {file: file.read_bytes() for file in interrupted.iterdir()} == before


def test_other_images_and_other_weights_are_refused(
    interrupted: Path, run: Run, images: Path, tmp_path: Path, pipeline: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for file in sorted(images.rglob("*.png"))[:10]:
        (fewer / file.name).write_bytes(file.read_bytes())
    edited = shutil.copytree(images, tmp_path / "edited")
    first, *others = sorted(edited.rglob("*.png"))
    for file in others:
        file.write_bytes(first.read_bytes())
    for data in (fewer, edited):
        assert run("cut.safetensors", "--resume", "--data", str(data)) == 1
        assert "images of --data" in capsys.readouterr().err

    from diffusers import UNet2DConditionModel

    other = tmp_path / "other"
    for part in pipeline.iterdir():
        (other / part.name).parent.mkdir(exist_ok=True)
        (other / part.name).symlink_to(part)
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    with torch.no_grad():
        unet.conv_in.bias += 1
    (other / "unet").unlink()
    unet.save_pretrained(other / "unet")
    assert run("cut.safetensors", "--resume", "--model", str(other)) == 1
    assert "weights of --model" in capsys.readouterr().err


def test_the_folder_may_move_and_intervals_may_change(
    interrupted: Path, run: Run, tmp_path: Path
) -> None:
    interrupted.rename(tmp_path / "moved.checkpoints")
    assert run("moved.safetensors", "--resume", "--checkpoint-every", "1") == 0


def test_resume_without_a_checkpoint_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("a.safetensors", "--resume") == 1
    error = capsys.readouterr().err
    assert "--resume needs a checkpoint" in error and "there is none" in error


def test_a_new_run_never_overwrites_an_unfinished_one(
    interrupted: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in interrupted.iterdir()}
    assert run("cut.safetensors") == 1
    error = capsys.readouterr().err
    assert "unfinished run" in error and "add --resume" in error
    assert {file: file.read_bytes() for file in interrupted.iterdir()} == before


@pytest.mark.parametrize("option", [{"checkpoint_every": -1}, {"keep_checkpoints": 0}])
def test_settings_that_cannot_work_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(UserError, match="change --"):
        RunOptions(**option)


# --- what can go wrong ----------------------------------------------------------------------------


def test_a_damaged_checkpoint_costs_an_interval_and_not_the_run(
    whole: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        fail_at(patch, 7, RuntimeError("a defect"))
        with pytest.raises(RuntimeError):
            run("cut.safetensors")
    newest = tmp_path / "cut.checkpoints" / "step-00000006.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    assert run("cut.safetensors", "--resume") == 0
    assert "step-00000006.safetensors is no usable checkpoint" in caplog.text
    assert "going on after step 3 of 9" in caplog.text
    assert_same(whole, tmp_path / "cut.safetensors")


def test_no_damaged_byte_of_a_checkpoint_is_a_crash_or_passes_nor_does_a_part_or_a_pickle(
    tmp_path: Path,
) -> None:
    state = {"a": torch.arange(3.0), "of": [1, None, {2: torch.ones(2, dtype=torch.uint8)}]}
    whole = checkpoint.to_bytes(3, {"--seed": 0}, state)
    file = tmp_path / "step-00000003.safetensors"
    file.write_bytes(whole)
    assert checkpoint.read(file).step == 3
    flipped = (whole[:i] + bytes([byte ^ 1]) + whole[i + 1 :] for i, byte in enumerate(whole))
    parts = (whole[:length] for length in range(len(whole)))
    for content in (*flipped, *parts, b"\x80\x04\x95 this could run anything"):
        file.write_bytes(content)
        with pytest.raises((ValueError, OSError)):
            checkpoint.read(file)


@pytest.mark.parametrize(
    "content", ["[]", "{}", "1", '{"state": {"pairs": [1]}}', '{"state": {}}', "[" * 10**5]
)
def test_a_checkpoint_of_other_contents_is_no_crash_whatever_its_checksum(
    tmp_path: Path, content: str
) -> None:
    metadata = {"format": checkpoint.FORMAT, "version": str(checkpoint.VERSION), "content": content}
    metadata["checksum"] = checkpoint._checksum(content, {})
    file = tmp_path / "step-00000003.safetensors"
    file.write_bytes(checkpoint.serialize({}, metadata))
    with pytest.raises(ValueError, match="none of a checkpoint"):
        checkpoint.read(file)


def test_only_damaged_checkpoints_are_an_error(
    interrupted: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in interrupted.iterdir():
        file.write_bytes(b"")
    assert run("cut.safetensors", "--resume") == 1
    assert "only damaged ones (step-00000003.safetensors)" in capsys.readouterr().err


def test_no_number_for_a_loss_ends_the_run_and_says_what_is_safe(
    whole: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    deviation = loop.deviation
    calls = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(
            loop,
            "deviation",
            lambda *args: deviation(*args) * (float("nan") if next(calls) == 5 else 1),
        )
        assert run("cut.safetensors") == 1  # in the sixth step
    assert "The reconstruction loss became nan at step 5" in capsys.readouterr().err
    assert "All up to step 3 is safe" in caplog.text
    assert run("cut.safetensors", "--resume") == 0
    assert_same(whole, tmp_path / "cut.safetensors")


def full_disk(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, times: int) -> None:
    """Let the first writes through ``module.name`` find no room."""
    whole, left = getattr(module, name), iter(range(times))

    def write(*arguments: Any) -> Any:
        if next(left, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*arguments)

    monkeypatch.setattr(module, name, write)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    whole: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    full_disk(monkeypatch, checkpoint, "write_atomically", 1)
    assert run("cut.safetensors") == 0
    assert "The checkpoint of step 3 can't be written: [Errno 28] No space left" in caplog.text
    assert_same(whole, tmp_path / "cut.safetensors")


def test_a_disk_full_at_the_end_loses_nothing(
    whole: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        full_disk(patch, outcome, "save_gates", 1)
        assert run("cut.safetensors") == 1
    assert "No space left on device" in (error := capsys.readouterr().err) and "--resume" in error
    assert "All up to step 9 is safe" in caplog.text
    monkeypatch.setattr(Learning, "advance", lambda _: pytest.fail("a step was taken again"))
    assert run("cut.safetensors", "--resume") == 0
    assert_same(whole, tmp_path / "cut.safetensors")


def test_an_unreadable_image_is_still_reported_after_a_resume(
    run: Run, monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))):
        (data / f"{i:02}.png").write_bytes(file.read_bytes() if i % 3 else b"broken")
    more = ("--data", str(data))
    run("whole.safetensors", *more)
    said = capsys.readouterr().out
    with monkeypatch.context() as patch:
        fail_at(patch, 5, RuntimeError("a defect"))
        with pytest.raises(RuntimeError):
            run("cut.safetensors", *more)
    assert run("cut.safetensors", *more, "--resume") == 0
    again = capsys.readouterr().out
    assert "7 of 20 images could not be read" in said and "7 of 20" in again
    assert_same(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    whole: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], number: signal.Signals,
) -> None:  # fmt: skip
    advance_whole = Learning.advance

    def advance(self: Learning) -> None:
        if self.step == 4:
            signal.raise_signal(number)
        advance_whole(self)

    before = signal.getsignal(signal.SIGINT)  # ignored, in a job that a script has put aside
    with monkeypatch.context() as patch:
        patch.setattr(Learning, "advance", advance)
        assert run("cut.safetensors") == 130
    error = capsys.readouterr().err
    assert "finishing this step" in error and "Stopped after step 5 of 9" in error
    assert error.rstrip().endswith("--resume")
    assert not (tmp_path / "cut.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert run("cut.safetensors", "--resume") == 0
    assert_same(whole, tmp_path / "cut.safetensors")


def test_the_second_ctrl_c_stops_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def advance(self: Learning) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Learning, "advance", advance)
    assert run("cut.safetensors") == 130
    assert "no gate file was written" in capsys.readouterr().err
    assert "No checkpoint was written yet" in caplog.text


# the point is a kill that no handler sees, and Windows has neither that signal nor fork
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_killed_at_random_moments_a_run_still_ends_with_the_same_bits(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_loop.py"))]
    command += [str(pipeline), str(images), str(tmp_path), str(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= KILLS
    assert told["runs"] >= 1 and told["equal"] == told["runs"]
    assert told["steps_when_killed"] >= min(5, KILLS // 3)  # the moments were spread over the run


# --- the file -------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "tensors": [torch.arange(3), torch.tensor(2.5, dtype=torch.float64), torch.zeros(0)],
        "numbers": {0: 1, 7: float("inf"), "x": 0.1 + 0.2},
        "nested": {"list": [None, True, "text", [1, 2]], "bfloat": torch.ones(2).bfloat16()},
    }
    folder = Checkpoints(tmp_path / "c", 1)
    path = folder.save(3, {"--seed": 0}, state)
    found = folder.load()
    assert (found.path, found.step, found.identity) == (path, 3, {"--seed": 0})
    for a, b in zip(found.state["tensors"], state["tensors"], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert found.state["numbers"] == state["numbers"]
    assert found.state["nested"]["list"] == state["nested"]["list"]
    assert torch.equal(found.state["nested"]["bfloat"], state["nested"]["bfloat"])


def test_what_a_file_cannot_hold_is_an_error_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="can't hold a set"):
        checkpoint.to_bytes(0, {}, {"a": {1, 2}})


def test_a_finished_run_leaves_nothing_not_even_of_a_write_that_was_killed(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path / "c", 1)
    folder.save(1, {}, {})
    (folder.folder / ".step-00000001.safetensors.0123abcd.ldcp").write_bytes(b"torn")
    folder.clear()
    assert not folder.folder.exists()
