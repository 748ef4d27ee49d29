"""What other trainers call the keys of a configuration, for those who bring their habits along.

Keys of kohya's scripts, OneTrainer, ai-toolkit and diffusers' examples, each with what it is here, or why it
is not. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

_SAME: Mapping[str, str] = {
    "model.init_from": "pretrained_model_name_or_path name_or_path base_model_name base_model checkpoint",
    "model.vae": "vae_path pretrained_vae_model_name_or_path vae_override",
    "data.sources": "datasets concepts train_data_dir folder_path dataset_config subsets image_dir",
    "data.resolution": "image_size max_resolution",
    "data.buckets.enabled": "enable_bucket enable_ar_bucket aspect_ratio_bucketing",
    "data.buckets.step": "bucket_reso_steps",
    "data.buckets.min_side": "min_bucket_reso",
    "data.buckets.max_side": "max_bucket_reso",
    "data.sources.repeats": "num_repeats balancing dataset_repeats",
    "data.sources.caption": "class_tokens default_caption instance_prompt",
    "data.sources.trigger": "trigger_word caption_prefix activation_tag",
    "data.sources.prior": "is_reg reg_data_dir class_data_dir prior_preservation with_prior_preservation",
    "data.sources.validation": "validation_concepts",
    "data.prior.weight": "prior_loss_weight",
    "data.prior.prompts": "class_prompt num_class_images diff_output_preservation "
    "diff_output_preservation_class blank_prompt_preservation",
    "data.flip": "flip_aug random_flip enable_random_flip flip_x",
    "data.crop": "random_crop center_crop enable_crop_jitter crop_jitter",
    "data.mask": "masked_training masked_loss alpha_mask mask_path",
    "data.mask.outside": "unmasked_weight mask_min_value",
    "data.cache.latents": "cache_latents cache_latents_to_disk latent_caching",
    "data.cache.text": "cache_text_encoder_outputs cache_text_embeddings text_caching",
    "data.cache.dir": "cache_dir",
    "data.workers": "max_data_loader_n_workers dataloader_num_workers dataloader_threads num_workers",
    "data.validation": "validation_split",
    "objective.timesteps": "timestep_distribution timestep_sampling timestep_type weighting_scheme "
    "content_or_style linear_timesteps timestep_bias_strategy",
    "objective.weighting": "loss_weight_fn loss_weighting",
    "objective.snr_gamma": "min_snr_gamma loss_weight_strength",
    "objective.noise_offset": "offset_noise_weight noise_offset_strength",
    "objective.dropout_joint": "caption_dropout_rate caption_dropout_probability uncond_p "
    "proportion_empty_prompts",
    "lora.rank": "network_dim lora_rank linear dim network_rank",
    "lora.alpha": "network_alpha lora_alpha linear_alpha",
    "lora.dropout": "network_dropout lora_dropout",
    "lora.rank_dropout": "module_dropout",
    "lora.dora": "dora_wd use_dora lora_decompose",
    "lora.rslora": "rs_lora use_rslora",
    "lora.factor": "lokr_factor",
    "lora.full_matrix": "lokr_full_rank",
    "lora.rank_pattern": "block_dims network_reg_dims",
    "lora.alpha_pattern": "block_alphas",
    "lora.targets": "network_args target_modules layer_filter only_if_contains",
    "lora.init_from": "network_weights lora_model_name",
    "lora.base_precision": "fp8_base quantize qtype weight_dtype",
    "optimizer.name": "optimizer_type optimizer_name",
    "optimizer.lr": "learning_rate unet_lr base_lr",
    "optimizer.args": "optimizer_args optimizer_params",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "optimizer.eps": "adam_epsilon",
    "optimizer.weight_decay": "adam_weight_decay scale_weight_norms",
    "optimizer.loraplus_lr_ratio": "loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio",
    "optimizer.groups": "down_lr_weight mid_lr_weight up_lr_weight",
    "schedule.kind": "lr_scheduler learning_rate_scheduler lr_scheduler_type",
    "schedule.warmup_steps": "lr_warmup_steps learning_rate_warmup_steps warmup",
    "schedule.min_lr": "lr_scheduler_min_lr_ratio learning_rate_min_factor",
    "run.output_dir": "output_name save_dir workspace_dir logging_dir output_model_destination "
    "training_folder",
    "run.steps": "max_train_steps max_steps total_steps",
    "run.batch_size": "train_batch_size per_device_train_batch_size",
    "run.grad_accumulation": "gradient_accumulation_steps gradient_accumulation",
    "run.clip_norm": "max_grad_norm clip_grad_norm gradient_clipping",
    "run.precision": "mixed_precision train_dtype dtype",
    "run.seed": "random_seed",
    "run.compile": "torch_compile dynamo_backend",
    "run.device": "train_device",
    "ema.enabled": "use_ema",
    "ema.decay": "ema_decay",
    "validation.every": "validate_every validate_after validate_every_n_steps eval_steps",
    "validation.patience": "early_stopping early_stopping_patience stop_training_after",
    "samples.every": "sample_every sample_every_n_steps sample_after validation_steps",
    "samples.prompts": "sample_prompts validation_prompts validation_prompt sample_definition_file_name",
    "samples.negative": "neg negative_prompt",
    "samples.cfg": "guidance_scale cfg_scale",
    "checkpoint.every": "backup_after checkpointing_steps",
    "checkpoint.keep_every": "save_every save_every_n_steps save_after",
    "checkpoint.keep_last": "max_step_saves_to_keep checkpoints_total_limit rolling_backup_count "
    "save_last_n_steps",
    "checkpoint.export_dtype": "save_precision save_dtype output_dtype",
    "metrics.tensorboard": "log_with report_to",
}

_SENTENCES: Mapping[str, str] = {
    "run.steps counts steps; --dry-run says how many epochs that are": "max_train_epochs num_train_epochs "
    "epochs num_epochs",
    "captions are read as they are: give several, of which one is drawn (data.sources.caption_lines)": (
        "shuffle_caption shuffle_tokens keep_tokens enable_tag_shuffling tag_dropout token_dropout_rate "
        "caption_tag_dropout_rate secondary_separator"
    ),
    "captions are .txt files, or a column of a table (data.sources.caption_fields)": "caption_extension "
    "caption_ext",
    "colors of pictures are never changed: what changed is learned": "color_aug random_brightness "
    "random_contrast random_hue random_saturation enable_random_brightness enable_random_hue "
    "face_crop_aug_range",
    "HunyuanDiT's text encoders are used to their last layer": "clip_skip text_encoder_layer_skip",
    "text encoders have the DiT's learning rate; optimizer.groups scales it": (
        "text_encoder_lr text_encoder_lr1 text_encoder_learning_rate"
    ),
    "adapters in text encoders are lora.train_bert and lora.train_t5": (
        "train_text_encoder network_train_unet_only"
    ),
    "the loss is the mean squared error": "loss_type huber_c huber_schedule huber_delta mae_strength "
    "mse_strength",
    "of noise there is objective.noise_offset alone": "multires_noise_iterations multires_noise_discount "
    "adaptive_noise_scale perturbation_noise_weight ip_noise_gamma",
    "the model predicts v, and its schedule stands in its file (model.info.diffusion)": "v_parameterization "
    "v_pred_like_loss zero_terminal_snr noise_scheduler rescale_noise_scheduler_to_zero_terminal_snr "
    "force_v_prediction",
    "trained weights are kept in fp32, or in bf16 with run.weights; what is frozen, in lora.base_precision": (
        "full_fp16 full_bf16 fused_backward_pass stochastic_rounding"
    ),
    "trained weights stay on the device: lora.base_precision and run.gradient_checkpointing make it less": (
        "blocks_to_swap low_vram lowvram layer_offload_fraction layer_offloading_transformer_percent"
    ),
    "all timesteps are trained; objective.timesteps says how they are drawn": "min_timestep max_timestep "
    "min_noising_strength max_noising_strength",
    "HunyuanDiT is no flow model; objective.timesteps says how timesteps are drawn": "flow_shift "
    "discrete_flow_shift timestep_shift dynamic_timestep_shifting",
    "HunyuanDiT's blocks have no convolutions": "conv conv_alpha conv_dim conv_rank use_tucker use_cp",
    "a schedule has no restarts; its end is schedule.min_lr": "lr_scheduler_num_cycles lr_scheduler_power "
    "learning_rate_cycles",
    "checkpoints are always whole; --resume goes on from one": "resume resume_from_checkpoint save_state "
    "continue_last_backup save_state_on_train_end initial_epoch",
    "the first sample pictures are those of step 0": "sample_at_first skip_first_sample disable_sampling",
    "embeddings are not trained; a LoRA with lora.train_bert and a trigger comes nearest": "embedding "
    "embeddings additional_embeddings textual_inversion placeholder_token",
    "the log is a file of the run, for TensorBoard too; nothing is sent to a service": "wandb_run_name "
    "wandb_api_key log_tracker_name",
    "nothing is uploaded": "push_to_hub hub_model_id huggingface_repo_id huggingface_token",
    "pictures are scaled up to their bucket; data.min_side leaves small ones out": "bucket_no_upscale",
    "attention is torch's own": "xformers sdpa mem_eff_attn attention_mechanism flash_attn",
    "files are always .safetensors, for ComfyUI and for peft": "save_model_as output_model_format "
    "network_module network_type",
}

HINTS: Mapping[str, str] = {
    **{other: f"here it is {ours}" for ours, others in _SAME.items() for other in others.split()},
    **{other: sentence for sentence, others in _SENTENCES.items() for other in others.split()},
}
"""By the key's name in other trainers."""
