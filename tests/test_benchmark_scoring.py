"""benchmarks/score.py's table and trace, and the hpsv2 package beside ours."""

import gzip
import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import hpsv2_package, score, scoring_trace
from preftune import cli


def test_scoring_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--images 3 --batch-size 2 --reload-images 1 --repeats 1 --workers 1 --threads 1".split()  # noqa: SIM905
    flags += ["--output", str(tmp_path / "a.json"), "--trace", str(tmp_path / "traces")]
    assert score.main(cli.parse(score.Config, flags)) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["files_to_raw"] == pytest.approx(row["files_images_per_s"] / row["raw_images_per_s"])
    assert row["files_to_reload"] == pytest.approx(row["files_images_per_s"] / row["reload_images_per_s"])
    assert row["flops_per_image"] > 1e7
    assert row["decode_images_per_s"] > 0
    said = capsys.readouterr().out
    assert "imagereward-tiny  fp32     2" in said
    assert "prepare while scoring: " in said
    events = json.loads((tmp_path / "traces" / "imagereward-tiny-fp32-2.json").read_text())["traceEvents"]
    spans = Counter(event["name"] for event in events if event["ph"] == "X")
    assert spans == {"receive": 3, "copy": 2, "score": 2, "wait": 2, "write": 1, "prepare": 3}
    pids = {event["name"]: event["pid"] for event in events if event["ph"] == "X"}
    assert pids["prepare"] != pids["score"], "the worker's work is its own"


def test_what_went_on_at_once() -> None:
    """By hand: scoring from 0 to 4 s and from 5 to 6 s, workers from 3 to 5.5 s, two of them at once."""
    spans = [("score", 0, 4), ("score", 5, 6), ("prepare", 3, 5), ("prepare", 3.5, 5.5), ("write", 7, 8)]
    events = [{"name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6} for name, begin, end in spans]
    assert scoring_trace.summary(events) == {
        "score": 5, "write": 1, "prepare": 2.5, "prepare while scoring": 1.5, "all": 8,
    }  # fmt: skip
    kernels = [
        {"name": "gemm", "cat": "kernel", "ts": 1e6, "dur": 1e6},
        {"name": "gemm", "cat": "kernel", "ts": 3e6, "dur": 4.5e6},
    ]
    copies = [{"name": "Memcpy", "cat": "gpu_memcpy", "ts": 2.5e6, "dur": 1e6}]
    found = scoring_trace.summary([*events, *kernels, *copies])
    assert found["prepare while scoring"] == 2.5, "on a GPU what its kernels do"
    assert found["copies while kernels"] == 0.5
    assert found["write while kernels"] == 0.5
    assert scoring_trace.summary([])["all"] == 0


def test_the_hpsv2_package_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("hpsv2") is not None:
        pytest.skip("hpsv2 is installed")
    with pytest.raises(SystemExit) as stop:
        hpsv2_package.main(hpsv2_package.Config())
    assert stop.value.code == 2
    assert "the hpsv2 package is not installed; pip install --no-deps hpsv2==1.2.0" in capsys.readouterr().err


def test_the_hpsv2_package_reads_our_vocabulary_and_weights(tmp_path: Path) -> None:
    """Its tokeniser takes the lines 1 to 48894 of the file that its wheel leaves out; its checkpoint holds a state_dict."""
    with hpsv2_package.vocabulary_or(gzip.open, tmp_path / "bpe_simple_vocab_16e6.txt.gz") as file:
        lines = file.read().decode("utf-8").split("\n")
    assert lines[1:4] == ["i n", "t h", "a n"]
    assert len(lines[1 : 49152 - 256 - 2 + 1]) == 48894
    card = hpsv2_package.card_of(1)
    assert card.clip is not None
    assert (card.clip.vision_layers, card.clip.text_layers, card.clip.embed) == (1, 1, 1024)
    small = replace(
        card, clip=replace(card.clip, embed=16, vision_width=16, text_width=16, vision_heads=2, text_heads=2)
    )
    hpsv2_package.write_checkpoint(small, tmp_path / "weights.pt")
    names = torch.load(tmp_path / "weights.pt", weights_only=True)["state_dict"].keys()
    assert {"visual.conv1.weight", "visual.proj", "positional_embedding", "logit_scale"} <= names
