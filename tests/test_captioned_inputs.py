"""Worker processes and stores on disk change nothing but the time that a training takes."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

import record_trajectories as recorded
import tiny
from benchmarks import captioned
from finetune import pretrain, refl
from preftune import encoded_store, families
from preftune.captioned_inputs import CaptionedInputs, on
from preftune.cli import parse
from preftune.diffusion_loss import captioned_loss
from preftune.encoded_store import Store
from preftune.families.base import Family
from preftune.images import load_levels, load_pixels
from preftune.order import items_at
from preftune.records import read_jsonl
from preftune.resolution import Resolution
from preftune.training.cache_config import CacheConfig
from preftune.training.checkpoint import read
from preftune.worker_processes import WorkerProcesses

pytestmark = pytest.mark.usefixtures("cpu")
SIZE = Resolution(32, 48)
KINDS = ("sd", "sdxl", "taesd")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tiny.pipeline_xl_folder if request.param == "sdxl" else tiny.pipeline_folder
    folder = make(tmp_path_factory.mktemp(str(request.param)))
    if request.param == "taesd":  # its latents have no posterior
        shutil.rmtree(folder / "vae")
        tiny.taesd().save_pretrained(folder / "vae")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]})
        )
    return folder


@pytest.fixture
def family(folder: Path) -> Family:
    return families.load(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five images, of which two are the same one under two names, in several formats and sizes."""
    root = tmp_path_factory.mktemp("images")
    paths = []
    for number, (name, size) in enumerate((("a.png", (64, 64)), ("b.jpg", (100, 40)), ("c.webp", (48, 90)))):
        noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(root / name)
        paths.append(root / name)
    Image.open(paths[0]).convert("LA").save(root / "d.png")
    (root / "e.png").write_bytes(paths[0].read_bytes())
    return [*paths, root / "d.png", root / "e.png"]


def batches(images: Sequence[Path], passes: int = 5) -> list[list[Path]]:
    """Two images a pass, so that the third pass has images of two epochs."""
    return [items_at(images, range(2 * i, 2 * i + 2), 0) for i in range(passes)]


def losses(inputs: CaptionedInputs, images: Sequence[Path], *, dropout: float = 0.5) -> list[Tensor]:
    """The losses of five passes; the caption of an image is its name, and dropped ones read "nothing"."""
    found = []
    inputs.expect(batches(images))
    for number, paths in enumerate(batches(images)):
        generators = [torch.Generator().manual_seed(10 * number + i) for i in range(2)]
        captions, dropped = [path.stem for path in paths], ["nothing"] * 2
        with torch.no_grad():
            found.append(
                captioned_loss(inputs, paths, captions, generators, caption_dropout=dropout, dropped=dropped)
            )
    inputs.close()
    return found


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- the same losses


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_are_the_same_to_the_bit(
    family: Family, images: list[Path], tmp_path: Path, precision: torch.dtype
) -> None:
    family.to("cpu", precision)
    plain = losses(CaptionedInputs(family, SIZE), images)
    assert same(losses(CaptionedInputs(family, SIZE, workers=2), images), plain)
    for workers in (0, 2, 2):  # the first fills the stores
        store = Store(tmp_path / "encoded")
        both = CaptionedInputs(family, SIZE, workers=workers, latents=store, texts=store, batch_size=2)
        assert same(losses(both, images), plain)


def test_a_filled_store_is_asked_instead_of_encoders_and_files(
    family: Family, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inputs(workers: int) -> CaptionedInputs:
        store = Store(tmp_path / "encoded")
        return CaptionedInputs(family, SIZE, workers=workers, latents=store, texts=store, batch_size=2)

    first = losses(inputs(0), images)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an encoder or a file was asked")

    for what in ("moments", "encode"):
        monkeypatch.setattr(family, what, fail)
    monkeypatch.setattr("preftune.captioned_inputs.load_levels", fail)
    for workers in (0, 2):
        assert same(losses(inputs(workers), images), first)


def test_what_changes_an_entry(folder: Path, images: list[Path], tmp_path: Path) -> None:
    """Content, size, batch, precision, weights and configuration; never the name or the time of a file."""
    family, store = families.load(folder), tmp_path / "encoded"

    def entries(*, size: Resolution = SIZE, batch: int = 2, paths: Sequence[Path] = images[:2]) -> int:
        held = Store(store)
        inputs = CaptionedInputs(family, size, latents=held, texts=held, batch_size=batch)
        _, framings = inputs.latents(paths[:batch], None)
        inputs.cond(["a cat", "two cats"][:batch], framings)
        return len(list(store.rglob("*.safetensors")))

    assert entries() == 4
    assert entries() == 4
    assert entries(paths=[images[4], images[1]]) == 4, "the same image under another name"
    assert entries(size=Resolution(48, 32)) == 6, "captions have no size"
    assert entries(batch=1) == 8, "an encoder rounds otherwise at another batch size"
    with torch.no_grad():
        next(iter(family.vae.parameters())).add_(1e-3)
    assert entries() == 10
    with torch.no_grad():
        next(iter(family.text_encoders[-1].parameters())).add_(1e-3)
    assert entries() == 12
    with torch.autocast("cpu", torch.bfloat16):
        assert entries() == 14, "captions may be encoded under autocast"
    family.to("cpu", torch.bfloat16)
    assert entries() == 18


def test_damaged_entries_are_made_again(family: Family, images: list[Path], tmp_path: Path) -> None:
    def inputs() -> CaptionedInputs:
        store = Store(tmp_path / "encoded")
        return CaptionedInputs(family, SIZE, latents=store, texts=store, batch_size=2)

    first = losses(inputs(), images)
    sound = {path: path.read_bytes() for path in (tmp_path / "encoded").rglob("*.safetensors")}
    for number, (path, content) in enumerate(sound.items()):
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes((content[: len(content) // 2], b"", bytes(len(content)), flipped)[number % 4])
    assert same(losses(inputs(), images), first)
    assert {path: path.read_bytes() for path in sound} == sound


def test_a_store_that_cannot_be_written_is_said_once(
    family: Family, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "encoded")
    inputs = CaptionedInputs(family, SIZE, latents=store, texts=store, batch_size=2)
    assert same(losses(inputs, images), losses(CaptionedInputs(family, SIZE), images))
    said = capsys.readouterr().err
    assert said.count("nothing more is cached") == 1
    assert str(store.folder) in said


def test_memory_holds_the_latest_entries_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_store, "MEMORY", 100)
    store = Store(tmp_path)
    for number in range(4):
        store.put(str(number) * 4, {"x": torch.full((10,), float(number))})
    assert list(store._kept) == ["2222", "3333"]
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    found = [store.get(str(number) * 4) for number in range(4)]
    assert [entry is not None for entry in found] == [False, False, True, True]


def fill(folder: Path) -> None:
    store = Store(folder)
    for number in range(60):
        name = f"{number % 12:02d}" * 4
        found = store.get(name)
        assert found is None or torch.equal(found["x"], torch.full((1000,), float(number % 12)))
        store.put(name, {"x": torch.full((1000,), float(number % 12))})
        store._kept.clear()


def test_several_processes_may_fill_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 12
    assert not list(tmp_path.rglob(".*"))


def test_levels_on_another_device_are_the_same_pixels(images: list[Path]) -> None:
    """The table that a GPU is given, against the division of the CPU."""
    levels = [load_levels(path, SIZE)[0] for path in images]
    pixels = on(torch.device("cpu"), levels)
    assert torch.equal(pixels, torch.stack([load_pixels(path, SIZE) for path in images]))
    assert pixels.is_contiguous()
    table = torch.arange(256).float() / 255
    assert torch.equal(table, torch.arange(256, dtype=torch.uint8).float() / 255)
    assert on(torch.device("meta"), levels).shape == pixels.shape


# ---------------------------------------------------------------- worker processes


def square_in_worker(number: int) -> tuple[int, int]:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number**2, os.getpid()


def children() -> set[int]:
    """Process ids of the children that are at work. The operating system's word: two threads that wait for one child, the pool's and
    a test's, can leave multiprocessing in the belief that it runs.
    """
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found


def assert_ended(before: set[int]) -> None:
    """No process is left that was not there before, of another test."""
    end = time.monotonic() + 30
    while children() - before and time.monotonic() < end:
        time.sleep(0.05)
    assert not children() - before


def test_results_come_in_order_and_from_other_processes() -> None:
    before = children()
    with WorkerProcesses(square_in_worker, 2) as ahead:
        ahead.expect([[i, i + 1] for i in range(0, 20, 2)])
        ahead.expect(([i] for i in range(100, 103)), stream=1)
        found = []
        for i in range(0, 20, 2):
            found += ahead.take([i, i + 1])
            if i < 6:
                (other,) = ahead.take([100 + i // 2], stream=1)
                assert other[0] == (100 + i // 2) ** 2
                assert other[1] != os.getpid()
    assert [number for number, _ in found] == [i**2 for i in range(20)]
    assert os.getpid() not in {process for _, process in found}
    assert_ended(before)


def test_another_expectation_replaces_the_first() -> None:
    with WorkerProcesses(square_in_worker, 1) as ahead:
        ahead.expect([[i] for i in range(50)])
        assert ahead.take([0])[0][0] == 0
        ahead.expect([[7], [8]])
        assert [ahead.take([i])[0][0] for i in (7, 8, 9)] == [49, 64, 81], "what is not expected is done here"
        ahead.expect([[1]])
        with pytest.raises(AssertionError, match="order that was expected"):
            ahead.take([2])


def test_an_error_of_a_worker_is_raised_where_its_item_is_taken() -> None:
    with WorkerProcesses(square_in_worker, 2) as ahead:
        ahead.expect([[1], [-1], [2]])
        assert ahead.take([1])[0][0] == 1
        with pytest.raises(ValueError, match="-1 is negative"):
            ahead.take([-1])
        assert ahead.take([2])[0][0] == 4


def test_killed_workers_cost_speed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = children()
    with WorkerProcesses(square_in_worker, 2) as ahead:
        ahead.expect([[i, i + 1] for i in range(0, 200, 2)])
        found = [ahead.take([0, 1])]
        for child in children() - before:
            os.kill(child, signal.SIGKILL)
        found += [ahead.take([i, i + 1]) for i in range(2, 200, 2)]
        assert found[-1][0] == (198**2, os.getpid())
    assert [number for batch in found for number, _ in batch] == [i**2 for i in range(200)]
    assert capsys.readouterr().err.count("a worker process has died") == 1


def test_ctrl_c_is_not_for_workers() -> None:
    before = children()
    with WorkerProcesses(square_in_worker, 2) as ahead:
        ahead.expect([[i, i + 1] for i in range(0, 40, 2)])
        ahead.take([0, 1])
        for child in children() - before:
            os.kill(child, signal.SIGINT)
        found = [ahead.take([i, i + 1]) for i in range(2, 40, 2)]
        assert os.getpid() not in {process for batch in found for _, process in batch}


_KILLED = """
import os, sys, time
from preftune.worker_processes import WorkerProcesses
def pid(_):
    return os.getpid()
ahead = WorkerProcesses(pid, 2)
ahead.expect([[i, i] for i in range(100)])
print(*{p for i in range(5) for p in ahead.take([i, i])}, flush=True)
os.kill(os.getpid(), 9)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    ended = threading.Event()
    left = [int(word) for word in done.stdout.split()]
    assert left
    for _ in range(100):
        left = [pid for pid in left if Path(f"/proc/{pid}/stat").exists() and not _is_gone(pid)]
        if not left:
            break
        ended.wait(0.1)
    assert not left


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# ---------------------------------------------------------------- programs


def few(root: Path) -> list[str]:
    """Flags for one validation image: most of the time goes into them."""
    return ["--validation-prompts", str(root / "prompts.txt"), "--num-validation-prompts", "1"]


def trained(
    driver: str, root: Path, output: Path, *flags: str
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The metrics of a run, but for its speed, and its trained weights."""
    short = [] if driver in ("autoencoder", "pretrain_scorer", "reward_model") else few(root)
    assert recorded.train(driver, [*recorded.arguments(driver, root, output), *short, *flags]) == 0
    rows = [
        {k: v for k, v in row.items() if k != "images_per_s"} for row in read_jsonl(output / "metrics.jsonl")
    ]
    return rows, read(output / "step_000003")["parameters"]


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("autoencoder", "dpo", "pretrain_scorer", "raft", "refl", "weird_lora")
]


@pytest.mark.parametrize("driver", ["reward_model", "reward_weighted", *SLOW])
def test_a_run_is_the_same_with_workers_and_caches(driver: str, root: Path, tmp_path: Path) -> None:
    flags = ["--dataloader-num-workers", "1"]
    if driver not in ("autoencoder", "pretrain_scorer", "reward_model"):
        flags += [
            "--cache-latents",
            "--cache-text-encoder-outputs",
            "--data-cache-dir",
            str(tmp_path / "encoded"),
        ]
    before = children()
    plain, weights = trained(driver, root, tmp_path / "plain", "--dataloader-num-workers", "0")
    found, same_weights = trained(driver, root, tmp_path / "workers", *flags)
    assert found == plain
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert_ended(before)


def test_a_resumed_run_may_take_workers_and_caches(root: Path, tmp_path: Path) -> None:
    """Also where the store is gone by then."""
    cache = ["--cache-latents", "--cache-text-encoder-outputs", "--data-cache-dir", str(tmp_path / "encoded")]
    rows, weights = trained("refl", root, tmp_path / "whole", *cache)
    begun = [*recorded.arguments("refl", root, tmp_path / "parts"), *few(root), *cache]
    assert recorded.train("refl", [*begun, "--max-train-steps", "1"]) == 0
    shutil.rmtree(tmp_path / "encoded")
    resumed = "--resume-from-checkpoint", "latest", "--dataloader-num-workers", "1"
    found, same_weights = trained("refl", root, tmp_path / "parts", *resumed)
    assert found[-1] == rows[-1]
    assert all(torch.equal(same_weights[name], value) for name, value in weights.items())


def test_pretrain_reads_what_it_has_kept(root: Path, tmp_path: Path) -> None:
    """In bf16, where the module encodes captions under autocast; a run that reads the stores equals the one that filled them."""
    flags = ["--no-train-text-encoder", "--mixed-precision", "bf16"]
    cache = ["--cache-latents", "--cache-text-encoder-outputs", "--data-cache-dir", str(tmp_path / "encoded")]
    plain, weights = trained("pretrain", root, tmp_path / "plain", *flags)
    for output, more in (("filled", []), ("read", ["--dataloader-num-workers", "1"])):
        found, same_weights = trained("pretrain", root, tmp_path / output, *flags, *cache, *more)
        assert found == plain
        assert all(torch.equal(same_weights[name], value) for name, value in weights.items())


def test_the_flags_of_other_scripts(root: Path) -> None:
    flags = "--cache_latents --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --max_data_loader_n_workers=3"
    config = parse(
        refl.Config, ["--model", str(root / "pipeline"), "--prompts", "x", "--data", "y", *flags.split()]
    )
    assert config.cache == CacheConfig(cache_latents=True, cache_text_encoder_outputs=True)
    assert config.run.dataloader_num_workers == 3


def test_wrong_flags(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(root / "pipeline")]
    cases = (
        (
            pretrain.Config,
            "--data x --train full --train-text-encoder --cache-text-encoder-outputs",
            "changes",
        ),
        (pretrain.Config, "--data x --data-cache-dir y", "add --cache-latents"),
        (pretrain.Config, "--data x --dataloader-num-workers -1", "it must be in [0, 256]"),
        (refl.Config, "--prompts x --cache-latents", "add --data IMAGEFOLDER"),
        (refl.Config, "--prompts x --cache-latents --data y --pretraining off", "add --data IMAGEFOLDER"),
    )
    for kind, flags, wanted in cases:
        with pytest.raises(SystemExit) as stopped:
            parse(kind, [*model, *flags.split()])
        assert stopped.value.code == 2
        assert wanted in capsys.readouterr().err


def test_the_benchmark_compares_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: captioned.ROWS[name] for name in ("in the process", "all three")}
    monkeypatch.setattr(captioned, "ROWS", rows)
    config = captioned.Config(
        images=3, train_batch_size=2, updates=2, turns=2, threads=torch.get_num_threads()
    )
    found = captioned.measure(config)
    assert [row.name for row in found] == list(rows)
    assert all(row.losses_same and 0 < row.main_cpu_ms < 1e5 and row.images_per_s > 0 for row in found)
