"""One seed at several shares and schedules beside the full model: what to choose, seen by eye."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..ldcp_core import Gates
from .compare import compare, remarks, summary, table
from .grid import comparison_grid
from .inputs import check_offered, denoise, how_to_sample
from .queued import inputs_of
from .shared import CATEGORY, GatesType, schema, show_on_node
from .variants import parse_variants

log = logging.getLogger("ldcp")


def problem(shares: Any, schedules: Any, steps: Any) -> str | None:
    """Why these widgets cannot be meant, as far as they are known (None: not yet)."""
    known_steps = steps if isinstance(steps, int) else None
    try:
        parse_variants(
            "learned" if shares is None else shares,
            "" if schedules is None else schedules,
            known_steps,
        )
    except ValueError as error:
        return str(error)
    return None


class LDCPCompareShares(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPCompareShares",
            display_name="Compare Pruning Shares",
            category=CATEGORY,
            description="Samples the same seed with the full model and pruned at several shares, "
            "at several schedules too, and shows the images side by side with the time, the bytes "
            "and the difference of each.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Stable Diffusion model (1.5, 2 or XL), LoRA included. Pruning "
                    "connected before this node is left out.",
                ),
                GatesType.Input(
                    "gates",
                    tooltip="Whose channels to prune: Load Pruning Gates, Estimate Gates from "
                    "Model or Calibrate Gates.",
                ),
                io.Vae.Input("vae", tooltip="Decodes the latents, as VAE Decode does."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to sample, at the size that you use. Every image of a "
                    "batch gets a grid of its own.",
                ),
                io.String.Input(
                    "shares",
                    default="0.2, 0.4, 0.6",
                    tooltip="The shares of the gated channels to prune, such as '0.2, 0.4', the "
                    "least important first. 'learned' prunes what the gates were trained to prune. "
                    "The full model comes first by itself.",
                ),
                io.String.Input(
                    "schedules",
                    default="",
                    multiline=True,
                    tooltip="When to prune, a row of the grid for every line: ranges of sampler "
                    "steps such as '0-4, 10-19' or '5-' (to the end), 0-based and inclusive. "
                    "Empty: all steps.",
                ),
                *how_to_sample(
                    seed="The random seed of the noise, the same for all.",
                    steps="The number of sampling steps.",
                    cfg="Classifier-free guidance, as in KSampler.",
                    sampler="The sampler.",
                    scheduler="The noise schedule.",
                ),
                denoise(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="grid", tooltip="All images with their figures, as one image."
                ),
                io.Image.Output(
                    display_name="images",
                    tooltip="The single images: the full model's, then row by row.",
                ),
                io.String.Output(display_name="text", tooltip="The figures as a plain text table."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, shares: str | None = None) -> bool | str:
        """Names one input, because ComfyUI repeats the answer for each (see `queued`)."""
        queued = inputs_of(cls.hidden.unique_id if cls.hidden else None)
        return problem(shares, queued.get("schedules"), queued.get("steps")) or True

    @classmethod
    def execute(
        cls,
        model: Any,
        gates: Gates,
        vae: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        shares: str,
        schedules: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
    ) -> io.NodeOutput:
        from comfy.samplers import KSampler  # which takes its first sampler for an unknown one

        check_offered("sampler_name", sampler_name, KSampler.SAMPLERS)
        check_offered("scheduler", scheduler, KSampler.SCHEDULERS)
        variants = parse_variants(shares, schedules, steps)
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
        node_id = cls.hidden.unique_id if cls.hidden else None
        rendered = compare(
            model, gates, variants, sampling, vae, lambda text: show_on_node(text, node_id)
        )
        found = remarks(model, gates, rendered)
        show_on_node("\n".join([*summary(rendered), *found]), node_id)
        text = table(rendered, found)
        log.info("LDCP: shares compared:\n%s", text)
        grid, images = comparison_grid(rendered), torch.cat([each.images for each in rendered])
        return io.NodeOutput(grid, images, text, ui=ui.PreviewImage(grid, cls=cls))
