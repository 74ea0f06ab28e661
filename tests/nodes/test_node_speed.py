"""A whole 20-step run in ComfyUI is no slower with pruning: selection, parking, restoring included.

Takes many minutes on a CPU, so it runs only when asked: ``LDCP_TEST_SPEED=1 pytest -s`` (with
``LDCP_TEST_SPEED_SIZE`` for the latent's side, ``LDCP_TEST_SPEED_ROUNDS`` for the rounds). Every
round runs all variants in random order; a ratio is of the process's own CPU time within a round,
which other programs on the machine disturb least.
"""

from __future__ import annotations

import os
import random
import statistics
import time

import pytest
import torch

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("LDCP_TEST_SPEED" not in os.environ, reason="set LDCP_TEST_SPEED=1"),
]
SIDE = int(os.environ.get("LDCP_TEST_SPEED_SIZE", "16"))
ROUNDS = int(os.environ.get("LDCP_TEST_SPEED_ROUNDS", "7"))
STEPS = 20


def test_a_whole_run_is_no_slower(comfy, sd15_checkpoint, make_gates, sample):
    comfy.folder_paths.add_model_folder_path("checkpoints", str(sd15_checkpoint.parent))
    loader = comfy.nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]()
    dense = loader.load_checkpoint(sd15_checkpoint.name)[0]
    gates = make_gates(topology=comfy.core.SD15)
    keep_sets = gates.keep_sets_at(0.5)

    def patched(schedule):
        return comfy.patch.attach(dense, comfy.patch.Layer(gates, keep_sets, schedule))

    variants = {
        "dense": dense,
        "on": patched(comfy.core.ALWAYS),
        "half of the steps": patched(comfy.core.Schedule.steps("0-9")),
        "off": patched(comfy.core.NEVER),
    }
    sample(dense, 1, (SIDE, SIDE))
    seconds = {name: [] for name in variants}
    shuffled = random.Random(0)
    for _ in range(ROUNDS):
        for name in shuffled.sample(list(variants), len(variants)):
            start = time.process_time()
            sample(variants[name], STEPS, (SIDE, SIDE), cfg=7.0)
            seconds[name].append(time.process_time() - start)
    print(f"\n{STEPS} steps, {8 * SIDE} px, CFG, {torch.get_num_threads()} thread, {ROUNDS} rounds")
    ratios = {}
    for name, times in seconds.items():
        pairs = [a / b for a, b in zip(times, seconds["dense"], strict=True)]
        ratios[name] = statistics.median(pairs)
        print(
            f"{name:20} {statistics.median(times):7.2f} s CPU, {ratios[name]:.3f}x dense "
            f"({min(pairs):.3f} to {max(pairs):.3f})"
        )
    assert max(ratios.values()) <= 1.01


def test_switched_off_costs_microseconds_per_evaluation(comfy, model, make_gates):
    """What the wrapper adds around the host's own evaluation, which is left out here."""
    gates = make_gates()
    layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.Schedule.steps("99"))
    pruning = comfy.patch.attached(comfy.patch.attach(model, layer))

    class Evaluation:
        class_obj = model.model

        def __call__(self, x, *_, **__):
            return x

    x, t = torch.zeros(2, 4, 8, 8), torch.tensor([7.0, 7.0])
    options = {"sigmas": t, "sample_sigmas": torch.linspace(14.6, 0.0, STEPS + 1)}
    calls, start = 2000, time.process_time()
    for _ in range(calls):
        pruning(Evaluation(), x, t, transformer_options=options)
    seconds = (time.process_time() - start) / calls
    print(f"\npruning off adds {1e6 * seconds:.0f} µs CPU to an evaluation")
    assert seconds < 2e-4
