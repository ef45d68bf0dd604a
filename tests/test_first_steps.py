"""What a newcomer types wrongly has an answer with the next step, and no flag is ignored in silence."""

from pathlib import Path

import pytest
import torch

from data_build.data_sets import find_data_set
from preftune.image_folders import Columns
from preftune.images import save_image
from preftune.records import read_rankings
from preftune.training import data
from preftune.training.config import ValidationConfig
from rewards.__main__ import main as table


def test_folders_without_rankings(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no rankings.jsonl; `preftune preferences` writes .*simulate-rankings"
    ):
        read_rankings(tmp_path)
    with pytest.raises(ValueError, match=r"none does not exist; `preftune preferences` writes"):
        read_rankings(tmp_path / "none")


def test_rankings_are_no_captioned_images(tmp_path: Path) -> None:
    save_image(torch.zeros(3, 8, 8), tmp_path / "a.png")
    (tmp_path / "rankings.jsonl").write_text("{}\n")
    options = {"prompt": "", "image_column": None, "text_column": None}
    with pytest.raises(
        ValueError, match=rf"holds rankings .*`preftune preference-accuracy --data {tmp_path}`"
    ):
        find_data_set(tmp_path, prompted=True, **options)  # type: ignore[arg-type]
    assert find_data_set(tmp_path, prompted=False, **options).kind == "images"  # type: ignore[arg-type]


@pytest.mark.parametrize("captioned", [True, False])
def test_a_column_of_a_folder_without_a_table(captioned: bool, tmp_path: Path) -> None:
    save_image(torch.zeros(3, 8, 8), tmp_path / "a.png")
    if captioned:
        (tmp_path / "a.txt").write_text("a red circle")
    wrong = Columns(image_column="foo")
    for call in (data.check, data.read):
        with pytest.raises(ValueError, match=r"--image-column foo names a column, but .* has no table"):
            call(tmp_path, wrong, captioned=captioned)
    named = {"image_column": "foo", "text_column": None}
    with pytest.raises(ValueError, match=r"--image-column foo names a column, but .* has no table"):
        find_data_set(tmp_path, prompted=False, prompt="", **named)
    assert wrong.where_any(tmp_path) == Columns()
    (tmp_path / "metadata.jsonl").write_text('{"foo": "a.png", "text": "x"}\n')
    assert wrong.where_any(tmp_path) == wrong
    data.check(tmp_path, wrong, captioned=captioned)


def test_the_number_of_validation_prompts_always_counts(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(300)]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    for number, of_training, of_file in ((None, 8, 256), (2, 2, 2), (20, 20, 20)):
        assert ValidationConfig(num_validation_prompts=number).prompts(texts) == texts[:of_training]
        named = ValidationConfig(num_validation_prompts=number, validation_prompts=tmp_path / "p.txt")
        assert named.prompts(["other"]) == texts[:of_file]


def test_the_table_of_scorers_takes_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        table(["nope"])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert "error: unrecognized arguments: nope" in captured.err
    table([])
    assert "imagereward-tiny" in capsys.readouterr().out
