"""Settings of kohya's sd-scripts (TOML, with its dataset file) and of its GUI (JSON)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...untrusted import read_toml
from .common import (
    DTYPES,
    OPTIMIZERS,
    PRECISION,
    SCHEDULES,
    put_steps,
    put_text_encoders,
    put_warmup,
)
from .options import Options, shown

MARKS = ("pretrained_model_name_or_path", "network_module", "network_dim", "train_data_dir", "LoRA_type")

_KINDS: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("lora", "locon", "standard", "loraxl"), ("lora", "")),
    **dict.fromkeys(("loha", "lycoris/loha"), ("loha", "")),
    **dict.fromkeys(("lokr", "lycoris/lokr"), ("lokr", "")),
    **dict.fromkeys(("lycoris/locon", "kohyalocon", "kohyadylora", "dylora"), ("lora", "as a plain LoRA")),
}
_FULL = 8192
_NO_CONVOLUTIONS = "for convolutions, which are not trained here"
_CAPTIONS = (
    "captions are used as they are written: give several per picture instead (data.sources.caption_lines)"
)
_REASONS = {
    "clip_skip": "BERT and mT5 are read as HunyuanDiT was trained: at their last layer",
    "max_token_length": "BERT's 77 and mT5's 256 tokens are the model's own",
    "full_fp16": "trained weights are kept in fp32",
    "full_bf16": "trained weights are kept in fp32; run.weights = 'bf16' with adamw_8bit keeps them in bf16",
    "v2": "another model",
    "v_parameterization": "the model's file says what it predicts",
    "zero_terminal_snr": "the noise schedule is the model's own",
    "beta_end": "the noise schedule is the model's own; model.info.diffusion.beta_end can set it",
    "scale_v_pred_loss_like_noise_pred": "use objective.weighting",
    "debiased_estimation_loss": "use objective.weighting = 'min_snr_v'",
    "multires_noise_iterations": "use objective.noise_offset",
    "multires_noise_discount": "use objective.noise_offset",
    "adaptive_noise_scale": "use objective.noise_offset",
    "ip_noise_gamma": "has no counterpart",
    "min_timestep": "all timesteps are trained; objective.timesteps says how they are drawn",
    "max_timestep": "all timesteps are trained; objective.timesteps says how they are drawn",
    "loss_type": "the loss is the mean square",
    "scale_weight_norms": "use optimizer.weight_decay",
    "shuffle_caption": _CAPTIONS,
    "keep_tokens": _CAPTIONS,
    "keep_tokens_separator": _CAPTIONS,
    "caption_tag_dropout_rate": _CAPTIONS,
    "caption_dropout_every_n_epochs": "use objective.dropout_joint",
    "weighted_captions": "captions have no weights here",
    "token_warmup_step": _CAPTIONS,
    "color_aug": "has no counterpart",
    "face_crop_aug_range": "has no counterpart; data.mask makes a part count more",
    "masked_loss": "use data.mask with a source's mask_dir",
    "conditioning_data_dir": "control pictures and masks are data.sources.control_dir and mask_dir",
    "bucket_no_upscale": "pictures are scaled up to their bucket; data.min_side leaves out small ones",
    "metadata_file": "make a .jsonl of it, which data.sources takes",
    "in_json": "make a .jsonl of it, which data.sources takes",
    "conv_dim": _NO_CONVOLUTIONS,
    "conv_alpha": _NO_CONVOLUTIONS,
    "block_dims": "use lora.rank_pattern",
    "block_alphas": "use lora.alpha_pattern",
    "down_lr_weight": "use optimizer.groups",
    "mid_lr_weight": "use optimizer.groups",
    "up_lr_weight": "use optimizer.groups",
    "module_dropout": "use lora.rank_dropout",
    "network_train_text_encoder_only": "the DiT is always trained",
    "base_weights": "merge them into the base first: hydit lora merge",
    "sample_prompts": "copy the prompts into samples.prompts",
    "sample_every_n_steps": "set samples.every and samples.prompts",
    "sample_every_n_epochs": "set samples.every and samples.prompts",
    "resume": "its state is another trainer's: lora.init_from goes on from its LoRA",
    "save_last_n_steps": "use checkpoint.keep_last and keep_every",
    "save_last_n_epochs": "use checkpoint.keep_last and keep_every",
    "lr_scheduler_num_cycles": "schedules have no restarts here",
    "lr_scheduler_power": "schedule.kind = 'linear' is the polynomial of power 1",
    "lr_scheduler_args": "has no counterpart",
    "lr_scheduler_type": "has no counterpart",
    "deepspeed": "start with torchrun",
    "blocks_to_swap": "use lora.base_precision and run.gradient_checkpointing",
    "extra_accelerate_launch_args": "start with torchrun",
    "LyCORIS_preset": "use lora.targets",
}
# Of speed, logs and files, or of what the model's own file says.
_QUIET = (
    *(
        "xformers",
        "sdpa",
        "mem_eff_attn",
        "use_extra_cond",
        "lowram",
        "highvram",
        "no_half_vae",
        "torch_compile",
    ),
    *(
        "persistent_data_loader_workers",
        "cache_latents_to_disk",
        "vae_batch_size",
        "disable_mmap_load_safetensors",
    ),
    *("cache_text_encoder_outputs_to_disk", "logging_dir", "log_with", "log_prefix", "log_tracker_name"),
    *("save_model_as", "save_state", "save_state_on_train_end", "no_metadata", "training_comment"),
    *(
        "reg_data_dir",
        "prior_loss_weight",
        "output_name",
        "model_list",
        "additional_parameters",
        "tokenizer_cache_dir",
    ),
    *(
        "num_processes",
        "num_machines",
        "num_cpu_threads_per_process",
        "main_process_port",
        "multi_gpu",
        "gpu_ids",
    ),
    *(
        "dynamo_backend",
        "dynamo_mode",
        "console_log_level",
        "wandb_run_name",
        "wandb_api_key",
        "huggingface_token",
    ),
    *("caption_extension", "debug_dataset", "sdxl", "save_as_bool", "max_grad_norm_text_encoder"),
)


def is_dataset(values: Mapping[str, Any]) -> bool:
    """Whether a file is the one that ``--dataset_config`` names."""
    return isinstance(values.get("datasets"), list)


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a TOML file: those of tables count as if they stood outside of them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= value if isinstance(value, dict) and name != "general" else {name: value}
    return found


def read(values: dict[str, Any], base: Path) -> Options:
    """The options of a file of kohya's trainer, without tables (see :func:`flat`)."""
    options = Options(values)
    sources = _data(options, values if is_dataset(values) else None, base)
    _model(options)
    _network(options)
    _optimizer(options)
    _run(options, sources, base)
    options.leave(_REASONS)
    options.quiet(_QUIET)
    options.rest()
    return options


def _model(o: Options) -> None:
    o.copy("pretrained_model_name_or_path", "model.init_from", str)
    o.copy("vae", "model.vae", str)
    folder, name = o.take("output_dir", str), o.take("output_name", str)
    if folder or name:
        joined = f"{folder.rstrip('/')}/{name}" if folder and name else folder or name
        o.put("run.output_dir", joined, "output_dir" + (" and output_name" if name else ""))


def _network(o: Options) -> None:
    arguments = dict(_arguments(o, "network_args"))
    for name in (
        "factor",
        "decompose_both",
        "full_matrix",
        "rank_dropout",
        "use_tucker",
        "algo",
        "train_norm",
    ):
        if name in o.values:  # of the GUI
            arguments.setdefault(name, o.take(name, str))
    inner = Options({**arguments, "LoRA_type": o.take("LoRA_type", str)})
    module = o.take("network_module", str) or "networks.lora"
    told = str(inner.values.get("algo") or inner.take("LoRA_type", str) or "lora").lower().replace(" ", "")
    kind, but = _KINDS.get(told, ("lora", f"{shown(told)} is not trained here"))
    o.put(
        "lora.kind",
        kind,
        f"{module.rpartition('.')[0] or module}, {shown(told)}" + (f": {but}" if but else ""),
    )
    rank = o.take("network_dim", int)
    if kind == "lokr" and rank is not None and rank > _FULL:
        o.put("lora.full_matrix", True, f"network_dim = {rank}")
    else:
        o.put("lora.rank", rank, "network_dim")
        o.copy("network_alpha", "lora.alpha", float, lambda a: a or None)
    o.quiet(["network_alpha"])
    if (dropout := o.take("network_dropout", float)) and kind == "lora":
        o.put("lora.dropout", dropout, "network_dropout")
    elif dropout:
        o.note("network_dropout", "LoHa and LoKr have none, there either; lora.rank_dropout drops rows")
    o.copy("network_weights", "lora.init_from", str)
    o.copy("lora_network_weights", "lora.init_from", str)
    inner.quiet(["algo"])
    if kind == "lokr":
        inner.copy("factor", "lora.factor", int, lambda n: n or None)
        inner.copy("decompose_both", "lora.decompose_both", bool, lambda on: on or None)
        inner.copy("full_matrix", "lora.full_matrix", bool, lambda on: on or None)
    if kind == "lora":
        inner.copy("dora_wd", "lora.dora", bool, lambda on: on or None)
        for name in ("loraplus_unet_lr_ratio", "loraplus_lr_ratio"):
            inner.copy(name, "optimizer.loraplus_lr_ratio", float)
    else:
        inner.copy("rank_dropout", "lora.rank_dropout", float, lambda share: share or None)
    inner.copy("rs_lora", "lora.rslora", bool, lambda on: on or None)
    inner.leave(
        {
            **dict.fromkeys(
                ("conv_dim", "conv_alpha", "use_tucker", "use_cp", "use_conv_cp"), _NO_CONVOLUTIONS
            ),
            "preset": "use lora.targets; what it is set to here is its default, attention",
            "module_dropout": "use lora.rank_dropout",
            "rank_dropout": "a LoRA has lora.dropout",
            "train_norm": "norms are not trained",
            "dora_wd": "DoRA is trained of a LoRA alone",
            "use_scalar": "has no counterpart",
            "dropout": "LoHa and LoKr have none, there either",
            "factor": "of a LoKr alone",
            "decompose_both": "of a LoKr alone",
        }
    )
    inner.rest()
    o.choices |= {key: c for key, c in inner.choices.items() if key not in o.choices}
    o.notes += [f"network_args, {note}" for note in inner.notes]


def _arguments(o: Options, name: str) -> Iterator[tuple[str, str]]:
    """``key=value``, as a list or with blanks between."""
    given = o.values.get(name)
    o.quiet([name])
    if isinstance(given, str):
        given = given.split()
    if not isinstance(given, list):
        if given is not None:
            o.note(name, "expected a list of key=value; left out")
        return
    for one in given:
        key, sign, value = str(one).partition("=")
        if sign:
            yield key.strip(), value.strip().strip("\"'")
        else:
            o.notes.append(f"{name}: {shown(one)} is no key=value; left out")


def _optimizer(o: Options) -> None:
    name = o.choose("optimizer_type", "optimizer.name", OPTIMIZERS)
    o.choose("optimizer", "optimizer.name", OPTIMIZERS)
    if o.take("use_8bit_adam", bool) and name is None:
        o.put("optimizer.name", "adamw_8bit", "use_8bit_adam")
    for key in ("unet_lr", "learning_rate"):
        o.copy(key, "optimizer.lr", float, lambda rate: rate or None)
    given = Options(dict(_arguments(o, "optimizer_args")))
    given.copy("weight_decay", "optimizer.weight_decay", float)
    given.copy("eps", "optimizer.eps", float)
    if betas := given.take("betas", str):
        pair = re.findall(r"[\d.]+(?:e-?\d+)?", betas)[:2]
        given.put("optimizer.betas", [float(b) for b in pair if b.count(".") < 2], "betas")
    given.copy("d_coef", "optimizer.args", float, lambda d: {"d_coef": d})
    given.leave(
        dict.fromkeys(("decouple", "use_bias_correction", "safeguard_warmup"), "set as its authors advise")
    )
    given.quiet(["relative_step", "scale_parameter", "warmup_init"])
    given.rest()
    o.choices |= {key: c for key, c in given.choices.items() if key not in o.choices}
    o.notes += [f"optimizer_args, {note}" for note in given.notes]
    o.copy("max_grad_norm", "run.clip_norm", float)
    o.choose("lr_scheduler", "schedule.kind", SCHEDULES)
    o.copy("noise_offset", "objective.noise_offset", float, lambda size: size or None)
    if gamma := o.take("min_snr_gamma", float):
        o.put("objective.weighting", "min_snr_v", "min_snr_gamma, as it weights a v-prediction")
        o.put("objective.snr_gamma", gamma, "min_snr_gamma")
    rate = o.take("text_encoder_lr", float) if not isinstance(o.values.get("text_encoder_lr"), list) else None
    put_text_encoders(
        o, rate is not None and not o.take("network_train_unet_only", bool), rate, "text_encoder_lr"
    )
    o.quiet(["network_train_unet_only"])


def _run(o: Options, sources: list[dict[str, Any]], base: Path) -> None:
    o.copy("train_batch_size", "run.batch_size", int)
    o.copy("gradient_accumulation_steps", "run.grad_accumulation", int)
    o.copy("max_train_steps", "run.steps", int, lambda n: n or None)
    name = "max_train_epochs" if o.take("max_train_epochs", float) else "epoch"
    epoch = put_steps(o, name, o.take(name, float), sources, base)
    o.quiet(["epoch"])
    put_warmup(o, "lr_warmup_steps", o.take("lr_warmup_steps", float))
    put_warmup(o, "lr_warmup", (o.take("lr_warmup", float) or 0) / 100)
    o.choose("mixed_precision", "run.precision", PRECISION)
    o.choose("save_precision", "checkpoint.export_dtype", DTYPES)
    o.copy("gradient_checkpointing", "run.gradient_checkpointing", bool)
    if o.take("fp8_base", bool):
        o.put("lora.base_precision", "fp8", "fp8_base")
    o.copy("seed", "run.seed", int)
    o.copy("max_data_loader_n_workers", "data.workers", int)
    o.copy("save_every_n_steps", "checkpoint.every", int, lambda n: n or None)
    if every := o.take("save_every_n_epochs", float):
        if epoch:
            o.put("checkpoint.every", max(1, round(every * epoch)), "save_every_n_epochs x steps of an epoch")
        else:
            o.note("save_every_n_epochs", "the steps of an epoch are not known: set checkpoint.every")
    if o.take("cache_latents", bool):
        o.put("data.cache.latents", True, "cache_latents")
    if o.take("cache_text_encoder_outputs", bool):
        o.put("data.cache.text", True, "cache_text_encoder_outputs")


# -- pictures ------------------------------------------------------------------------------------------------


def _data(o: Options, dataset: dict[str, Any] | None, base: Path) -> list[dict[str, Any]]:
    """The sources, and what their files say of all pictures."""
    named = o.take("dataset_config", str)
    if dataset is None and named:
        path = next((p for p in (base / named, Path(named)) if p.is_file()), None)
        if path is None:
            o.note("dataset_config", "not found: set data.sources, or import that file for itself")
        else:
            dataset = read_toml(path, error=ConfigError)
    sources = _subsets(o, dataset) if dataset is not None else _folders(o, base)
    if sources:
        o.put("data.sources", sources, "dataset_config" if dataset is not None else "train_data_dir")
    for name, key in _ABOUT_ALL.items():
        o.copy(name, *key)
    _resolution(o)
    return sources


_ABOUT_ALL: Mapping[str, tuple[Any, ...]] = {
    "flip_aug": ("data.flip", bool, lambda on: 0.5 if on else None),
    "random_crop": ("data.crop", bool, lambda on: "random" if on else None),
    "enable_bucket": ("data.buckets.enabled", bool),
    "min_bucket_reso": ("data.buckets.min_side", int),
    "max_bucket_reso": ("data.buckets.max_side", int),
    "bucket_reso_steps": ("data.buckets.step", int),
    "caption_dropout_rate": ("objective.dropout_joint", float, lambda share: share or None),
}


def _resolution(o: Options) -> None:
    given = o.values.get("resolution", o.values.get("max_resolution"))
    o.quiet(["resolution", "max_resolution"])
    sides = given if isinstance(given, list) else re.split(r"[,x ]+", str(given)) if given else []
    numbers = [int(side) for side in map(str, sides) if side.isdecimal() and len(side) < 6]
    if len(numbers) == 1 or (len(numbers) == 2 and numbers[0] == numbers[1]):
        o.put("data.resolution", numbers[0], "resolution")
    elif len(numbers) == 2:
        o.put("data.resolution", numbers, "resolution")


def _subsets(o: Options, dataset: dict[str, Any]) -> list[dict[str, Any]]:
    o.quiet(["datasets", "general"])
    general = dataset.get("general")
    general = general if isinstance(general, dict) else {}
    sources = []
    for one in filter(_is_table, dataset.get("datasets", [])):
        outer = {**general, **{k: v for k, v in one.items() if k != "subsets"}}
        for subset in filter(_is_table, one.get("subsets") or []):
            inner = Options({**outer, **subset})
            if source := _source(inner):
                sources.append(source)
            for name in ("resolution", "batch_size", *_ABOUT_ALL):  # of all pictures, here
                if name in inner.values:
                    o.values.setdefault(
                        "train_batch_size" if name == "batch_size" else name, inner.values[name]
                    )
            inner.quiet(["resolution", "batch_size", *_ABOUT_ALL])
            inner.leave(_REASONS)
            inner.quiet(_QUIET)
            inner.rest()
            o.notes += [note for note in inner.notes if note not in o.notes]
    return sources


def _source(o: Options) -> dict[str, Any] | None:
    folder = o.take("image_dir", str)
    if folder is None:
        return None
    source: dict[str, Any] = {"path": folder}
    if (repeats := o.take("num_repeats", int)) and repeats > 1:
        source["repeats"] = repeats
    if words := o.take("class_tokens", str):
        source["caption"] = words
    if words := o.take("caption_prefix", str):
        source["trigger"] = words.strip().rstrip(",")
    if o.take("is_reg", bool):
        source["prior"] = True
    return source


def _folders(o: Options, base: Path) -> list[dict[str, Any]]:
    """``train_data_dir``: folders in it that are called ``10_name of the thing``."""
    sources: list[dict[str, Any]] = []
    for name, prior in (("train_data_dir", False), ("reg_data_dir", True)):
        folder = o.take(name, str)
        if not folder:
            continue
        try:
            inner = sorted(p.name for p in (base / folder).iterdir() if p.is_dir())
        except (OSError, ValueError):
            inner = []
        matches = [m for m in (re.fullmatch(r"(\d{1,4})_(.+)", one) for one in inner) if m]
        found = [
            {"path": f"{folder.rstrip('/')}/{m[0]}", "repeats": max(1, int(m[1])), "caption": m[2].strip()}
            for m in matches
        ]
        for source in found or [{"path": folder}]:
            sources.append({**source, "prior": True} if prior else source)
    return sources


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)
