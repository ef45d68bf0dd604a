"""Training options that all drivers share, and the checks that run before any model is loaded."""

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preftune import files
from preftune.files import lock
from preftune.machine.cores import cores
from preftune.training import report_to


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Training options that every driver has."""

    output_dir: Path = Path("runs/default")
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, step_000500/."""
    seed: int = 0
    """Seed of all random numbers."""
    max_train_steps: int = 1000
    """Total number of optimizer updates, those before a resume included."""
    train_batch_size: int = 2
    """Images per process in one forward and backward pass."""
    gradient_accumulation_steps: int = 4
    """Passes per update; one update sees batch x accumulation x processes images."""
    learning_rate: float | None = None
    """Peak learning rate; None = that of the program, the model and --train, as 1e-4 for a LoRA and 1e-5 for all weights of
    Stable Diffusion: preftune/training/defaults.py.
    """
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Learning-rate schedule after the warmup; linear and cosine decay to 0 at the last update."""
    lr_warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to its peak."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    decay_vectors: bool = True
    """Apply weight decay also to biases, norms and scalars; CLIP and HPS v2 do not."""
    adam_beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay rate of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits; needs bitsandbytes."""
    fused_adam: bool | None = None
    """AdamW in one kernel for all weights (torch's fused), the same formula; None = on a CUDA GPU, but not in fp16 nor in 8 bits."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it; inf never clips."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass; trained weights stay in float32. fp16 needs a GPU. None = bf16 on a CUDA GPU, fp16 on one
    before Ampere, no elsewhere.
    """
    allow_tf32: bool = False
    """Let float32 matrix products use TF32 on a GPU since Ampere; convolutions may by torch's own default."""
    ema_decay: float = 0.0
    """Decay per update of an exponential moving average of the trained weights; 0 = none."""
    compile: bool = False
    """Compile the repeated blocks of the trained module, on a GPU also for passes without gradient: minutes at first."""
    cuda_graphs: bool = True
    """On a GPU, replay passes without gradient as CUDA graphs: the host launches one graph instead of a thousand kernels."""
    checkpointing_steps: int = 100
    """Updates between checkpoints; 0 = only at the end."""
    validation_steps: int = 0
    """Updates between sample grids; 0 = only at the end."""
    checkpoints_total_limit: int = 2
    """Newest checkpoints to keep; 0 = all."""
    resume_from_checkpoint: Literal["latest"] | Path | None = None
    """latest = continue from the newest checkpoint in --output-dir, if any; or a checkpoint folder."""
    overwrite_output_dir: bool = False
    """Remove an earlier run from the output folder first."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers that get metrics and validation images: tensorboard, wandb, trackio, ...; none, or all that are installed."""
    tracker_project_name: str | None = None
    """Project in these trackers; None = what WANDB_PROJECT and the like say, else preftune."""
    dataloader_num_workers: int | None = None
    """Worker processes that decode images ahead of time; 0 = they are decoded when they are needed. None = up to 4 for each GPU, 0 on a
    CPU, whose cores train.
    """
    threads: int = 0
    """CPU threads per process; 0 = all cores, divided by the processes on this machine."""

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps"):
            _demand(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "lr_warmup_steps",
            "checkpointing_steps",
            "validation_steps",
            "checkpoints_total_limit",
            "threads",
        ):
            _demand(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        number = self.dataloader_num_workers
        _demand(number is None or 0 <= number <= 256, "dataloader_num_workers", number, "in [0, 256]")
        for name in ("learning_rate", "adam_epsilon"):
            value = getattr(self, name)
            _demand(value is None or 0 < value < math.inf, name, value, "above 0 and finite")
        _demand(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
        _demand(
            0 <= self.adam_weight_decay < math.inf,
            "adam_weight_decay",
            self.adam_weight_decay,
            "0 or more and finite",
        )
        for name in ("adam_beta1", "adam_beta2"):
            _demand(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _demand(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0; inf never clips")
        _demand(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1); 0 keeps no average")
        if self.fused_adam and (self.use_8bit_adam or self.mixed_precision == "fp16"):
            other = "--use-8bit-adam" if self.use_8bit_adam else "--mixed-precision fp16"
            raise ValueError(f"--fused-adam does not work with {other}; leave out one of them")
        report_to.check_names(self.report_to)
        if self.overwrite_output_dir and self.resume_from_checkpoint == "latest":
            raise ValueError(
                "--resume-from-checkpoint latest continues the run that --overwrite-output-dir removes; give one of them"
            )


def _demand(holds: bool, name: str, value: object, legal: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {legal}")


def check(config: RunConfig) -> None:
    """Fail on what this machine or the output folder cannot do; takes milliseconds, so call it before loading a model.

    The main process becomes the folder's only writer here.

    Raises:
        ValueError: fp16 without a GPU, 8-bit AdamW without bitsandbytes, a tracker without its package, an output folder that cannot be written, is
            being written by another process or already holds a run, a checkpoint to resume from that is not there.
    """
    import torch

    from preftune.training import checkpoint, folder  # these need torch, which the flags do not

    if config.mixed_precision == "fp16" and (forced_to_cpu() or not torch.accelerator.is_available()):
        raise ValueError("--mixed-precision fp16 needs a GPU and there is none; use no or bf16")
    if config.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "--use-8bit-adam needs bitsandbytes: pip install bitsandbytes, or leave the flag out"
        )
    latest = config.resume_from_checkpoint == "latest"  # which does nothing in an empty folder
    resumes = bool(
        checkpoint.find_checkpoints(config.output_dir) if latest else config.resume_from_checkpoint
    )
    report_to.check_ready(config.report_to, resumes=resumes)
    if lock.is_main_process():
        lock.acquire(config.output_dir)  # until `Run.finish`, or the end of the process
    files.check_writable(config.output_dir)
    source = config.resume_from_checkpoint if isinstance(config.resume_from_checkpoint, Path) else None
    if source and (checkpoint.updates_of(source) is None or not (source / "state.pt").is_file()):
        raise ValueError(
            f"--resume-from-checkpoint {source} is no checkpoint; give latest or a folder such as runs/x/step_000500"
        )
    if not config.overwrite_output_dir and config.resume_from_checkpoint != "latest":
        folder.check_not_mixed(config.output_dir, source)


def forced_to_cpu() -> bool:
    """Return whether the processes run on the CPU whatever the machine has: accelerate launch --cpu."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def set_torch(config: RunConfig) -> None:
    """Give torch this process' share of the threads, and TF32 for float32 products where it is asked."""
    import torch

    from preftune.machine.tf32 import set_tf32

    torch.set_num_threads(cpu_threads(config))
    set_tf32(config.allow_tf32, convolutions=True)  # torch's own default


def cpu_threads(config: RunConfig) -> int:
    """Threads for this process. Torch's default is not used, because the launchers set OMP_NUM_THREADS to 1."""
    return config.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
