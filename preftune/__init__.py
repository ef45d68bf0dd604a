"""preftune: the shared library of the drivers (families, noise, sampling, LoRA, prompts, records, images, cli)."""

import os

# Unless asked otherwise: transformers would tell everybody, on each start, of a torchvision that nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
