"""Files and folders that appear whole or not at all, whatever happens to the process that writes them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preftune import files

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_text(path, "one\n")
    assert path.read_bytes() == b"one\n", "its folder is made"
    with files.replacing(path, durable=True) as place:
        assert place.parent == path.parent, "a rename works within a file system only"
        assert (place.name, files.is_leftover(place)) == (f".a.json.tmp-{os.getpid()}", True)
        place.write_text("two\n", encoding="utf-8")
        assert path.read_text() == "one\n"
    assert path.read_text() == "two\n"
    assert names(path.parent) == ["a.json"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    for number in range(2):
        with files.replacing(tmp_path / "images", durable=bool(number)) as place:
            (place / "deep").mkdir(parents=True)
            (place / "deep" / f"{number}.txt").write_text(str(number))
    assert names(tmp_path) == ["images"]
    assert names(tmp_path / "images" / "deep") == ["1.txt"], "nothing of the old one is left"


def test_a_file_takes_the_place_of_a_link_and_not_of_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    files.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").read_text() == "text"
    assert not (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["elsewhere", "link"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_leaves_the_old_content(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    old = path if kind == "file" else path / "b"
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")

    def half_written() -> None:
        with files.replacing(path) as place:
            if kind == "folder":
                place.mkdir()
            (place if kind == "file" else place / "b").write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_written()
    assert old.read_text() == "old"
    assert names(tmp_path) == ["a"], "what was written is removed"


KILLED = """
import os, signal, sys
from pathlib import Path
from preftune import files
with files.replacing(Path(sys.argv[1]), durable=True) as place:
    place.write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_old_content_and_what_is_known_as_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.txt")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    (left,) = (path for path in tmp_path.iterdir() if path.name != "a.txt")
    assert left.read_text() == "ne"
    assert files.is_leftover(left)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (".step_000001.tmp-4194305", True),
        (".samples.tmp-shared", True),
        (".a.tmp-old-4194305", True),
        ("a.tmp-1", False),
        (".hidden", False),
        ("metadata.jsonl", False),
    ],
)
def test_leftovers_are_known_by_their_names(name: str, left: bool) -> None:
    assert files.is_leftover(Path("folder.tmp-1") / name) == left


def test_remove_takes_whatever_is_there(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.remove(tmp_path / "link")
    assert names(tmp_path) == ["file", "folder"], "a link goes, and not what it names"
    for name in ("folder", "file", "absent"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == []


def test_tidy_removes_leftovers_and_puts_back_what_was_being_replaced(tmp_path: Path) -> None:
    for name in (".a.json.tmp-1", "kept.json", ".hidden", ".notes.unfinished", "deep/.f.tmp-7"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folders = (".b.tmp-old-2", ".c.tmp-old-2", "c", ".d.tmp-2", ".e.tmp-shared", ".g.tmp-gone")
    for name in (*folders, ".s.unfinished", ".s.previous", ".t.previous", "t"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    files.tidy(tmp_path, tmp_path / "deep")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == sorted(
        [
            ".hidden",
            ".notes.unfinished",
            "b",
            "b/file",
            "c",
            "c/file",
            "deep",
            "kept.json",
            "s",
            "s/file",
            "t",
            "t/file",
        ]
    ), "a file of the user stays, whatever it is called"
    was = {name: (tmp_path / name / "file").read_text() for name in "bcst"}
    assert was == {"b": ".b.tmp-old-2", "c": "c", "s": ".s.previous", "t": "t"}, (
        "what was killed between two renames is put back"
    )
    files.tidy(tmp_path / "nothing")


def test_what_was_left_beside_a_folder_goes_and_what_is_of_others_stays(tmp_path: Path) -> None:
    for name in (".data[1].tmp-3", ".data[1].tmp-old-3", ".data[1]x.tmp-3", ".data[1].lock", ".data1.tmp-3"):
        (tmp_path / name).mkdir()
    files.tidy_beside(tmp_path / "data[1]")
    assert names(tmp_path) == sorted([".data[1].lock", ".data[1]x.tmp-3", ".data1.tmp-3", "data[1]"])
