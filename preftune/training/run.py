"""A training run, for drivers with an explicit training loop. Only this file and trackers.py import accelerate.

    check(config.run)                      # first of all: fails in milliseconds, not after loading a model
    run = Run(config.run, driver="refl", config_text=dump(config))  # compares a resumed run, before a model loads
    unet = run.prepare(unet, learning_rate=1e-4)
    for step in run.steps():
        for micro_batch in run.passes():   # backward passes of this update: --gradient-accumulation-steps, or any number
            indices = run.image_indices(step, micro_batch)
            with run.accumulate():
                loss = ...
                run.update(loss, mean_reward=rewards.mean())
        if run.due("checkpointing_steps", step): run.save(step, write=..., state={"best": best})

Steps count updates from 0; checkpoint `step_000500` holds the weights after 500 updates and resumes at step
500. Random numbers derive from (seed, step), (seed, rank, step) or (seed, image index): on the same
hardware a resumed run equals, bit for bit, one that was never stopped. On Ctrl-C or SIGTERM the update
finishes, `due("checkpointing_steps", step)` is true and `steps()` ends; `finish()` then returns the exit
code 128 + signal (130, 143). A second one, a second later or more, kills at once.
Several processes: `accelerate launch --num_processes 2 driver.py`; on CPUs with ACCELERATE_USE_CPU=true and --multi_gpu.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn
from tqdm.auto import tqdm

from preftune import order, seeds
from preftune.cli.notes import say
from preftune.files import lock
from preftune.regional import compile_blocks
from preftune.seeds import Stream
from preftune.training import checkpoint, folder, metrics, resume, signals
from preftune.training.optimizer import EMA, SkippedUpdates, adamw, lr_factor
from preftune.training.run_config import RunConfig, check, set_torch
from rewards.on_device import one

__all__ = ["Run", "RunConfig", "check"]

_REMEDY = "lower --learning-rate, or find what this step's images have in common"


class Run:
    """One training run: its folder, processes, optimizer, metrics and checkpoints.

    Attributes:
        folder: Where the run writes.
        device: This process' device.
        is_main: Whether this is the process that writes.
        rank, world: Index of this process; number of processes.
        resumed_state: What the driver gave to `save` as its own state; empty for a new run.
        source: The checkpoint that the run goes on from, which may be that of step 0, or None.
        start, resumed: First step to do, 0 or where the checkpoint left off; whether there is a source.
        stopped: Set it, on every process, to end `steps` after this update, which is then due for saving.
        row: Metrics that may be added to: of the step under way, or of the last one before `start` where a signal came.

    Raises:
        ValueError: see `check`; a checkpoint to resume from that is damaged, or has other settings.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        driver: str,
        config_text: str,
        settings: Mapping[str, object] | None = None,
        driver_files: tuple[str, ...] = (),
    ) -> None:
        """Start the processes; the folder is opened by `prepare`, when everything has loaded.

        config_text is YAML that replays the whole configuration; settings is what else a resume must not change, numbers and
        strings by name; driver_files are patterns of the driver's own files, which --overwrite-output-dir removes.
        """
        check(config)  # on every rank before any touches the folder: starting the processes is a barrier
        # accelerate keeps the precision of a process' first Accelerator; an earlier Run must not bind this one.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # Ranks may differ in their passes without gradient; broadcasting buffers in each forward would deadlock then.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self._accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[ddp])
        self.config, self.driver, self.folder = config, driver, config.output_dir
        self._driver_settings, self._driver_files = dict(settings or {}), driver_files
        self._config_text, self.resumed_state = config_text, dict[str, Any]()
        self.device: torch.device = self._accelerator.device
        self.is_main: bool = self._accelerator.is_main_process
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self._passes = config.gradient_accumulation_steps  # of the update under way
        self.images_per_update = config.train_batch_size * config.gradient_accumulation_steps * self.world
        set_torch(config)
        seeds.seed_everything(config.seed, Stream.SETUP, 0, 0)
        self._begin = self._find_start()
        self.source = self._begin.source
        self.start = (checkpoint.updates_of(self.source) or 0) if self.source else 0
        self.resumed, self.stopped = self.source is not None, False
        self._metrics: metrics.Metrics | None = None
        self.row: dict[str, float] = {}  # empty once written
        self._scalars: list[dict[str, Tensor | float]] = []  # of each pass since the last optimizer step
        self._received = signals.Received()  # by this process
        self._agreed_signal = 0  # received by any process, as all of them learnt in the last update
        self._postfix: dict[str, str] = {}  # beside the progress bar
        self._skipped = SkippedUpdates()

    def prepare(self, module: nn.Module, *, learning_rate: float) -> nn.Module:
        """Make `module` ready to train; where the run resumes, with the weights, moments and EMA of the checkpoint.

        Args:
            module: Its parameters that require a gradient, float32, are trained; it is moved to the device.
            learning_rate: The peak, unless --learning-rate names one.

        Returns:
            The module whose forward must be called: only its forward exchanges gradients between processes.

        Raises:
            ValueError: the checkpoint to resume from has other parameters.
        """
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        frozen = [name for name, _ in module.named_parameters() if name not in named]  # all have read them
        assert named, "module has no parameter that requires a gradient"
        assert all(p.dtype == torch.float32 for p in named.values()), "trained parameters must be float32"
        self._named, self._peak_lr = named, self.config.learning_rate or learning_rate
        if self.config.compile:
            compile_blocks(module)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        parts = module.to(self.device), adamw(self.config, list(named.values()), self._peak_lr)
        self._module, self._optimizer = self._accelerator.prepare(*parts)
        self._ema = EMA(self.config, named.values())
        if self.source is not None:
            self._load(self.source)
        self._open_folder()
        return self._module

    def _find_start(self) -> folder.Start:
        """Where the run begins, as the main process finds it, and what differs from before, which it says."""
        start = folder.Start()
        if self.is_main:
            settings = (
                resume.settings(self.config, self.driver, self.images_per_update) | self._driver_settings
            )
            self._identity = resume.identity(self._config_text, settings, self.world)
            start = resume.find_start(self.config, self._identity)
            for line in start.said:
                say(line, kind="")
        if self.world > 1:
            (start,) = broadcast_object_list([start])
        return start

    def _open_folder(self) -> None:
        """Begin to write: the first moment at which an earlier run can be touched, since now everything has loaded."""
        self.wait()
        if self.is_main:
            overwrite, patterns = self.config.overwrite_output_dir, self._driver_files
            trackers = metrics.start_trackers(self.config, self._identity["flags"], self.source, self.row)
            folder.clear(self.folder, self._begin, overwrite=overwrite, driver_files=patterns)
            checkpoint.prune(self.folder, self.config.checkpoints_total_limit)
            trackers.remember()
            self._metrics = metrics.Metrics(self.config, trackers, start=self.start - bool(self.row))
            circumstances = f"torch {torch.__version__}, processes {self.world}"
            folder.write_config(self.folder, self._config_text, self.driver, circumstances)
        self.wait()

    def steps(self) -> Iterator[int]:
        """Indices of the updates still to do; each begins with freshly seeded random number generators."""
        interval = 0.5 if sys.stderr.isatty() or "ipykernel" in sys.modules else 30.0
        total = self.config.max_train_steps
        bar = tqdm(total=total, initial=self.start, disable=not self.is_main, mininterval=interval)
        self._write_row()
        with bar, signals.caught() as self._received:
            for step in range(total if self.stopped else self.start, total):
                seeds.seed_everything(self.config.seed, Stream.STEP, self.rank, step)
                lr = self._peak_lr * lr_factor(self.config, step)
                for group in self._optimizer.param_groups:
                    group["lr"] = lr
                self.row, self._began = {"step": step, "lr": lr}, time.perf_counter()
                yield step
                assert not self._scalars, "call update() once in each of the passes()"
                self._write_row()
                bar.set_postfix(self._postfix, refresh=False)
                bar.update()
                if self.interrupted or self.stopped:
                    return

    def passes(self, number: int | None = None) -> Iterator[int]:
        """Yield 0, 1, ...: the backward passes of one update, `number` of them, which is chosen for each update anew.

        None = --gradient-accumulation-steps. The same on all processes. Gradients of the passes are averaged.
        """
        assert not self._scalars, "call update() once in each of the passes()"
        self._passes = self.config.gradient_accumulation_steps if number is None else number
        yield from range(self._passes)

    def image_indices(self, step: int, micro_batch: int) -> range:
        """Global indices of the images of this process in one micro-batch; see `order.image_indices`."""
        return order.image_indices(
            step, micro_batch, self.images_per_update, self.config.train_batch_size, self.rank, self.world
        )

    def generator(self, index: int, stream: int = 0) -> torch.Generator:
        """CPU generator of the image with that global index: the same on every process, for every batch size.

        A driver that makes two things of one index takes two streams.
        """
        return seeds.generator(self.config.seed, Stream.IMAGE, stream, index)

    def rng(self, step: int, micro_batch: int = 0) -> np.random.Generator:
        """Generator of (seed, step, micro_batch), the same on all processes: for what an update chooses, as ReFL's late step."""
        return seeds.rng(self.config.seed, Stream.CHOICE, 0, step, micro_batch)

    def accumulate(self) -> AbstractContextManager[None]:
        """Context of a backward pass: processes exchange gradients in the last one of an update only."""
        if len(self._scalars) + 1 == self._passes:
            return nullcontext()
        return self._accelerator.no_sync(self._module)

    def autocast(self) -> AbstractContextManager[None]:
        """Context of the configured precision, for work outside the prepared module (which has its own)."""
        return self._accelerator.autocast()

    def update(self, loss: Tensor, *, phase: str = "", **scalars: Tensor | float) -> None:
        """Backward; in the last of the `passes` also clip, step, average the weights and note the metrics.

        The loss and the scalars (numbers or tensors of one element, the same names on every process) are averaged over
        passes and processes. A GPU is waited for once, in the last pass, before the weights change. A driver with several updates per step names them: phase="pretrain" notes
        `pretrain_loss` and `pretrain_grad_norm`. They share the optimizer and the learning rate of the step.

        Raises:
            FloatingPointError: on every process, before the weights change, when a loss, another scalar or the gradient is not finite.
                Under fp16 an infinite gradient is the loss scaler's business: it skips the update; 50 in a row raise.
        """
        prefix = f"{phase}_" if phase else ""
        values = {f"{prefix}loss": loss, **scalars}
        self._scalars.append(
            {name: v.detach().float() if isinstance(v, Tensor) else float(v) for name, v in values.items()}
        )
        self._accelerator.backward(loss / self._passes)
        if len(self._scalars) < self._passes:
            return
        assert self.row, "call update() in the loop over steps(), before save()"
        where = f"step {self.row['step']}, rank {self.rank}, learning rate {self.row['lr']:.3g}"
        clipped = self._accelerator.clip_grad_norm_(self._named.values(), self.config.max_grad_norm)
        means, norm = self._averaged(f"{prefix}loss", clipped, where)
        self.row |= means | {f"{prefix}grad_norm": norm}
        if not math.isfinite(norm) and self.config.mixed_precision != "fp16":
            raise FloatingPointError(f"gradient norm at {where} is {norm}: {_REMEDY}{self._suspects()}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._skipped.note(self._accelerator.optimizer_step_was_skipped, where)
        if not self._accelerator.optimizer_step_was_skipped:
            self._ema.update()
        if self.config.mixed_precision == "fp16":
            self.row["skipped_updates"] = self._skipped.total
        self.row["images_per_s"] = self.images_per_update / (time.perf_counter() - self._began)

    def _suspects(self) -> str:
        """Return what rewards of the user's own may have to do with a gradient that is not finite."""
        names = resume.own_rewards(self._identity) if self.is_main else []
        return f", or a square root, logarithm or division at 0 in {' and '.join(names)}" if names else ""

    def _averaged(self, loss: str, norm: Tensor, where: str) -> tuple[dict[str, float], float]:
        """Means of the passes' scalars, and the norm; the one wait for a GPU, and the moment when processes agree on a stop or failure."""
        names = sorted(self._scalars[0])
        assert all(sorted(scalars) == names for scalars in self._scalars), f"all passes must give {names}"
        rows = [torch.cat([one(scalars[name], self.device) for name in names]) for scalars in self._scalars]
        signal, means = one(self._received.number, self.device), torch.stack(rows).mean(0)
        mine = torch.cat([signal, means, one(norm, self.device)])
        table = self.gather(mine[None]).cpu()  # (processes, 1 + names + 1)
        self._scalars = []
        self._agreed_signal = int(table[:, 0].max())
        for name in [loss, *names]:  # the loss first
            column = table[:, 1 + names.index(name)].tolist()
            bad = [f"{value} on rank {rank}" for rank, value in enumerate(column) if not math.isfinite(value)]
            if bad:
                raise FloatingPointError(f"{name} at {where} is {', '.join(bad)}: {_REMEDY}")
        averages = table[:, 1:-1].mean(0).tolist()
        return dict(zip(names, averages, strict=True)), float(table[self.rank, -1])

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenation along the first axis, in order of rank, of every process' (B, ...) tensor."""
        return self._accelerator.gather(tensor)

    def wait(self) -> None:
        """Wait until every process is here."""
        self._accelerator.wait_for_everyone()

    def until_stopped(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches of images until a signal comes, which ends the one under way; then all processes know: `interrupted`."""
        yield from signals.until_stopped(self._received, batches)
        self._agreed_signal = int(self.gather(one(self._received.number, self.device)).max())

    def ema_weights(self) -> AbstractContextManager[None]:
        """Context in which the trained module holds the averaged weights; without averaging, its own."""
        return self._ema.swapped_in()

    def log(self, step: int, **scalars: float) -> None:
        """Add scalars to the metrics of a step; before `save`, for a resume does not know what is logged after it."""
        if self.row and self.row["step"] == step:
            self.row |= scalars
        elif self._metrics is not None:
            self._metrics.write({"step": step, **scalars})

    def log_images(self, step: int, key: str, images: Mapping[Path, str]) -> None:
        """Show image files with captions in the trackers, of a step or, before the first, of -1; before the metrics of a later one."""
        if self._metrics is not None:
            self._metrics.images(key, images, step)

    def _write_row(self, *, complete: bool = True) -> None:
        if self.row and self._metrics is not None:
            self._metrics.write(self.row, complete=complete)
            self._postfix = {name: f"{value:.3g}" for name, value in self.row.items() if name != "step"}
        self.row = {}

    def due(self, what: Literal["checkpointing_steps", "validation_steps"], step: int) -> bool:
        """Whether to save or sample after this step: every so many, at the last one, and save when it ends sooner."""
        early = what == "checkpointing_steps" and (self.interrupted or self.stopped)
        return early or self.scheduled(what, step)

    def scheduled(self, what: Literal["checkpointing_steps", "validation_steps"], step: int) -> bool:
        """Whether `due` is so without an interruption: for what a run that was never stopped must do as well."""
        every = int(getattr(self.config, what))
        return step + 1 == self.config.max_train_steps or (every > 0 and (step + 1) % every == 0)

    @property
    def fingerprint(self) -> str:
        """Digest of all that a resume must not change; on the main process only."""
        return resume.fingerprint(self._identity)

    def save(
        self,
        step: int,
        *,
        write: Callable[[Path], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the checkpoint after the updates of this step: the main process writes, the others wait.

        `write` adds the driver's own files, such as `lora/`, to the folder that it is given. `state`, of tensors, numbers, strings,
        lists and dicts, is the driver's own `resumed_state` later. The step's metrics are written first, after a signal last.
        """
        assert not self._scalars, "save between updates"
        row = self.row if self.interrupted else {}  # its validation may follow in the run that resumes
        if not row:
            self._write_row()
        if self._metrics is not None:
            notes = {"metrics": self._metrics.sync(), "run": self._identity}
            contents = self._state() | {"driver": dict(state or {}), "row": row}
            keep = self.config.checkpoints_total_limit
            checkpoint.write(self.folder, step + 1, contents, write, keep, notes)
        self._write_row(complete=False)  # the one that the checkpoint has itself
        self.wait()

    def _state(self) -> dict[str, Any]:
        scaler = self._accelerator.scaler
        return {
            "skipped": (self._skipped.total, self._skipped.in_a_row),
            "parameters": {name: p.detach().cpu() for name, p in self._named.items()},
            "optimizer": self._optimizer.state_dict()["state"],
            "average": self._ema.state(),
            "averaged": self._ema.count,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    @torch.no_grad()
    def _load(self, source: Path) -> None:
        state = checkpoint.read(source)
        then, now = [{k: tuple(p.shape) for k, p in ps.items()} for ps in (state["parameters"], self._named)]
        resume.refuse_mismatch(source, then, now)
        for name, parameter in self._named.items():
            parameter.copy_(state["parameters"][name])
        self._ema.go_on(state["average"], state["averaged"])
        self._skipped.total, self._skipped.in_a_row = state["skipped"]
        self.resumed_state, self.row = state["driver"], state["row"]
        # Learning rate, betas and so on are the configuration's; only the moments come from the checkpoint.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if (scaler := self._accelerator.scaler) is not None:
            scaler.load_state_dict(state["scaler"])

    @property
    def interrupted(self) -> bool:
        """Whether some process was asked to stop; the same on all of them, since the last update."""
        return self._agreed_signal != 0

    def finish(self) -> int:
        """Close files and processes. Returns the exit code: 0, or 128 + signal when interrupted."""
        self.wait()
        if self._metrics is not None:
            self._metrics.close(hurry=self.interrupted)
            lock.release(self.folder)
        self._accelerator.end_training()
        return 128 + self._agreed_signal if self.interrupted else 0
