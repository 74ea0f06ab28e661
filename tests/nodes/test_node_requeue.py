"""One long-lived server, graphs queued one after the other: each gives what a fresh server gives.

What people do between queues: bypass the node, delete it, mute it, bring it back, change sparsity
or steps, put two of them in a row, go back and forth between graphs. A bypassed or deleted node is
not in what the browser sends, and what it fed is connected to what fed it; of a muted one nothing
is left to feed the sampler. The model is the narrow one of these tests.
"""

from __future__ import annotations

from pathlib import Path

import comfy_server
import pytest
import safetensors.torch
import torch

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
APPLY = "LDCPApplyDynamicPruning"


def graph(*applied, steps=2, seed=3):
    """The small model, Apply nodes in a row, a sampler; each is (gates file, sparsity, steps)."""
    prompt = {
        "model": node("LDCPTestSmallModel"),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    }
    model = ["model", 0]
    for number, (gates, sparsity, pruned_steps) in enumerate(applied):
        inputs = {"model": model, "gates": [f"load{number}", 0], "sparsity": sparsity}
        inputs |= {"schedule": [f"schedule{number}", 0], "full_weights": "auto"}
        widgets = {"mode": "steps", "steps": pruned_steps, "start_percent": 0, "end_percent": 1}
        prompt[f"load{number}"] = node("LDCPLoadGates", gates_name=gates)
        prompt[f"schedule{number}"] = node("LDCPStepSchedule", **widgets)
        prompt[f"apply{number}"] = node(APPLY, **inputs)
        model = [f"apply{number}", 0]
    return prompt | sampled("sampler", model, steps, seed)


def sampled(name, model, steps=2, seed=3):
    settings = {"seed": seed, "steps": steps, "cfg": 3.0, "denoise": 1.0}
    settings |= {"sampler_name": "euler", "scheduler": "normal", "latent_image": ["empty", 0]}
    conditions = {"positive": ["model", 1], "negative": ["model", 1]}
    inputs = {"model": model, **settings, **conditions}
    saved = node("SaveLatent", samples=[name, 0], filename_prefix=f"latent_{name}")
    return {name: node("KSampler", **inputs), f"save_{name}": saved}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


A, B = "a.safetensors", "b.safetensors"
PLAIN = graph()
GRAPHS = {
    "plain": PLAIN,
    "pruned": graph((A, -1.0, "0-")),
    "other sparsity": graph((A, 0.75, "0-")),
    "other steps": graph((A, -1.0, "1")),
    "more steps": graph((A, -1.0, "0-"), steps=3),
    "other gates": graph((B, -1.0, "0-")),
    "two in a row": graph((A, -1.0, "0"), (B, 0.25, "1-")),
    # both in one prompt: the pruned model beside the one it came from
    "side by side": graph((A, -1.0, "0-")) | sampled("unpruned", ["model", 0]),
}
#: what one user queues in one server
QUEUE = [
    "pruned",
    "plain",  # bypassed, or deleted
    "pruned",
    "muted",
    "pruned",
    "other sparsity",
    "pruned",
    "other steps",
    "more steps",
    "two in a row",
    "pruned",
    "two in a row",
    "other gates",
    "side by side",
    "other gates",
    "pruned",
    "plain",
]


@pytest.fixture(scope="module")
def start(comfy, comfyui_path, make_gates, tmp_path_factory):
    """Start a server in a folder of its own."""

    def run():
        base = tmp_path_factory.mktemp("comfyui")
        checkpoint = base / "none.safetensors"
        checkpoint.touch()  # nobody loads it
        comfy_server.prepare_folder(base, REPOSITORY, checkpoint)
        small = Path(__file__).parent / "small_model_node.py"
        (base / "custom_nodes" / small.name).symlink_to(small)
        for seed, name in enumerate((A, B), 1):
            gates = make_gates(seed=seed, constants=20.0)
            comfy.core.save_gates(gates, base / "models/ldcp_gates" / name)
        return comfy_server.Server(comfyui_path, base)

    return run


def latents(server, prompt):
    files = server.run(prompt).files
    return {name: safetensors.torch.load(file)["latent_tensor"] for name, file in files.items()}


@pytest.fixture(scope="module")
def fresh(start):
    """What each graph gives in a server that has run nothing else."""
    found = {}
    for name, prompt in GRAPHS.items():
        with start() as server:
            found[name] = latents(server, prompt)
    return found


def test_the_graphs_give_different_images(fresh):
    """So that one of them can't be taken for another."""
    images = {name: found["latent_sampler"] for name, found in fresh.items()}
    alike = {
        (one, other)
        for one in images
        for other in images
        if one < other and torch.equal(images[one], images[other])
    }
    assert alike == {("pruned", "side by side")}
    assert torch.equal(fresh["side by side"]["latent_unpruned"], images["plain"])


def test_whatever_was_queued_before_the_image_is_that_of_a_fresh_server(start, fresh):
    muted = {k: v for k, v in GRAPHS["pruned"].items() if k != "apply0"}
    muted["sampler"] = node("KSampler", **muted["sampler"]["inputs"])
    del muted["sampler"]["inputs"]["model"]
    with start() as server:
        for number, name in enumerate(QUEUE):
            if name == "muted":
                with pytest.raises(comfy_server.Refused, match="Required input is missing: model"):
                    server.run(muted)
                continue
            # another seed in between, or the server would answer from its cache
            prompt = GRAPHS[name]
            other = {
                **prompt,
                **sampled("sampler", prompt["sampler"]["inputs"]["model"], 1, number),
            }
            server.run(other)
            found = latents(server, prompt)
            assert found.keys() == fresh[name].keys()
            for file, latent in found.items():
                assert torch.equal(latent, fresh[name][file]), (number, name, file)
