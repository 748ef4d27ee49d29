"""diffusers' HunyuanDiT pipelines over our weights: with the same features, they must draw what ours does."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPipeline,
)
from diffusers_models import diffusers_controlnet, diffusers_dit

PROMPT, NEGATIVE, SEED, STEPS, SIDE = "a red apple", "a green car", 5, 10, 128
SCHEDULERS = {
    "ddpm": (DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_small"}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
}


def theirs(pipe, sampler, cfg, rescale, output, controls=()):
    """The result of diffusers' pipeline; ``controls`` are (ControlNet, picture, scale)."""
    cls, options = SCHEDULERS[sampler]
    scheduler = cls(
        beta_start=pipe.info.diffusion.beta_start,
        beta_end=pipe.info.diffusion.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        **options,
    )
    parts: dict[str, Any] = {
        "vae": pipe.vae.model,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": diffusers_dit(pipe.dit.config, pipe.dit.state_dict()),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    more: dict[str, Any] = {}
    if controls:
        nets = [diffusers_controlnet(net.config, net.state_dict()) for net, _, _ in controls]
        pictures, scales = [picture for _, picture, _ in controls], [scale for _, _, scale in controls]
        one = len(nets) == 1
        parts["controlnet"] = nets[0] if one else nets
        more["control_image"] = pictures[0] if one else pictures
        more["controlnet_conditioning_scale"] = scales[0] if one else scales
    reference = (HunyuanDiTControlNetPipeline if controls else HunyuanDiTPipeline)(**parts)
    reference.set_progress_bar_config(disable=True)
    reference.vae.register_to_config(scaling_factor=0.13025)
    features = {}
    for name, text in (("prompt", PROMPT), ("negative_prompt", NEGATIVE)):
        bert, bert_mask, t5, t5_mask = pipe.text.encode([text])
        features |= {f"{name}_embeds": bert, f"{name}_embeds_2": t5}
        mask = name.replace("prompt", "prompt_attention_mask")
        features |= {mask: bert_mask, f"{mask}_2": t5_mask}
    result = reference(
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=cfg,
        guidance_rescale=rescale,
        generator=torch.Generator().manual_seed(SEED),
        original_size=(1024, 1024),
        use_resolution_binning=False,
        output_type=output,
        **features,
        **more,
    )
    return result.images
