"""What a run changes of its process beside its folder, for calls from Python: it is put back after the call."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

_STATES = (PartialState, AcceleratorState, GradientState)


@contextmanager
def kept() -> Iterator[None]:
    """Context after which the process is as before.

    Put back are accelerate's state (also that of an Accelerator that the caller has made), torch's number of threads, the
    environment variables that accelerate sets, and the global random numbers of Python, numpy and torch.
    """
    states = [dict(state._shared_state) for state in _STATES]
    threads, environment = torch.get_num_threads(), dict(os.environ)
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for state, before in zip(_STATES, states, strict=True):
            state._shared_state.clear()
            state._shared_state.update(before)
        torch.set_num_threads(threads)
        for name in os.environ.keys() | environment.keys():
            if name.startswith(("ACCELERATE_", "PYTORCH_")):
                _set(name, environment.get(name))
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def device() -> torch.device:
    """Return the device that a run takes, as accelerate chooses it; inside `kept`."""
    found: torch.device = PartialState().device
    return found


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
