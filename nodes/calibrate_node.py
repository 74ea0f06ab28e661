"""Gates made by watching the model at work on the user's own prompts."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..ldcp_core import Calibration, Gates, Padding, Ranking, correctable
from .choose import CRITERIA, Choice, Criterion, calibrate
from .inputs import check_offered, denoise, how_to_prune, how_to_sample
from .shared import CATEGORY, CalibrationType, GatesType, schema, show_on_node

log = logging.getLogger("ldcp")


def status(gates: Gates, given: Gates | None, corrections: bool) -> list[str]:
    """Sites and the share of channels pruned; how they were chosen; how much was seen.

    And how many layers were corrected, or why none.
    """
    info, sites = gates.info, len(gates.scores)
    seen = info["calibration_evaluations"]
    requested = "" if given is not None else f" ({info['target_sparsity']:.1%} requested)"
    chosen = "scores as given" if given is not None else f"{info['criterion']}, {info['ranking']}"
    return [
        f"{sites} site{'s' * (sites != 1)}, {gates.sparsity:.1%} pruned{requested}",
        f"{chosen}, rule '{gates.padding}'",
        f"{seen:,} evaluation{'s' * (seen != 1)} watched",
        *_corrected(gates, given, corrections),
    ]


def _corrected(gates: Gates, given: Gates | None, wanted: bool) -> list[str]:
    if not wanted:
        return (
            ["corrections of the given gates left out"]
            if given is not None and given.corrections
            else []
        )
    layers, found = len(correctable(gates)), len(gates.corrections)
    if not layers:
        return ["no layer to correct: none reads a site of which a part is pruned"]
    why = "" if found else ": none found that helps under other noise"
    return [f"{found} of {layers} layer{'s' * (layers != 1)} corrected{why}"]


class LDCPCalibrateGates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPCalibrateGates",
            display_name="Calibrate Gates",
            category=CATEGORY,
            description="Samples your prompt with a Stable Diffusion model (1.5, 2 or XL), "
            "watches its "
            "channels, and makes pruning gates of what it saw: the channels that are told best by "
            "their mean are pruned, and the mean stands in for them. Better than Estimate Gates "
            "from Model; learned gates are better still.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Stable Diffusion model (1.5, 2 or XL) or fine-tune, LoRA included. "
                    "Pruning "
                    "connected before this node is left out: the full model is watched.",
                ),
                *how_to_sample(
                    seed="The random seed of the noise. It stays as it is, so that the node "
                    "keeps its gates, and does not sample anew, until an input changes.",
                    steps="The number of sampling steps; all of them are watched.",
                    cfg="Classifier-free guidance, as in KSampler. At 1.0 the negative prompt "
                    "is not evaluated, and not watched.",
                    sampler="The sampler; best the one that the gates will be used with.",
                    scheduler="The noise schedule; best the one that the gates will be used with.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt to watch the model with: one of your own."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to sample, at the size that you use. A batch of several "
                    "shows more of the model.",
                ),
                denoise(),
                io.Combo.Input(
                    "criterion",
                    options=list(CRITERIA),
                    default="flap",
                    tooltip="What makes a channel important. flap: how far it strays from its mean "
                    "while sampling, times the weights that read it. l1, l2: the size of its "
                    "weights, as in Estimate Gates from Model; only the means are watched.",
                ),
                *how_to_prune("global"),
                GatesType.Input(
                    "gates",
                    optional=True,
                    tooltip="Gates whose channels stay chosen as they are: only their constants "
                    "become the means seen here. criterion, sparsity, ranking, padding and scope "
                    "are then not used.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="What another Calibrate Gates has seen, with another prompt, say: the "
                    "gates then rest on both. With corrections, its prompt is sampled once more as "
                    "well.",
                ),
                io.Boolean.Input(
                    "corrections",
                    default=False,
                    optional=True,
                    tooltip="Whether layers that read pruned channels get a small update which "
                    "makes up for a part of what the means lose. It costs nothing when the gates "
                    "are used. To find it the node samples twice more: as before, and a "
                    "few steps from the next seed, to check it. A large scope takes minutes and "
                    "gigabytes of main memory on top.",
                ),
            ],
            outputs=[
                GatesType.Output(
                    display_name="gates",
                    tooltip="Which channels to prune, for Apply Dynamic Pruning or Save Gates.",
                ),
                io.Latent.Output(
                    display_name="LATENT",
                    tooltip="What was sampled meanwhile, by the full model: as from KSampler.",
                ),
                CalibrationType.Output(
                    display_name="calibration",
                    tooltip="What was seen, for another Calibrate Gates.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: Any,
        denoise: float,
        criterion: Criterion,
        sparsity: float,
        ranking: Ranking,
        padding: Padding,
        scope: str,
        gates: Gates | None = None,
        calibration: Calibration | None = None,
        corrections: bool = False,
    ) -> io.NodeOutput:
        from comfy.samplers import KSampler  # which takes its first sampler for an unknown one

        check_offered("sampler_name", sampler_name, KSampler.SAMPLERS)
        check_offered("scheduler", scheduler, KSampler.SCHEDULERS)
        sampling = {
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": sampler_name,
            "scheduler": scheduler,
            "positive": positive,
            "negative": negative,
            "latent": latent_image,
            "denoise": denoise,
        }
        choice = Choice(criterion, sparsity, ranking, padding, scope)
        made, latent, seen = calibrate(model, choice, sampling, gates, calibration, corrections)
        lines = status(made, gates, corrections)
        log.info("LDCP: gates calibrated: %s", ", ".join(lines))
        show_on_node("\n".join(lines), cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput(made, latent, seen)
