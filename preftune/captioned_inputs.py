"""Image files and captions as a denoiser takes them: latents and encoded prompts, from the encoders or from a store on disk.

What comes out depends neither on the number of worker processes nor on the store: an entry is used where all entries of a batch are
there, and is otherwise made of the whole batch, since an encoder's rounding depends on the size of its batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from preftune import encoded_store
from preftune.cli import exit_on_user_error
from preftune.encoded_store import Store
from preftune.families.base import Cond, Family
from preftune.images import load_levels, to_pixels
from preftune.resolution import Framing, Resolution
from preftune.worker_processes import WorkerProcesses
from rewards.digests import sha256_of
from rewards.on_device import upload


class ReadImage(NamedTuple):
    """What a worker process found of an image: its entry in the store, or else the image itself."""

    name: str = ""
    """Of the entry; empty without a store."""
    entry: bytes | None = None
    levels: NDArray[np.uint8] | None = None
    """(H, W, 3)."""
    framing: Framing | None = None


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Function of worker processes, from an image file to what is known of it; ValueError as `images.opened`."""

    resolution: Resolution
    folder: Path | None = None
    """Of the store."""
    encoder: str = ""
    """Digest of the autoencoder, and the kind of device that it computes on."""
    batch_size: int = 0

    def __call__(self, path: Path) -> ReadImage:
        """Read the entry or the image."""
        name, entry = "", None
        if self.folder is not None and path.is_file():
            name = encoded_store.key(
                "latents", self.encoder, self.resolution, self.batch_size, sha256_of(path)
            )
            entry = encoded_store.read(self.folder, name)
        if entry is not None:
            return ReadImage(name=name, entry=entry)
        levels, framing = load_levels(path, self.resolution)
        return ReadImage(name, None, levels, framing)


class CaptionedInputs:
    """Latents and encoded captions of a family's model at one resolution.

    workers: processes that decode images ahead, as `expect` tells them. latents, texts: stores of what the autoencoder and the text
    encoders say, None = they are asked each time; with a store every batch has `batch_size` images.
    """

    def __init__(
        self,
        family: Family,
        resolution: Resolution,
        *,
        workers: int = 0,
        latents: Store | None = None,
        texts: Store | None = None,
        batch_size: int = 0,
    ) -> None:
        self.family, self.resolution, self.batch_size = family, resolution, batch_size
        self._latents, self._texts = latents, texts
        reader = Reader(resolution=resolution)
        if latents is not None:
            vae = f"{encoded_store.digest_of([family.vae])} {family.device.type}"
            reader = Reader(resolution=resolution, folder=latents.folder, encoder=vae, batch_size=batch_size)
        self._workers = WorkerProcesses(reader, workers)
        self._encoders = (
            "" if texts is None else encoded_store.digest_of(family.text_encoders, family.tokenizers)
        )

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()

    def expect(self, batches: Iterable[Sequence[Path]], stream: int = 0) -> None:
        """Begin to read images ahead: those of the next calls of `latents` for this stream, batch by batch."""
        self._workers.expect(batches, stream)

    @torch.no_grad()
    def latents(
        self, paths: Sequence[Path], generators: Sequence[Generator] | None, stream: int = 0
    ) -> tuple[Tensor, list[Framing]]:
        """Return latents (B, C, h, w) of images, scaled and cropped to the resolution, and how they were cropped.

        Of the posterior a sample by each image's generator, or its mean.
        """
        with exit_on_user_error():  # an image that was sound when the run began
            found = self._workers.take(paths, stream)
            stored = self._stored(found)
            if stored is not None:
                return self.family.latents_of(*self._moved(stored), generators), _framings(stored)
            loaded = [self._loaded(path, image) for path, image in zip(paths, found, strict=True)]
        framings = [framing for _, framing in loaded]
        mean, std = self.family.moments(on(self.family.device, [levels for levels, _ in loaded]))
        if self._latents is not None and len(paths) == self.batch_size:
            self._keep([image.name for image in found], framings, mean, std)
        return self.family.latents_of(mean, std, generators), framings

    def cond(self, texts: Sequence[str], framings: Sequence[Framing]) -> Cond:
        """Return the encoded captions of images that were cropped like this; from the store without a negative prompt."""
        if self._texts is None:
            return self.family.encode(texts, framings=framings)
        kind = self.family.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        names = [
            encoded_store.key("text", self._encoders, kind, autocast, len(texts), text) for text in texts
        ]
        entries = [self._texts.get(name) for name in names]
        stored = [entry for entry in entries if entry is not None]
        if len(stored) == len(entries):
            rows = {name: torch.stack([entry[name] for entry in stored]) for name in stored[0]}
            positive = {name: upload(value, self.family.device) for name, value in rows.items()}
            return self.family.framed(Cond(positive=positive, negative={}), framings)
        with torch.no_grad():
            cond = self.family.encode(texts)
        host = {part: value.cpu() for part, value in cond.positive.items()}
        for row, name in enumerate(names):
            self._texts.put(name, {part: value[row] for part, value in host.items()})
        return self.family.framed(cond, framings)

    def _stored(self, found: Sequence[ReadImage]) -> list[dict[str, Tensor]] | None:
        """The entries of all images; None where one is missing."""
        if self._latents is None or len(found) != self.batch_size:
            return None
        entries = [self._latents.get(image.name, image.entry) for image in found if image.name]
        stored = [entry for entry in entries if entry is not None]
        return stored if len(stored) == len(found) else None

    def _keep(
        self, names: Sequence[str], framings: Sequence[Framing], mean: Tensor, std: Tensor | None
    ) -> None:
        """Put the posteriors (B, C, h, w) of images into the store."""
        assert self._latents is not None, "there is a store"
        layout = torch.tensor(mean.stride(1) == 1 and mean.shape[1] > 1)
        posterior = {"mean": mean.cpu()} | ({} if std is None else {"std": std.cpu()})
        for row, (name, framing) in enumerate(zip(names, framings, strict=True)):
            own = {part: value[row] for part, value in posterior.items()}
            numbers = torch.tensor([*framing.original, framing.top, framing.left])
            self._latents.put(name, own | {"framing": numbers, "channels_last": layout})

    def _moved(self, stored: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation, in memory as the autoencoder left them: what follows rounds otherwise in another order."""
        layout = torch.channels_last if stored[0]["channels_last"] else torch.contiguous_format
        mean, std = (
            upload(
                torch.stack([entry[name] for entry in stored]).contiguous(memory_format=layout),
                self.family.device,
            )
            if name in stored[0]
            else None
            for name in ("mean", "std")
        )
        assert mean is not None, "an entry has a mean"
        return mean, std

    def _loaded(self, path: Path, image: ReadImage) -> tuple[NDArray[np.uint8], Framing]:
        if image.levels is None or image.framing is None:  # its entry is there, another image's is not
            return load_levels(path, self.resolution)
        return image.levels, image.framing


def _framings(stored: Sequence[dict[str, Tensor]]) -> list[Framing]:
    rows = [entry["framing"].tolist() for entry in stored]
    return [Framing(Resolution(height, width), top, left) for height, width, top, left in rows]


def on(device: torch.device, levels: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Return images of (H, W, 3) levels as pixels (B, 3, H, W) on a device, float32 in [0, 1]: the same bits on all of them.

    To a GPU go the levels, a quarter of the bytes, and a table of their values: its division by 255 would round otherwise.
    """
    batch = np.stack(levels)
    if device.type == "cpu":
        return to_pixels(batch).contiguous()
    table = upload(torch.arange(256).float() / 255, device)
    return table[upload(torch.from_numpy(batch), device).long()].movedim(-1, -3).contiguous()
