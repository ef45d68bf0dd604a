"""Flags pasted from the command lines of diffusers, TRL and kohya's sd-scripts: taken, or answered with the right name.

The lists hold all flags of their scripts: diffusers' text-to-image, DreamBooth and Diffusion-DPO (with and without LoRA, SD and XL),
kohya's train_network.py, and TRL's ddpo.py and alignprop.py with what they inherit from transformers.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from data_build import generate
from finetune import pretrain, raft, refl, reward_model, reward_weighted, weird_lora
from preftune import cli
from preftune.cli.help_text import help_text
from preftune.cli.leaves import flag_of, leaves_of
from preftune.cli.other_scripts import ALIASES, ELSEWHERE, SAME
from preftune.cli.typed_flags import alias_of, as_here, instead
from preftune.programs import PROGRAMS
from preftune.prompts import read_prompts
from preftune.resolution import parse as resolution
from preftune.typed_prompts import is_text

DIFFUSERS = [
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "adam_weight_decay",
    "adam_weight_decay_text_encoder",
    "allow_tf32",
    "beta_dpo",
    "cache_dir",
    "caption_column",
    "center_crop",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "class_data_dir",
    "class_labels_conditioning",
    "class_prompt",
    "dataloader_num_workers",
    "dataset_config_name",
    "dataset_name",
    "dataset_split_name",
    "debug_loss",
    "do_edm_style_training",
    "dream_detail_preservation",
    "dream_training",
    "enable_npu_flash_attention",
    "enable_xformers_memory_efficient_attention",
    "foreach_ema",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "hub_model_id",
    "hub_token",
    "image_column",
    "image_interpolation_mode",
    "input_perturbation",
    "instance_data_dir",
    "instance_prompt",
    "is_turbo",
    "learning_rate",
    "local_rank",
    "logging_dir",
    "lora_dropout",
    "loss_type",
    "lr_num_cycles",
    "lr_power",
    "lr_scheduler",
    "lr_warmup_steps",
    "max_grad_norm",
    "max_train_samples",
    "max_train_steps",
    "mixed_precision",
    "no_hflip",
    "noise_offset",
    "non_ema_revision",
    "num_class_images",
    "num_train_epochs",
    "num_validation_images",
    "offload_ema",
    "offset_noise",
    "optimizer",
    "output_dir",
    "output_kohya_format",
    "pre_compute_text_embeddings",
    "prediction_type",
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "prior_generation_precision",
    "prior_loss_weight",
    "prodigy_beta3",
    "prodigy_decouple",
    "prodigy_safeguard_warmup",
    "prodigy_use_bias_correction",
    "proportion_empty_prompts",
    "push_to_hub",
    "random_crop",
    "random_flip",
    "rank",
    "repeats",
    "report_to",
    "resolution",
    "resume_from_checkpoint",
    "revision",
    "run_validation",
    "sample_batch_size",
    "scale_lr",
    "seed",
    "set_grads_to_none",
    "skip_save_text_encoder",
    "snr_gamma",
    "text_encoder_lr",
    "text_encoder_use_attention_mask",
    "timestep_bias_begin",
    "timestep_bias_end",
    "timestep_bias_multiplier",
    "timestep_bias_portion",
    "timestep_bias_strategy",
    "tokenizer_max_length",
    "tokenizer_name",
    "tracker_name",
    "tracker_project_name",
    "train_batch_size",
    "train_data_dir",
    "train_text_encoder",
    "use_8bit_adam",
    "use_dora",
    "use_ema",
    "vae_encode_batch_size",
    "validation_epochs",
    "validation_images",
    "validation_prompt",
    "validation_prompts",
    "validation_scheduler",
    "validation_steps",
    "variant",
    "with_prior_preservation",
]
KOHYA = [
    "adaptive_noise_scale",
    "alpha_mask",
    "async_upload",
    "base_weights",
    "base_weights_multiplier",
    "blocks_to_swap",
    "bucket_no_upscale",
    "bucket_reso_steps",
    "cache_info",
    "cache_latents",
    "cache_latents_to_disk",
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "caption_dropout_every_n_epochs",
    "caption_dropout_rate",
    "caption_extension",
    "caption_extention",
    "caption_prefix",
    "caption_separator",
    "caption_suffix",
    "caption_tag_dropout_rate",
    "clip_skip",
    "color_aug",
    "conditioning_data_dir",
    "config_file",
    "cpu_offload_checkpointing",
    "dataset_class",
    "dataset_config",
    "dataset_repeats",
    "ddp_gradient_as_bucket_view",
    "ddp_static_graph",
    "ddp_timeout",
    "debiased_estimation_loss",
    "debug_dataset",
    "deepspeed",
    "dim_from_weights",
    "disable_mmap_load_safetensors",
    "dynamo_backend",
    "enable_bucket",
    "enable_wildcard",
    "face_crop_aug_range",
    "flip_aug",
    "fp16_master_weights_and_gradients",
    "fp8_base",
    "fp8_base_unet",
    "full_bf16",
    "full_fp16",
    "fused_backward_pass",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "highvram",
    "huber_c",
    "huber_scale",
    "huber_schedule",
    "huggingface_path_in_repo",
    "huggingface_repo_id",
    "huggingface_repo_type",
    "huggingface_repo_visibility",
    "huggingface_token",
    "in_json",
    "initial_epoch",
    "initial_step",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "keep_tokens",
    "keep_tokens_separator",
    "learning_rate",
    "log_config",
    "log_prefix",
    "log_tracker_config",
    "log_tracker_name",
    "log_with",
    "logging_dir",
    "logit_mean",
    "logit_std",
    "loss_type",
    "lowram",
    "lr_decay_steps",
    "lr_scheduler",
    "lr_scheduler_args",
    "lr_scheduler_min_lr_ratio",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_scheduler_type",
    "lr_warmup_steps",
    "masked_loss",
    "max_bucket_reso",
    "max_data_loader_n_workers",
    "max_grad_norm",
    "max_timestep",
    "max_token_length",
    "max_train_epochs",
    "max_train_steps",
    "max_validation_steps",
    "mem_eff_attn",
    "metadata_author",
    "metadata_description",
    "metadata_is_negative_embedding",
    "metadata_license",
    "metadata_merged_from",
    "metadata_preprocessor",
    "metadata_tags",
    "metadata_thumbnail",
    "metadata_title",
    "metadata_trigger_phrase",
    "metadata_usage_hint",
    "min_bucket_reso",
    "min_snr_gamma",
    "min_timestep",
    "mixed_precision",
    "mode_scale",
    "multires_noise_discount",
    "multires_noise_iterations",
    "network_alpha",
    "network_args",
    "network_dim",
    "network_dropout",
    "network_module",
    "network_train_text_encoder_only",
    "network_train_unet_only",
    "network_weights",
    "no_half_vae",
    "no_metadata",
    "noise_offset",
    "noise_offset_random_strength",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
    "optimizer_args",
    "optimizer_schedulefree_wrapper",
    "optimizer_type",
    "output_config",
    "output_dir",
    "output_name",
    "perlin_noise",
    "persistent_data_loader_workers",
    "pretrained_model_name_or_path",
    "prior_loss_weight",
    "random_crop",
    "reg_data_dir",
    "resize_interpolation",
    "resolution",
    "resume",
    "resume_from_huggingface",
    "sample_at_first",
    "sample_every_n_epochs",
    "sample_every_n_steps",
    "sample_prompts",
    "sample_sampler",
    "save_every_n_epochs",
    "save_every_n_steps",
    "save_last_n_epochs",
    "save_last_n_epochs_state",
    "save_last_n_steps",
    "save_last_n_steps_state",
    "save_model_as",
    "save_n_epoch_ratio",
    "save_precision",
    "save_state",
    "save_state_on_train_end",
    "save_state_to_huggingface",
    "scale_v_pred_loss_like_noise_pred",
    "scale_weight_norms",
    "schedulefree_wrapper_args",
    "sdpa",
    "secondary_separator",
    "seed",
    "shuffle_caption",
    "skip_cache_check",
    "skip_until_initial_step",
    "text_encoder_batch_size",
    "text_encoder_lr",
    "token_warmup_min",
    "token_warmup_step",
    "tokenizer_cache_dir",
    "torch_compile",
    "train_batch_size",
    "train_data_dir",
    "training_comment",
    "unet_lr",
    "use_8bit_adam",
    "use_lion_optimizer",
    "use_safetensors",
    "v2",
    "v_parameterization",
    "v_pred_like_loss",
    "vae",
    "vae_batch_size",
    "validate_every_n_epochs",
    "validate_every_n_steps",
    "validation_seed",
    "validation_split",
    "wandb_api_key",
    "wandb_run_name",
    "weighted_captions",
    "weighting_scheme",
    "xformers",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "zero_stage",
    "zero_terminal_snr",
]
TRL = [
    "accelerator_kwargs",
    "allow_tf32",
    "async_reward_computation",
    "bf16",
    "dataloader_num_workers",
    "eval_steps",
    "exp_name",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "hf_hub_aesthetic_model_filename",
    "hf_hub_aesthetic_model_id",
    "hf_hub_model_id",
    "learning_rate",
    "log_image_freq",
    "log_with",
    "logdir",
    "logging_steps",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "max_workers",
    "mixed_precision",
    "negative_prompts",
    "num_checkpoint_limit",
    "num_epochs",
    "num_train_epochs",
    "optim",
    "output_dir",
    "per_device_train_batch_size",
    "per_prompt_stat_tracking",
    "per_prompt_stat_tracking_buffer_size",
    "per_prompt_stat_tracking_min_count",
    "pretrained_model",
    "pretrained_revision",
    "project_kwargs",
    "push_to_hub",
    "report_to",
    "resume_from",
    "resume_from_checkpoint",
    "run_name",
    "sample_batch_size",
    "sample_eta",
    "sample_guidance_scale",
    "sample_num_batches_per_epoch",
    "sample_num_steps",
    "save_freq",
    "save_steps",
    "save_total_limit",
    "seed",
    "torch_compile",
    "tracker_kwargs",
    "tracker_project_name",
    "train_adam_beta1",
    "train_adam_beta2",
    "train_adam_epsilon",
    "train_adam_weight_decay",
    "train_adv_clip_max",
    "train_batch_size",
    "train_cfg",
    "train_clip_range",
    "train_gradient_accumulation_steps",
    "train_learning_rate",
    "train_max_grad_norm",
    "train_num_inner_epochs",
    "train_timestep_fraction",
    "train_use_8bit_adam",
    "truncated_backprop_rand",
    "truncated_backprop_timestep",
    "truncated_rand_backprop_minmax",
    "use_lora",
    "warmup_steps",
    "weight_decay",
]

DRIVERS = (refl, raft, pretrain, reward_weighted, weird_lora, reward_model)
NEEDED = ["--model", "x", "--prompts", "p.txt", "--data", "d"]


def parsed(line: str) -> refl.Config:
    return cli.parse(refl.Config, [*NEEDED, *shlex.split(line)])


def refused(line: str, capsys: pytest.CaptureFixture[str], config: type = refl.Config) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.parse(config, shlex.split(line))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("typed", "value"),
    [("", True), (" true", True), ("=False", False), (" None", None), ("=true", True)],
)
def test_a_switch_that_may_be_left_to_the_program(typed: str, value: bool | None) -> None:
    assert parsed(f"--fused-adam{typed} --seed 1").run.fused_adam is value


def test_such_a_switch_is_turned_off_and_refused_as_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--no-fused-adam").run.fused_adam is False
    for typed in ("--fused-adam maybe", "--fused-adam=maybe"):
        said = refused(f"--model x --prompts p.txt {typed}", capsys)
        assert (
            "--fused-adam is 'maybe'; write --fused-adam, --no-fused-adam, or neither for the default" in said
        )
    assert "  --fused-adam, --no-fused-adam\n" in help_text(refl.Config, "")


def test_wrong_folders_are_refused_with_the_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "file").write_text("")
    cached = f"--model x --prompts p.txt --data d --cache-latents --data-cache-dir {file}"
    assert f"--data-cache-dir {file} cannot be written: Not a directory; choose another" in refused(
        cached, capsys
    )
    assert parsed(f"{cached}s").cache.folder() == tmp_path / "files"
    said = refused(f"--model x --prompts p.txt --reward-vae {tmp_path / 'absent'}", capsys)
    assert (
        "absent does not exist; name the folder of an autoencoder or a hub id, as madebyollin/taesd" in said
    )


def test_all_weights_in_place_of_the_lora_of_a_file(tmp_path: Path) -> None:
    (file := tmp_path / "a.yaml").write_text("lora: {rank: 8}\n")
    config = parsed(f"--config {file} --train full")
    assert config.model.train == "full"
    assert config.model.lora == type(config.model.lora)()
    assert parsed(f"--config {file}").model.lora.rank == 8


@pytest.mark.parametrize("script", ["DIFFUSERS", "KOHYA", "TRL"])
def test_every_flag_of_other_scripts_is_taken_or_has_an_answer(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names: list[str] = globals()[script]
    leaves = leaves_of(refl.Config)
    taken = {name for name in names if name in leaves or alias_of(name, leaves)}
    with_value = {key.partition("=")[0] for key in SAME}
    others = [name for name in names if name not in taken | with_value]
    assert len(taken) > 20
    assert [name for name in others if "(here: " not in instead(name, leaves)] == []
    for some in (others[at : at + 12] for at in range(0, len(others), 12)):
        said = refused(" ".join(f"--{name}=7" for name in some), capsys)
        assert [name for name in some if f"--{name}" not in said] == [], "one message names them all"
        assert said.endswith("); see --help\n"), "each has an answer, or shares it"


def test_no_answer_names_a_flag_that_the_program_lacks() -> None:
    for driver in DRIVERS:
        leaves = leaves_of(driver.Config)
        for name in {*ELSEWHERE, *ALIASES} - leaves.keys():
            if alias_of(name, leaves) is None:
                answer = instead(name, leaves)
                first = (
                    answer.removeprefix(" (here: --").split(maxsplit=1)[0].rstrip("),;:").replace("-", "_")
                )
                assert not answer.startswith(" (here: --") or first in (*leaves, "config"), (driver, name)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("--rank=16 --lora_alpha 8", "--lora.rank 16 --lora.alpha 8"),
        ("--network_module=networks.lora --network_dim=16 --network_alpha=1", "--lora.rank 16 --lora.alpha 1"),
        ("--optimizer_type AdamW8bit", "--use-8bit-adam"),
        ("--fp8_base --optim adamw_torch_fused", "--quantization fp8 --fused-adam True"),
        ("--optimizer=AdamW --center_crop --network_train_unet_only", ""),
        ("--save_model_as=safetensors", "--export kohya"),
        ("--xformers", "--attention xformers"),
        ("--enable_xformers_memory_efficient_attention", "--attention xformers"),
        ("--train_learning_rate=3e-4 --train_gradient_accumulation_steps=2", "--learning-rate 3e-4 --gradient-accumulation-steps 2"),
        ("--sample_num_steps=50 --sample_guidance_scale=5.0", "--num-inference-steps 50 --guidance-scale 5"),
        ("--use_lora=True --train_use_8bit_adam=True --bf16 True", "--use-8bit-adam --mixed-precision bf16"),
        ("--gradient_checkpointing=False --compile True", "--no-gradient-checkpointing --compile"),
        ("--validation_prompt='cute dragon creature'", "--validation-prompts 'cute dragon creature'"),
        ("--num_checkpoint_limit=5 --resume_from=latest", "--checkpoints-total-limit 5 --resume-from-checkpoint latest"),
        ("--window=30,38", "--window 30 38"),
        ("--window 30,38", "--window 30 38"),
        ("--caption_dropout_rate 0.1 --lr_scheduler_type cosine --warmup_steps 5", "--caption-dropout 0.1 --lr-scheduler cosine --lr-warmup-steps 5"),
    ],
)  # fmt: skip
def test_flags_with_the_same_meaning_are_taken(line: str, same: str) -> None:
    assert parsed(line) == parsed(same)


def test_names_of_sampling_where_training_has_no_such() -> None:
    argv = [
        "--model",
        "x",
        "--prompts",
        "p.txt",
        "--rewards",
        "brightness=1",
        "--sample_num_steps=50",
        "--sample_guidance_scale=5.0",
    ]
    sampling = cli.parse(raft.Config, argv).validation.sample
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (50, 5.0)


PASTED = {
    "--pretrained_model_name_or_path=x --dataset_name=d --use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1": [
        "--dataset_name (here: --data IMAGEFOLDER)",
        "--use_ema (here: --ema-decay 0.999)",
        "--random_flip (here: images are not mirrored: it would make `left of` wrong); see --help",
    ],
    "--pretrained_model_name_or_path=x --instance_data_dir=d --instance_prompt='a photo of sks dog' --push_to_hub": [
        "--instance_data_dir (here: --data IMAGEFOLDER)",
        "--instance_prompt (here: DreamBooth is not here)",
        "--push_to_hub (here: upload the folder of the run with `hf upload`)",
    ],
    "--network_module=lycoris.kohya --network_args algo=loha --output_name=o --max_train_epochs=10 --cache_latents --clip_skip=2": [
        "--network_module (here: --train lora)",
        "--network_args (here: --lora.rank, --lora.alpha and --lora.target-modules)",
        "--output_name (here: --output-dir names the run)",
        "--max_train_epochs (here: --max-train-steps, a number of updates)",
        "--clip_skip (here: text encoders stay as they are",
    ],
    "--num_epochs=200 --sample_batch_size=6 --train_batch_size=3 --per_prompt_stat_tracking=True --tracker_project_name=sd": [
        "unknown flags --num_epochs (here: --max-train-steps, a number of updates), --sample_batch_size (here: --sample.batch-size)",
        "--per_prompt_stat_tracking (here: policy gradients are not here)",
    ],
    "--optimizer_type=Lion --prompts p.txt": ["unknown flag --optimizer_type (here: AdamW it is"],
    "--model x --prompts p.txt --pretraining off --lr_scheduler=cosine_with_restarts": [
        "--lr-scheduler is 'cosine_with_restarts'; it must be constant, constant_with_warmup, linear or cosine",
        "constant_with_warmup, linear or cosine",
    ],
    "--window 30": ["error: --window takes 2 whole numbers, got 30\n"],
    "--window=30,x": ["error: --window takes 2 whole numbers, got 30 x\n"],
    "--seed x --model x --prompts p.txt": ["error: --seed: 'x' is not a whole number\n"],
    "--learning-rate fast --model x --prompts p.txt": ["error: --learning-rate: 'fast' is not a number\n"],
    "--truncated_backprop_rand=True --nonsense": ["--window FIRST LAST", ", --nonsense; see --help"],
}


@pytest.mark.parametrize("line", PASTED)
def test_what_a_pasted_line_is_answered(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(line, capsys)
    assert [words for words in PASTED[line] if words not in said] == []


def test_the_program_that_has_the_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for config in (refl.Config, pretrain.Config):
        assert "preftune pretrain has --train-text-encoder" in refused("--text_encoder_lr=1", capsys, config)


def test_a_program_without_the_flag_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("--dataset_name=d --rank 4", capsys, reward_model.Config)
    assert "--dataset_name (here: --data IMAGEFOLDER), --rank (this program has no --lora.rank)" in said
    assert "--cache_latents_to_disk (this program has no --cache-latents)" in refused(
        "--cache_latents_to_disk", capsys, reward_model.Config
    )
    assert "--instance_data_dir (this program has no --data)" in refused(
        "--instance_data_dir=d", capsys, raft.Config
    )


def test_prompts_as_they_are_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = cli.parse(
        generate.Config, ["--model", "x", "--output-dir", "o", "--prompts", "a cat", "a big dog, v1.5"]
    )
    assert read_prompts(config.prompts) == ["a cat", "a big dog, v1.5"]
    assert capsys.readouterr().err == (
        "note: no prompt file has this name, it is taken as 2 prompts: a cat / a big dog, v1.5\n"
    )
    (tmp_path / "again.yaml").write_text(cli.dump(config))
    assert cli.parse(generate.Config, ["--config", str(tmp_path / "again.yaml")]) == config
    long = "a photo of a cat, " * 100
    assert read_prompts(Path(long)) == [long]
    named = tmp_path / "my prompts.txt"
    named.write_text("one\ntwo\n")
    assert read_prompts(named) == ["one", "two"]
    for missing in ("my prompts.txt", "/my folder/prompts", "cat", str(tmp_path / "my folder")):
        assert not is_text(Path(missing))
        with pytest.raises(ValueError, match="prompt file"):
            read_prompts(Path(missing))


def test_width_and_height_with_a_comma() -> None:
    assert resolution("768,512") == resolution("768x512")


def test_words_before_and_behind_are_kept() -> None:
    leaves = leaves_of(refl.Config)
    argv = ["-h", "--rewards", "a=1", "b=2", "--seed", "-1", "--num-inference-steps=4"]
    assert as_here(argv, leaves) == argv


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_answer_names_flags_that_the_program_has(name: str) -> None:
    module = importlib.import_module(PROGRAMS[name])
    if not hasattr(module, "Config"):
        return
    leaves = leaves_of(module.Config)
    for flag in (*ELSEWHERE, *ALIASES):
        answer = instead(flag, leaves, flag_of)
        if "(here:" in answer:
            named = re.findall(r"(?<!has )--([\w.-]*\w)", answer)
            known = (*leaves, "config", "num_processes", "help")
            assert [word for word in named if word.replace("-", "_") not in known] == [], f"--{flag}{answer}"


SLIPS = {
    "\u2013seed 1": "unknown flag \u2013seed: a flag begins with two hyphens, as in --seed",
    "-max_train_steps 1": "unknown flag -max_train_steps: a flag begins with two hyphens",
    "\u2212\u2212rank 1": "two hyphens, as in --rank",
    "--output-dir \u201cmy run\u201d": "quotes of a text are none for the shell: write \" or '",
    "--seed = 1": "there are no spaces around =",
    "--resolution 512 512": "write 512, or 768x512",
    "--gradient_checkpointing 1": "takes no value, got '1': write --gradient-checkpointing or --no-gradient-checkpointing",
    "--rewards imagereward:1": "a weight stands behind =, as in imagereward=1",
    "--rewards imagereward=1,hpsv2=0.5": "separated by spaces, without quotes: imagereward=1 hpsv2=0.5",
    "--rewards 'imagereward=1 hpsv2'": "separated by spaces, without quotes: imagereward=1 hpsv2",
    "--output-dir": "--output-dir needs a value",
}


@pytest.mark.parametrize("line", SLIPS)
def test_what_a_slip_is_answered(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert SLIPS[line] in refused(f"--model x --prompts p.txt {line}", capsys)


def test_a_tab_in_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\nlora:\n\trank: 2\n", encoding="utf-8")
    assert "c.yaml line 3: there is a tab; write spaces in its place" in refused(
        f"--config {tmp_path / 'c.yaml'}", capsys
    )
