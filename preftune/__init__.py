"""preftune: the shared library of the drivers (families, noise, sampling, LoRA, prompts, records, images, cli)."""
