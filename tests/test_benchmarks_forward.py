"""benchmarks/forward.py in miniature: every row computes the same prediction, and the table comes out."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from benchmarks import forward, refl_loops
from benchmarks.refl_loops import Trial
from preftune import cli


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The program sets torch's threads; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    parts = refl_loops.parts_of("tiny", Path()) | {
        "pipeline": tiny.pipeline_folder(tmp_path_factory.mktemp("parts") / "pipeline")
    }
    return Trial(loop="ours", precision="no", train="lora", train_batch_size=2, **forward.SAME, **parts)


def test_all_rows_predict_the_same_noise(trial: Trial) -> None:
    rows = forward.rows(trial)
    predictions = {}
    for row in rows:
        with row.context():
            predictions[row.name] = row.call(0)
    begins = [name for name in predictions if name.endswith("begin")]
    assert [predictions.pop(name) for name in begins] == [None, None]
    first = predictions.pop("published full")
    assert list(predictions) == [
        "published lora",
        "ours full",
        "ours full, gradient",
        "ours lora",
        "ours lora, gradient",
    ]
    assert first.std() > 0.01
    for name, other in predictions.items():
        assert other.requires_grad == name.endswith("gradient"), name
        torch.testing.assert_close(other.detach(), first, atol=1e-5, rtol=0, msg=name)


def test_half_precision_has_a_half_base(trial: Trial) -> None:
    names = [row.name for row in forward.rows(replace(trial, precision="bf16"))]
    assert names[:4] == ["published full", "published lora", "half-base lora", "ours full"]


def test_rows_take_turns() -> None:
    """Warm-up calls are not counted; host time is the least, device time the median."""
    calls: list[str] = []
    found = [forward.Row(name=name, call=lambda _, name=name: calls.append(name)) for name in "ab"]
    times = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "timed", lambda call, index, device: call(index) or (next(times), 50 - index))
        rows = forward.measure(found, "cpu", 3)
    assert calls == ["a", "b"] * 6
    assert rows == [
        {"row": "a", "host_ms": 6e3, "device_ms": 46e3},
        {"row": "b", "host_ms": 7e3, "device_ms": 46e3},
    ]


def test_table_and_json(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parts = {
        name: getattr(trial, name)
        for name in ("model", "device", "resolution", "scorer", "pipeline", "scorer_files")
    }
    monkeypatch.setattr(forward, "parts_of", lambda model, workdir: parts)
    flags = ["--repeats", "1", "--precision", "no", "--output", str(tmp_path / "new" / "rows.json")]
    assert forward.main(cli.parse(forward.Config, flags)) == 0
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert "host ms" in header
    written = json.loads((tmp_path / "new" / "rows.json").read_text())["rows"]
    assert len(written) == len(lines) == 8
    assert lines[0].split()[:5] == ["1", "published", "full", f"{written[0]['host_ms']:.2f}", "1.00"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--repeats", "0"], "--repeats"), (["--model", "sd1"], "CUDA"), (["--threads", "0"], "--threads")],
)
def test_wrong_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        forward.main(cli.parse(forward.Config, flags))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
