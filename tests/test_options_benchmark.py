"""The benchmark of options in miniature: real runs of two of them, and the table."""

import json
from pathlib import Path

import pytest

from benchmarks import options
from preftune.families.locate import locate_vae

pytestmark = pytest.mark.usefixtures("cpu")


def test_runs_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = options.Config(
        workdir=tmp_path,
        options=("AutoencoderTiny",),
        max_train_steps=1,
        train_batch_size=2,
        num_validation_prompts=2,
        sample_steps=1,
        fit_steps=2,
        output=tmp_path / "rows.json",
    )
    assert options.main(config) == 0
    default, small = json.loads((tmp_path / "rows.json").read_text())
    assert default["before"] == small["before"], "one model, one set of captions"
    assert default["change"][0] == 0
    assert small["change"][0] == pytest.approx(small["after"] - default["after"])
    assert locate_vae(str(tmp_path / "taesd")) == tmp_path / "taesd"
    said = capsys.readouterr().out
    assert "| AutoencoderTiny | `--reward-vae {taesd}` |" in said
    first = (options.place(config, "default", 0) / "metrics.jsonl").stat().st_mtime_ns
    assert options.main(config) == 0
    assert (options.place(config, "default", 0) / "metrics.jsonl").stat().st_mtime_ns == first, (
        "not run again"
    )


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--options fast is unknown; one of default, few steps"):
        options.Config(workdir=tmp_path, options=("fast",))
