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

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from preftune.api.given_inputs import scorers
from preftune.api.running import call, given_functions, tune

PathLike = str | Path
Prompts = str | Path | Iterable[str]
Rewards = str | Callable[..., Any] | Iterable[Any] | Mapping[str, Any]


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
    return tune("refl", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def draft(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model by the gradient of a reward through the last steps of sampling (DRaFT, AlignProp); return the tuned pipeline.

    arXiv 2309.17400, 2310.03739. Arguments, result and errors as `refl`. Usual ones more: last_steps, truncation, lv_copies, eta.
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return tune("draft", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def drtune(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model by the gradient of a reward to a few steps all over the trajectory (DRTune); return the tuned pipeline.

    arXiv 2405.00760. Arguments, result and errors as `refl`. Usual ones more: active_steps, early_stop.
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return tune("drtune", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def flowbp(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model by a reward's gradient through a surrogate of the trajectory (FlowBP, LeapAlign); return the tuned pipeline.

    arXiv 2606.11075, 2604.15311. Arguments, result and errors as `refl`. Usual ones more: surrogate, active_steps, input_share.
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return tune("flowbp", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def ddpo(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model by policy gradients, with any reward (DDPO; GRPO with advantages="group"), and return the tuned pipeline.

    arXiv 2305.13301, 2505.07818. Arguments, result and errors as `refl`. Usual ones more: advantages, images_per_prompt,
    prompts_per_rollout, clip_range, kl_weight.
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return tune("ddpo", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def awm(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model on its own images, weighted by signed advantages (AWM, arXiv 2509.25050), and return the tuned pipeline.

    Arguments, result and errors as `refl`; the reward needs no gradient. Usual ones more: prompts_per_epoch, images_per_prompt,
    timesteps_per_image, kl_weight.
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return tune("awm", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


def nft(
    *,
    model: PathLike | None = None,
    prompts: Prompts | None = None,
    rewards: Rewards | None = None,
    output_dir: PathLike | None = None,
    max_train_steps: int | None = None,
    **arguments: Any,
) -> Any:
    """Tune a model towards its good images and away from its bad ones (DiffusionNFT, arXiv 2509.16117); return the tuned pipeline.

    Arguments, result and errors as `refl`; the reward needs no gradient. Usual ones more: prompts_per_epoch, images_per_prompt,
    timesteps_per_image, beta.
    """
    __tracebackhide__ = True
    given = {"model": model, "prompts": prompts, "rewards": rewards}
    return tune("nft", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


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
    return tune("raft", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


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
    return tune(
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
    return tune(
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
    return tune("dpo", given | {"output_dir": output_dir, "max_train_steps": max_train_steps} | arguments)


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
    return tune(
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
        with given_functions(functions), torch.no_grad():
            names = parse_names(terms)
            several = images.to(place) if isinstance(images, torch.Tensor) else _opened(images)
            texts = prompts if isinstance(prompts, str) else list(prompts)
            loaded = load_all(names, files={}, device=place, dtype=torch.float32)
            return {scorer.card.name: scorer(several, texts).cpu() for scorer in loaded}

    return call(work, {"rewards": str}, "score")


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
