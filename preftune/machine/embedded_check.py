"""Whether the embedded models, prompts and images are there as they were published."""

import base64
import hashlib
import importlib.metadata
import json
from pathlib import Path

from rewards import embedded

_FOLDER = "assets/tiny"
_NEEDED = (
    "prompts.txt", "held_out.txt", "images/metadata.jsonl", "pipeline/model_index.json", "pipeline/tokenizer/tokenizer.json",
    "pipeline/scheduler/scheduler_config.json", "imagereward/config.json", "imagereward/vocab.txt",
)  # fmt: skip
_WEIGHTS = (
    "pipeline/unet/diffusion_pytorch_model.safetensors", "pipeline/vae/diffusion_pytorch_model.safetensors",
    "pipeline/text_encoder/model.safetensors", "imagereward/model.safetensors",
)  # fmt: skip


def damaged() -> list[str]:
    """Return a sentence for each embedded file that is missing, cut short or, where a wheel was installed, altered."""
    root = embedded.own(_FOLDER)
    if root is None:
        return [f"{_FOLDER} is not in {embedded.ROOT}; install preftune again"]
    faults = [f"{root / name} is missing" for name in (*_NEEDED, *_WEIGHTS) if not (root / name).is_file()]
    faults += [fault for name in _WEIGHTS if (fault := _cut(root / name)) is not None]
    return faults or [f"{path} is not as in the wheel; install preftune again" for path in _altered(root)]


def _cut(path: Path) -> str | None:
    """Return a sentence where a safetensors file has not the length that its first bytes say."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            return f"{path} is a pointer of git LFS; run `git lfs pull`"
        file.seek(8)
        header = file.read(min(int.from_bytes(start[:8], "little"), 1 << 20))
    try:
        rows = json.loads(header)
        end = max(row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is no safetensors file"
    want, have = 8 + len(header) + end, path.stat().st_size
    return None if want == have else f"{path} has {have} bytes, but must have {want}"


def _altered(root: Path) -> list[Path]:
    """Return the files of the folder whose SHA-256 is not the one that the installed wheel gives; a checkout has no wheel."""
    try:
        files = importlib.metadata.files("preftune") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for file in files:
        path = Path(str(file.locate()))
        if file.hash is None or not path.is_relative_to(root):
            continue
        digest = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            found.append(path)
    return found
