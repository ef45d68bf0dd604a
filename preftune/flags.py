"""Flags of other training scripts: those with the same meaning are accepted, the others give an error with
the flag to use here.

Names are written with underscores, without leading dashes. They come from diffusers' text-to-image scripts,
TRL and kohya's sd-scripts.
"""

ALIASES = {
    "pretrained_model_name_or_path": "model",
    "pretrained_vae_model_name_or_path": "vae",
    "text_column": "caption_column",
    "train_data_dir": "data",
}
"""Flag of another script -> the same flag here."""

ELSEWHERE = {
    "allow_tf32": "it is torch's setting: torch.set_float32_matmul_precision",
    "cache_dir": "set HF_HOME",
    "center_crop": "images are always scaled to cover --resolution and cut in the middle",
    "class_prompt": "DreamBooth is not here",
    "dataloader_num_workers": "images are read in this process",
    "dataset_name": "--data IMAGEFOLDER",
    "dataset_config_name": "--data IMAGEFOLDER",
    "enable_xformers_memory_efficient_attention": "--attention xformers",
    "gradient_accumulation": "--gradient-accumulation-steps",
    "hub_model_id": "upload the folder of the run with `hf upload`",
    "hub_token": "upload the folder of the run with `hf upload`",
    "image_interpolation_mode": "images are resampled bicubically",
    "input_perturbation": "it is not here",
    "instance_data_dir": "--data IMAGEFOLDER",
    "instance_prompt": "DreamBooth is not here",
    "local_rank": "accelerate launch sets it",
    "logging_dir": "tensorboard/ lies in --output-dir",
    "lora_alpha": "--lora.alpha",
    "lr_num_cycles": "cosine falls to 0 once",
    "lr_power": "there are constant, linear and cosine in --lr-scheduler",
    "max_train_samples": "use a smaller data set",
    "network_alpha": "--lora.alpha",
    "network_dim": "--lora.rank",
    "network_module": "--train lora",
    "network_weights": "--lora-start",
    "noise_offset": "it is not here",
    "non_ema_revision": "--variant non_ema",
    "num_processes": "it goes before the file: accelerate launch --num_processes 2 finetune/refl.py",
    "num_train_epochs": "--max-train-steps",
    "num_validation_images": "--num-validation-prompts: each prompt has one image",
    "optimizer": "AdamW it is; --use-8bit-adam keeps its moments in 8 bits",
    "prediction_type": "it is read from the model's folder",
    "proportion_empty_prompts": "--caption-dropout",
    "push_to_hub": "upload the folder of the run with `hf upload`",
    "random_flip": "images are not mirrored: it would make `left of` wrong",
    "rank": "--lora.rank",
    "resume": "--resume-from-checkpoint latest",
    "save_model_as": "--export kohya",
    "save_every_n_steps": "--checkpointing-steps",
    "scale_lr": "--learning-rate is the rate itself",
    "snr_gamma": "the loss is not weighted by the signal-to-noise ratio",
    "text_encoder_lr": "text encoders stay as they are; finetune/pretrain.py has --train-text-encoder",
    "unet_lr": "--learning-rate",
    "use_ema": "--ema-decay 0.999",
    "validation_epochs": "--validation-steps",
    "validation_prompt": "--validation-prompts FILE",
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
    "weight_decay": "--adam-weight-decay",
}
"""Unsupported flag -> what to use instead: a flag, or a sentence."""

_FILE = "it is a prompt file: write the prompts into a .txt file, one a line, and name that file"
ONE_VALUE = {"prompts": _FILE, "validation_prompts": _FILE}
"""Flag of one value that other scripts give several -> what to do."""

EXCLUSIVE = ("--overwrite-output-dir", "--resume-from-checkpoint=latest")
"""Flags that exclude each other. Of those in different places (several files, the command line) the last one counts."""
