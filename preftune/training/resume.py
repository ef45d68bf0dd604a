"""From which checkpoint a run goes on, and whether it is the same run: what must not differ is refused, the rest is said.

What makes a run is noted in each checkpoint: the settings that the program compares itself, all flags of its configuration, and the
digests of its inputs. A flag whose input has the same content is the same, wherever that lies now.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from preftune.training import checkpoint, inputs, metrics
from preftune.training.folder import Start
from preftune.training.run_config import RunConfig
from rewards import own
from rewards.terms import parse_weights

MAY_DIFFER = frozenset(
    [
        "max_train_steps",
        "learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
        "adam_weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "fused_adam",
        "max_grad_norm",
        "ema_decay",
        "compile",
        "cuda_graphs",
        "allow_tf32",
        "checkpointing_steps",
        "validation_steps",
        "checkpoints_total_limit",
        "threads",
        "report_to",
        "tracker_project_name",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "vae_checkpointing",
        "attention",
        "offload",
        "export",
        "sample.batch_size",
        "guard",
        "guard_diversity_drop",
    ]
)
"""Flags that a run may go on with other values of; it says which."""
_SAY_NOTHING = frozenset(
    [
        "output_dir",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "workers",
        "dataloader_num_workers",
        "cache_latents",
        "cache_text_encoder_outputs",
        "data_cache_dir",
        "reward_files",
        "lora.alpha",
        "revision",
        "variant",
    ]
)
"""Flags that change nothing, or that something else in the comparison covers."""


def settings(config: RunConfig, driver: str, images_per_update: int) -> dict[str, object]:
    """Return what a resume must not change, beside the flags, the parameters and the driver's own settings."""
    return {
        "driver": driver,
        "seed": config.seed,
        "batch x accumulation x processes": images_per_update,
        "use_8bit_adam": config.use_8bit_adam,
        "use of ema_decay": config.ema_decay > 0,
        "use of fp16": config.mixed_precision == "fp16",
    }


def identity(config_text: str, settings: Mapping[str, object], processes: int = 1) -> dict[str, Any]:
    """Return what makes a run, as JSON has it; `config_text` is the YAML that replays its configuration."""
    try:
        rows = yaml.safe_load(config_text)
    except yaml.YAMLError:
        rows = None
    flags: dict[str, Any] = {}
    for name, value in rows.items() if isinstance(rows, dict) else ():
        flags |= (
            {f"{name}.{leaf}": one for leaf, one in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    digests = inputs.digests(flags)
    for name in ("rewards", "holdout_rewards"):
        if flags.get(name):
            flags[name] = parse_weights(flags[name])
    around = {"processes": processes, "torch": torch.__version__}
    run = {"settings": dict(settings), "flags": flags, "digests": digests, "around": around}
    found: dict[str, Any] = json.loads(json.dumps(run))
    return found


def own_rewards(run: Mapping[str, Any]) -> list[str]:
    """Return the names of the rewards of the user's own in what makes a run."""
    return [name for name in run["flags"].get("rewards") or () if own.is_own(name)]


def fingerprint(now: Mapping[str, Any]) -> str:
    """Return a digest of all that a run must not change."""
    flags = {name: value for name, value in now["flags"].items() if _must_not_differ(name, now)}
    kept = {"flags": {name: value for name, value in flags.items() if name not in now["digests"]}}
    text = json.dumps(kept | {"digests": now["digests"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_start(config: RunConfig, now: Mapping[str, Any]) -> Start:
    """Return where a run begins. ValueError for a checkpoint that is damaged, or of another run than `now`; touches nothing."""
    wanted, output = config.resume_from_checkpoint, config.output_dir
    if wanted is None:
        return Start()
    damaged: list[Path] = []
    faults: list[str] = []
    candidates = checkpoint.find_checkpoints(output, damaged=True) if wanted == "latest" else [wanted]
    for source in reversed(candidates):
        try:
            notes = checkpoint.verify(source)
        except ValueError as error:
            damaged.append(source)
            faults.append(str(error))
            continue
        changed = compare(source, notes["run"], now)
        if (done := notes["updates"]) > config.max_train_steps:
            raise ValueError(
                f"--max-train-steps {config.max_train_steps} is less than the {done} updates that {source} has; give {done} or"
                " more, start anew with --overwrite-output-dir or another --output-dir, or resume from an earlier checkpoint"
            )
        said = [
            f"warning: {fault}; set aside as {path.name}.damaged, going on from {source.name}"
            for fault, path in zip(faults, damaged, strict=True)
        ]
        if changed:
            said.append(f"going on from {source} with {changed}")
            if _schedule_moves(notes["run"], config):
                said.append(
                    f"warning: --lr-scheduler {config.lr_scheduler} falls to 0 at --max-train-steps, which is another number now:"
                    " the learning rates are not those of one run of this length"
                )
        if done == config.max_train_steps:
            said.append(
                f"{output} is complete, with all {done} updates; to run anew, add --overwrite-output-dir or another --output-dir, to"
                " train longer, a larger --max-train-steps"
            )
        if source.resolve().parent == output.resolve():
            gone = metrics.check(output, notes["metrics"], source)
            said += [f"warning: {gone}"] if gone else []
        return Start(source=source, damaged=tuple(damaged), said=tuple(said))
    if faults:
        earlier = [path for path in checkpoint.find_checkpoints(output, damaged=True) if path not in damaged]
        offer = f"use --resume-from-checkpoint {earlier[-1]}, or " if earlier else ""
        raise ValueError(
            f"cannot resume: {'; '.join(faults)}; {offer}start anew with --overwrite-output-dir or another --output-dir"
        )
    begun = (output / metrics.FILE).exists()
    return Start(said=(f"warning: {output} has no checkpoint: the run begins anew",) if begun else ())


def compare(source: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between a checkpoint's run and the present one, of what may, in words.

    ValueError for what must not differ.
    """
    refuse_mismatch(source, then["settings"], now["settings"])
    refused, allowed = [], []
    for name in then["flags"].keys() & now["flags"].keys():
        before, after = then["flags"][name], now["flags"][name]
        if before != after and name in MAY_DIFFER:
            allowed.append(f"--{_flag(name)} {after} (was {before})")
        elif before != after and _must_not_differ(name, now) and not _same_content(name, then, now):
            refused.append(f"--{_flag(name)} was {before}, is {after}")
    for name in then["digests"].keys() & now["digests"].keys():
        if then["digests"][name] != now["digests"][name] and then["flags"].get(name) == now["flags"].get(
            name
        ):
            what = name if name.startswith("scorer ") else f"--{_flag(name)} {now['flags'][name]}"
            refused.append(f"{what} is not what it was: its content has changed")
    for name, before in then["around"].items():
        if before != now["around"].get(name):
            allowed.append(f"{name} {now['around'].get(name)} (was {before})")
    if refused:
        raise _refusal(source, sorted(refused), _from_its_weights(source, then, now, len(refused)))
    return ", ".join(sorted(allowed))


def _from_its_weights(source: Path, then: Mapping[str, Any], now: Mapping[str, Any], refused: int) -> str:
    """How a new run goes on from the LoRA of a checkpoint, where nothing is refused but edited rewards of the user's own."""
    edited = [
        name
        for name in own_rewards(now)
        if then["digests"].get(f"scorer {name}", "") not in ("", now["digests"].get(f"scorer {name}"))
    ]
    if not edited or len(edited) < refused or not (source / "lora").is_dir():
        return ""
    return f"; to go on from these weights with {' and '.join(edited)} as it is now, begin another run with --lora-start {source}"


def _schedule_moves(then: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether the learning rate now ends at another update than before."""
    falls = config.lr_scheduler in ("linear", "cosine")
    return falls and then["flags"].get("max_train_steps") != config.max_train_steps


def refuse_mismatch(folder: Path, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Compare settings, or shapes by parameter name, of a checkpoint with the present ones.

    Raises:
        ValueError: they differ; names the first three differences.
    """
    names = [*then, *(name for name in now if name not in then)]
    differ = [
        f"{name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in names
        if (name in then, then.get(name)) != (name in now, now.get(name))
    ]
    if differ or list(then) != list(now):
        raise _refusal(folder, differ or ["the parameters come in another order"])


def _refusal(folder: Path, differences: list[str], more_ways: str = "") -> ValueError:
    more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ValueError(
        f"cannot resume from {folder}: {'; '.join(differences[:3])}{more}; give the settings that wrote it, or start anew with"
        f" --overwrite-output-dir or another --output-dir{more_ways}"
    )


def _must_not_differ(name: str, now: Mapping[str, Any]) -> bool:
    """Whether a flag is compared; the settings of the program have some of them under their own names."""
    return name not in MAY_DIFFER | _SAY_NOTHING and name not in now["settings"]


def _same_content(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    digest = then["digests"].get(name)
    return digest is not None and digest == now["digests"].get(name)


def _flag(name: str) -> str:
    return name.replace("_", "-")
