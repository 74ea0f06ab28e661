"""A custom node for ComfyUI's own server: the narrow SD1.5 of these tests, without a checkpoint.

The server imports it from ``custom_nodes``; the stock loaders know full-size models alone.
"""

from __future__ import annotations


class SmallModel:
    """A U-Net of widths 32, 64, 128, 128 with random weights, and a conditioning for it."""

    RETURN_TYPES = ("MODEL", "CONDITIONING")
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models
        import torch

        torch.manual_seed(0)
        config = comfy.supported_models.SD15(
            dict(
                image_size=32,
                in_channels=4,
                out_channels=4,
                model_channels=32,
                num_res_blocks=[2, 2, 2, 2],
                channel_mult=[1, 2, 4, 4],
                num_heads=8,
                num_head_channels=-1,
                use_spatial_transformer=True,
                transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
                transformer_depth_middle=1,
                transformer_depth_output=[1] * 9 + [0] * 3,
                context_dim=64,
                use_linear_in_transformer=False,
                legacy=False,
                adm_in_channels=None,
                use_temporal_attention=False,
            )
        )
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        model = comfy.model_base.BaseModel(config, device=cpu).eval()
        for parameter in model.diffusion_model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        return patcher, [[torch.randn(1, 77, 64), {}]]


NODE_CLASS_MAPPINGS = {"LDCPTestSmallModel": SmallModel}
