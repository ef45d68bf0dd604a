"""The plumbing of a training run, for drivers whose loop stays in the open. Only this file knows accelerate.

    check(config.run)                      # first of all: fails in milliseconds, not after loading a model
    run = Run(config.run, driver="refl", config_text=dump(config))
    unet = run.prepare(unet, parameters=lora_parameters)
    for step in run.steps():
        for micro in range(run.gradient_accumulation_steps):
            indices = run.image_indices(step, micro)
            with run.accumulate():
                loss = ...
                run.update(loss, mean_reward=rewards.mean())
        if run.due("validation_steps", step): ...
        if run.due("checkpointing_steps", step): run.save(step, write=...)
    sys.exit(run.finish())

Steps count updates from 0; checkpoint `step_000500` holds the weights after 500 updates and resumes at step 500.
Everything random derives from (seed, step), (seed, rank, step) or (seed, image index): on the same hardware a resumed run equals, bit
for bit, one that was never stopped. Ctrl-C or SIGTERM lets the update finish, makes `due("checkpointing_steps", step)` true and
ends `steps()`; `finish()` then returns the exit code 128 + signal (130, 143). A second one, a second
later or more, kills at once.

Several processes: `accelerate launch --num_processes 2 driver.py` on GPUs; on CPUs `ACCELERATE_USE_CPU=true accelerate
launch --multi_gpu --num_processes 2 driver.py`: without MPI, `--cpu` starts one process whatever it is asked for.
"""

import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from preftune.training import checkpoint
from preftune.training.optimizer import Average, adamw, lr_factor
from preftune.training.run_config import RunConfig, check, cpu_threads

__all__ = ["Run", "RunConfig", "check"]

MAX_SKIPPED = (
    50  # fp16 updates skipped in a row: the loss scale has halved 50 times by then and will not recover
)
_REMEDY = "lower --learning-rate, or find what this step's images have in common"
_SETUP, _STEP, _IMAGE, _DRAW = range(
    4
)  # second word of every seed: streams for different purposes never coincide


class Run:
    """One training run: its folder, processes, optimizer, metrics and checkpoints.

    Attributes:
        folder: Where the run writes.
        device: This process' device.
        is_main: Whether this is the process that writes.
        rank, world: Index of this process; number of processes.
        accumulation: Micro batches per update.
        start: First step to do: 0, or where the checkpoint left off.
        resumed: Whether the run goes on from a checkpoint, which may be that of step 0.

    Raises:
        ValueError: see `check`.
    """

    def __init__(self, config: RunConfig, *, driver: str, config_text: str) -> None:
        """Open the folder; `driver` names the kind of run, `config_text` is YAML that replays the whole configuration."""
        check(config)  # on every rank before any touches the folder: starting the processes is a barrier
        # accelerate keeps the precision of a process' first Accelerator; an earlier Run must not bind this one.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # Ranks may differ in their passes without gradient; broadcasting buffers in each forward would deadlock then.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self._accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            kwargs_handlers=[ddp],
        )
        self.config, self.driver, self.folder = config, driver, config.output_dir
        self.device: torch.device = self._accelerator.device
        self.is_main: bool = self._accelerator.is_main_process
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.gradient_accumulation_steps = config.gradient_accumulation_steps
        self.images_per_update = config.train_batch_size * config.gradient_accumulation_steps * self.world
        torch.set_num_threads(cpu_threads(config))
        self._seed_all(_SETUP, 0, 0)
        self._open_folder(config_text)
        self._row: dict[str, float] = {}  # metrics of the step under way; empty once written
        self._micro: list[dict[str, Tensor]] = []  # scalars of each micro batch since the last optimizer step
        self._signal = 0  # received by this process
        self._agreed_signal = 0  # received by any process, as all of them learnt in the last update
        self._shown: dict[str, str] = {}  # beside the progress bar
        self._skipped = self._skipped_in_a_row = 0

    def _open_folder(self, config_text: str) -> None:
        config, output = self.config, self.folder
        self._source = (
            config.resume_from_checkpoint if isinstance(config.resume_from_checkpoint, Path) else None
        )
        if self.is_main:
            checkpoint.clear(output, resume_from=self._source, overwrite=config.overwrite_output_dir)
        self._accelerator.wait_for_everyone()
        if config.resume_from_checkpoint == "latest":
            self._source = next(reversed(checkpoint.find_checkpoints(output)), None)
        self.start = (checkpoint.updates_of(self._source) or 0) if self._source else 0
        self.resumed = self._source is not None
        self._metrics = None
        if self.is_main:
            self._metrics = checkpoint.Metrics(output, start=self.start)
            made_by = f"driver {self.driver}, commit {checkpoint.commit()}, torch {torch.__version__}"
            header = f"# {made_by}, processes {self.world}\n"
            checkpoint.write_text(output / "config.yaml", header + config_text)

    def prepare(
        self, module: nn.Module, *, parameters: Iterable[nn.Parameter] | None = None, lr: float | None = None
    ) -> nn.Module:
        """Make `module` ready to train; where the run resumes, with the weights, moments and average of the checkpoint.

        Args:
            module: Holds the trained parameters; moved to the device.
            parameters: The trained ones, float32: exactly those of `module` that require a gradient. None = these.
            lr: Peak learning rate; None = the configured one.

        Returns:
            The module whose forward must be called: only its forward exchanges gradients between processes.

        Raises:
            ValueError: the checkpoint to resume from has other parameters or settings.
        """
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wanted = named.values() if parameters is None else parameters
        assert named, "module has no parameter that requires a gradient"
        same = {id(p) for p in wanted} == {id(p) for p in named.values()}
        assert same, "parameters must be those of module that require a gradient"
        assert all(p.dtype == torch.float32 for p in named.values()), "trained parameters must be float32"
        self._named, self._peak_lr = named, self.config.learning_rate if lr is None else lr
        if self.config.compile:
            module.compile()
        module = module.to(self.device)
        optimizer = adamw(self.config, list(named.values()), self._peak_lr)
        self._module, self._optimizer = self._accelerator.prepare(module, optimizer)
        self._average = Average(self.config, named.values())
        if self._source is not None:
            self._load(self._source)
        return self._module

    # The loop

    def steps(self) -> Iterator[int]:
        """Indices of the updates still to do; each begins with freshly seeded random number generators."""
        interval = 0.5 if sys.stderr.isatty() else 30.0
        total = self.config.max_train_steps
        bar = tqdm(total=total, initial=self.start, disable=not self.is_main, mininterval=interval)
        with bar, self._signals_caught():
            for step in range(self.start, total):
                self._seed_all(_STEP, self.rank, step)
                lr = self._peak_lr * lr_factor(self.config, step)
                for group in self._optimizer.param_groups:
                    group["lr"] = lr
                self._row, self._began = {"step": step, "lr": lr}, time.perf_counter()
                yield step
                assert not self._micro, (
                    f"update() must be called {self.gradient_accumulation_steps} times, in accumulate()"
                )
                self._write_row()
                bar.set_postfix(self._shown, refresh=False)
                bar.update()
                if self.interrupted:
                    return

    def image_indices(self, step: int, micro: int) -> range:
        """Global indices of the images of this process in one micro batch.

        Over all processes and micro batches, step s has [s G, (s + 1) G) with G = batch x accumulation x processes, so
        the images of a step do not depend on how G is divided.
        """
        batch = self.config.train_batch_size
        first = step * self.images_per_update + (micro * self.world + self.rank) * batch
        return range(first, first + batch)

    def generator(self, index: int, stream: int = 0) -> torch.Generator:
        """CPU generator of the image with that global index: the same on every process, for every batch size.

        A driver that makes two things of one index takes two streams. The seed is the first 64-bit word of numpy's
        SeedSequence((seed, 2, stream, index)).
        """
        words = np.random.SeedSequence((self.config.seed, _IMAGE, stream, index)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]))

    def rng(self, step: int, micro: int = 0) -> np.random.Generator:
        """Generator from (seed, step, micro) for draws that all processes must make alike, such as the late step of ReFL.

        What belongs to one image comes from `generator` instead, so neither depends on the number of processes. The seed
        is numpy's SeedSequence((seed, 3, 0, step, micro)).
        """
        return np.random.default_rng((self.config.seed, _DRAW, 0, step, micro))

    def _seed_all(self, *key: int) -> None:
        word = int(np.random.SeedSequence((self.config.seed, *key)).generate_state(1)[0])
        random.seed(word)
        np.random.seed(word)  # for libraries that draw from the global generator
        torch.manual_seed(word)

    def accumulate(self) -> AbstractContextManager[None]:
        """Context of a micro batch: processes exchange gradients in the last one of an update only."""
        return self._accelerator.accumulate(self._module)

    def autocast(self) -> AbstractContextManager[None]:
        """Context of the configured precision, for work outside the prepared module (which has its own)."""
        return self._accelerator.autocast()

    def update(self, loss: Tensor, *, phase: str = "", **scalars: Tensor | float) -> None:
        """Backward; at each `accumulation`-th call also clip, step, average the weights and note the metrics.

        The loss and the scalars (numbers or tensors of one element, the same names on every process) are averaged over
        micro batches and processes. A driver with several updates per step names them: phase="pretrain" notes
        `pretrain_loss` and `pretrain_grad_norm`. They share the optimizer and the learning rate of the step.

        Raises:
            FloatingPointError: on every process, before the weights change, when a loss or the gradient is not finite.
                Under fp16 an infinite gradient is the loss scaler's business: it skips the update; 50 in a row raise.
        """
        prefix = f"{phase}_" if phase else ""
        values = {f"{prefix}loss": loss, **scalars}
        self._micro.append({name: torch.as_tensor(value).detach().float() for name, value in values.items()})
        self._accelerator.backward(loss)
        if not self._accelerator.sync_gradients:
            return
        assert self._row, "call update() in the loop over steps(), before save()"
        assert len(self._micro) == self.gradient_accumulation_steps, (
            "call update() in accumulate(), once each"
        )
        where = f"step {self._row['step']}, rank {self.rank}"
        self._row |= self._averaged(f"{prefix}loss", where)
        norm = float(self._accelerator.clip_grad_norm_(self._named.values(), self.config.max_grad_norm))
        self._row[f"{prefix}grad_norm"] = norm
        if not math.isfinite(norm) and self.config.mixed_precision != "fp16":
            raise FloatingPointError(f"gradient norm at {where} is {norm}: {_REMEDY}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._accelerator.optimizer_step_was_skipped:
            self._skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED:
                raise FloatingPointError(f"{MAX_SKIPPED} gradients overflowed fp16, up to {where}: use bf16")
        else:
            self._skipped_in_a_row = 0
            self._average.update()
        if self.config.mixed_precision == "fp16":
            self._row["skipped_updates"] = self._skipped
        self._row["images_per_s"] = self.images_per_update / (time.perf_counter() - self._began)

    def _averaged(self, loss: str, where: str) -> dict[str, float]:
        """Means of the micro batches' scalars; also the one moment when processes agree on a stop or a failure."""
        names = sorted(self._micro[0])
        assert all(sorted(micro) == names for micro in self._micro), f"all micro batches must give {names}"
        micros = [
            torch.stack([micro[name].reshape(()).to(self.device) for name in names]) for micro in self._micro
        ]
        means = torch.stack(micros).mean(0)
        mine = torch.cat([means.new_tensor([self._signal]), means])
        table = self.gather(mine[None]).cpu()  # (processes, 1 + names)
        self._micro = []
        self._agreed_signal = int(table[:, 0].max())
        losses = table[:, 1 + names.index(loss)].tolist()
        bad = [f"{value} on rank {rank}" for rank, value in enumerate(losses) if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{loss} at {where} is {', '.join(bad)}: {_REMEDY}")
        return dict(zip(names, table[:, 1:].mean(0).tolist(), strict=True))

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenation along the first axis, in order of rank, of every process' (B, ...) tensor."""
        return self._accelerator.gather(tensor)

    def ema_weights(self) -> AbstractContextManager[None]:
        """Context in which the trained module holds the averaged weights; without averaging, its own."""
        return self._average.swapped_in()

    # Metrics and checkpoints

    def log(self, step: int, **scalars: float) -> None:
        """Add scalars to the metrics of a step; before `save`, for a resume does not know what is logged after it."""
        if self._row and self._row["step"] == step:
            self._row |= scalars
        elif self._metrics is not None:
            self._metrics.write({"step": step, **scalars})

    def _write_row(self) -> None:
        if self._row and self._metrics is not None:
            self._metrics.write(self._row)
            self._shown = {name: f"{value:.3g}" for name, value in self._row.items() if name != "step"}
        self._row = {}

    def due(self, what: Literal["checkpointing_steps", "validation_steps"], step: int) -> bool:
        """Whether to save or sample after this step: every so many, at the last one, and save when interrupted."""
        every = (
            self.config.checkpointing_steps if what == "checkpointing_steps" else self.config.validation_steps
        )
        last = step + 1 == self.config.max_train_steps
        return (
            last
            or (every > 0 and (step + 1) % every == 0)
            or (what == "checkpointing_steps" and self.interrupted)
        )

    def save(self, step: int, *, write: Callable[[Path], None] | None = None) -> None:
        """Save the checkpoint after the updates of this step: the main process writes, the others wait.

        `write` adds the driver's own files, such as `lora/`, to the folder that it is given. The step's metrics are
        written first.
        """
        assert not self._micro, "save between updates"
        self._write_row()
        if self._metrics is not None:
            self._metrics.sync()
            checkpoint.write(self.folder, step + 1, self._state(), write, self.config.checkpoints_total_limit)
        self._accelerator.wait_for_everyone()

    def _settings(self) -> dict[str, object]:
        """What a resume must not change, beside the parameters."""
        config = self.config
        return {
            "driver": self.driver,
            "seed": config.seed,
            "batch x accumulation x processes": self.images_per_update,
            "use_8bit_adam": config.use_8bit_adam,
            "use of ema_decay": config.ema_decay > 0,
            "use of fp16": config.mixed_precision == "fp16",
        }

    def _state(self) -> dict[str, Any]:
        scaler = self._accelerator.scaler
        return {
            "settings": self._settings(),
            "skipped": (self._skipped, self._skipped_in_a_row),
            "parameters": {name: p.detach().cpu() for name, p in self._named.items()},
            "optimizer": self._optimizer.state_dict()["state"],
            "average": [weight.cpu() for weight in self._average.weights],
            "averaged": self._average.count,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    @torch.no_grad()
    def _load(self, folder: Path) -> None:
        state = checkpoint.read(folder)
        checkpoint.refuse_mismatch(folder, state["settings"], self._settings())
        then, now = [{k: tuple(p.shape) for k, p in ps.items()} for ps in (state["parameters"], self._named)]
        checkpoint.refuse_mismatch(folder, then, now)
        for name, parameter in self._named.items():
            parameter.copy_(state["parameters"][name])
        self._average.load(state["average"], state["averaged"])
        self._skipped, self._skipped_in_a_row = state["skipped"]
        # Learning rate, betas and so on are the configuration's; only the moments come from the checkpoint.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    # The end

    @property
    def interrupted(self) -> bool:
        """Whether some process was asked to stop; the same on all of them, since the last update."""
        return self._agreed_signal != 0

    @contextmanager
    def _signals_caught(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread catch signals
            return
        first = 0.0

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal first
            now = time.monotonic()
            if not self._signal:
                self._signal, first = number, now
                name = signal.Signals(number).name
                tqdm.write(f"{name}: stopping after this update; once more kills at once", file=sys.stderr)
            elif now > first + 1:  # sooner, it is the same request, sent by both the launcher and the cluster
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def finish(self) -> int:
        """Close files and processes. Returns the exit code: 0, or 128 + signal when interrupted."""
        self._accelerator.wait_for_everyone()
        if self._metrics is not None:
            self._metrics.close()
        self._accelerator.end_training()
        return 128 + self._agreed_signal if self.interrupted else 0
