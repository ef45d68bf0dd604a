"""Flags of programs that train on captioned images: what is encoded once and kept on disk."""

import os
from dataclasses import dataclass
from pathlib import Path

from preftune import files


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What the frozen encoders say of images and captions may be kept on disk: losses stay the same to the bit."""

    cache_latents: bool = False
    """Keep on disk what the autoencoder makes of each image: 64 KiB at 512 px in bf16. It is found again by the image's content, the
    resolution, the batch size and the autoencoder's weights, by later runs too.
    """
    cache_text_encoder_outputs: bool = False
    """Keep on disk what the text encoders make of each caption: 116 KiB for Stable Diffusion in bf16, 308 KiB for SDXL."""
    data_cache_dir: Path | None = None
    """Folder of both; None = ~/.cache/preftune/encoded. It may be shared by runs, and removed at any time."""

    def __post_init__(self) -> None:
        if self.data_cache_dir is not None and not self.is_on:
            raise ValueError(
                f"--data-cache-dir {self.data_cache_dir} keeps nothing; add --cache-latents or --cache-text-encoder-outputs"
            )
        if (
            self.data_cache_dir is not None and not self.data_cache_dir.is_dir()
        ):  # one of others may be read only
            files.check_writable(self.data_cache_dir, "--data-cache-dir")

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self.cache_latents or self.cache_text_encoder_outputs

    def folder(self) -> Path:
        """Return where it is kept."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return self.data_cache_dir or home / "preftune" / "encoded"
