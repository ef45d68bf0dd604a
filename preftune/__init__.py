"""preftune: reward-guided tuning of text-to-image diffusion models; the shared library of the programs, and their Python calls.

>>> from preftune import refl
>>> pipe = refl(model="stable-diffusion-v1-5/stable-diffusion-v1-5", prompts=["a red car"], rewards="imagereward=1")

The calls are in preftune/api/__init__.py. `import preftune` alone takes milliseconds.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Unless asked otherwise: transformers would tell everybody, on each start, of a torchvision that nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Before torch is imported. Its threads (GNU OpenMP) wait for each other in a loop of milliseconds, in which they take the cores from
# whatever else computes, and from each other: beside other work a forward took 6 to 60 times as long. A short loop, then sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from preftune.api import (
        awm,
        ddpo,
        dpo,
        draft,
        drtune,
        flowbp,
        nft,
        pretrain,
        raft,
        refl,
        reward_weighted,
        score,
        weird_lora,
    )  # fmt: skip

__all__ = [
    "awm",
    "ddpo",
    "dpo",
    "draft",
    "drtune",
    "flowbp",
    "nft",
    "pretrain",
    "raft",
    "refl",
    "reward_weighted",
    "score",
    "weird_lora",
]


if not TYPE_CHECKING:  # type checkers know the names from above, and no others

    def __getattr__(name: str) -> Any:
        """Import the calls when they are asked for (PEP 562).

        ImportError where a file of the user's, such as rewards.py, hides a package that they need.
        """
        if name in __all__:
            from preftune.programs import hidden

            for package in ("rewards", "finetune"):
                if (fault := hidden(package)) is not None:
                    raise ImportError(fault)
            return getattr(importlib.import_module("preftune.api"), name)
        raise AttributeError(f"module 'preftune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
