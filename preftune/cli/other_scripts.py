"""Flags of other training scripts: those with the same meaning are accepted, the others give an error with
the flag to use here, or the reason why there is none.

Names are written with underscores, without leading dashes. They come from diffusers' scripts (text-to-image and DreamBooth, with and
without LoRA, Stable Diffusion and XL), TRL's DDPO and AlignProp, and kohya's sd-scripts (train_network.py); tests/test_flags.py has
them all.
"""

ALIASES = {
    "pretrained_model_name_or_path": "model",
    "pretrained_vae_model_name_or_path": "vae",
    "text_column": "caption_column",
    "train_data_dir": "data",
    "validation_prompt": "validation_prompts",
    "proportion_empty_prompts": "caption_dropout",
    "rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    # kohya's sd-scripts
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs",
    "max_data_loader_n_workers": "dataloader_num_workers",
    "caption_dropout_rate": "caption_dropout",
    "network_alpha": "lora.alpha",
    "network_dim": "lora.rank",
    "torch_compile": "compile",
    # TRL, and the arguments of transformers' Trainer that it inherits
    "lr_scheduler_type": "lr_scheduler",
    "max_steps": "max_train_steps",
    "num_checkpoint_limit": "checkpoints_total_limit",
    "per_device_train_batch_size": "train_batch_size",
    "pretrained_model": "model",
    "pretrained_revision": "revision",
    "resume_from": "resume_from_checkpoint",
    "sample_guidance_scale": "guidance_scale",
    "sample_num_steps": "num_inference_steps",
    "save_total_limit": "checkpoints_total_limit",
    "train_adam_beta1": "adam_beta1",
    "train_adam_beta2": "adam_beta2",
    "train_adam_epsilon": "adam_epsilon",
    "train_adam_weight_decay": "adam_weight_decay",
    "train_gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_learning_rate": "learning_rate",
    "train_max_grad_norm": "max_grad_norm",
    "train_use_8bit_adam": "use_8bit_adam",
    "warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay",
}
"""Flag of another script -> the same flag here."""

SAME = {
    "bf16": "--mixed-precision=bf16",
    "center_crop": "",
    "enable_xformers_memory_efficient_attention": "--attention=xformers",
    "fp16": "--mixed-precision=fp16",
    "fp8_base": "--quantization=fp8",
    "fp8_base_unet": "--quantization=fp8",
    "network_module=networks.lora": "--train=lora",
    "network_train_unet_only": "",
    "optim=adamw_torch": "",
    "optim=adamw_torch_fused": "--fused-adam=True",
    "optimizer=adamw": "",
    "optimizer_type=adamw": "",
    "optimizer_type=adamw8bit": "--use-8bit-adam",
    "output_kohya_format": "--export=kohya",
    "save_model_as=safetensors": "--export=kohya",
    "sdpa": "--attention=sdpa",
    "set_grads_to_none": "",
    "use_lora": "--train=lora",
    "xformers": "--attention=xformers",
}
"""Flag of another script, or flag and value in lower case -> the same here; nothing where it is always so."""

_BUCKETS = "images are scaled to cover --resolution and cut in the middle; there are no buckets"
_CAPTIONS = "captions are used as they are"
_COLLABORATION = "upload the folder of the run with `hf upload`"
_DREAMBOOTH = "DreamBooth is not here"
_EMA = "--ema-decay 0.999"
_EPOCHS = "--max-train-steps, a number of updates"
_IMAGEFOLDER = "--data IMAGEFOLDER"
_LATENTS = "--cache-latents encodes them batch by batch as they are needed"
_LAUNCHER = "it goes before the file, as accelerate launch --num_processes 2 finetune/refl.py; see `accelerate launch --help`"
_LOSS = "the loss is the plain one of the model's own prediction"
_METADATA = "no such metadata is written"
_OPTIMIZER = "AdamW it is; --use-8bit-adam keeps its moments in 8 bits"
_POLICY = "policy gradients are not here"
_PRECISION = "trained weights stay in float32; --mixed-precision is that of the forward pass"
_SCHEDULE = "there are constant, constant_with_warmup, linear and cosine in --lr-scheduler"
_SPLIT = "--validation-prompts FILE; images are generated from prompts, no data are set aside"
_STATE = "--checkpoints-total-limit; each checkpoint has the state, too"
_TEXT_ENCODER = "text encoders stay as they are; preftune pretrain has --train-text-encoder"
_TIMESTEPS = "timesteps are chosen as the model was trained: uniformly"
_TRACKER = "tensorboard/ lies in --output-dir"


def _all(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


ELSEWHERE = {
    **_all("enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale random_crop center_crop", _BUCKETS),
    **_all("face_crop_aug_range skip_image_resolution", _BUCKETS),
    **_all("caption_prefix caption_suffix caption_separator caption_tag_dropout_rate keep_tokens", _CAPTIONS),
    **_all("keep_tokens_separator secondary_separator shuffle_caption enable_wildcard weighted_captions", _CAPTIONS),
    **_all("caption_dropout_every_n_epochs token_warmup_min token_warmup_step", _CAPTIONS),
    **_all("hub_model_id hub_token push_to_hub hf_hub_model_id async_upload save_state_to_huggingface", _COLLABORATION),
    **_all("huggingface_path_in_repo huggingface_repo_id huggingface_repo_type huggingface_repo_visibility", _COLLABORATION),
    **_all("huggingface_token", _COLLABORATION),
    **_all("class_prompt class_data_dir instance_prompt num_class_images with_prior_preservation prior_loss_weight", _DREAMBOOTH),
    **_all("prior_generation_precision class_labels_conditioning reg_data_dir", _DREAMBOOTH),
    **_all("use_ema offload_ema foreach_ema", _EMA),
    **_all("num_train_epochs max_train_epochs num_epochs", _EPOCHS),
    **_all("dataset_name dataset_config_name instance_data_dir in_json dataset_config dataset_class", _IMAGEFOLDER),
    **_all("conditioning_data_dir", _IMAGEFOLDER),
    **_all("vae_batch_size skip_cache_check cache_info", _LATENTS),
    **_all("num_processes local_rank deepspeed zero_stage zero3_init_flag zero3_save_16bit_model dynamo_backend", _LAUNCHER),
    **_all("offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path", _LAUNCHER),
    **_all("ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph fp16_master_weights_and_gradients", _LAUNCHER),
    **_all("snr_gamma min_snr_gamma noise_offset offset_noise noise_offset_random_strength input_perturbation", _LOSS),
    **_all("multires_noise_iterations multires_noise_discount adaptive_noise_scale ip_noise_gamma", _LOSS),
    **_all("ip_noise_gamma_random_strength loss_type huber_schedule huber_c huber_scale", _LOSS),
    **_all("debiased_estimation_loss v_pred_like_loss scale_v_pred_loss_like_noise_pred masked_loss alpha_mask", _LOSS),
    **_all("dream_training dream_detail_preservation do_edm_style_training debug_loss perlin_noise", _LOSS),
    **_all("metadata_author metadata_description metadata_is_negative_embedding metadata_license", _METADATA),
    **_all("metadata_merged_from metadata_preprocessor metadata_tags metadata_thumbnail metadata_title", _METADATA),
    **_all("metadata_trigger_phrase metadata_usage_hint no_metadata training_comment", _METADATA),
    **_all("optimizer optimizer_type optimizer_args optim use_lion_optimizer optimizer_schedulefree_wrapper", _OPTIMIZER),
    **_all("schedulefree_wrapper_args prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup", _OPTIMIZER),
    **_all("prodigy_use_bias_correction fused_backward_pass", _OPTIMIZER),
    **_all("per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count", _POLICY),
    **_all("sample_eta sample_num_batches_per_epoch train_num_inner_epochs train_adv_clip_max", _POLICY),
    **_all("train_clip_range train_timestep_fraction async_reward_computation max_workers", _POLICY),
    **_all("full_fp16 full_bf16 save_precision", _PRECISION),
    **_all("lr_num_cycles lr_power lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_args", _SCHEDULE),
    **_all("lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_decay_steps lr_scheduler_kwargs", _SCHEDULE),
    **_all("validation_split validation_seed max_validation_steps validation_images", _SPLIT),
    **_all("save_state save_state_on_train_end save_last_n_epochs save_last_n_epochs_state save_last_n_steps", _STATE),
    **_all("save_last_n_steps_state", _STATE),
    **_all("text_encoder_lr network_train_text_encoder_only adam_weight_decay_text_encoder train_text_encoder", _TEXT_ENCODER),
    **_all("skip_save_text_encoder clip_skip tokenizer_name max_token_length tokenizer_max_length", _TEXT_ENCODER),
    **_all("text_encoder_use_attention_mask text_encoder_batch_size", _TEXT_ENCODER),
    **_all("timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin timestep_bias_end", _TIMESTEPS),
    **_all("timestep_bias_portion min_timestep max_timestep weighting_scheme logit_mean logit_std mode_scale", _TIMESTEPS),
    **_all("logging_dir logdir log_prefix log_config log_tracker_config log_tracker_name", _TRACKER),
    **_all("wandb_run_name wandb_api_key run_name exp_name tracker_kwargs project_kwargs", _TRACKER),
    "persistent_data_loader_workers": "workers last as long as the run",
    "accelerator_kwargs": _LAUNCHER,
    "base_weights": "--lora-start",
    "beta_dpo": "preference optimisation of the model itself is not here; preftune refl follows a reward",
    "run_validation": "--validation-steps",
    "dataset_split_name": "--data IMAGEFOLDER",
    "is_turbo": "it is read from the model's folder",
    "no_hflip": "images are never mirrored",
    "vae_encode_batch_size": "--train-batch-size",
    "tracker_name": "--tracker-project-name; a run has the name of its --output-dir",
    "base_weights_multiplier": "--lora-start LORA has its full strength",
    "blocks_to_swap": "--gradient-checkpointing, --quantization and --offload save memory; the weights that are trained stay on the GPU",
    "cache_dir": "set HF_HOME",
    "caption_extension": "--data IMAGEFOLDER reads a .txt or .caption file beside each image",
    "caption_extention": "--data IMAGEFOLDER reads a .txt or .caption file beside each image",
    "color_aug": "colours are not changed",
    "config_file": "--config FILE.yaml",
    "cpu_offload_checkpointing": "--gradient-checkpointing",
    "dataset_repeats": "--max-train-steps says how often all is seen",
    "debug_dataset": "skipped.jsonl in --output-dir names the images that were left out",
    "dim_from_weights": "--lora.rank is that of the new LoRA, whatever --lora-start has",
    "disable_mmap_load_safetensors": "files are read as safetensors does",
    "enable_npu_flash_attention": "--attention sdpa or xformers",
    "eval_steps": "--validation-steps",
    "flip_aug": "images are not mirrored: it would make `left of` wrong",
    "gradient_accumulation": "--gradient-accumulation-steps",
    "hf_hub_aesthetic_model_filename": "--rewards aesthetic=1",
    "hf_hub_aesthetic_model_id": "--rewards aesthetic=1",
    "height": "--resolution WIDTHxHEIGHT",
    "highvram": "nothing is moved to save memory without --offload",
    "image_interpolation_mode": "images are resampled bicubically",
    "image_dir": "--data IMAGEFOLDER",
    "initial_epoch": "--resume-from-checkpoint latest",
    "initial_step": "--resume-from-checkpoint latest",
    "log_image_freq": "--validation-steps",
    "log_with": "--report-to",
    "logging_steps": "metrics of each update go to metrics.jsonl",
    "lora_bias": "the LoRA has no biases",
    "lora_dropout": "the LoRA has no dropout",
    "lora_path": "--lora-start",
    "lora_layers": "--lora.target-modules",
    "lowram": "--model is loaded once, part by part",
    "max_train_samples": "use a smaller data set",
    "mem_eff_attn": "--attention sdpa or xformers",
    "negative_prompt": "--negative",
    "negative_prompts": "training is without negative prompts",
    "network_args": "--lora.rank, --lora.alpha and --lora.target-modules",
    "network_dropout": "the LoRA has no dropout",
    "network_module": "--train lora",
    "network_weights": "--lora-start",
    "no_half_vae": "--vae madebyollin/sdxl-vae-fp16-fix, an autoencoder that works in fp16",
    "non_ema_revision": "--variant non_ema",
    "num_images_per_prompt": "--images",
    "num_validation_images": "--num-validation-prompts: each prompt has one image",
    "output_config": "config.yaml in --output-dir is written by each run",
    "output_name": "--output-dir names the run",
    "pre_compute_text_embeddings": "--cache-text-encoder-outputs",
    "prompt_fn": "--prompts FILE",
    "reward_fn": "--rewards FILE.py:FUNCTION",
    "split_name": "--data IMAGEFOLDER",
    "prediction_type": "it is read from the model's folder",
    "random_flip": "images are not mirrored: it would make `left of` wrong",
    "repeats": "--max-train-steps says how often all is seen",
    "resize_interpolation": "images are resampled bicubically",
    "resume": "--resume-from-checkpoint latest",
    "resume_from_huggingface": "download the run's folder, then --resume-from-checkpoint FOLDER",
    "sample_at_first": "images before the first update are always made",
    "sample_batch_size": "--sample.batch-size",
    "sample_every_n_epochs": "--validation-steps",
    "sample_every_n_steps": "--validation-steps",
    "sample_prompts": "--validation-prompts FILE, a prompt a line without options",
    "sample_sampler": "--sample.solver",
    "save_every_n_epochs": "--checkpointing-steps",
    "save_every_n_steps": "--checkpointing-steps",
    "save_freq": "--checkpointing-steps",
    "save_model_as": "--export kohya",
    "save_n_epoch_ratio": "--checkpointing-steps",
    "save_steps": "--checkpointing-steps",
    "scale_lr": "--learning-rate is the rate itself",
    "scale_weight_norms": "the norms of the LoRA are not limited",
    "skip_until_initial_step": "--resume-from-checkpoint latest",
    "tokenizer_cache_dir": "the tokenizer is read from the model's folder",
    "train_cfg": "--guidance-scale; 1 is none",
    "truncated_backprop_rand": "--window FIRST LAST: the step with gradient is a random one of these",
    "truncated_backprop_timestep": "--window FIRST LAST, as --window 39 39 for one step",
    "truncated_rand_backprop_minmax": "--window FIRST LAST",
    "unet_lr": "--learning-rate",
    "use_dora": "the LoRA is a plain one",
    "use_safetensors": "files are safetensors where there are such",
    "v2": "it is read from the model's folder",
    "v_parameterization": "it is read from the model's folder",
    "width": "--resolution WIDTHxHEIGHT",
    "validate_every_n_epochs": "--validation-steps",
    "validate_every_n_steps": "--validation-steps",
    "validation_epochs": "--validation-steps",
    "validation_scheduler": "--sample.solver",
    "zero_terminal_snr": "it is read from the model's folder",
    # earlier names of flags of this package
    "accumulation": "--gradient-accumulation-steps",
    "adam_8bit": "--use-8bit-adam",
    "adam_betas": "--adam-beta1 and --adam-beta2",
    "adam_eps": "--adam-epsilon",
    "batch": "--train-batch-size",
    "draw": "--sample.solver, --sample.resolution and so on",
    "guidance": "--guidance-scale",
    "held_out": "--validation-prompts",
    "held_out_count": "--num-validation-prompts",
    "keep": "--checkpoints-total-limit",
    "lora.targets": "--lora.target-modules",
    "lr": "--learning-rate",
    "num_steps": "--num-inference-steps",
    "output": "--output-dir",
    "overwrite": "--overwrite-output-dir",
    "reward_sample": "--reward-stats",
    "reward_units": "--reward-normalization",
    "sample_every": "--validation-steps",
    "save_every": "--checkpointing-steps",
    "schedule": "--lr-scheduler",
    "scheduler": "--solver",
    "shift": "--jitter",
    "size": "--resolution",
    "updates": "--max-train-steps",
    "views": "--jitter-copies",
    "warmup_updates": "--lr-warmup-steps",
}  # fmt: skip
"""Unsupported flag -> what to use instead: a flag, or a sentence."""

TEXTS = ("prompts", "validation_prompts")
"""Flags of a prompt file that take prompts, too."""
ONE_VALUE = dict.fromkeys(
    TEXTS, "a prompt stands in quotes, and a file of many prompts, one a line, is named once"
) | {
    "resolution": "write 512, or 768x512 for another width than height",
}
"""Flag of one value that other scripts give several -> what to do."""

EXCLUSIVE = ("--overwrite-output-dir", "--resume-from-checkpoint=latest")
"""Flags that exclude each other. Of those in different places (several files, the command line) the last one counts."""
