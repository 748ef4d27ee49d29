"""HyDiTKSampler, and its parts for custom sampling."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hydit_core.diffusion.samplers import SAMPLERS
from ..hydit_core.errors import ConfigError
from ..hydit_core.facts import SPACINGS
from ..hydit_core.presets import PRESETS
from .host import sampling
from .schema import make_schema

OWN = "model's own"
PRESET = "preset's"
_CATEGORY = "HunyuanDiT/sampling"
_MAX_SEED = 2**64 - 1

_DENOISE = (
    "1 starts from noise alone. Less starts from the latent's picture and keeps more of it, the lower it is: "
    "only the last steps × denoise steps (rounded down) run, as in img2img of diffusers. 0 changes nothing."
)
_SPACING = (
    "Which of the 1000 timesteps the steps visit. leading: DDPM and DDIM of Tencent and diffusers; linspace: "
    "their DPM-Solver++; trailing: begins at the very last timestep, good with few steps."
)


def _given(value: Any, unset: Any) -> Any:
    return None if value == unset else value


class HyDiTKSampler(io.ComfyNode):
    """Published settings in one node; the same seed gives the picture of `python -m hydit_core.generate`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTKSampler",
            display_name="HunyuanDiT KSampler",
            category=_CATEGORY,
            description=(
                "Samples with the settings that the model or its release recommends, and starts as Tencent's "
                "pipeline and diffusers do. Picture i of a batch is drawn with seed + i."
            ),
            search_aliases=["hunyuan", "hydit", "sampler", "text to image", "img2img", "inpaint"],
            has_intermediate_output=True,  # what the node shows
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanDiT, from our loaders or from ComfyUI's."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What to steer away from. Not used when cfg is 1."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent, or an encoded picture (with denoise below 1). A noise mask on "
                    "it limits the change to the masked part.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=_MAX_SEED,
                    control_after_generate=True,
                    tooltip="Of the first picture of the batch; the others count up from it.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[OWN, *PRESETS],
                    default=OWN,
                    tooltip="Where sampler, spacing, steps, cfg and guidance rescale come from, unless "
                    "chosen below. model's own: what the model's file recommends. v1.0, v1.1, v1.2: "
                    "Tencent's script (ddpm, 100 steps, cfg 6). distilled: the same in 25 steps. diffusers: "
                    "its pipeline (ddpm, 50 steps, cfg 5).",
                ),
                io.Combo.Input(
                    "sampler",
                    options=[PRESET, *SAMPLERS],
                    default=PRESET,
                    tooltip="ddpm adds noise at each step; ddim, euler and dpmpp_2m do not. dpmpp_2m needs "
                    "the fewest steps. lcm is for distilled models and LoRAs.",
                ),
                io.Combo.Input(
                    "spacing",
                    options=[PRESET, *SPACINGS],
                    default=PRESET,
                    tooltip=_SPACING + " preset's: what belongs to the sampler, if another one is chosen.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=1000, tooltip="0: as the preset says. Usual: 20 to 100."
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly to follow the prompt: 1 (guidance off, twice as fast) and up; "
                    "usual: 4 to 8. 0: as the preset says.",
                ),
                io.Float.Input(
                    "guidance_rescale",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Against the overexposure of a high cfg: 0 (off) to 1. -1: as the preset says.",
                ),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_DENOISE),
                io.Float.Input(
                    "cfg_end",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,  # graphs of before it was there lack it
                    tooltip="Guide only this share of the steps, from the first on; the others take half the "
                    "time. 1: all of them.",
                ),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="The sampled latents, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        preset: str,
        sampler: str,
        spacing: str,
        steps: int,
        cfg: float,
        guidance_rescale: float,
        denoise: float,
        cfg_end: float = 1.0,
    ) -> io.NodeOutput:
        sampled, notes = sampling.sample(
            model,
            positive,
            negative,
            latent_image,
            seed=seed,
            preset=_given(preset, OWN),
            denoise=denoise,
            cfg_end=cfg_end,
            sampler=_given(sampler, PRESET),
            spacing=_given(spacing, PRESET),
            steps=_given(steps, 0),
            cfg=_given(cfg, 0),
            guidance_rescale=None if guidance_rescale < 0 else guidance_rescale,
        )
        return io.NodeOutput(sampled, ui={"hydit_notes": ["\n".join(notes)]})


class HyDiTSampler(io.ComfyNode):
    """The samplers alone, for SamplerCustom and SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTSampler",
            display_name="HunyuanDiT Sampler",
            category=_CATEGORY,
            description="Tencent's samplers for custom sampling: unit start noise, independent step noise.",
            search_aliases=["hunyuan", "hydit", "ddpm", "ddim", "dpmpp"],
            inputs=[
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="ddpm",
                    tooltip="ddpm adds noise at each step; ddim (eta 0), euler and dpmpp_2m do not. lcm adds "
                    "new noise at each step and is for distilled models and LoRAs.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Noise that ddim adds: 0 (none) to 1 (as ddpm). Only for ddim.",
                ),
            ],
            outputs=[io.Sampler.Output("SAMPLER")],
        )

    @classmethod
    def execute(cls, sampler: str, eta: float) -> io.NodeOutput:
        if eta and sampler != "ddim":
            raise ConfigError(f"eta {eta:g} belongs to the ddim sampler; {sampler} has none: set eta to 0")
        return io.NodeOutput(sampling.HyDiTKSAMPLER(sampler, eta=eta if sampler == "ddim" else None))


class HyDiTScheduler(io.ComfyNode):
    """The timesteps of Tencent and diffusers as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTScheduler",
            display_name="HunyuanDiT Scheduler",
            category=_CATEGORY,
            description="The model's sigmas at the timesteps that Tencent and diffusers sample at.",
            search_aliases=["hunyuan", "hydit", "sigmas", "leading", "trailing"],
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanDiT; its noise schedule gives the sigmas."),
                io.Combo.Input("spacing", options=list(SPACINGS), default="leading", tooltip=_SPACING),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Usual: 20 to 100."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_DENOISE),
            ],
            outputs=[io.Sigmas.Output("SIGMAS")],
        )

    @classmethod
    def execute(cls, model: Any, spacing: str, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(sampling.model_sigmas(model, spacing, steps, denoise))
