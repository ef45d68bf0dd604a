"""The benchmarks in miniature: what they measure must be the driver's own update, and the table must come out."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rewards
from benchmarks import build, full_size, gpu, hardware, models, paths, score
from benchmarks import reward_model as training
from data_build import diffusiondb
from finetune import refl, reward_model
from golden_weights import tiny_card
from preftune import cli
from rewards import CARDS


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Measuring sets the number of threads; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_fresh_process_has_its_own_peak() -> None:
    """The parent's gigabyte must not be in the child's peak."""
    ballast = torch.ones(2**28)
    assert hardware.peak_mib("cpu") > 1024
    assert hardware.fresh(hardware.peak_mib, "cpu") < 1000
    del ballast


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    if peak is None:
        with pytest.raises(ValueError, match="--peak-tflops"):
            hardware.peak_tflops()
    else:
        assert hardware.peak_tflops() == peak


def test_full_size_command_is_one_the_driver_takes(tmp_path: Path) -> None:
    config = full_size.Config(workdir=tmp_path, prompts=paths.PROMPTS, mixed_precision="bf16")
    argv = full_size.command(config)
    driver = next(i for i, word in enumerate(argv) if word.endswith("finetune/refl.py"))
    parsed = cli.parse(refl.Config, argv[driver + 1 :])
    assert (parsed.num_inference_steps, parsed.window, parsed.model.resolution) == (40, (30, 39), "512")
    assert (
        parsed.run.max_train_steps,
        parsed.run.train_batch_size,
        parsed.run.gradient_accumulation_steps,
    ) == (2, 1, 1)
    assert parsed.model.tuned() is not None
    assert parsed.model.gradient_checkpointing
    assert parsed.model.vae_checkpointing
    assert parsed.reward.files() == {"imagereward": tmp_path / "scorer"}


def test_watch_sees_the_peak_of_a_child() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytes(1) * 2**28; import time; time.sleep(1)'])"
    seen = full_size.watch([sys.executable, "-c", code])
    assert seen.code == 0
    assert 0.25 <= seen.process_gib < 0.4
    assert seen.process_gib <= seen.tree_gib + 0.01 < 0.5


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        counts = {
            make: sum(p.numel() for p in make().parameters())
            for make in (models.unet, models.autoencoder, models.text_encoder)
        }
    assert list(counts.values()) == [859_520_964, 83_653_863, 123_060_480]


def test_tokenizer_is_clip_s() -> None:
    words = models.tokenizer()
    assert words(["a photo of a cat"]).input_ids[0] == [49406, 320, 1125, 539, 320, 2368, 49407]
    ids = words(["a cat"], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    assert ids[0, -1] == 49407


# ---------------------------------------------------------------- score.py


def scoring(scratch: Path, **changes: object) -> score.Trial:
    settings = {
        "scorer": "imagereward-tiny",
        "weights": None,
        "precision": "fp32",
        "batch_size": 2,
        "images": 3,
        "reload_images": 2,
        "repeats": 1,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "trace": None,
    }
    return score.Trial(**{**settings, **changes})  # type: ignore[arg-type]


def test_files_raw_and_reload_score_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is the same work three times: the scorer is called for each image and gives the same scores."""
    bench = score.Bench(scoring(tmp_path), tmp_path)
    called: list[float] = []
    scorer, load = bench.scorer, bench.load

    def spy(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        scores = scorer(pixels, prompts)
        called.extend(scores.tolist())
        return scores

    spy.card, spy.to = scorer.card, scorer.to  # type: ignore[attr-defined]
    monkeypatch.setattr(bench, "scorer", spy)
    monkeypatch.setattr(bench, "load", lambda: (load(), spy)[1])
    with torch.no_grad():
        bench.raw(0)
        raw = called.copy()
        called.clear()
        bench.files(0)
        assert called == pytest.approx(raw, abs=1e-6)
        called.clear()
        for index in range(3):
            bench.reload(index)
    assert called == pytest.approx(raw, abs=1e-5)
    assert len(raw) == len({round(value, 4) for value in raw}) == 3
    assert (tmp_path / "scored0" / "chunks").is_dir(), "the writing is timed, too"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scorers", "beauty"], "--scorers beauty cannot be measured here; one of imagereward"),
        (["--scorers", "shapes"], "--scorers shapes cannot be measured here"),
        (["--scorers", "hpsv2"], "--scorers hpsv2 needs --workdir"),
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got (0,)"),
    ],
)
def test_wrong_flags_of_score(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        score.main(cli.parse(score.Config, [flag.format(tmp=tmp_path) for flag in flags]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hpsv1", "pickscore"])
def test_random_weights_are_ones_that_load(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(CARDS, name, tiny_card(name))
    file = models.write_scorer(name, tmp_path)
    scorer = rewards.load(name, weights=file)
    assert scorer(torch.rand(1, 3, 224, 224), ["a red circle"]).isfinite().all()
    assert models.write_scorer(name, tmp_path) == file, "what is there is used again"


# ---------------------------------------------------------------- build.py


def building(**changes: object) -> build.Trial:
    settings = {
        "scorer": "imagereward-tiny",
        "weights": None,
        "parts": 2,
        "images": 6,
        "side": 64,
        "repeats": 1,
        "batch_size": 4,
        "workers": 0,
        "threads": 1,
        "precision": "fp32",
        "device": "cpu",
    }
    return build.Trial(**{**settings, **changes})  # type: ignore[arg-type]


def test_decode_forward_and_build_do_the_builder_s_work(tmp_path: Path) -> None:
    """All images are prepared, all prompts scored, and the data set is the one that the program writes."""
    bench = build.Bench(building(), tmp_path)
    scorer, called, prepared = bench.scorers[0], list[str](), list[str]()

    def spy(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        called.extend(prompts)
        return scorer(pixels, prompts)

    spy.card = scorer.card  # type: ignore[attr-defined]
    wanted = bench.prepare.unwanted
    assert wanted is not None
    bench.prepare = replace(
        bench.prepare, unwanted=lambda image: (prepared.append(image.size), wanted(image))[1]
    )
    bench.decode(0)
    assert prepared == [(64, 64)] * 12
    bench.scorers[0] = spy  # type: ignore[assignment]
    with torch.no_grad():
        bench.forward(0)
        assert called == bench.prompts
        assert len(called) == 12
        called.clear()
        bench.build(0)
    assert len(called) == 12 - json.loads((tmp_path / "built0/summary.json").read_text())["filtered"].get(
        "blurred", 0
    )
    assert len(bench.scoring) == 1
    diffusiondb.main(building().config(tmp_path / "data", tmp_path / "program"))
    for name in ("metadata.jsonl", "summary.json", "job.json"):
        assert (tmp_path / "built0" / name).read_bytes() == (tmp_path / "program" / name).read_bytes()


def test_building_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "fresh", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "--images 4 --side 64 --parts 1 2 --repeats 1 --workers 0 --threads 1".split()  # noqa: SIM905
    assert build.main(cli.parse(build.Config, [*flags, "--output", str(tmp_path / "a.json")])) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    (row,) = written["rows"]
    assert row["of_raw"] == pytest.approx(row["scoring_per_s"] / row["forward_per_s"])
    assert row["build_per_s"] < row["scoring_per_s"], "the data set is written after the last score"
    slower = min(("decode", "forward"), key=lambda name: row[f"{name}_per_s"])
    assert row["bottleneck"] == slower
    assert [*written["peak_mib"]] == ["1", "2"]
    printed = capsys.readouterr().out
    assert "imagereward-tiny  fp32    32     1 " in printed
    assert "left out: hpsv2.1" in printed
    assert "set aside" not in printed


def test_memory_that_grows_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        build, "run", lambda measure, trial: 90.0 + trial.parts if measure is build.memory else None
    )
    assert build.main(build.Config(parts=(10, 19))) == 0
    assert build.main(build.Config(parts=(10, 21))) == 1
    assert "100 MiB at 10 parts, 111 MiB at 21 parts; they differ by 11.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts"], "--parts is empty; name some of limits, weights"),
        (["--parts", "speed"], "--parts is 'speed'; it must be limits, weights, "),
        (["--limit-scale", "0"], "--limit-scale must be above 0 and finite, got 0"),
        (["--output-dir", "README.md/x"], "--output-dir README.md/x cannot be written: Not a directory"),
        (["--workdir", "README.md"], "--workdir README.md cannot be written: Not a directory"),
        ([], "torch finds no CUDA device (preftune doctor says why); --dry runs the same code on the CPU"),
    ],
)
def test_wrong_flags_of_gpu(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(cli.parse(gpu.Config, words))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["images", "parts", "repeats", "batch-size"])
def test_wrong_flags_of_build(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(build.Config, [f"--{name}", "0"])
    assert stop.value.code == 2
    assert f"--{name} must be at least 1, got" in capsys.readouterr().err


# ---------------------------------------------------------------- reward_model.py


def test_the_recipe_is_that_of_the_configuration(tmp_path: Path) -> None:
    """What is timed is the published recipe: everything that costs time or memory is as in the YAML of Stable Preference."""
    config = training.Config(workdir=tmp_path)
    (row,) = training.trials(config, {"clipscore": tmp_path}, "cpu")
    timed = cli.parse(reward_model.Config, training.command(row, tmp_path, tmp_path / "run"))
    yaml = paths.ROOT / "finetune/configs/reward_model/stable_preference_clip_l.yaml"
    published = cli.parse(reward_model.Config, ["--config", str(yaml)])
    assert replace(timed.stable, first_stage_steps=3000) == published.stable
    for name in ("model", "objective", "last_layers", "frozen_share", "jitter", "gradient_checkpointing"):
        assert getattr(timed, name) == getattr(published, name), name
    for name in (
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "adam_weight_decay",
        "adam_beta1",
        "adam_beta2",
    ):
        assert getattr(timed.run, name) == getattr(published.run, name), name


def test_training_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CARDS, "clipscore", tiny_card("clipscore"))
    for module in (training, models):
        monkeypatch.setattr(module, "fresh", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--workdir", str(tmp_path), "--output", str(tmp_path / "a.json")]
    flags += "--views 0 1 --last-layers 1 1 --train-batch-size 2 --gradient-accumulation-steps 2 --max-train-steps 2 --threads 1".split()  # noqa: SIM905
    assert training.main(cli.parse(training.Config, flags)) == 0
    plain, viewed = json.loads((tmp_path / "a.json").read_text())["rows"]
    for row, views in ((plain, 0), (viewed, 1)):
        assert row["s_per_update"] == row["times"][1]
        assert row["images_per_s"] == pytest.approx(2 * 4 * (1 + views) / row["s_per_update"])
        assert row["ratio"] == pytest.approx(row["s_per_update"] / plain["s_per_update"])
    assert viewed["losses"][0] > plain["losses"][0], "the anti-interference loss is added"
    assert "clipscore      1  on             no        4 " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "clipscore"], "runs leave nothing"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scorers", "imagereward"], "--scorers imagereward cannot be measured here; one of hpsv1"),
        (["--scorers", "aesthetic"], "--scorers aesthetic cannot be measured here; one of hpsv1"),
        (["--views", "-1"], "--views must be 0 or more, got (-1,)"),
        (["--train-batch-size", "0"], "--train-batch-size must be at least 1, got 0"),
    ],
)
def test_wrong_flags_of_training(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        training.main(cli.parse(training.Config, ["--workdir", str(tmp_path), *flags]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
