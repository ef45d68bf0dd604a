"""data_build/generate.py: parts that the reader of DiffusionDB takes, generated once and always alike."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_build import generate
from data_build.decode import ImageEntry, decode
from data_build.readers import entries, find_data_set, read_bytes
from preftune import cli, families
from preftune.prompts import read_prompts
from preftune.sampling import Sampling, sample


def config(root: Path, output: Path, *flags: str) -> generate.Config:
    argv = [
        "--model",
        str(root / "pipeline"),
        "--prompts",
        str(root / "prompts.txt"),
        "--output-dir",
        str(output),
    ]
    argv += ["--count", "5", "--images", "3", "--prompts-per-part", "2", "--sample.num-inference-steps", "2"]
    argv += ["--sample.resolution", "32", "--sample.batch-size", "4", *flags]
    return cli.parse(generate.Config, argv)


def test_the_reader_takes_what_was_generated(root: Path, tmp_path: Path) -> None:
    settings = config(root, tmp_path / "parts")
    generate.main(settings)
    data = find_data_set(tmp_path / "parts", prompted=True, prompt="", image_column=None, text_column=None)
    assert data.sources == ("part-000001.zip", "part-000002.zip", "part-000003.zip")
    images = [entry for *_, entry in entries(data)]
    assert all(isinstance(image, ImageEntry) for image in images)
    prompts = read_prompts(root / "prompts.txt")[:5]
    assert [image.text for image in images if isinstance(image, ImageEntry)] == [
        prompt for prompt in prompts for _ in range(3)
    ]
    with zipfile.ZipFile(tmp_path / "parts" / "part-000002.zip") as archive:
        notes = json.loads(archive.read("part-000002.json"))
    note = notes["000003-01.png"]
    assert (note["p"], note["c"], note["st"], note["sa"]) == (prompts[3], 7.5, 2, "pndm")
    sampling = Sampling(num_inference_steps=2, resolution="32")
    (alone,) = next(sample(families.load(root / "pipeline"), [note["p"]], [note["se"]], sampling))
    chosen = next(p for p in images if isinstance(p, ImageEntry) and p.member == "000003-01.png")
    found = np.asarray(decode(read_bytes(data, chosen))).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(
        found, alone, atol=0.6 / 255, err_msg="an image is that of its prompt and seed"
    )
    assert len({note["se"] for note in notes.values()}) == len(notes), "each image has its own seed"


def test_parts_that_are_there_stay(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "parts"
    generate.main(config(root, folder))
    whole = {path.name: path.read_bytes() for path in folder.glob("*.zip")}
    (folder / "part-000002.zip").unlink()
    (folder / ".part-000002.zip.tmp-4194305").write_bytes(b"of a killed process")
    written: list[int] = []
    write = generate.write_part
    monkeypatch.setattr(generate, "write_part", lambda *args: (written.append(args[3]), write(*args)))
    generate.main(config(root, folder))
    assert written == [1]
    assert {path.name: path.read_bytes() for path in folder.glob("*.zip")} == whole, "byte for byte"
    assert not list(folder.glob(".*"))


def test_the_batch_size_may_change(root: Path, tmp_path: Path) -> None:
    begun = begin(root, tmp_path)
    assert generate.check_folder(config(root, tmp_path / "parts", "--sample.batch-size", "2")) == begun


def begin(root: Path, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """A folder with a part."""
    prompts, settings = generate.check_folder(config(root, tmp_path / "parts"))
    generate.begin_folder(config(root, tmp_path / "parts"), settings)
    (tmp_path / "parts" / "part-000001.zip").write_bytes(b"")
    return prompts, settings


def test_a_folder_without_a_part_may_become_another_job_and_a_damaged_record_is_named(
    root: Path, tmp_path: Path
) -> None:
    begin(root, tmp_path)
    (tmp_path / "parts" / "part-000001.zip").unlink()
    other = generate.check_folder(config(root, tmp_path / "parts", "--seed", "5"))[1]
    assert other["seed"] == "5"
    (tmp_path / "parts" / "job.json").write_text("[1")
    with pytest.raises(ValueError, match=r"job\.json is damaged"):
        generate.check_folder(config(root, tmp_path / "parts"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must lie in"),
        (["--model", "nowhere"], "nowhere"),
        (["--prompts", "none.txt"], "none.txt does not exist"),
        (["--images", "4"], "was begun with images 3, not 4"),
        (["--count", "6"], "was begun with count 5, not 6"),
        (["--sample.guidance-scale", "2"], "was begun with sample"),
        (["--output-dir", "{inputs}"], "holds something else"),
    ],
)
def test_wrong_flags(
    flags: list[str], words: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    begin(root, tmp_path)
    monkeypatch.setattr(families, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        generate.main(config(root, tmp_path / "parts", *[flag.format(inputs=root) for flag in flags]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
