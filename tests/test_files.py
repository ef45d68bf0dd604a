"""Files and folders are written in one piece, and random numbers have one rule."""

import os
from pathlib import Path

import pytest

from preftune import files, seeds


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("one")
        assert files.is_leftover(temporary)
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(OSError, match="disk full"), files.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("tw")
        raise OSError("disk full")
    assert (path.read_text(), names(path.parent)) == ("one", ["a.txt"])


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_replaces_a_folder_with_all_that_it_held(tmp_path: Path, durable: bool) -> None:
    folder = tmp_path / "a"
    for name in ("old", "new"):
        with files.replacing(folder, durable=durable) as temporary:
            (temporary / "inside").mkdir(parents=True)
            (temporary / "inside" / name).touch()
    assert names(folder / "inside") == ["new"]
    assert names(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_known(tmp_path: Path) -> None:
    for name, left in ((".a.json.tmp-123", True), ("a.tmp-123", False), (".hidden", False)):
        assert files.is_leftover(tmp_path / name) == left, name
    (tmp_path / f".a.tmp-{os.getpid()}").write_text("of an earlier process with this number")
    files.write_text(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"]


def test_words_are_those_of_numpy() -> None:
    """Recorded values: a change of the rule would change every data set and every run."""
    assert seeds.word(7, 3, 1, bits=32) == 1060801321
    assert seeds.word(7, 3, 1) == 13330671360687115049
    assert seeds.generator(7, 3).initial_seed() == 5061563556724077661
    assert seeds.rng(7, 3).integers(1000, size=3).tolist() == [727, 975, 538]
