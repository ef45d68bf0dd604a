"""What a call from Python does: arguments become flags, the program's main runs in this process, its result is loaded."""

import contextlib
import gc
import importlib
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune import cli
from preftune.api.arguments import flags, in_python
from preftune.api.given_inputs import PROMPT_ARGUMENTS, Functions, Written, prompt_file, scorers
from preftune.cli import notes
from preftune.files import lock
from preftune.programs import PROGRAMS

_UNDER_WAY = threading.Lock()
"""Runs share torch's random numbers and accelerate's state, so that a process has one at a time."""


def tune(program: str, arguments: Mapping[str, Any]) -> Any:
    """Run a program with these arguments, and return the pipeline of its result."""
    __tracebackhide__ = True
    if not _UNDER_WAY.acquire(blocking=False):
        raise ValueError(
            "another call is under way in this process; wait for it, or start this one in a process of its own"
        )
    try:
        module = importlib.import_module(PROGRAMS[program])
        types, name = cli.flag_types(module.Config), program.replace("-", "_")
        return call(lambda: _run(module, arguments, types), types, name)
    finally:
        _UNDER_WAY.release()


def _run(module: Any, arguments: Mapping[str, Any], types: Mapping[str, Any]) -> Any:
    from preftune.training import process_state

    given = {name: value for name, value in arguments.items() if value is not None}
    functions: Functions = {}
    if "rewards" in given:
        given["rewards"], functions = scorers(given["rewards"])
    with given_functions(functions), process_state.kept():
        config, written = configure(module, given, types)
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


def configure(module: Any, given: dict[str, Any], types: Mapping[str, Any]) -> tuple[Any, Written | None]:
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


def given_functions(functions: Functions) -> contextlib.AbstractContextManager[None]:
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


def call(work: Callable[[], Any], types: Mapping[str, Any], name: str) -> Any:
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
