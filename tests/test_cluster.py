"""Scoring on a Ray cluster of two processes: the data set is that of a run without it, also after a kill."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_build import cluster, diffusiondb, score_folder
from preftune.cli import parse
from preftune.records import read_jsonl
from test_diffusiondb import config, contents, members, write_part, write_parts


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Ray puts a handler of SIGTERM of its own in place of the process'."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray that tells nobody, writes no token home, and whose processes other work does not starve; they have one thread."""
    pytest.importorskip(
        "ray.data", reason='Ray Data is not installed: pip install -c constraints.txt -e ".[ray]"'
    )
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbered(folder: Path) -> Callable[[], Callable[[int], list[score_folder.ScoreRow]]]:
    """What makes something that gives a row of a part's number and of the process, and notes that it was asked."""

    def rows_of(part: int) -> list[score_folder.ScoreRow]:
        (folder / f"{part} {time.monotonic_ns()}").touch()
        time.sleep(2 if part == 3 else 0.5)  # the fourth ends after later ones
        return [] if part == 5 else [{"part": part, "process": os.getpid(), "third": 1 / 3}]

    return lambda: rows_of


@pytest.mark.slow
def test_parts_are_written_once_and_in_order_by_two_processes(tmp_path: Path, ray: None) -> None:
    (tmp_path / "asked").mkdir()
    counts = cluster.score_parts(
        tmp_path, range(2, 10), numbered(tmp_path / "asked"), address="local", workers=2
    )
    assert list(counts) == [1, 1, 1, 0, 1, 1, 1, 1]
    rows = [row for (row,) in score_folder.chunk_rows(tmp_path)]
    assert [row["part"] for row in rows] == [2, 3, 4, 6, 7, 8, 9]
    assert {row["third"] for row in rows} == {1 / 3}
    assert len({row["process"] for row in rows}) == 2
    assert os.getpid() not in {row["process"] for row in rows}
    assert score_folder.progress(tmp_path) == (7, (10, 0))
    assert len([*(tmp_path / "asked").iterdir()]) == 8


@pytest.mark.slow
def test_two_processes_give_the_data_set_of_one(
    tmp_path: Path, ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte: broken parts, one without entries and overlapping prompts; ended by an interrupt and begun again."""
    write_parts(tmp_path / "images")
    write_part(tmp_path / "images" / "part-000008.zip", [])
    write_part(tmp_path / "images" / "part-000009.zip", members(9, range(8), 1))
    plain = config(tmp_path / "images", tmp_path / "plain", rewards="imagereward-tiny", scale=2.0)
    diffusiondb.main(plain)
    write_chunk, written = score_folder.write_chunk, list[int]()

    def interrupted(folder: Path, number: int, *rest: Any) -> None:
        if number == 3 and len(written) == 3:
            written.append(-1)
            raise KeyboardInterrupt
        write_chunk(folder, number, *rest)
        written.append(number)

    monkeypatch.setattr(score_folder, "write_chunk", interrupted)
    settings = replace(plain, output_dir=tmp_path / "ray", ray="local", workers=1)
    with pytest.raises(KeyboardInterrupt):
        diffusiondb.main(settings)
    diffusiondb.main(settings)
    assert written == [0, 1, 2, -1, 3, 4, 5, 6, 7], "what is written is not scored again"
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")
    assert len(read_jsonl(tmp_path / "ray" / "metadata.jsonl")) > 3


@pytest.mark.parametrize("missing", [True, False])
def test_what_is_refused(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray, and where no cluster answers."""
    if missing:
        monkeypatch.setitem(sys.modules, "ray.data", None)
    else:
        pytest.importorskip("ray.data", reason="Ray Data is not installed")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_part(tmp_path / "part-000001.zip", members(1, range(1), 1))
    flags = [
        "--data",
        str(tmp_path),
        "--output-dir",
        str(tmp_path / "out"),
        "--rewards",
        "shapes",
        "--ray",
        "auto",
    ]
    with pytest.raises(SystemExit) as stop:
        diffusiondb.main(parse(diffusiondb.Config, flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert ("--ray needs Ray Data: pip install" if missing else "--ray auto: no Ray cluster answers") in error
    assert error.count("\n") == 1
