"""Where the embedded models and prompts are; needs no torch."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"
PROMPTS = TINY / "prompts.txt"
