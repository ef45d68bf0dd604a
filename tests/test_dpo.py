"""DPO as a program: the reference, the noise that a pair shares, image sizes of SDXL, fixed noise, resumes, and what is set aside."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Generator, Tensor

import record_trajectories as recorded
import tiny
from finetune import dpo
from preftune import diffusion_loss, families
from preftune.captioned_inputs import CaptionedInputs
from preftune.families.base import Family
from preftune.families.sd import SD
from preftune.families.sdxl import SDXL
from preftune.lora.config import LoRA
from preftune.records import read_jsonl, write_jsonl
from preftune.resolution import Resolution
from preftune.training.checkpoint import read
from preftune.training.labelled_pairs import Pair

pytestmark = pytest.mark.usefixtures("cpu")

FEW = ["--num-validation-prompts", "1"]


def draw_of(number: int) -> dpo.Draw:
    def draw(stream: int) -> list[Generator]:
        return [torch.Generator().manual_seed(100 * stream + row) for row in range(number)]

    return draw


def trained(root: Path, output: Path, *flags: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The metrics of a run, but for its speed, and its last checkpoint."""
    assert recorded.train("dpo", [*recorded.arguments("dpo", root, output), *FEW, *flags]) == 0
    rows = read_jsonl(output / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows], read(
        output / "step_000003"
    )


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_at_the_start_the_loss_is_log_2(root: Path, tmp_path: Path, train: str, precision: str) -> None:
    """The model is its own reference, bit for bit: every pair is a tie, which counts half."""
    flags = ["--train", train, "--mixed-precision", precision, "--beta", "5000", "--max-train-steps", "1"]
    assert recorded.train("dpo", [*recorded.arguments("dpo", root, tmp_path), *FEW, *flags]) == 0
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    if (train, precision) == (
        "full",
        "bf16",
    ):  # norms have float32 weights there, and the second model those of bf16
        assert row["loss"] == pytest.approx(0.693147, abs=0.2)
        return
    assert row["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert row["implicit_accuracy"] == 0.5
    assert (row["margin"], row["error"]) == (row["reference_margin"], row["reference_error"])


def test_the_reference_is_the_model_before_tuning_in_every_update(root: Path, tmp_path: Path) -> None:
    """A LoRA switched off, a second model, and a LoRA of another learning rate have one reference; the tuned models differ."""
    runs = [
        trained(root, tmp_path / name, *flags)[0]
        for name, flags in (
            ("lora", []),
            ("full", ["--train", "full"]),
            ("fast", ["--learning-rate", "3e-2"]),
        )
    ]
    for name in ("reference_error", "reference_margin"):
        assert (
            [row[name] for row in runs[0]] == [row[name] for row in runs[1]] == [row[name] for row in runs[2]]
        )
    assert len({run[-1]["error"] for run in runs}) == 3


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An image of 64 x 48 pixels (width, height) and one of 40 x 80."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, size in (("wide", (64, 48)), ("high", (40, 80))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{name}.png")
    return [folder / "wide.png", folder / "high.png"]


def pair_of(first: Path, second: Path) -> Pair:
    return Pair(prompt="a red circle", first=first, second=second, label=1.0, weight=1.0)


def test_both_images_of_a_pair_have_one_noise_and_one_timestep(
    root: Path, sizes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families.load(root / "pipeline")
    seen = list[tuple[Tensor, Tensor]]()
    add = diffusion_loss.add_noise

    def noted(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        seen.append((eps, alpha))
        return add(x0, eps, alpha, sigma)

    monkeypatch.setattr(diffusion_loss, "add_noise", noted)
    inputs = CaptionedInputs(family, Resolution(32, 32))
    pairs = [pair_of(*sizes), pair_of(*sizes[::-1])]
    x0, cond = dpo.inputs_of(inputs, pairs, draw_of(2), 0.0)
    with torch.no_grad():
        one, other = (dpo.errors_of(family, x0, cond, draw_of(2)) for _ in range(2))
    assert torch.equal(one, other), "the reference sees what the model sees"
    for eps, alpha in seen:
        assert torch.equal(eps[:2], eps[2:])
        assert torch.equal(alpha[:2], alpha[2:])
        assert not torch.equal(eps[0], eps[1])
        assert alpha[0] != alpha[1]
    assert one.shape == (2, 2)
    assert one[0, 0] != one[1, 0]


def test_the_first_row_of_errors_is_the_preferred_image(root: Path, sizes: list[Path]) -> None:
    family = families.load(root / "pipeline")
    inputs = CaptionedInputs(family, Resolution(32, 32))
    x0, _ = dpo.inputs_of(inputs, [pair_of(*sizes)], draw_of(1), 0.0)
    mine, _ = inputs.latents(sizes[:1], draw_of(1)(1)[:1])
    generator = draw_of(1)(1)[0]
    torch.rand((), generator=generator)  # whether the caption is dropped
    mine, _ = inputs.latents(sizes[:1], [generator])
    assert torch.equal(x0[:1], mine)


def test_sdxl_knows_the_size_and_crop_of_each_image(tmp_path: Path, sizes: list[Path]) -> None:
    """Scaled to cover 32 x 32: the wide one to 42.67 x 32, of which 5 pixels on the left are cut, the high one to 32 x 64."""
    family = families.load(tiny.pipeline_xl_folder(tmp_path / "pipeline"))
    inputs = CaptionedInputs(family, Resolution(32, 32))
    _, cond = dpo.inputs_of(inputs, [pair_of(*sizes), pair_of(*sizes[::-1])], draw_of(2), 0.0)
    wide, high = [48, 64, 0, 5], [80, 40, 16, 0]
    assert cond.positive["framing"].tolist() == [wide, high, high, wide]
    assert torch.equal(cond.positive["embeds"][:2], cond.positive["embeds"][2:])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "mapo"])
def test_an_update_of_one_pair_raises_its_margin(
    kind: str, loss: str, tmp_path: Path, sizes: list[Path]
) -> None:
    """Of both families, without an edit: after some updates on one pair, one noise, the preferred image is denoised better."""
    folder = tiny.pipeline_folder if kind == "sd" else tiny.pipeline_xl_folder
    family: Family = families.load(folder(tmp_path / "pipeline"))
    weights = [w for w in family.trainable(LoRA(), 0).parameters() if w.requires_grad]
    config = dpo.Config(
        data=(tmp_path,),
        loss=loss,
        beta=dpo.BETAS[loss],
        model=dpo.ModelConfig(pretrained=families.Pretrained(model="-")),
    )  # type: ignore[arg-type]
    x0, cond = dpo.inputs_of(CaptionedInputs(family, Resolution(32, 32)), [pair_of(*sizes)], draw_of(1), 0.0)
    with torch.no_grad(), family.reference():
        before = dpo.errors_of(family, x0, cond, draw_of(1))
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for _ in range(12):
        errors = dpo.errors_of(family, x0, cond, draw_of(1))
        losses, _ = dpo.losses_of(errors, before, torch.ones(1), config, 1000)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (first, second), (first_before, second_before) = errors.tolist(), before.tolist()
    assert second[0] - first[0] > second_before[0] - first_before[0] + 1e-5


def test_the_metrics_of_a_pass() -> None:
    errors, reference = torch.tensor([[0.1, 0.4], [0.2, 0.3]]), torch.tensor([[0.2, 0.2], [0.2, 0.4]])
    found = dpo.metrics_of(errors, reference, torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.75]))
    assert {name: round(float(value), 6) for name, value in found.items()} == {
        "implicit_accuracy": 0.625, "margin": 0.0, "error": 0.25, "reference_margin": 0.1, "reference_error": 0.25,
    }  # fmt: skip
    assert dpo.metrics_of(errors, None, torch.ones(2), torch.ones(2)).keys() == {
        "implicit_accuracy",
        "margin",
        "error",
    }


def test_places_of_fixed_noise() -> None:
    """Three pairs of two noises: the place says which pair and which noise, whose turn is the epoch's."""
    assert dpo.places_of([2, 0, 1], range(6, 9), 3, 0) == [6, 7, 8]
    assert dpo.places_of([2, 0], range(2, 4), 3, 2) == [4, 1], "the last of epoch 0, the first of epoch 1"
    assert dpo.places_of([2], range(7, 8), 3, 2) == [4], "epoch 2 has the noise of epoch 0"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches of the reference."""
    calls, original = list[int](), dpo.Reference.errors

    def errors(self: dpo.Reference, x0: Tensor, *others: Any) -> Tensor | None:
        calls.append(len(x0))
        return original(self, x0, *others)

    monkeypatch.setattr(dpo.Reference, "errors", errors)
    return calls


def test_reference_errors_of_fixed_noise_are_worked_out_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pairs, four an update: two updates know them all, the third asks nobody, and has the numbers of who asks always."""
    calls = counted(monkeypatch)
    flags = ["--validation-share", "0", "--fixed-noise", "1"]
    rows, last = trained(root, tmp_path / "once", *flags)
    assert calls == [4] * 4
    known = last["driver"]["reference_errors"]
    assert known.shape == (8, 2)
    assert known.isfinite().all()
    monkeypatch.setattr(
        dpo.Reference, "errors_once", lambda self, x0, cond, draw, places: self.errors(x0, cond, draw)
    )
    again, _ = trained(root, tmp_path / "always", *flags)
    assert len(calls) == 4 + 6
    for one, other in zip(rows, again, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert rows[2]["reference_error"] != rows[0]["reference_error"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--fixed-noise", "1", "--validation-share", "0"],
        ["--train", "full"],
        *(pytest.param(flags, marks=pytest.mark.slow) for flags in ([], ["--loss", "mapo"])),
    ],
    ids=" ".join,
)
def test_a_resumed_run_equals_an_uninterrupted_one(flags: Sequence[str], root: Path, tmp_path: Path) -> None:
    """With fixed noise the third update is the first that uses the table of the checkpoint."""
    rows, last = trained(root, tmp_path / "straight", *flags)
    argv = [*recorded.arguments("dpo", root, tmp_path / "parts"), *FEW, *flags]
    assert recorded.train("dpo", [*argv, "--max-train-steps", "2"]) == 0
    found, same = trained(root, tmp_path / "parts", *flags, "--resume-from-checkpoint", "latest")
    assert found[0] == rows[0]
    assert found[2] == rows[2]
    assert all(torch.equal(same["parameters"][name], weight) for name, weight in last["parameters"].items())


def test_held_out_prompts_are_measured_and_not_trained_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[str]] = {0: set(), dpo.HELD_OUT: set()}
    original = dpo.inputs_of

    def inputs_of(inputs: Any, pairs: Sequence[Pair], draw: Any, dropout: float, stream: int = 0) -> Any:
        seen[stream] |= {pair.prompt for pair in pairs}
        return original(inputs, pairs, draw, dropout, stream)

    monkeypatch.setattr(dpo, "inputs_of", inputs_of)
    rows, _ = trained(root, tmp_path, "--validation-steps", "1")
    assert len(seen[0]) == 3
    assert len(seen[dpo.HELD_OUT]) == 1
    assert not seen[0] & seen[dpo.HELD_OUT]
    assert len({row["validation_loss"] for row in rows}) == 3, "the model changes, the noise does not"


def test_held_out_pairs_have_the_same_noise_each_time(root: Path, tmp_path: Path) -> None:
    flags = ["--validation-steps", "1", "--loss", "mapo", "--beta", "0.1", "--learning-rate", "1e-30"]
    rows, _ = trained(root, tmp_path, *flags)
    assert len({row["validation_loss"] for row in rows}) == 1
    assert len({row["loss"] for row in rows}) == 3


def test_a_loss_that_is_not_finite_stops_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dpo, "losses_of", lambda errors, *_: (errors[0] * torch.nan, errors[0]))
    with pytest.raises(SystemExit) as stop:
        trained(root, tmp_path)
    assert stop.value.code == 1
    assert "loss at step 0, rank 0, learning rate 0.01 is nan on rank 0" in capsys.readouterr().err
    assert not (tmp_path / "step_000001").exists()


def test_weights_of_raters_count(root: Path, tmp_path: Path) -> None:
    """A ranking of a tenth of the weight moves the loss a tenth as much: it is the weighted mean."""
    folder = Path(shutil.copytree(root / "rankings", tmp_path / "rankings"))
    rows = read_jsonl(folder / "rankings.jsonl")
    losses = []
    for weights in ([1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0]):
        write_jsonl(
            folder / "rankings.jsonl", [row | {"weight": w} for row, w in zip(rows, weights, strict=True)]
        )
        flags = ["--data", str(folder), "--loss", "mapo", "--max-train-steps", "1", "--validation-share", "0"]
        output = tmp_path / str(weights[0])
        argv = [*recorded.arguments("dpo", root, output), *FEW, *flags, "--gradient-accumulation-steps", "4"]
        assert recorded.train("dpo", argv) == 0
        losses.append(read_jsonl(output / "metrics.jsonl")[0])
    assert losses[0]["error"] == losses[1]["error"], "all eight pairs, once each"
    assert losses[0]["loss"] != losses[1]["loss"]


def test_scores_of_captioned_images_are_raters(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve images of three captions and one alone, by the majority of three scorers; equal images and ties are counted."""
    folder = Path(shutil.copytree(root / "images", tmp_path / "images"))
    rows = read_jsonl(folder / "metadata.jsonl")
    for index, row in enumerate(rows):
        row |= {"text": f"caption {index % 3}" if index else "alone", "a": index, "b": -index, "c": index % 2}
    write_jsonl(folder / "metadata.jsonl", rows)
    (folder / "04.png").write_bytes((folder / "01.png").read_bytes())
    flags = [
        "--data",
        str(folder),
        "--raters",
        "a",
        "b",
        "c",
        "--labels",
        "majority",
        "--max-train-steps",
        "1",
    ]
    argv = [*recorded.arguments("dpo", root, tmp_path / "run"), *FEW, *flags, "--validation-share", "0"]
    assert recorded.train("dpo", argv) == 0
    said = capsys.readouterr().err
    # captions 0, 1, 2 have images 3 6 9, 1 4 7 10, 2 5 8 11: 3 + 6 + 6 pairs; where c ties a and b stand one to one
    assert "1 image without another to compare set aside" in said
    assert (
        "9 pairs of 9 rankings, --labels majority; 5 ties dropped; 1 pair of equal images set aside" in said
    )
    reasons = [row["reason"] for row in read_jsonl(tmp_path / "run" / "skipped.jsonl")]
    assert ["no other image of its caption" in reasons[0], "are the same image" in reasons[1]] == [True, True]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_lora_loads_in_diffusers(kind: str, root: Path, tmp_path: Path) -> None:
    """Its UNet answers as ours with the same file, and not as without it."""
    model = root / "pipeline" if kind == "sd" else tiny.pipeline_xl_folder(tmp_path / "pipeline")
    output = tmp_path / "run"
    trained(root, output, "--model", str(model), "--export", "kohya")
    pipe = (
        DiffusionPipeline.from_pretrained(model, safety_checker=None)
        if kind == "sd"
        else DiffusionPipeline.from_pretrained(model)
    )
    family = families.load(model)
    assert isinstance(family, SD | SDXL)
    family.load_tuned(output / "lora")
    before = answer(pipe.unet, kind)
    pipe.load_lora_weights(output / "lora")
    assert not torch.allclose(answer(pipe.unet, kind), before, atol=1e-4)
    torch.testing.assert_close(answer(pipe.unet, kind), answer(family.unet, kind), atol=1e-5, rtol=1e-4)
    other = type(pipe).from_pretrained(model)
    other.load_lora_weights(output / "lora_kohya.safetensors")
    torch.testing.assert_close(answer(other.unet, kind), answer(pipe.unet, kind), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def answer(unet: Any, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(1, 4, 4, 4, generator=generator),
        torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator),
    )
    if kind == "sd":
        found: Tensor = unet(x, 500, text).sample
        return found
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    more = {"text_embeds": torch.ones(1, width), "time_ids": torch.ones(1, 6)}
    added: Tensor = unet(x, 500, text, added_cond_kwargs=more).sample
    return added


def test_what_is_logged_has_these_names(root: Path, tmp_path: Path) -> None:
    rows, _ = trained(root, tmp_path)
    names = {
        "step",
        "lr",
        "loss",
        "grad_norm",
        "implicit_accuracy",
        "margin",
        "error",
        "reference_margin",
        "reference_error",
    }
    assert rows[0].keys() == names
    assert rows[-1].keys() >= names | {"validation_loss", "validation_accuracy"}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["implicit_accuracy"] == 0.5
