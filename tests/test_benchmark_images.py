"""eval/generate.py and the protocols: the images of a prompt list, killed and started again, and over two processes."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import children
import tiny
from eval import generate
from eval.protocol import FOLDER, NAMES, load_protocol, read_lists
from preftune import cli, families
from preftune.images import load_pixels
from preftune.records import read_imagefolder, read_jsonl
from preftune.sampling import sample
from rewards import embedded

PROMPTS = [f"a {colour} circle on a white background" for colour in ("red", "blue", "green", "black", "grey")]
IMAGES = 2 * len(PROMPTS)
SHARED = Path(__file__).parents[2] / "shared" / "data" / "prompts"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline `model` and five prompts."""
    root = tmp_path_factory.mktemp("stage")
    tiny.pipeline_folder(root / "model")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return root


def flags(stage: Path, output: Path, *more: str) -> list[str]:
    common = f"--model {stage / 'model'} --prompts {stage / 'prompts.txt'} --num-images-per-prompt 2 --num-inference-steps 2"
    return [*common.split(), "--batch-size", "3", "--resolution", "32", "--output-dir", str(output), *more]


def run(argv: list[str]) -> None:
    """The program in this process, also as a child that may be killed."""
    assert generate.main(cli.parse(generate.Config, argv)) == 0


def run_as(rank: int, port: int, argv: list[str]) -> None:
    """The program as a launcher starts one of two processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(argv)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(stage: Path) -> Path:
    """What an uninterrupted run in one process writes."""
    run(flags(stage, stage / "whole", "--seed", "7"))
    return stage / "whole"


def test_the_folder(whole: Path, stage: Path) -> None:
    rows = read_jsonl(whole / "base" / "metadata.jsonl")
    assert [row["seed"] for row in rows] == list(range(7, 17))
    assert [row["text"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [row.path.name for row in read_imagefolder(whole / "base")] == [f"{i:04d}.png" for i in range(10)]
    record = json.loads((whole / "base" / "generated.json").read_text())
    assert record["num_inference_steps"] == 2
    assert len(record["weights"]) == 64
    family = families.load(stage / "model")
    settings = generate.check_inputs(cli.parse(generate.Config, flags(stage, stage / "x"))).sampling
    (pixels,) = sample(family, [PROMPTS[2]], [12], settings)
    apart = (load_pixels(whole / "base" / "0005.png") - pixels[0]).abs().max()
    assert apart <= 1.5 / 255, "image 1 of prompt 2 is a function of model, prompt and seed"


@pytest.mark.parametrize("images", [1, 5])
def test_killed_and_started_again_the_bytes_are_the_same(
    images: int, whole: Path, stage: Path, tmp_path: Path
) -> None:
    argv = flags(stage, tmp_path / "out", "--seed", "7")
    child = children.begin(run, argv)
    end = time.monotonic() + children.WAIT
    while len(list((tmp_path / "out").rglob("*.png"))) < images:
        assert time.monotonic() < end
        time.sleep(0.001)
    child.kill()
    child.join()
    assert not (tmp_path / "out" / "base" / "metadata.jsonl").exists(), (
        "it comes last, so a part is not taken for all"
    )
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("[0-9]*.png")}
    assert images <= len(kept) < IMAGES
    (tmp_path / "out" / "base" / ".0003.png.tmp-1").write_bytes(b"half an image")
    run(argv)
    assert contents(tmp_path / "out") == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was there is kept"


def test_two_processes_write_what_one_does(whole: Path, stage: Path, tmp_path: Path) -> None:
    port = 29500 + os.getpid() % 20000
    argv = flags(stage, tmp_path / "out", "--seed", "7")
    both = [children.begin(run_as, rank, port, argv) for rank in range(2)]
    assert [children.end(child) for child in both] == [0, 0]
    assert contents(tmp_path / "out") == contents(whole)


def test_an_empty_image_of_a_power_cut_is_made_again(whole: Path, stage: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "base" / "0004.png").write_bytes(b"")
    run(flags(stage, tmp_path / "out", "--seed", "7"))
    assert contents(tmp_path / "out") == contents(whole)


def test_other_images_are_refused(
    whole: Path, stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        run(flags(stage, tmp_path / "out", "--seed", "8"))
    assert stop.value.code == 2
    assert "base holds other images (other seeds); add --overwrite-output-dir" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(whole)
    run(flags(stage, tmp_path / "out", "--seed", "8", "--overwrite-output-dir"))
    assert read_jsonl(tmp_path / "out" / "base" / "metadata.jsonl")[0]["seed"] == 8


def test_a_protocol_with_groups(stage: Path, tmp_path: Path) -> None:
    """Two styles of three prompts; the YAML's numbers hold where none are typed, and lists lie beside it."""
    (tmp_path / "mine.yaml").write_text(
        "follows: nobody\nprompt_files: [a=a.txt, b=b.txt]\nsource: my disk\nnum_prompts: 3\nnum_images_per_prompt: 2\n"
        "rewards: [brightness]\nseed: 5\nsample: {num_inference_steps: 3, solver: ddim, resolution: 32}\n"
    )
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(3)))
    argv = f"--model {stage / 'model'} --protocol {tmp_path / 'mine.yaml'} --count 2 --num-inference-steps 2"
    request = generate.check_inputs(
        cli.parse(generate.Config, [*argv.split(), "--output-dir", str(tmp_path / "out")])
    )
    assert request.prompts == ["a0", "a0", "a1", "a1", "b0", "b0", "b1", "b1"]
    assert request.groups == ["a", "a", "a", "a", "b", "b", "b", "b"]
    assert list(request.seeds) == list(range(5, 13))
    assert (request.sampling.num_inference_steps, request.sampling.solver) == (2, "ddim")
    assert list(request.rows())[4] == {"file_name": "0004.png", "text": "b0", "seed": 9, "group": "b"}


def test_the_protocols_of_the_package() -> None:
    sizes = {name: load_protocol(name).size() for name in NAMES}
    assert sizes == {
        "hpsv2": 3200, "hpsv2.1": 3200, "drawbench": 200, "imagereward": 1000, "pickscore": 2048, "lpo": 2000, "parti": 1632,
        "geneval_prompts": 2212,
    }  # fmt: skip
    shipped = {"imagereward", "parti", "geneval_prompts"}
    for name in NAMES:
        protocol = load_protocol(name)
        if name in shipped:
            (prompts,) = read_lists(name, protocol, None).values()
            assert len(prompts) == protocol.num_prompts
        else:
            with pytest.raises(
                ValueError, match=r"do not come with preftune: they are from .*; give .* as --prompts"
            ):
                read_lists(name, protocol, None)
        assert "arXiv" in protocol.follows
        assert "github.com" in protocol.follows + protocol.source + protocol.note
    licences = (embedded.find(FOLDER) / "prompts" / "LICENSES.txt").read_text()
    lists = {path.name for path in (embedded.find(FOLDER) / "prompts").iterdir()} - {"LICENSES.txt"}
    assert lists == {"imagereward.json", "parti.tsv", "geneval.txt"}
    assert all(name in licences for name in lists)
    assert (load_protocol("hpsv2").part_size, load_protocol("hpsv2").factor) == (80, 100)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the sources of the prompt lists are not beside the repository"
)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("parti.tsv", "parti/PartiPrompts.tsv"),
        ("geneval.txt", "geneval/generation_prompts.txt"),
        ("imagereward.json", "imagereward/benchmark-prompts.json"),
    ],
)
def test_shipped_lists_are_unchanged(ours: str, theirs: str) -> None:
    assert (embedded.find(FOLDER) / "prompts" / ours).read_bytes() == (SHARED / theirs).read_bytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--protocol", "hpsv3"], "there is no protocol hpsv3; name one of hpsv2, hpsv2.1, drawbench"),
        (["--protocol", "nowhere.yaml"], "there is no protocol nowhere.yaml"),
        (
            ["--protocol", "lpo"],
            "the prompts of lpo do not come with preftune: they are from the captions of",
        ),
        (["--protocol", "hpsv2", "--prompts", "TMP"], "the prompts of hpsv2 are not at TMP/anime.json"),
        (
            ["--protocol", "parti", "--prompts", "TMP/p.txt"],
            "p.txt has 2 prompts, and parti 1,632; give the file of",
        ),
        (["--columns", "a=", "a="], "--columns repeats the title a"),
        (["--columns", "base=nowhere/run"], "column 'base': nowhere/run does not exist"),
        (["--num-images-per-prompt", "0"], "--num-images-per-prompt must be at least 1, got 0"),
        (
            ["--negative", "x", "--guidance-scale", "1"],
            "--negative does nothing at --sample.guidance-scale 1",
        ),
    ],
)
def test_wrong_flags(
    argv: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(families, "load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    argv = [word.replace("TMP", str(tmp_path)) for word in argv]
    with pytest.raises(SystemExit) as stop:
        generate.main(cli.parse(generate.Config, [*argv, "--output-dir", str(tmp_path / "out")]))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words.replace("TMP", str(tmp_path)) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
