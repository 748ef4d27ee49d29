"""Settings of ai-toolkit (YAML, or the same as JSON)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...untrusted import MAX_TOML_BYTES, read_text
from .common import DTYPES, OPTIMIZERS, PRECISION, SCHEDULES, put_steps, put_text_encoders
from .options import Options, shown

_KINDS: Mapping[str, tuple[Any, str]] = {"lora": ("lora", ""), "lokr": ("lokr", ""), "locon": ("lora", "")}
_SECTIONS = ("network", "save", "train", "model", "sample")
_REASONS = {
    "train.noise_scheduler": "the model's file says how it is trained and sampled",
    "train.timestep_type": "use objective.timesteps",
    "train.content_or_style": "use objective.timesteps",
    "train.loss_type": "the loss is the mean square",
    "train.do_differential_guidance": "has no counterpart",
    "train.min_denoising_steps": "all timesteps are trained",
    "train.max_denoising_steps": "all timesteps are trained",
    "train.diff_output_preservation": "use data.prior.prompts",
    "train.blank_prompt_preservation": "use data.prior.prompts",
    "train.cache_text_embeddings": "use data.cache.text",
    "network.conv": "for convolutions, which are not trained here",
    "network.conv_alpha": "for convolutions, which are not trained here",
    "network.network_kwargs": "use lora.targets",
    "model.quantize_te": "text encoders are kept in run.precision",
    "model.low_vram": "use lora.base_precision and run.gradient_checkpointing",
    "model.assistant_lora_path": "merge it into the base first: hydit lora merge",
    "sample.sampler": "the model's file recommends one; samples.sampler",
    "sample.samples": "copy the prompts into samples.prompts",
    "slider": "sliders are not trained",
    "network.transformer_only": "lora.train_bert is off unless asked for",
}
_QUIET = (
    *(
        "type",
        "device",
        "performance_log_every",
        "log_dir",
        "sqlite_db_path",
        "logging",
        "network.lokr_full_rank",
    ),
    *(
        "save.push_to_hub",
        "save.hf_repo_id",
        "save.hf_private",
        "save.save_format",
        "model.is_flux",
        "model.is_v3",
    ),
    *(
        "model.arch",
        "train.train_unet",
        "train.skip_first_sample",
        "train.disable_sampling",
        "train.force_first_sample",
    ),
    *(
        "sample.walk_seed",
        "model.qtype",
        "model.qtype_te",
        "model.model_kwargs",
        "model.is_xl",
        "train.unload_text_encoder",
    ),
    *(
        "network.linear_alpha",
        "train.ema_config",
        "train.bypass_guidance_embedding",
        "train.linear_timesteps",
        "datasets",
    ),
)


def parse(path: Path) -> dict[str, Any]:
    """A YAML file, without what makes a small one large, or runs something.

    Raises:
        ConfigError: it is damaged, too large, uses anchors, or pyyaml is not installed.
    """
    if importlib.util.find_spec("yaml") is None:
        raise ConfigError(f"{path}: YAML needs pyyaml: pip install pyyaml")
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ConfigError(f"{path}: anchors and aliases are not read; write the values out")
            return super().compose_node(parent, index)

    text = read_text(path, error=ConfigError, max_bytes=MAX_TOML_BYTES)
    try:
        found = yaml.load(text, Plain)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a table of settings")
    return found


def is_job(values: Mapping[str, Any]) -> bool:
    """Whether a file is a job of ai-toolkit."""
    return "job" in values and isinstance(values.get("config"), dict)


def read(values: dict[str, Any], base: Path) -> Options:
    """The options of a job with one process."""
    config = values["config"]
    processes = config.get("process")
    first = processes[0] if isinstance(processes, list) and processes else None
    if not isinstance(first, dict):
        raise ConfigError("config.process: expected a list with the settings of one training")
    flat = {k: v for k, v in first.items() if k not in _SECTIONS}
    for section in _SECTIONS:
        inner = first.get(section)
        flat |= {f"{section}.{k}": v for k, v in inner.items()} if isinstance(inner, dict) else {}
    o = Options(flat)
    if len(processes) > 1:
        o.notes.append(f"config.process: the first of {len(processes)} is taken")
    name, folder = config.get("name"), o.take("training_folder", str)
    if isinstance(name, str) or folder:
        parts = [part.rstrip("/") for part in (folder, name) if isinstance(part, str) and part]
        o.put("run.output_dir", "/".join(parts), "training_folder and name")
    o.copy("model.name_or_path", "model.init_from", str)
    if o.take("model.quantize", bool):
        o.put("lora.base_precision", "int8", "model.quantize")
    _network(o)
    sources = _datasets(o)
    _train(o, sources, base)
    _samples(o)
    o.leave(_REASONS)
    o.quiet(_QUIET)
    o.rest()
    return o


def _network(o: Options) -> None:
    o.copy("trigger_word", "lora.trigger", str)
    if not any(name.startswith("network.") for name in o.values):
        o.put("objective.kind", "full", "there is no network")
        return
    kind = o.choose("network.type", "lora.kind", _KINDS)
    rank, alpha = o.take("network.linear", int), o.take("network.linear_alpha", float)
    if kind == "lokr":
        if o.take("network.lokr_full_rank", bool):
            o.put("lora.full_matrix", True, "network.lokr_full_rank")
            rank = alpha = None
        o.copy("network.lokr_factor", "lora.factor", int)
    o.quiet(["network.lokr_factor"])
    o.put("lora.rank", rank, "network.linear")
    o.put("lora.alpha", alpha, "network.linear_alpha")
    if kind == "lora":
        o.copy("network.dropout", "lora.dropout", float, lambda share: share or None)


def _datasets(o: Options) -> list[dict[str, Any]]:
    listed = o.values.get("datasets")
    trigger = o.values.get("trigger_word")
    sources = []
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, dict):
            continue
        inner = Options(one)
        path = inner.take("folder_path", str) or inner.take("dataset_path", str)
        if path is None:
            continue
        source: dict[str, Any] = {"path": path}
        if (repeats := inner.take("num_repeats", int)) and repeats > 1:
            source["repeats"] = repeats
        if words := inner.take("default_caption", str):
            source["caption"] = words
        if isinstance(trigger, str) and trigger:
            source["trigger"] = trigger
        if inner.take("is_reg", bool):
            source["prior"] = True
        sources.append(source)
        _about_all(o, inner)
        o.notes += [f"dataset {shown(path)}, {note}" for note in inner.notes]
    if sources:
        o.put("data.sources", sources, "datasets")
    return sources


def _about_all(o: Options, inner: Options) -> None:
    inner.copy("caption_dropout_rate", "objective.dropout_joint", float, lambda share: share or None)
    inner.copy("flip_x", "data.flip", bool, lambda on: 0.5 if on else None)
    inner.copy("random_crop", "data.crop", bool, lambda on: "random" if on else None)
    if inner.take("cache_latents_to_disk", bool) or inner.take("cache_latents", bool):
        inner.put("data.cache.latents", True, "cache_latents")
    sides = inner.values.get("resolution")
    numbers = [n for n in (sides if isinstance(sides, list) else [sides]) if type(n) is int]
    if numbers:
        inner.put("data.resolution", max(numbers), "resolution")
        inner.put("data.buckets.enabled", True, "it always buckets")
        if len(numbers) > 1:
            inner.note("resolution", "one size is trained in a run: the largest")
    inner.leave(
        {
            "shuffle_tokens": "captions are used as they are written",
            "token_dropout_rate": "captions are used as they are written",
            "keep_tokens": "captions are used as they are written",
            "mask_path": "use data.mask with a source's mask_dir",
            "control_path": "objective.kind = 'controlnet' takes a source's control_dir",
            "network_weight": "use repeats",
            "flip_y": "has no counterpart",
            "num_frames": "pictures are trained here",
        }
    )
    inner.quiet(
        ["resolution", "caption_ext", "cache_latents", "cache_latents_to_disk", "shrink_video_to_frames"]
    )
    inner.quiet(["fps", "controls", "do_i2v", "type", "dataset_path", "buckets"])
    inner.rest()
    o.choices |= {key: c for key, c in inner.choices.items() if key not in o.choices}


def _train(o: Options, sources: list[dict[str, Any]], base: Path) -> None:
    o.copy("train.batch_size", "run.batch_size", int)
    for name in ("train.gradient_accumulation_steps", "train.gradient_accumulation"):
        o.copy(name, "run.grad_accumulation", int)
    o.copy("train.steps", "run.steps", int)
    put_steps(o, "train.steps", None, sources, base)
    o.copy("train.gradient_checkpointing", "run.gradient_checkpointing", bool)
    o.choose("train.optimizer", "optimizer.name", OPTIMIZERS)
    o.copy("train.lr", "optimizer.lr", float)
    more = o.values.get("train.optimizer_params")
    o.quiet(["train.optimizer_params"])
    inner = Options(more if isinstance(more, dict) else {})
    inner.copy("weight_decay", "optimizer.weight_decay", float)
    inner.rest()
    o.choices |= {key: c for key, c in inner.choices.items() if key not in o.choices}
    o.notes += [f"train.optimizer_params, {note}" for note in inner.notes]
    o.choose("train.lr_scheduler", "schedule.kind", SCHEDULES)
    o.choose("train.dtype", "run.precision", PRECISION)
    o.copy("train.max_grad_norm", "run.clip_norm", float)
    o.copy("train.noise_offset", "objective.noise_offset", float, lambda size: size or None)
    put_text_encoders(o, bool(o.take("train.train_text_encoder", bool)), None, "train.train_text_encoder")
    ema = o.values.get("train.ema_config")
    if isinstance(ema, dict):
        own = Options(ema)
        own.copy("use_ema", "ema.enabled", bool)
        own.copy("ema_decay", "ema.decay", float)
        o.choices |= own.choices
    o.choose("save.dtype", "checkpoint.export_dtype", DTYPES)
    o.copy("save.save_every", "checkpoint.every", int)
    o.copy("save.max_step_saves_to_keep", "checkpoint.keep_last", int)


def _samples(o: Options) -> None:
    prompts = o.values.get("sample.prompts")
    o.quiet(["sample.prompts"])
    trigger = o.values.get("trigger_word")
    texts = [str(p).replace("[trigger]", str(trigger or "")) for p in prompts or [] if isinstance(p, str)]
    if not texts:
        o.quiet(name for name in o.values if name.startswith("sample."))
        return
    o.put("samples.prompts", texts, "sample.prompts")
    for name, key, kind in (
        ("sample_every", "every", int),
        ("seed", "seed", int),
        ("neg", "negative", str),
        ("guidance_scale", "cfg", float),
        ("sample_steps", "steps", int),
        ("width", "width", int),
        ("height", "height", int),
    ):
        o.copy(f"sample.{name}", f"samples.{key}", kind)
