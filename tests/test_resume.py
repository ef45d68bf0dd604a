"""What a resume compares, and what it does with damaged folders: the same bits, or one sentence that says what to do."""

import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from PIL import Image

import record_trajectories as recorded
import tiny
from finetune import reward_model
from hub_server import Hub
from preftune.files import manifest
from preftune.images import save_image
from preftune.training import checkpoint, inputs, metrics, resume, validation
from preftune.training.folder import Start
from preftune.training.folder import clear as clear_folder
from test_locate import files_of
from test_run import assert_same_run, rows, run_config, train

FEW = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 0}
LATEST = {**FEW, "resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped: checkpoints after 2, 4 and 6 updates."""
    output = tmp_path_factory.mktemp("straight") / "run"
    train(output, **FEW)
    return output


@pytest.fixture
def output(straight: Path, tmp_path: Path) -> Path:
    """A copy of it that was stopped after 4."""
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_000006")
    return tmp_path / "run"


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


# Damaged checkpoints


@pytest.mark.parametrize("file", ["state.pt", "extra.pt", "manifest.json"])
def test_no_flipped_bit_of_a_checkpoint_is_read(output: Path, file: str) -> None:
    rng = random.Random(file)
    sound = (output / "step_000004" / file).read_bytes()
    for _ in range(60):
        flip(output / "step_000004" / file, rng)
        with pytest.raises(ValueError, match=r"step_000004") as caught:
            checkpoint.verify(output / "step_000004")
        assert "\n" not in str(caught.value)
        (output / "step_000004" / file).write_bytes(sound)
    checkpoint.verify(output / "step_000004")


def damages() -> Iterator[Any]:
    def cut(folder: Path) -> None:
        (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:1000])

    def swap(folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("step_000002"), folder)

    def replace_by_link(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.symlink_to("nowhere")

    def replace_by_file(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.write_text("mine")

    yield pytest.param(cut, "state.pt is damaged", id="truncated")
    yield pytest.param(
        lambda folder: (folder / "state.pt").write_bytes(b""), "state.pt is damaged", id="empty"
    )
    yield pytest.param(lambda folder: (folder / "state.pt").unlink(), "has no state.pt", id="half deleted")
    yield pytest.param(
        lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json", id="no manifest"
    )
    yield pytest.param(
        lambda folder: (folder / "manifest.json").write_text("[1, 2]"),
        "manifest.json is damaged",
        id="a list",
    )
    yield pytest.param(
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "is damaged", id="nested"
    )
    yield pytest.param(swap, "is the checkpoint of 2 updates under another name", id="swapped")
    yield pytest.param(replace_by_link, "is gone", id="dangling link")
    yield pytest.param(replace_by_file, "is no folder", id="file")


@pytest.mark.parametrize(("damage", "words"), list(damages()))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    output: Path, straight: Path, damage: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(output / "step_000004")
    assert train(output, **LATEST) == 0
    said = capsys.readouterr().err
    assert "warning: " in said
    assert words in said
    assert "set aside as step_000004.damaged, going on from step_000002" in said
    assert_same_run(straight, output, 6)
    (aside,) = [path.name for path in output.iterdir() if path.name.startswith("step_000004.")]
    assert aside == "step_000004.damaged"


def test_where_no_checkpoint_is_sound_one_sentence_says_what_to_do(output: Path) -> None:
    for path in output.glob("step_*/state.pt"):
        path.write_bytes(b"")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"cannot resume: .*step_000004/state.pt is damaged.*overwrite-output-dir"
    ):
        train(output, **LATEST)
    with pytest.raises(ValueError, match=r"use --resume-from-checkpoint .*step_000002, or start anew"):
        train(output, **FEW, resume_from_checkpoint=output / "step_000004")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_state_of_something_else_is_told_from_one(tmp_path: Path) -> None:
    import torch

    for content, words in (([1], "a list"), ({"a": torch.ones(1)}, "a dict")):
        torch.save(content, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=f"is not the state of a run, but {words}"):
            checkpoint.read(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.read(tmp_path)


# Metrics


def test_no_flipped_bit_of_the_metrics_is_taken(output: Path) -> None:
    recorded_then = checkpoint.verify(output / "step_000004")["metrics"]
    rng, path = random.Random(0), output / metrics.FILE
    sound = path.read_bytes()
    for _ in range(60):
        path.write_bytes(sound[: recorded_then["bytes"]])
        flip(path, rng)
        with pytest.raises(ValueError, match=r"metrics\.jsonl"):
            metrics.check(output, recorded_then, output / "step_000004")
    path.write_bytes(sound)
    assert not metrics.check(output, recorded_then, output / "step_000004")


def test_metrics_that_are_gone_are_missed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / metrics.FILE).unlink()
    train(output, **LATEST)
    assert "metrics.jsonl is gone: it begins anew" in capsys.readouterr().err
    assert [row["step"] for row in rows(output)] == [4, 5]
    train(output, **LATEST | {"max_train_steps": 7})  # what is there now is what the checkpoints say


# The same run


def test_fewer_updates_than_there_are_is_no_resume(output: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--max-train-steps 3 is less than the 4 updates that .*step_000004 has"
    ):
        train(output, **LATEST | {"max_train_steps": 3})


def test_what_may_differ_is_said(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(output, **LATEST | {"max_train_steps": 8, "checkpointing_steps": 1, "threads": 2})
    said = capsys.readouterr().err
    assert "--checkpointing-steps 1 (was 2), --max-train-steps 8 (was 6), --threads 2 (was 1)\n" in said


def test_what_must_not_differ_is_refused_by_name(root: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("data", "moved"):
        shutil.copytree(root / "images", tmp_path / name)
    argv = recorded.arguments("autoencoder", root, tmp_path / "run")
    argv += ["--max-train-steps", "1", "--resume-from-checkpoint", "latest"]
    recorded.train("autoencoder", [*argv, "--data", str(tmp_path / "data")])

    def refused(*flags: str) -> str:
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as stop:
            recorded.train("autoencoder", [*argv, "--data", str(tmp_path / "data"), *flags])
        assert stop.value.code == 2
        assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
        return str(capsys.readouterr().err).splitlines()[-1]

    assert "--kl-weight was 0.1, is 0.2; give the settings" in refused("--kl-weight", "0.2")
    assert "--mixed-precision was no, is bf16" in refused("--mixed-precision", "bf16")
    several = refused(
        "--kl-weight", "0.2", "--resolution", "64", "--widths", "8", "8", "8", "8", "--seed", "2"
    )
    assert "seed was 0, is 2" in several
    recorded.train("autoencoder", [*argv, "--data", str(tmp_path / "moved")])  # the same content elsewhere
    (tmp_path / "data" / "metadata.jsonl").write_text(
        (root / "images" / "metadata.jsonl").read_text().replace("red", "blue")
    )
    assert f"--data {tmp_path / 'data'} is not what it was: its content has changed" in refused()
    recorded.train("autoencoder", [*argv, "--data", str(tmp_path / "moved")])
    (tmp_path / "moved" / "00.png").rename(tmp_path / "moved" / "x.png")
    (tmp_path / "moved" / "metadata.jsonl").write_text(
        (root / "images" / "metadata.jsonl").read_text().replace("00.png", "x.png")
    )
    said = refused("--data", str(tmp_path / "moved"))
    assert f"--data was {tmp_path / 'data'}, is {tmp_path / 'moved'}" in said, "other names of files"


def test_scorers_and_prompts_are_known_by_what_they_are(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "scorer", tmp_path / "scorer")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = {
        "rewards": [f"{tmp_path / 'scorer'}=1.0", "brightness=2"],
        "prompts": str(tmp_path / "prompts.txt"),
    }
    before = resume.identity(json.dumps(flags), {})
    again = resume.identity(
        json.dumps(flags | {"rewards": [f"{tmp_path / 'scorer'}=1", "brightness=2.0"]}), {}
    )
    assert not resume.compare(tmp_path, before, again)
    assert resume.fingerprint(before) == resume.fingerprint(again)
    lighter = resume.identity(json.dumps(flags | {"rewards": [f"{tmp_path / 'scorer'}=1"]}), {})
    with pytest.raises(ValueError, match=r"--rewards was .*, is "):
        resume.compare(tmp_path, before, lighter)
    (tmp_path / "prompts.txt").write_text("a dog\n")
    weights = tmp_path / "scorer" / "model.safetensors"
    flip(weights, random.Random(1))
    with pytest.raises(
        ValueError, match=r"--prompts .*prompts.txt is not what it was: .*; scorer .* is not what"
    ):
        resume.compare(tmp_path, before, resume.identity(json.dumps(flags), {}))


def test_a_model_is_known_by_its_weights(root: Path, tmp_path: Path) -> None:
    """In another folder, or under another name of its revision, it is the same one; with a changed weight it is not."""
    shutil.copytree(root / "pipeline", tmp_path / "moved")
    before = resume.identity(json.dumps({"model": str(root / "pipeline"), "variant": None}), {})
    now = resume.identity(json.dumps({"model": str(tmp_path / "moved")}), {})
    assert resume.compare(tmp_path, before, now) == ""
    assert resume.compare(tmp_path, before, now | {"flags": now["flags"] | {"variant": "fp16"}}) == ""
    weights = tmp_path / "moved" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"--model was .*pipeline, is .*moved"):
        resume.compare(tmp_path, before, resume.identity(json.dumps({"model": str(tmp_path / "moved")}), {}))


def test_what_counts_of_a_data_set(tmp_path: Path) -> None:
    """Names, sizes and texts, in whatever order the system lists them; a pipe or a circle of links does not stop it."""
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    for name in ("a.png", "a.txt", "deep/b.jpg", "deep/b.caption", ".hidden.txt"):
        (data / name).write_text(name)
    (data / "deep" / "circle").symlink_to("..")
    os.mkfifo(data / "pipe.txt")

    def digest(path: Path = data) -> str:
        return inputs.digests({"data": str(path)})["data"]

    first = digest()
    (data / ".hidden.txt").write_text("other")
    (data / "a.png").write_text("b.png")  # as many bytes: pixels do not count
    assert digest() == first
    (data / "a.png").write_text("a.p")
    cut = digest()
    (data / "a.png").write_text("a.png")
    assert digest() == first != cut
    (data / "deep" / "b.caption").write_text("another caption")
    assert digest() != first
    (data / "deep" / "b.caption").write_text("deep/b.caption")
    assert digest(data.rename(tmp_path / "moved")) == first
    (tmp_path / "moved").rename(data)
    (data / "a.txt").write_text("another caption")
    second = digest()
    (data / "deep" / "b.jpg").rename(data / "deep" / "c.jpg")
    assert len({first, second, digest()}) == 3


@pytest.mark.parametrize("driver", ["pretrain", "autoencoder", "weird_lora"])
def test_other_samples_are_no_resume(driver: str, root: Path, tmp_path: Path, capsys: Any) -> None:
    """An image of another size, and one as large as before that cannot be read any more."""
    shutil.copytree(root / "images", tmp_path / "data")
    argv = recorded.arguments(driver, root, tmp_path / "run")
    argv += ["--max-train-steps", "1", "--data", str(tmp_path / "data"), "--resume-from-checkpoint", "latest"]
    recorded.train(driver, argv)
    image = sorted((tmp_path / "data").glob("*.png"))[0]
    sound = image.read_bytes()
    for content, words in (
        (sound + b"more", f"--data {tmp_path / 'data'} is not what it was: its content has changed"),
        (bytes(len(sound)), "samples set aside was 0, is 1"),
    ):
        image.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            recorded.train(driver, argv)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    image.write_bytes(sound)
    recorded.train(driver, argv)


def test_an_autoencoder_of_the_hub_is_known_by_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hub ids are told apart, and one that is the same as a folder is not."""
    places = {f"them/{name}": tmp_path / name for name in ("one", "two")}
    for seed, place in enumerate(places.values()):
        tiny.vae(seed=seed).save_pretrained(place)
    with (
        Hub({name: files_of(place) for name, place in places.items()}) as server,
        server.in_use(monkeypatch, tmp_path / "cache"),
    ):
        found = {name: inputs.digests({"vae": name})["vae"] for name in (*places, str(tmp_path / "one"))}
    assert found["them/one"] == found[str(tmp_path / "one")] != found["them/two"]


def paths_of(config: type) -> Iterator[str]:
    """The flags of a Config that name files or folders."""
    for field in dataclasses.fields(config):
        hint = typing.get_type_hints(config, include_extras=True)[field.name]
        hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(hint):
            yield from paths_of(typing.cast(type, hint))
        elif hint is Path or Path in typing.get_args(hint):
            yield field.name


def test_every_flag_is_compared_said_or_known_to_change_nothing() -> None:
    run = {"output_dir", "resume_from_checkpoint", "data_cache_dir"}
    for driver in recorded._FLAGS:
        found = set(paths_of(importlib.import_module(f"finetune.{driver}").Config)) - run
        assert found <= set(inputs.FLAGS), (
            f"{driver}: the content of {found - set(inputs.FLAGS)} is not compared"
        )
    fields = {field.name for field in dataclasses.fields(run_config(Path("x")))}
    kept = {"seed", "use_8bit_adam", "mixed_precision", "decay_vectors"}
    unknown = fields - resume.MAY_DIFFER - resume._SAY_NOTHING - kept
    assert not unknown, f"may a run go on with another {unknown}?"


# What goes with an earlier run


def test_overwriting_removes_all_of_the_run_and_nothing_of_the_user(output: Path) -> None:
    theirs = [
        "step_by_step.md", "step_12", "step_000004.txt", "lora.md", "iteration_notes.txt", "samples/mine.png",
        "samples/step_by_step.png", "tensorboard/notes.txt", "unet_before/weights.bin", ".hidden", "step_00000x/a",
    ]  # fmt: skip
    ours = [
        "lora/pytorch_lora_weights.safetensors", "unet/config.json", "pipeline/a", "scorer/config.json", "vae/a", "accuracy.png",
        "before_after.png", "reconstructions.png", "samples/step_000002/0000.png", "samples/step_000002.png",
        "samples/step_000002_negative/scores.json", "iteration_01/000000.png", "iteration_123/a", "step_000002.damaged/state.pt",
        ".config.yaml.tmp-77", "samples/.step_000003.tmp-shared/0000.png", ".scorer.unfinished/a", ".step_000002.tmp-gone/a",
        "skipped.jsonl",
    ]  # fmt: skip
    for name in (*theirs, *ours):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(name)
    patterns = ("iteration_[0-9][0-9]", "iteration_[0-9][0-9][0-9]")
    clear_folder(output, Start(), overwrite=True, driver_files=patterns)
    left = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert left == {*theirs, "rank0.pt"}


def test_a_run_from_a_checkpoint_in_its_folder_keeps_what_led_there(output: Path) -> None:
    for name in ("lora/a", "samples/step_000002/a", "samples/step_000004/a", "samples/step_000004.png"):
        (output / name).parent.mkdir(exist_ok=True, parents=True)
        (output / name).write_text(name)
    clear_folder(output, Start(source=output / "step_000002"), overwrite=True)
    assert (output / "step_000002").is_dir()
    assert (output / metrics.FILE).is_file()
    assert sorted(path.name for path in (output / "samples").iterdir()) == ["step_000002"]
    assert not (output / "lora").exists()
    assert not (output / "step_000004").exists()


def test_tensorboard_reads_the_files_in_order_although_the_clock_was_set_back(output: Path) -> None:
    board = output / "tensorboard"
    (first,) = board.iterdir()
    first.rename(board / "events.out.tfevents.9000000000.host.1.0")
    train(output, **LATEST)
    names = sorted(path.name for path in board.iterdir())
    assert names[0].startswith("events.out.tfevents.9000000000.")
    assert names[1].startswith("events.out.tfevents.9000000001.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == list(range(6)), "rows that were written twice are shown once"


def test_manifest_by_hand(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("abc")
    manifest.write(tmp_path, updates=3)
    found = manifest.verify(tmp_path)
    assert found == {
        "updates": 3,
        "files": {"deep/a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    }
    (tmp_path / "more").write_text("beside")
    assert manifest.verify(tmp_path) == found


# What belongs to a run besides its checkpoints


def moment(run: Path, name: str, proxy: list[float], made_by: str = "one") -> None:
    folder = run / "samples" / name
    for index in range(len(proxy)):
        save_image(Image.new("RGB", (32, 32)), folder / f"{index:04d}.png")
    scores = {"prompts": ["a cat"] * len(proxy), "proxy": proxy, "gold": None, "run": made_by}
    (folder / "scores.json").write_text(json.dumps(scores))
    manifest.write(folder)


def test_only_the_same_scorers_and_prompts_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = {"before": "step_000000", "after": "step_000002"}
    moment(tmp_path, "step_000000", [0.0, 1.0])
    moment(tmp_path, "step_000002", [1.0, 2.0])
    validation.write_comparison(tmp_path, moments)
    assert "proxy before 0.500 -> after 1.500" in capsys.readouterr().out
    (tmp_path / "before_after.png").unlink()
    moment(tmp_path, "step_000002", [1.0, 2.0], made_by="other")
    validation.write_comparison(tmp_path, moments)
    assert (
        "no comparison of before and after: the settings, inputs or scorers differ" in capsys.readouterr().out
    )
    moment(tmp_path, "step_000002", [1.0, 2.0])
    flip(tmp_path / "samples" / "step_000000" / "0001.png", random.Random(2))
    validation.write_comparison(tmp_path, moments)
    said = capsys.readouterr().out
    assert "no comparison of before and after: samples/step_000000 is not there or damaged" in said
    assert not (tmp_path / "before_after.png").exists()


@pytest.mark.usefixtures("cpu")
def test_a_stopped_scorer_training_validates_and_keeps_what_a_straight_one_does(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an accuracy out of turn after SIGTERM, nor the scorer of a killed run that was later than its checkpoint."""

    def argv(name: str) -> list[str]:
        few = ["--checkpointing-steps", "0", "--validation-steps", "2"]
        return [*recorded.arguments("reward_model", root, tmp_path / name), *few]

    recorded.train("reward_model", argv("straight"))
    whole = reward_model.total_before
    with monkeypatch.context() as patch:
        patch.setattr(
            reward_model, "total_before", lambda *args: (signal.raise_signal(signal.SIGTERM), whole(*args))[1]
        )
        assert recorded.train("reward_model", argv("stopped")) == 128 + signal.SIGTERM
    assert "validation_accuracy" not in rows(tmp_path / "stopped")[-1]
    assert recorded.train("reward_model", [*argv("stopped"), "--resume-from-checkpoint", "latest"]) == 0
    assert rows(tmp_path / "stopped") == rows(tmp_path / "straight")
    names = [path.name for path in (tmp_path / "straight" / "scorer").iterdir()]
    assert names
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    flip(tmp_path / "killed" / "scorer" / "model.safetensors", random.Random(3))
    recorded.train("reward_model", [*argv("killed"), "--resume-from-checkpoint", "latest"])
    for name in names:
        content = (tmp_path / "straight" / "scorer" / name).read_bytes()
        assert (tmp_path / "stopped" / "scorer" / name).read_bytes() == content
        assert (tmp_path / "killed" / "scorer" / name).read_bytes() == content


@pytest.mark.usefixtures("cpu")
def test_a_damaged_data_set_of_raft_is_named_or_generated_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--validation-prompts", str(root / "prompts.txt"), "--num-validation-prompts", "1"]
    argv = [*recorded.arguments("raft", root, tmp_path), *few]
    recorded.train("raft", argv)
    image = tmp_path / "iteration_01" / "000001.png"
    sound = image.read_bytes()
    for updates in (2, 3):
        shutil.rmtree(tmp_path / f"step_{updates:06d}")
    flip(image, random.Random(0))
    with pytest.raises(SystemExit) as stop:
        recorded.train("raft", [*argv, "--resume-from-checkpoint", "latest"])
    assert stop.value.code == 2
    assert "000001.png is damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "step_000001")  # now it goes on from the weights that generated the data set
    recorded.train("raft", [*argv, "--resume-from-checkpoint", "latest"])
    assert image.read_bytes() == sound
