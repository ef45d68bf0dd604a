r"""Copy trained models into this folder, in types that take less room.

    python assets/tiny/install.py --pipeline runs/pretrain_third/pipeline --imagereward runs/reward_model/scorer \
        --pickscore runs/pickscore_tiny/scorer --blip runs/pretrain_scorer/scorer --clip runs/pretrain_clip/scorer

The pipeline is in float16. Transformers would load its text encoder in the type of the file, so that the configuration of the text
encoder asks for float32. Matrices of scorers are in float8 (e4m3), their vectors in float16: LOG.md has what that changes. A card.json,
which says from which folder a training started, stays behind: cards of embedded scorers are in rewards/__init__.py.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from preftune.cli import exit_on_user_error, parse

HERE = Path(__file__).parent
PIPELINE = {
    "unet/diffusion_pytorch_model.safetensors": torch.float16,
    "vae/diffusion_pytorch_model.safetensors": torch.float16,
    "text_encoder/model.safetensors": torch.float16,
}
SCORER = {"model.safetensors": torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Install trained models as the embedded models; models that are not given are unchanged."""

    pipeline: Path | None = None
    """Pipeline folder, as pretrain.py wrote it."""
    imagereward: Path | None = None
    """Scorer folder of ImageReward's architecture, as reward_model.py wrote it."""
    pickscore: Path | None = None
    """Scorer folder of the held-out scorer, a CLIP, as reward_model.py wrote it."""
    blip: Path | None = None
    """Scorer folder of the pre-trained BLIP, as pretrain_scorer.py wrote it."""
    clip: Path | None = None
    """Scorer folder of the pre-trained CLIP, as pretrain_scorer.py wrote it."""
    output_dir: Path = HERE
    """Folder that gets pipeline/, imagereward/, pickscore/, pretrained/blip/ and pretrained/clip/."""


def narrow(path: Path, matrices: torch.dtype) -> None:
    """Rewrite the tensors of a safetensors file: those of float32 with two dimensions or more in `matrices`, others in float16.

    Raises:
        ValueError: A value is beyond the range of its type.

    """
    state = load_file(path)
    for name, value in state.items():
        if value.is_floating_point():
            dtype = matrices if value.ndim > 1 else torch.float16
            largest = value.abs().amax().item() if value.numel() else 0.0
            if largest > torch.finfo(dtype).max:
                raise ValueError(f"{path}: {name} reaches {largest:g}, beyond what {dtype} can hold")
            state[name] = value.to(dtype)
    save_file(state, path, metadata={"format": "pt"})


def main(config: Config) -> None:
    """Copy each folder to a temporary name, make its weights smaller, and rename."""
    for source, name, types in (
        (config.pipeline, "pipeline", PIPELINE),
        (config.imagereward, "imagereward", SCORER),
        (config.pickscore, "pickscore", SCORER),
        (config.blip, "pretrained/blip", SCORER),
        (config.clip, "pretrained/clip", SCORER),
    ):
        if source is None:
            continue
        target = config.output_dir / name
        partial = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("card.json"))
        with exit_on_user_error():
            for file, matrices in types.items():
                narrow(partial / file, matrices)
        settings = partial / "text_encoder/config.json"
        if settings.exists():
            settings.write_text(
                json.dumps(json.loads(settings.read_text()) | {"dtype": "float32"}, indent=2) + "\n"
            )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


if __name__ == "__main__":
    main(parse(Config))
