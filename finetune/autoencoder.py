"""Train a small AutoencoderKL from scratch on an imagefolder: the first stage of the embedded pipeline.

Loss: weighted mean of |error| + error^2 of the reconstruction + kl_weight x mean KL(q(z|x) || N(0, 1)) per
latent element (Rombach et al. 2022, appendix G). The adversarial and perceptual terms are left out: flat
shapes do not need them, and both need a second network. Pixels that differ from the image's median colour
have weight 1 + foreground_weight: most of an image is background, and with equal weights small objects lose
their colour for the first thousands of updates. At the end `scaling_factor` is set to 1 / std of the
latents of the first images, as in Stable Diffusion.

    python finetune/autoencoder.py --config finetune/configs/autoencoder/tiny.yaml

Hardware: two CPU cores, about 12 minutes for the given configuration. Output: an AutoencoderKL folder
`OUTPUT/vae`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.image_folders import Columns
from preftune.training.defaults import FROM_SCRATCH, filled, of_run
from preftune.training.run_config import RunConfig, check


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a small AutoencoderKL (factor 8, 4 latent channels) on an imagefolder."""

    data: Path
    """Folder of images; captions are not needed."""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    resolution: int = 64
    """Side of the square images, pixels; a multiple of 8."""
    widths: tuple[int, ...] = (16, 32, 64, 64)
    """Channels of the four levels, each a multiple of 8."""
    foreground_weight: float = 4.0
    """Extra weight of pixels that differ from the image's median colour."""
    kl_weight: float = 1e-5
    """Weight of the KL term, per latent element."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/autoencoder"))
    )

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"--resolution must be a positive multiple of 8, got {self.resolution}")
        if len(self.widths) != 4 or any(width < 8 or width % 8 for width in self.widths):
            raise ValueError(f"--widths must be four multiples of 8, got {self.widths}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from torch import Tensor, nn

from preftune import files
from preftune.ahead import initial_noise
from preftune.cli.printable import show
from preftune.families.tiny import build_autoencoder
from preftune.files.one_writer import one_writer
from preftune.grid import captioned_grid
from preftune.images import load_pixels, save_image
from preftune.order import items_at
from preftune.training import data
from preftune.training.run import Run
from rewards.on_device import upload


class Reconstruct(nn.Module):
    """The autoencoder's training pass as one forward, so that several processes share its gradients."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1], noise (B, 4, h, w) -> reconstruction, mean KL per latent element ()."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return self.vae.decode(latents).sample, kl


@one_writer
def main(config: Config) -> int:
    """Train, save, and write a grid of originals and reconstructions."""
    with exit_on_user_error():
        check(config.run)
        rate = FROM_SCRATCH["autoencoder"]
        config = filled(config, of_run(rate), "autoencoder")
        samples, skipped = data.read(config.data, config.columns, captioned=False)
        settings = data.as_setting(skipped)
        run = Run(config.run, driver="autoencoder", config_text=dump(config), settings=settings)
        vae = build_autoencoder(config.widths, config.resolution, seed=config.run.seed)
        module = run.prepare(Reconstruct(vae), learning_rate=rate)
    if run.is_main:
        data.write_report(run.folder, skipped)
    paths = [sample.path for sample in samples]

    def load(chosen: list[Path]) -> Tensor:
        with exit_on_user_error():  # an image that was sound when the run began
            loaded = [load_pixels(path, config.resolution) for path in chosen]
        return upload(torch.stack(loaded), run.device) * 2 - 1

    def write(folder: Path) -> None:
        with run.ema_weights():
            vae.save_pretrained(folder / "vae")

    latent = (4, config.resolution // 8, config.resolution // 8)
    for step in run.steps():
        for micro_batch in run.passes():
            indices = run.image_indices(step, micro_batch)
            with run.accumulate():
                images = load(items_at(paths, indices, config.run.seed))
                noise = initial_noise(latent, [run.generator(i) for i in indices], run.device)
                reconstruction, kl = module(images, noise)
                error = reconstruction_error(reconstruction.float(), images, config.foreground_weight)
                run.update(error + config.kl_weight * kl, error=error, kl=kl)
        if run.due("checkpointing_steps", step):
            run.save(step, write=write)
    if run.is_main and not run.interrupted:
        with run.ema_weights():
            finish(vae, load(paths[:256]), run.folder)
        run.log_images(
            run.config.max_train_steps - 1, "reconstructions", {run.folder / "reconstructions.png": ""}
        )
        show(f"autoencoder, metrics and reconstructions: {run.folder}")
    return run.finish()


def reconstruction_error(reconstruction: Tensor, images: Tensor, foreground_weight: float) -> Tensor:
    """Return the weighted mean of |error| + error^2; both images are (B, 3, H, W) in [-1, 1].

    Foreground is what lies more than 0.1 (mean over channels) from the image's median colour.
    """
    median = images.flatten(2).median(-1).values[..., None, None]
    foreground = (images - median).abs().mean(1, keepdim=True) > 0.1
    error = reconstruction - images
    return ((1 + foreground_weight * foreground) * (error.abs() + error.square())).mean()


@torch.no_grad()
def finish(vae: Any, images: Tensor, folder: Path) -> None:
    """Set the scaling factor, save `folder/vae`, and a grid of originals above reconstructions."""
    vae.eval()
    latents = vae.encode(images).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    with files.replacing(folder / "vae") as place:
        vae.save_pretrained(place)
    originals, redrawn = ((x[:12].clamp(-1, 1) + 1) / 2 for x in (images, vae.decode(latents[:12]).sample))
    rows = [list(originals), list(redrawn)]
    save_image(
        captioned_grid(rows, row_captions=["original", "reconstruction"]), folder / "reconstructions.png"
    )


if __name__ == "__main__":
    sys.exit(main(CONFIG))
