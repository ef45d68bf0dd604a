"""Tuning from Python: the pipeline that comes back, errors, and what a call leaves of its process."""

import errno
import gc
import importlib
import inspect
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

import preftune
import tiny
from finetune import refl as program
from preftune import api, cli
from preftune.api import arguments, given_inputs, running
from preftune.files import one_writer
from preftune.programs import PROGRAMS
from preftune.training.checkpoint import find_checkpoints

pytestmark = pytest.mark.usefixtures("cpu")

PROMPTS = ["a blue circle", "a green square"]


def red(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    return (pixels[:, 0] - pixels[:, 1:].mean(1)).mean((1, 2))


def in_training(pixels: Tensor) -> bool:
    """Whether a reward is called by an update of `given`, not in the trial before, of two images, nor for validation."""
    return pixels.requires_grad and len(pixels) == 1


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """The objects of the imported libraries stay out of the collections, of which each call has one: half a second less."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def given(root: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a run of a second."""
    return {
        "model": str(root / "pipeline"),
        "prompts": PROMPTS,
        "rewards": red,
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 1,
        "resolution": 32,
        "num_inference_steps": 2,
        "window": (0, 1),
        "pretraining": "off",
        "learning_rate": 1e-2,
        "reward_scale": 1,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_validation_prompts": 1,
        "sample": {"num_inference_steps": 1, "solver": "ddim", "resolution": 32},
        "threads": 1,
    }


def image_of(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    shape = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"}
    return np.asarray(pipe("a red car", generator=generator, **shape).images)


def shown(error: BaseException) -> int:
    """How many frames a notebook shows of a traceback, besides the last one."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return sum(not frame.f_locals.get("__tracebackhide__") for frame in frames)


def example() -> str:
    text = textwrap.dedent(str(api.__doc__).split("\n\n", 1)[1].rpartition("\n\n")[0])
    return text[: text.index("\n\nThe run folder")] if "\n\nThe run folder" in text else text


def test_the_example_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")  # one thread, as all tests have
    lines = [line for line in example().splitlines() if line]
    assert lines[0] == "from preftune import refl"
    assert len(lines) <= 10
    exec("\n".join(lines), {})
    with Image.open("red.png") as image:
        assert image.size == (64, 64)
    assert (checkout / "runs" / "red" / "lora").is_dir()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sd", {"ema_decay": 0.5}),
        ("sd", {"train": "full", "mixed_precision": "bf16"}),
        ("xl", {}),
    ],
    ids=["LoRA with an average", "full in bf16", "SDXL"],
)
def test_the_pipeline_is_that_of_diffusers(
    kind: Literal["sd", "xl"], more: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    """The images are those of diffusers' own way to load the run's result, and differ from the model's before."""
    make = tiny.pipeline_folder if kind == "sd" else tiny.pipeline_xl_folder
    model, run = make(tmp_path / "model"), Path(given["output_dir"])
    pipe = preftune.refl(
        **given | more | {"model": model, "max_train_steps": 2 if "ema_decay" in more else 1}
    )
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if "mixed_precision" in more else torch.float32}
    if kind == "sd":
        settings["safety_checker"] = None
    before = DiffusionPipeline.from_pretrained(model, **settings)
    untuned = image_of(before)
    if "train" in more:
        before.unet = UNet2DConditionModel.from_pretrained(run / "unet", **settings)
    else:
        before.load_lora_weights(run / "lora")
    assert type(pipe) is type(before)
    assert pipe.scheduler.config == before.scheduler.config
    assert pipe.device.type == "cpu"
    assert np.array_equal(image_of(pipe), image_of(before))
    assert not np.array_equal(image_of(pipe), untuned)


def test_the_pipeline_has_the_vae_and_the_lora_that_the_run_started_from(
    given: dict[str, Any], tmp_path: Path
) -> None:
    tiny.vae(seed=5).save_pretrained(tmp_path / "vae")
    first, second = given["output_dir"], str(tmp_path / "second")
    preftune.refl(**given)
    pipe = preftune.refl(**given | {"output_dir": second, "lora_start": first, "vae": tmp_path / "vae"})
    other = DiffusionPipeline.from_pretrained(
        given["model"], safety_checker=None, vae=AutoencoderKL.from_pretrained(tmp_path / "vae")
    )
    other.load_lora_weights(f"{second}/lora")
    assert np.array_equal(image_of(pipe), image_of(other))


def test_every_call_returns_a_pipeline(root: Path, given: dict[str, Any]) -> None:
    names = ("model", "max_train_steps", "resolution", "train_batch_size", "sample", "threads")
    common = {name: given[name] for name in names} | {"data": str(root / "images")}
    place = given["output_dir"]
    pipes = [
        preftune.pretrain(**common, train="full", output_dir=f"{place}/a"),
        preftune.reward_weighted(**common, score="liking", beta=0, output_dir=f"{place}/b"),
        preftune.weird_lora(**common, output_dir=f"{place}/c", num_validation_prompts=1),
    ]
    pairs = common | {"data": [root / "rankings"], "num_validation_prompts": 1}
    pipes.append(preftune.dpo(**pairs, output_dir=f"{place}/e", poly_alpha=8))
    raft = {"iterations": 1, "prompts_per_iteration": 1, "images_per_prompt": 2}
    del common["data"]
    pipes.append(preftune.raft(**common, **raft, prompts=PROMPTS, rewards=red, output_dir=f"{place}/d"))
    assert [type(pipe).__name__ for pipe in pipes] == ["StableDiffusionPipeline"] * 5
    own = DiffusionPipeline.from_pretrained(f"{place}/a/pipeline", safety_checker=None)
    assert np.array_equal(image_of(pipes[0]), image_of(own))


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("draft", {"last_steps": 2, "eta": 0.5, "jitter": 2}),
        pytest.param("drtune", {"active_steps": 1, "early_stop": 1}, marks=pytest.mark.slow),
        pytest.param("flowbp", {"surrogate": "lagrange", "input_share": 0.5}, marks=pytest.mark.slow),
        ("dpo", {"loss": "ipo", "beta": 20, "labels": "majority"}),
        pytest.param("ddpo", {"eta": 0.5, "clip_range": 0.1}, marks=pytest.mark.slow),
        pytest.param("awm", {"weighting": "t2"}, marks=pytest.mark.slow),
        ("nft", {"beta": 0.5}),
    ],
)
def test_a_call_trains_the_weights_of_the_command(
    method: str, own: dict[str, Any], given: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    """Bit for bit, and not those of a run without the method's own arguments."""
    inputs = (
        {"data": [root / "rankings"]}
        if method == "dpo"
        else {"rewards": {"brightness": 1}, "prompts": str(root / "prompts.txt")}
    )
    epoch = {"prompts_per_epoch": 2, "images_per_prompt": 2, "updates_per_epoch": 1, "timesteps_per_image": 1}
    if method in ("awm", "nft"):
        inputs |= epoch
    elif method != "dpo":
        inputs |= {"num_inference_steps": 3, "guidance_scale": 2}
    if method == "ddpo":
        inputs |= {"prompts_per_rollout": 2, "images_per_prompt": 2, "prompt_buffer_min_count": 1}
    names = ("model", "max_train_steps", "resolution", "learning_rate", "train_batch_size", "gradient_accumulation_steps",
             "num_validation_prompts", "sample", "threads")  # fmt: skip
    common = {name: given[name] for name in names} | inputs
    pipe = getattr(preftune, method)(**common | own, output_dir=tmp_path / "call")
    assert pipe.get_list_adapters()
    module = importlib.import_module(f"finetune.{method}")
    for folder, more in (("command", own), ("plain", {})):
        words = arguments.flags(
            common | more | {"output_dir": tmp_path / folder}, cli.flag_types(module.Config)
        )
        assert module.main(cli.parse(module.Config, words)) == 0
    called, commanded, plain = (
        (tmp_path / folder / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
        for folder in ("call", "command", "plain")
    )
    assert called == commanded
    assert called != plain


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"learning_rat": 1}, r"unknown argument learning_rat \(did you mean learning_rate\?\); see help\(preftune.refl\)"),
        ({"lora": {"rnk": 4}}, r"unknown argument lora\.rnk \(did you mean lora_rank\?\).*"),
        ({"overwrite": True}, r"unknown argument overwrite \(here: overwrite_output_dir=True\).*"),
        ({"help": True}, r"unknown argument help; .*"),
        ({"max_train_steps": 0}, "max_train_steps is 0; it must be at least 1"),
        ({"pretraining": "alternate"}, 'pretraining="alternate" needs data IMAGEFOLDER; or .*'),
        ({"overwrite_output_dir": 1}, "overwrite_output_dir is 1; it must be True or False"),
        ({"decay_vectors": None, "no_decay_vectors": True}, r".*\(did you mean decay_vectors=False\?\)"),
        ({"lora": 4}, "lora is 4; it is a group of arguments, given as a dict with rank, .*"),
        ({"seed": torch.zeros(1)}, "seed is a Tensor; give a number, .*"),
        ({"model": "nowhere"}, "nowhere does not exist; .*"),
        ({"prompts": "a red car"}, r"prompts is 'a red car', which is no prompt file; .* prompts=\['a red car'\]"),
        ({"prompts": []}, "prompts is an empty list; give a list of strings"),
        ({"prompts": ["a", 1]}, "prompts holds 1; give a list of strings"),
        ({"prompts": [" "]}, r"prompt file .*prompts_\w+.json holds no prompts"),
        ({"rewards": "britness"}, r"unknown scorer 'britness' \(did you mean brightness\?\); .*"),
        ({"rewards": lambda pixels, prompts: pixels}, "rewards holds a function without a name; .*"),
        ({"rewards": [red, red]}, "rewards has two functions called red; .*"),
        ({"rewards": {"mine": "red"}}, r"rewards has 'red' for mine; give a weight, .*"),
        ({"rewards": {"brightness": red}}, "brightness is a scorer of the table; .*"),
        ({"rewards": {"mine": lambda pixels, prompts: pixels.mean()}}, r"mine \(.*test_api.py:\d+\) returned .*"),
        ({"train": "full", "lora_rank": 8}, 'lora settings do nothing with train="full"; .*'),
        ({"config": "nowhere.yaml"}, "cannot read the config file nowhere.yaml: .*"),
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value))[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_errors_are_sentences_about_arguments(
    wrong: dict[str, Any], sentence: str, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """ValueError, nothing written, nothing said, no SystemExit."""
    with pytest.raises(ValueError, match=re.compile(f"^{sentence}$")) as caught:
        preftune.refl(**given | wrong)
    assert shown(caught.value) == 1, "the caller's own"
    assert not Path(given["output_dir"]).exists()
    assert "error" not in capsys.readouterr().err


def test_what_a_reward_raised_is_the_cause(given: dict[str, Any]) -> None:
    def broken(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyError("missing")

    with pytest.raises(ValueError, match=r"broken failed at .*KeyError") as caught:
        preftune.refl(**given | {"rewards": broken})
    assert isinstance(caught.value.__cause__, KeyError)
    assert shown(caught.value.__cause__) == 1, "its own"


def test_a_failed_write_is_the_original_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").touch()
    config = cli.parse(program.Config, ["--model", "a", "--prompts", "b", "--pretraining", "off"])
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    with pytest.raises(OSError, match="No space left") as caught, cli.errors_raised():  # noqa: SIM117
        with one_writer.exit_on_failed_write(tmp_path, config):
            raise full
    assert caught.value is full
    assert "no complete checkpoint yet: make room there" in caught.value.__notes__[0]
    assert caught.value.__notes__[0].endswith("the same call and --resume-from-checkpoint latest")
    assert not capsys.readouterr().err


def test_a_run_goes_on_and_config_yaml_replays_it(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The list of prompts lies in the run folder, under a name that its content gives."""
    run = Path(given["output_dir"])
    given |= {"rewards": {"brightness": 1}, "validation_prompts": iter(["a square"])}
    preftune.refl(**given)
    names = sorted(path.name for path in run.glob("*prompts_*.json"))
    config = cli.parse(program.Config, ["--config", str(run / "config.yaml")])
    assert names == [config.prompts.name, config.validation.validation_prompts.name]
    with pytest.raises(ValueError, match=r'already holds a run: .* resume_from_checkpoint="latest"'):
        preftune.refl(**given | {"prompts": ["another"], "validation_prompts": None})
    assert names == sorted(path.name for path in run.glob("*prompts_*.json")), (
        "a refused call leaves all as it was"
    )
    again = [
        "--config",
        str(run / "config.yaml"),
        "--max-train-steps",
        "2",
        "--resume-from-checkpoint",
        "latest",
    ]
    assert program.main(cli.parse(program.Config, again)) == 0
    given |= {"max_train_steps": 3, "resume_from_checkpoint": "latest", "validation_prompts": ["a square"]}
    preftune.refl(**given)
    assert "going on from" in capsys.readouterr().err
    assert find_checkpoints(run)[-1].name == "step_000003"
    preftune.refl(
        **given | {"prompts": ["a third"], "resume_from_checkpoint": None, "overwrite_output_dir": True}
    )
    assert names[0] not in {path.name for path in run.iterdir()}, "an earlier run's list goes with it"


def test_a_stop_leaves_a_checkpoint_and_the_handlers(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stops = [signal.SIGINT]

    def stopping(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if in_training(pixels) and stops:
            signal.raise_signal(stops.pop())
        return red(pixels, prompts)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        KeyboardInterrupt, match=r'step_000001; go on .* resume_from_checkpoint="latest"'
    ) as caught:
        preftune.refl(**given | {"rewards": {"mine": stopping}, "max_train_steps": 3})
    assert shown(caught.value) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "go on" not in capsys.readouterr().err, "the error says it"
    again = {"rewards": {"mine": stopping}, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    assert preftune.refl(**given | again).get_list_adapters()


def test_a_second_interrupt_raises_at_once(given: dict[str, Any]) -> None:
    """In a program it kills the process, which would be that of the notebook."""

    def impatient(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if in_training(pixels):
            signal.raise_signal(signal.SIGINT)
            time.sleep(1.1)
            signal.raise_signal(signal.SIGINT)
        return red(pixels, prompts)

    with pytest.raises(KeyboardInterrupt):
        preftune.refl(**given | {"rewards": impatient})
    assert [path.name for path in find_checkpoints(Path(given["output_dir"]))] == ["step_000000"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_call_in_another_thread_and_one_at_a_time(given: dict[str, Any]) -> None:
    second: list[BaseException] = []

    def nested(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if not second:
            with pytest.raises(ValueError, match="another call is under way") as caught:
                preftune.refl(**given)
            second.append(caught.value)
        return red(pixels, prompts)

    pipes: list[Any] = []
    thread = threading.Thread(target=lambda: pipes.append(preftune.refl(**given | {"rewards": nested})))
    thread.start()
    thread.join()
    assert pipes
    assert second


def test_the_process_is_as_before(given: dict[str, Any]) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    mine = Accelerator(cpu=True)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    folder, environment, threads = Path.cwd(), dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(2)
    preftune.refl(**given | {"mixed_precision": "bf16"})
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert (Path.cwd(), dict(os.environ)) == (folder, environment)
    assert mine.mixed_precision == "no"
    assert mine.state.device.type == "cpu"
    now = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(now[0], expected[0])
    assert now[1:] == expected[1:]


def test_the_memory_of_a_call_is_free_after_it_and_after_one_that_failed(given: dict[str, Any]) -> None:
    def models() -> int:
        gc.collect()
        return sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects())

    before = models()
    pipe = preftune.refl(**given)
    assert models() == before + 1, "the pipeline's own"
    del pipe
    assert models() == before

    def late_nan(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return red(pixels, prompts) * (float("nan") if in_training(pixels) else 1)

    with pytest.raises(FloatingPointError, match="late_nan gave nan") as caught:
        preftune.refl(**given | {"rewards": late_nan, "overwrite_output_dir": True})
    assert re.fullmatch("the last complete checkpoint is .*step_000000", caught.value.__notes__[0])
    assert models() == before, "also while a notebook keeps the traceback"
    assert shown(caught.value) == 1
    assert caught.value.__traceback__ is not None
    lock = Path(given["output_dir"]).with_name(".run.lock")
    assert not lock.exists()


def test_pixels_of_a_reward_that_failed_are_free(given: dict[str, Any]) -> None:
    """And with them the graph of an update."""
    kept: list[weakref.ref[Tensor]] = []

    def failing(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if in_training(pixels):
            kept.append(weakref.ref(pixels))
            raise KeyError("missing")
        return red(pixels, prompts)

    with pytest.raises(ValueError, match="failing failed") as caught:
        preftune.refl(**given | {"rewards": failing})
    assert caught.value.__cause__ is not None
    assert [pixels() for pixels in kept] == [None], "also while a notebook keeps the traceback"


def test_notes_name_arguments(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    preftune.refl(**given | {"learning_rate": None, "window": None, "num_inference_steps": 4})
    said = capsys.readouterr().err
    assert 'learning_rate=0.0001 mixed_precision="no" window=(2, 3) ' in said
    assert " --" not in said


def test_arguments_are_flags(given: dict[str, Any]) -> None:
    types = cli.flag_types(program.Config)
    written = arguments.flags(
        {
            "config": [Path("a.yaml"), "b.yaml"],
            "lora": {"rank": np.int64(8), "target_modules": ["to_q", "to_k"]},
            "sample_guidance_scale": np.float32(1.5),
            "decay_vectors": False,
            "compile": True,
            "learning_rate": None,
            "rewards": {"imagereward": 1, "brightness": -0.5},
            "caption-dropout": 1e-05,
        },
        types,
    )
    assert written == [
        *("--config", "a.yaml", "--config", "b.yaml", "--lora.rank=8", "--lora.target-modules", "to_q", "to_k"),
        *("--sample.guidance-scale=1.5", "--no-decay-vectors", "--compile", "--learning-rate=None", "--rewards"),
        *("imagereward=1", "brightness=-0.5", "--caption-dropout=1e-05"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="an element may not begin with -"):
        arguments.flags({"rewards": ["--model", "x"]}, types)


def test_rewards_are_terms_and_functions() -> None:
    mine, parts = {"mine": (red, 0.5), "imagereward": 2, "other": red}, ["brightness=0.5", red]
    assert given_inputs.scorers(mine) == (
        ["mine=0.5", "imagereward=2.0", "other=1.0"],
        {"mine": red, "other": red},
    )
    assert given_inputs.scorers(parts) == (["brightness=0.5", "red=1"], {"red": red})
    assert given_inputs.scorers("brightness") == (["brightness"], {})


def test_scores_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = Image.new("RGB", (8, 8), (51, 51, 51))
    grey.save(tmp_path / "grey.png")
    found = preftune.score([grey, str(tmp_path / "grey.png")], "grey", ["brightness", red])
    assert {name: values.tolist() for name, values in found.items()} == {
        "brightness": pytest.approx([0.2, 0.2]),
        "red": pytest.approx([0.0, 0.0]),
    }
    monkeypatch.chdir(tmp_path)  # the package's own files are found from any folder
    assert preftune.score("assets/tiny/images/000/000000.png", "a red circle", "brightness")[
        "brightness"
    ].shape == (1,)
    assert preftune.score(torch.ones(1, 3, 8, 8), ["white"], "brightness")["brightness"].tolist() == [1]
    with pytest.raises(ValueError, match=r"^rewards brightness=2 has a weight"):
        preftune.score(grey, "grey", "brightness=2")


def test_without_arguments_it_is_the_demo(checkout: Path) -> None:
    flags = arguments.flags({}, cli.flag_types(program.Config))
    demo = cli.parse(program.Config, flags, default_config=program.TINY)
    config, written = running.configure(program, {"max_train_steps": 7}, cli.flag_types(program.Config))
    assert demo.run.max_train_steps == 80
    assert (config.run.max_train_steps, config.model, written) == (7, demo.model, None)


def test_help_and_an_import_without_torch() -> None:
    assert "sample_guidance_scale" in inspect.getdoc(preftune.refl)
    assert {"refl", "score"} <= set(dir(preftune))
    programs = [
        module.replace("finetune.", "") for module in PROGRAMS.values() if module.startswith("finetune.")
    ]
    sources = {name: Path(str(program.__file__)).with_name(f"{name}.py").read_text() for name in programs}
    tuning = {name for name, source in sources.items() if "validation: Annotated[ValidationConfig" in source}
    assert tuning == set(preftune.__all__) - {"score"}, (
        "each program that tunes a diffusion model has a call in preftune/api"
    )
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        preftune.tune  # noqa: B018
    code = "import sys; sys.modules['torch'] = None; from preftune import flowbp, raft, refl; help(refl)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prompts: Prompt file, or a list of strings." in done.stdout
