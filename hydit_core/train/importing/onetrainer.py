"""Settings of OneTrainer (JSON), with its concepts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...untrusted import read_json
from .common import DTYPES, OPTIMIZERS, PRECISION, SCHEDULES, put_steps, put_text_encoders, put_warmup
from .options import Options, shown

MARKS = ("training_method", "base_model_name", "workspace_dir", "concept_file_name")

_METHODS: Mapping[str, tuple[Any, str]] = {"lora": ("lora", ""), "finetune": ("full", "")}
_KINDS: Mapping[str, tuple[Any, str]] = {
    "lora": ("lora", ""),
    "loha": ("loha", ""),
    "lokr": ("lokr", ""),
    "oft2": ("lora", "OFT is not trained here"),
}
_TIMESTEPS: Mapping[str, tuple[Any, str]] = {
    "uniform": ("uniform", ""),
    "logitnormal": ("logit_normal", ""),
    "sigmoid": ("logit_normal", "the same, by another name"),
}
_REASONS = {
    "masked_training": "use data.mask with a source's mask_dir",
    "lora_layers": "use lora.targets",
    "layer_filter": "use lora.targets, or optimizer.groups for all weights",
    "sample_definition_file_name": "copy the prompts into samples.prompts",
    "samples": "copy the prompts into samples.prompts",
    "continue_last_backup": "its state is another trainer's: lora.init_from goes on from its LoRA",
    "custom_learning_rate_scheduler": "has no counterpart",
    "learning_rate_scaler": "optimizer.lr is what each step uses",
    "align_prop": "has no counterpart",
    "perturbation_noise_weight": "use objective.noise_offset",
    "mae_strength": "the loss is the mean square",
    "log_cosh_strength": "the loss is the mean square",
    "min_noising_strength": "all timesteps are trained",
    "max_noising_strength": "all timesteps are trained",
    "rescale_noise_scheduler_to_zero_terminal_snr": "the noise schedule is the model's own",
    "force_v_prediction": "the model's file says what it predicts",
    "force_epsilon_prediction": "the model's file says what it predicts",
    "embedding": "embeddings are not trained",
    "additional_embeddings": "embeddings are not trained",
    "bundle_additional_embeddings": "embeddings are not trained",
    "layer_offload_fraction": "use run.gradient_checkpointing and lora.base_precision",
    "prior": "has no counterpart",
    "text_encoder_2": "lora.train_t5 = true trains adapters in mT5",
    "lora_weight_dtype": "trained weights are kept in fp32",
    "output_model_destination": "lora.safetensors stands in run.output_dir",
    "vae": "stays as it is",
    "validation": "set data.validation, validation.every",
}
_QUIET = (
    *("__version", "debug_mode", "debug_dir", "cache_dir", "tensorboard", "tensorboard_expose", "only_cache"),
    *("include_train_config", "secrets", "output_model_format", "train_device", "temp_device", "model_type"),
    *("weight_dtype", "fallback_train_dtype", "clear_cache_before_training", "latent_caching", "concepts"),
    *("tensorboard_port", "tensorboard_always_on", "validate_after", "validate_after_unit", "backup_after"),
    *(
        "backup_after_unit",
        "rolling_backup",
        "rolling_backup_count",
        "backup_before_save",
        "samples_to_tensorboard",
    ),
    *(
        "optimizer_defaults",
        "enable_async_offloading",
        "enable_activation_offloading",
        "compile",
        "save_filename_prefix",
    ),
    *(
        "sample_image_format",
        "sample_video_format",
        "sample_audio_format",
        "gradient_reduce_precision",
        "multi_gpu",
    ),
    *(
        "sample_after",
        "sample_after_unit",
        "sample_skip_first",
        "save_skip_first",
        "learning_rate_cycles",
        "cloud",
    ),
    *(
        "unmasked_probability",
        "unmasked_weight",
        "normalize_masked_area_loss",
        "masked_prior_preservation_weight",
    ),
    *(
        "mse_strength",
        "loss_scaler",
        "gamma",
        "noising_weight",
        "noising_bias",
        "dataloader_threads",
        "device_indexes",
    ),
    *(
        "text_encoder_layer_skip",
        "epochs",
        "concept_file_name",
        "non_ema_lora",
        "frames",
        "attention_mechanism",
    ),
    *(
        "ema_update_step_interval",
        "embedding_learning_rate",
        "embedding_weight_dtype",
        "preserve_embedding_norm",
    ),
    *(
        "dropout_probability",
        "rank_pattern",
        "lora_decompose_norm_epsilon",
        "lora_decompose_output_axis",
        "unet",
    ),
    *(
        "transformer",
        "prior_dtype",
        "text_encoder",
        "optimizer",
        "timestep_shift",
        "dynamic_timestep_shifting",
    ),
)


def read(values: dict[str, Any], base: Path) -> Options:
    """The options of a file of OneTrainer."""
    o = Options(values)
    if o.choose("training_method", "objective.kind", _METHODS) is None:
        raise ConfigError(
            f"training_method = {shown(values.get('training_method'))}: LORA and FINE_TUNE have a counterpart"
        )
    o.copy("base_model_name", "model.init_from", str)
    o.copy("workspace_dir", "run.output_dir", str)
    if o.choices["objective", "kind"].value == "lora":
        _network(o)
    sources = _concepts(o, base)
    _optimizer(o)
    _run(o, sources, base)
    o.leave(_REASONS)
    o.quiet(_QUIET)
    o.quiet(name for name in values if re.fullmatch(r"(vae|unet|text_encoder(_\d)?|prior|decoder)_.*", name))
    o.rest()
    return o


def _network(o: Options) -> None:
    kind = o.choose("peft_type", "lora.kind", _KINDS)
    o.copy("lora_rank", "lora.rank", int)
    o.copy("lora_alpha", "lora.alpha", float)
    o.copy("lora_model_name", "lora.init_from", str)
    if kind in (None, "lora"):
        o.copy("lora_decompose", "lora.dora", bool, lambda on: on or None)
        o.copy("dropout_probability", "lora.dropout", float, lambda share: share or None)


def _optimizer(o: Options) -> None:
    table = o.values.get("optimizer")
    inner = Options(table if isinstance(table, dict) else {"optimizer": table})
    inner.choose("optimizer", "optimizer.name", OPTIMIZERS)
    inner.copy("weight_decay", "optimizer.weight_decay", float)
    inner.copy("eps", "optimizer.eps", float)
    betas = [inner.take(name, float) for name in ("beta1", "beta2")]
    if None not in betas:
        inner.put("optimizer.betas", betas, "beta1 and beta2")
    o.choices |= {key: c for key, c in inner.choices.items() if key not in o.choices}
    o.notes += inner.notes
    o.copy("learning_rate", "optimizer.lr", float)
    o.choose("learning_rate_scheduler", "schedule.kind", SCHEDULES)
    o.copy("learning_rate_min_factor", "schedule.min_lr", float, lambda share: share or None)
    o.copy("clip_grad_norm", "run.clip_norm", float)
    o.copy("offset_noise_weight", "objective.noise_offset", float, lambda size: size or None)
    o.choose("timestep_distribution", "objective.timesteps", _TIMESTEPS)
    weighting, gamma = o.take("loss_weight_fn", str), o.take("loss_weight_strength", float)
    if weighting == "MIN_SNR_GAMMA":
        o.put("objective.weighting", "min_snr_v", "loss_weight_fn, as it weights a v-prediction")
        o.put("objective.snr_gamma", gamma, "loss_weight_strength")
    elif weighting not in (None, "CONSTANT"):
        o.note("loss_weight_fn", "has no counterpart; left out")
    encoder = o.values.get("text_encoder")
    if isinstance(encoder, dict):
        own = Options(encoder)
        rate = own.take("learning_rate", float)
        put_text_encoders(o, bool(own.take("train", bool)), rate, "text_encoder.train")


def _run(o: Options, sources: list[dict[str, Any]], base: Path) -> None:
    o.copy("batch_size", "run.batch_size", int)
    o.copy("gradient_accumulation_steps", "run.grad_accumulation", int)
    epoch = put_steps(o, "epochs", o.take("epochs", float), sources, base)
    put_warmup(o, "learning_rate_warmup_steps", o.take("learning_rate_warmup_steps", float))
    o.choose("train_dtype", "run.precision", PRECISION)
    o.choose("output_dtype", "checkpoint.export_dtype", DTYPES)
    checkpointing = o.take("gradient_checkpointing", str)
    if checkpointing is not None or o.values.get("gradient_checkpointing") is True:
        o.put("run.gradient_checkpointing", checkpointing != "OFF", "gradient_checkpointing")
    o.notes[:] = [note for note in o.notes if not note.startswith("gradient_checkpointing = True: expected")]
    o.copy("seed", "run.seed", int)
    ema = o.take("ema", str)
    if ema is not None:
        o.put("ema.enabled", ema != "OFF", f"ema = {shown(ema)}")
        o.copy("ema_decay", "ema.decay", float)
    every, unit = o.take("save_every", float), o.take("save_every_unit", str)
    if every and unit == "STEP":
        o.put("checkpoint.every", max(1, round(every)), "save_every")
    elif every and unit == "EPOCH" and epoch:
        o.put("checkpoint.every", max(1, round(every * epoch)), "save_every x steps of an epoch")
    if o.take("latent_caching", bool):
        o.put("data.cache.latents", True, "latent_caching")
    o.copy("aspect_ratio_bucketing", "data.buckets.enabled", bool)
    sides = [int(n) for n in re.findall(r"\d{1,5}", o.take("resolution", str) or "")]
    if sides:
        o.put("data.resolution", sides[0], "resolution")
        if len(set(sides)) > 1:
            o.note("resolution", "one size is trained in a run: the first")
    o.take("ema_decay", float)


def _concepts(o: Options, base: Path) -> list[dict[str, Any]]:
    listed, named = o.values.get("concepts"), o.take("concept_file_name", str)
    if not isinstance(listed, list) and named:
        path = next((p for p in (base / named, Path(named)) if p.is_file()), None)
        if path is None:
            o.note("concept_file_name", "not found: set data.sources")
        else:
            listed = read_json(path, error=ConfigError, kind=list)
    sources = [s for one in listed or [] if isinstance(one, dict) and (s := _source(o, Options(one)))]
    if sources:
        o.put("data.sources", sources, "concepts")
    return sources


def _source(o: Options, concept: Options) -> dict[str, Any] | None:
    path = concept.take("path", str)
    if path is None or concept.take("enabled", bool) is False:
        return None
    source: dict[str, Any] = {"path": path}
    repeats = concept.take("balancing", float)
    if repeats and repeats > 1 and concept.take("balancing_strategy", str) != "SAMPLES":
        source["repeats"] = round(repeats)
    elif repeats and repeats != 1:
        concept.note("balancing", "an epoch shows each picture at least once")
    kind = concept.take("type", str)
    if kind == "VALIDATION":
        source["validation"] = True
    elif kind == "PRIOR_PREDICTION":
        source["prior"] = True
    text, image = concept.values.get("text"), concept.values.get("image")
    words = Options(text if isinstance(text, dict) else {})
    if words.take("prompt_source", str) == "concept":
        words.note("prompt_path", "captions are read from a .txt beside each picture")
    if words.take("prompt_source", str) == "filename":
        words.note("prompt_source", "captions are read from a .txt beside each picture, not from its name")
    if words.take("enable_tag_shuffling", bool):
        words.note("enable_tag_shuffling", "captions are used as they are written")
    looks = Options(image if isinstance(image, dict) else {})
    if looks.take("enable_random_flip", bool):
        o.put("data.flip", 0.5, "enable_random_flip")
    for name in (
        "enable_random_rotate",
        "enable_random_brightness",
        "enable_random_contrast",
        "enable_random_hue",
    ):
        if looks.take(name, bool):
            looks.note(name, "has no counterpart")
    o.notes += [f"concept {shown(path)}, {note}" for part in (concept, words, looks) for note in part.notes]
    return source
