"""Tuning from Python: a call takes the flags of a program as arguments and returns a pipeline of diffusers.

    from preftune import refl

    def red(pixels, prompts):  # (B, 3, H, W) in [0, 1] -> (B,)
        return (pixels[:, 0] - pixels[:, 1:].mean(1)).mean((1, 2))

    pipe = refl(model="assets/tiny/pipeline", prompts=["a blue circle", "a green square"],
                rewards={"red": red, "imagereward-tiny": 0.5}, output_dir="runs/red",
                max_train_steps=2, gradient_accumulation_steps=1, num_inference_steps=4,
                sample_num_inference_steps=10)
    pipe("a blue circle", num_inference_steps=10).images[0].save("red.png")

The run folder is that of the program, and either can go on with the other's. An error of the caller is a ValueError of one
sentence, before a model loads. Ctrl-C, or a notebook's stop button, ends the run after the update under way, with a checkpoint.
"""

import contextlib
import gc
import importlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune import cli
from preftune.api.arguments import flags, in_python
from preftune.api.given_inputs import PROMPT_ARGUMENTS, Functions, Written, prompt_file, scorers
from preftune.cli import notes
from preftune.files import lock
from preftune.programs import PROGRAMS

PathLike = str | Path
Prompts = str | Path | Iterable[str]
Rewards = str | Callable[..., Any] | Iterable[Any] | Mapping[str, Any]

_UNDER_WAY = threading.Lock()
"""Runs share torch's random numbers and accelerate's state, so that a process has one at a time."""


def refl(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model by the gradient of a reward (ReFL, arXiv 2304.05977), and return the tuned pipeline.

    Without arguments: the embedded demo, about three minutes on two CPU cores.

    Args:
        model: Pipeline folder, .safetensors or .ckpt file, or hub id, of Stable Diffusion 1.x, 2.x or XL.
        prompts: Prompt file, or a list of strings.
        rewards: "imagereward=1", a function f(pixels (B, 3, H, W) in [0, 1], prompts) -> (B,) with a gradient, a list of
            such, or a dict: {"imagereward": 1, "mine": (function, 0.5)}.
        output_dir: Folder of the run; default runs/refl.
        max_train_steps: Updates.
        **arguments: Every other flag that `preftune refl --help` lists, - and . as _: learning_rate=1e-4, lora_rank=16,
            sample_guidance_scale=5, train="full", gradient_checkpointing=True. A group may be a dict, lora={"rank": 16};
            config="run.yaml" reads a file, over which arguments win. None leaves an argument out.

    Returns:
        A StableDiffusionPipeline or StableDiffusionXLPipeline on the run's device and in its precision, with the LoRA of
        output_dir/lora loaded, or with train="full" all tuned weights.

    Raises:
        ValueError: Something that was given is wrong; one sentence, before a model loads. Also later, where a reward of yours
            fails: what it raised is the cause.
        OSError, FloatingPointError: A write failed, a loss is not finite; notes say which checkpoint there is.
        KeyboardInterrupt: Stopped; go on with resume_from_checkpoint="latest".
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return _tune("refl", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def raft(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model on its own best images, again and again (RAFT, arXiv 2304.06767), and return the tuned pipeline.

    Arguments, result and errors as `refl`; a function in `rewards` needs no gradient. Usual ones more: iterations,
    prompts_per_iteration, images_per_prompt; max_train_steps is a multiple of iterations.
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return _tune("raft", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def reward_weighted(
    *,
    model: PathLike | None = None,
    data: PathLike | None = None,
    score: str | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model on images whose loss is weighted by their score, and return the tuned pipeline.

    `data` is a folder of captioned images, `score` the column of its metadata with their score. Further arguments, result and
    errors as `refl`; `rewards` score the validation images.
    """
    __tracebackhide__ = True
    given = {"model": model, "data": data, "score": score}
    return _tune(
        "reward-weighted", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments
    )


def weird_lora(
    *,
    model: PathLike | None = None,
    data: PathLike | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Teach a model a prefix for images that people dislike, as a negative prompt (HPS, arXiv 2303.14420); return the pipeline.

    `data` is a folder of captioned images, whose `kind` is preferred or non_preferred; `prefix` is the prefix. Further
    arguments, result and errors as `refl`; `rewards` score the validation images.
    """
    __tracebackhide__ = True
    given = {"model": model, "data": data}
    return _tune(
        "weird-lora", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments
    )


def dpo(
    *,
    model: PathLike | None = None,
    data: PathLike | Iterable[PathLike] | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model on pairs of images of which one is preferred (Diffusion-DPO, arXiv 2311.12908), and return the pipeline.

    `data` is a folder with rankings.jsonl, or of captioned images with scores that `raters` names, or several of them. Usual ones
    more: loss, beta, poly_alpha, labels. Further arguments, result and errors as `refl`; `rewards` score the validation images.
    """
    __tracebackhide__ = True
    given = {"model": model, "data": data}
    return _tune("dpo", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def pretrain(
    *,
    model: PathLike | None = None,
    data: PathLike | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Train a model on captioned images, a LoRA or all weights, and return the tuned pipeline.

    `data` is a folder of captioned images. Further arguments, result and errors as `refl`, without `prompts` and `rewards`.
    """
    __tracebackhide__ = True
    given = {"model": model, "data": data}
    return _tune(
        "pretrain", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments
    )


def score(images: Any, prompts: str | Iterable[str], rewards: Rewards, *, device: str | None = None) -> Any:
    """Return the scores of images by each scorer, by its name: float32 tensors (B,) on the CPU, higher is better.

    Args:
        images: PIL images or paths of image files, one or a list, or pixels (B, 3, H, W) in [0, 1].
        prompts: One for each image, or one for all.
        rewards: As in `refl`, without weights: each scorer is reported by itself.
        device: Where the scorers run; None = the GPU, or the CPU where there is none.

    Raises:
        ValueError: Something that was given is wrong.
    """

    __tracebackhide__ = True

    def work() -> Any:
        import torch

        from preftune.cli.precision import device_here
        from rewards.shared_towers import load_all
        from rewards.terms import parse_names

        terms, functions = scorers(rewards)
        place = device or device_here()
        with _given_functions(functions), torch.no_grad():
            names = parse_names(terms)
            several = images.to(place) if isinstance(images, torch.Tensor) else _opened(images)
            texts = prompts if isinstance(prompts, str) else list(prompts)
            loaded = load_all(names, files={}, device=place, dtype=torch.float32)
            return {scorer.card.name: scorer(several, texts).cpu() for scorer in loaded}

    return _call(work, {"rewards": str}, "score")


def _opened(images: Any) -> list[Any]:
    """Return images as PIL images, files among them read."""
    from preftune.images import opened
    from rewards import embedded

    found = []
    for image in images if isinstance(images, list | tuple) else [images]:
        if isinstance(image, str | Path):
            with opened(embedded.find(Path(image).expanduser())) as file:
                found.append(file.copy())
        else:
            found.append(image)
    return found


def _tune(program: str, arguments: Mapping[str, Any]) -> Any:
    """Run a program with these arguments, and return the pipeline of its result."""
    __tracebackhide__ = True
    if not _UNDER_WAY.acquire(blocking=False):
        raise ValueError(
            "another call is under way in this process; wait for it, or start this one in a process of its own"
        )
    try:
        module = importlib.import_module(PROGRAMS[program])
        types, call = cli.flag_types(module.Config), program.replace("-", "_")
        return _call(lambda: _run(module, arguments, types), types, call)
    finally:
        _UNDER_WAY.release()


def _run(module: Any, arguments: Mapping[str, Any], types: Mapping[str, Any]) -> Any:
    from preftune.training import process_state

    given = {name: value for name, value in arguments.items() if value is not None}
    functions: Functions = {}
    if "rewards" in given:
        given["rewards"], functions = scorers(given["rewards"])
    with _given_functions(functions), process_state.kept():
        config, written = _configure(module, given, types)
        try:
            if written is not None:
                lock.acquire(config.run.output_dir)  # main releases it
                written.write()
            code = module.main(config)
        finally:
            lock.release(config.run.output_dir)
            if written is not None:
                written.tidy()
        device = process_state.device()
        done = cli.parse(
            module.Config, ["--config", str(config.run.output_dir / "config.yaml")]
        )  # with its defaults
    _free()
    if code:
        _stopped(config.run.output_dir, code - 128)
    return _result(done, device)


def _configure(module: Any, given: dict[str, Any], types: Mapping[str, Any]) -> tuple[Any, Written | None]:
    """Return the configuration, and the prompt files that it names, which are not written yet."""
    lists = {
        name: prompt_file(name, given[name]) for name in PROMPT_ARGUMENTS if name in given and name in types
    }
    contents = dict(file for file in lists.values() if file is not None)
    named = {name: file[0] for name, file in lists.items() if file is not None}
    default = getattr(module, "TINY", None)
    config = cli.parse(module.Config, flags(given | named, types), default_config=default)
    if not contents:
        return config, None
    places = {name: config.run.output_dir / file for name, file in named.items()}
    validation = {name: place for name, place in places.items() if name == "validation_prompts"}
    own = {name: place for name, place in places.items() if name not in validation}
    config = replace(config, **own, validation=replace(config.validation, **validation))
    return config, Written(config.run.output_dir, contents)


def _given_functions(functions: Functions) -> contextlib.AbstractContextManager[None]:
    """Context in which these functions are scorers."""
    if not functions:
        return contextlib.nullcontext()
    from rewards import own

    return own.given(functions)


def _forget_frames(error: BaseException) -> None:
    """Let go of what the frames of an error hold, such as a model, and those of the errors that it followed."""
    following: BaseException | None = error
    while following is not None:
        traceback.clear_frames(following.__traceback__)
        following = following.__context__


def _call(work: Callable[[], Any], types: Mapping[str, Any], name: str) -> Any:
    """Return what `work` returns; nothing in it ends the process, and its sentences name arguments instead of flags."""
    __tracebackhide__ = True  # a notebook shows the caller's line and the sentence
    cause: BaseException | None = None
    try:
        with cli.errors_raised(), notes.worded(lambda text: in_python(text, types, name)):
            return work()
    except ValueError as error:
        cause, failure = (
            _cause(error),
            _reworded(ValueError(in_python(str(error), types, name)), error, types, name),
        )
        _forget_frames(error)
        if cause is not None:  # its frames have the pixels, and those the graph
            traceback.clear_frames(cause.__traceback__)
    except BaseException as error:  # a notebook keeps the last traceback, and so what its frames hold
        failure = _reworded(error, error, types, name)
        _forget_frames(error)
        if not isinstance(error, KeyboardInterrupt | FloatingPointError):  # of which the sentence says all
            _free()
            raise
    _free()
    raise failure.with_traceback(None) from cause


def _reworded(
    failure: BaseException, error: BaseException, types: Mapping[str, Any], name: str
) -> BaseException:
    """Give a failure the notes of an error, which name arguments instead of flags; return it."""
    failure.__notes__ = [in_python(note, types, name) for note in getattr(error, "__notes__", ())]
    return failure


def _cause(error: BaseException) -> BaseException | None:
    """What a reward of the caller's own raised, where that is behind an error: its traceback shows the line."""
    seen: BaseException | None = error
    while seen is not None:
        if hasattr(seen, "trace"):  # rewards.own.OwnRewardError
            return seen.__cause__
        seen = seen.__cause__ or seen.__context__
    return None


def _stopped(folder: Path, number: int) -> None:
    """Raise KeyboardInterrupt after a run that a signal has stopped; for SIGTERM do what that does without a run."""
    import signal

    from preftune.training.checkpoint import find_checkpoints

    if number != signal.SIGINT:
        signal.raise_signal(number)
    raise KeyboardInterrupt(
        f"the run stopped after the update under way, with checkpoint {find_checkpoints(folder)[-1]}; go on with the same call"
        ' and resume_from_checkpoint="latest"'
    )


def _result(config: Any, device: Any) -> Any:
    """Return the model of a configuration as a pipeline, with what its run has saved."""
    from preftune.families import pipelines
    from preftune.training.workspace import DTYPES

    source, vae, folder = config.model.pretrained.source(), config.model.vae, config.run.output_dir
    return pipelines.tuned(source, folder, device, DTYPES[config.run.mixed_precision or "no"], vae=vae)


def _free() -> None:
    """Give back the memory of a run: its modules refer to each other."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
