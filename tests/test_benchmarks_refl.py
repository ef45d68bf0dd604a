"""benchmarks/refl_step.py in miniature: what is timed must be the driver's own update and the released ones, and the table must
come out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch.nn.modules.module import register_module_forward_hook

import tiny
from benchmarks import hardware, published, refl_loops, refl_step, turns
from benchmarks.refl_loops import LoopName, Train, Trial, Update
from preftune import cli
from rewards.card import ImageRewardConfig
from rewards.imagereward import ImageReward


def small_scorer(folder: Path) -> Path:
    """An ImageReward of a few thousand weights, for the preprocessing of imagereward-tiny's card."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue"]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(words) + "\n")
    sizes = ImageRewardConfig(
        image_size=64,
        patch_size=32,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        vocab_size=len(words) + 2,
        max_positions=8,
        max_length=8,
        text_width=16,
        text_layers=1,
        text_heads=2,
        text_intermediate=16,
        projection=8,
        head=(16, 16, 8, 8),
    )
    ImageReward.build(sizes, vocab, seed=0).save(folder / "scorer")
    return folder / "scorer"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Measuring sets the number of threads; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("parts")
    return Trial(
        loop="ours",
        model="tiny",
        pipeline=tiny.pipeline_folder(folder / "pipeline"),
        scorer="imagereward-tiny",
        scorer_files=small_scorer(folder),
        resolution="64",
        device="cpu",
        precision="bf16",
        train="lora",
        checkpointing="off",
        compile="off",
        graphs="off",
        train_batch_size=1,
        num_inference_steps=3,
        late=1,
        repeats=3,
        threads=1,
    )


ALL = ("full", "lora", "half-base")
RELEASED: list[tuple[LoopName, Train]] = [("published", "full"), ("published", "lora"), ("half-base", "lora")]


def released(trial: Trial, index: int) -> Trial:
    return trial.published(*RELEASED[index])


def test_a_setting_is_compared_in_turns(trial: Trial) -> None:
    row = turns.measure_alone(trial, [released(trial, i) for i in range(3)])
    assert row["s_per_update"] == sorted(row["times"])[1]
    assert row["images_per_s"] == pytest.approx(1 / row["s_per_update"])
    assert row["cpu_s"] == min(row["cpu_times"]) > 0
    for name in ("full", "lora", "half_base"):
        assert len(row[f"{name}_times"]) == 3
        assert 0.05 < row[f"over_{name}"] < 20
    assert row["peak_mib"] >= row["before_mib"] > 0


def test_a_rival_s_time_is_over_ours(trial: Trial) -> None:
    """On a CPU that others share, of least CPU times; on CUDA, of median wall times."""
    walls = (3.0, 9.0, 4.0)
    times = [hardware.Spent(wall=wall, cpu=cpu) for wall, cpu in zip(walls, (2.0, 6.0, 2.5), strict=True)]
    row = {"s_per_update": 2.0, "cpu_s": 0.5}
    rival = released(trial, 2)
    assert turns.against(row, rival, times)["over_half_base"] == 4
    assert turns.against(row, replace(rival, device="cuda"), times)["over_half_base"] == 2


def test_rows_of_one_process_come_as_they_are_measured(trial: Trial) -> None:
    """Where a setting and the rivals do not fit together, the setting is measured alone; another error is its row."""
    rows: list[tuple[Trial, turns.Row]] = []
    mine = [replace(trial, train_batch_size=2), replace(trial, train="full"), trial]
    fits = [True, False, True]
    compare = turns.compare

    def tight(loops: Sequence[turns.Loop]) -> list[turns.Row]:
        first = loops[0].trial
        if first in mine and len(loops) > 1 and not fits[mine.index(first)]:
            raise torch.OutOfMemoryError
        return compare(loops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "compare", tight)
        others = [released(trial, 0), replace(trial, loop="published", scorer_files=Path("absent"))]
        with pytest.raises(ValueError, match="absent"):
            turns.measure_together(mine, others, lambda one, row: rows.append((one, row)))
        turns.measure_together(mine, others[:1], lambda one, row: rows.append((one, row)))
    assert [one for one, _ in rows] == [others[0], *mine]
    assert ["over_full" in row for _, row in rows] == [False, True, False, False]
    assert all(len(row["times"]) == 3 for _, row in rows)


@pytest.mark.parametrize(("loop", "train"), [("ours", "lora"), ("ours", "full"), *RELEASED])
def test_an_update_trains_the_denoiser_only(trial: Trial, loop: LoopName, train: Train) -> None:
    """The update must move the trained weights: a benchmark of a loss without gradient would look fast."""
    trained: list[torch.nn.Parameter] = []
    optimised = refl_loops.optimised

    def spy(one: Trial, weights: list[torch.nn.Parameter], *rest: Any) -> Update:
        trained.extend(weights)
        return optimised(one, weights, *rest)

    one = replace(trial, train=train) if loop == "ours" else trial.published(loop, train)
    with pytest.MonkeyPatch.context() as patch:
        for module in (refl_loops, published):
            patch.setattr(module, "optimised", spy)
        update = turns.start(replace(one, repeats=1)).update
    before = [weight.detach().clone() for weight in trained]
    loss = update(2)
    moved = [not torch.equal(weight, old) for weight, old in zip(trained, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert 0 < loss < 4e-3  # lambda relu(2 - r) of an untrained scorer, |r| of order 1
    assert all(weight.grad is None for weight in trained)


def test_precision_of_the_frozen_weights(trial: Trial) -> None:
    """The released LoRA script keeps the UNet in float32; half-base is the same with frozen weights in half."""
    found = []

    def note(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            frozen = {weight.dtype for weight in module.parameters() if not weight.requires_grad}
            found.append((frozen, {weight.dtype for weight in module.parameters() if weight.requires_grad}))

    with register_module_forward_hook(note):
        for index in range(3):
            published.published(released(trial, index), range(1))(0)
    wide, half = torch.float32, torch.bfloat16
    assert found[0] == (set(), {wide})
    assert found[len(found) // 2] == ({wide}, {wide})
    assert found[-1] == ({half}, {wide})


def test_an_average_is_kept_of_all_weights_alone(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the released script of all weights does, in its loop and in ours; diffusers' average and our own."""
    averages: list[object] = []
    for home, name in ((published, "EMAModel"), (refl_loops, "EMA")):
        kind = getattr(home, name)
        monkeypatch.setattr(
            home, name, lambda *args, kind=kind, **kw: averages.append(kind(*args, **kw)) or averages[-1]
        )
    for train in ("full", "lora"):
        for one in (replace(trial, train=train), trial.published("published", train)):
            turns.start(replace(one, repeats=1))
    mine, theirs, none = averages
    assert len(mine.weights) == len(theirs.shadow_params) > 10
    assert mine.count == theirs.optimization_step == turns.WARMUP
    assert none.weights == []


@pytest.mark.parametrize(("loop", "train"), RELEASED)
def test_all_loops_have_the_same_loss(
    trial: Trial, loop: LoopName, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same x_T and the same noise, the released loops compute what the driver does: the same work is timed."""
    monkeypatch.setattr(torch, "randn", _constant)
    monkeypatch.setattr(  # DDPM draws the noise of a step from where it imported randn_tensor
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: torch.full(shape, 0.3)
    )
    monkeypatch.setattr(torch.Tensor, "clamp", lambda self, *_, **__: self)  # the one intended difference
    decoded: list[torch.Tensor] = []  # the scorer hardly sees a difference; the decoder's images show it

    def note(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        if isinstance(module, Decoder):
            decoded.append(output.detach())

    mine = replace(trial, precision="no")
    with register_module_forward_hook(note):
        losses = [float(refl_loops.ours(replace(mine, train=train))(0))]
        losses.append(float(published.published(mine.published(loop, train), range(1))(0)))
    torch.testing.assert_close(decoded[0], decoded[1], atol=1e-5, rtol=0)
    assert decoded[0].std() > 0.01
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def _constant(*size: Any, out: torch.Tensor | None = None, **_: object) -> torch.Tensor:
    return torch.full(_shape(size), 0.3) if out is None else out.fill_(0.3)


def _shape(size: tuple[object, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if isinstance(size[0], tuple | list | torch.Size) else size


def test_trials_change_one_thing_at_a_time() -> None:
    names = ("train", "compile", "checkpointing", "precision")
    cpu = refl_step.trials(refl_step.Config(train_batch_size=(1, 2)), refl_loops.parts_of("tiny", Path()))
    assert list(cpu) == [1, 2]
    for mine in cpu.values():
        base = mine[0]
        changes = [[n for n in names if getattr(t, n) != getattr(base, n)] for t in mine]
        assert changes == [[], *([name] for name in names)]
        rivals = [(t.loop, t.train, t.precision, t.checkpointing) for t in refl_step.rivals(mine[-1], ALL)]
        assert rivals == [
            (*RELEASED[0], "bf16", "on"),
            (*RELEASED[1], "bf16", "off"),
            (*RELEASED[2], "bf16", "off"),
        ]
        assert len(refl_step.rivals(base, ALL)) == 2, "in float32 there is no half"
    parts = refl_loops.parts_of("tiny", Path()) | {"device": "cuda"}
    cuda = refl_step.trials(refl_step.Config(train_batch_size=(8,), cross=True), parts)[8]
    assert len(cuda) == 3 * 2 * 2 * 2 * 2
    assert {t.precision for one in cuda for t in refl_step.rivals(one, ALL)} == {"fp16"}
    assert len({t for one in cuda for t in refl_step.rivals(one, ALL)}) == 3, "they are loaded once a batch"


def test_table_and_json(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "pipeline").symlink_to(trial.pipeline)
    (tmp_path / "imagereward").symlink_to(trial.scorer_files)
    monkeypatch.setattr(refl_loops, "TINY", tmp_path)
    monkeypatch.setattr(refl_step, "fresh", lambda function, *arguments: function(*arguments))
    flags = "--models tiny --precision bf16 --train lora --checkpointing on --compile off --train-batch-size 1 --repeats 1"
    flags += f" --threads 1 --num-inference-steps 2 --late 1 --output {tmp_path / 'new' / 'rows.json'}"
    assert refl_step.main(cli.parse(refl_step.Config, flags.split())) == 0
    first, header, *lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in first
    assert "1 threads" in first
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert first.startswith(written["hardware"])
    assert [line.split()[:8] for line in lines] == [
        ["tiny", "published", "bf16", "full", "on", "off", "off", "1"],
        ["tiny", "published", "bf16", "lora", "off", "off", "off", "1"],
        ["tiny", "half-base", "bf16", "lora", "off", "off", "off", "1"],
        ["tiny", "ours", "bf16", "lora", "on", "off", "off", "1"],
    ]
    assert [row["loop"] for row in written["rows"]] == [line.split()[1] for line in lines]
    assert len(lines[3].split()) == 8 + 8, "without CUDA: two times, speed, peak, before, and three ratios"
    assert header.index("MFU") >= len(lines[3]) - 1


def test_mfu_of_the_nominal_peak_and_of_a_matrix_product(trial: Trial, capsys: pytest.CaptureFixture) -> None:
    table = refl_step.Table("a card", None, {"peak_tflops": 1000.0, "matmul_tflops": 800.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refl_step, "count_flops", lambda one: 40 * 10**12)
        table.count(trial)
    row = {"s_per_update": 0.8, "images_per_s": 10.0, "cpu_s": 1.0, "peak_mib": 2.0}
    table.add(replace(trial, train="full"), dict(row))
    table.add(trial, row)
    assert (row["mfu"], row["mfu_of_matmul"]) == (0.4, 0.5)
    without, line = capsys.readouterr().out.splitlines()
    assert line.split()[-2:] == ["40.0%", "50.0%"]
    assert "%" not in without, "the operations of that update were not counted"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--late", "40"], "--late"),
        (["--repeats", "0"], "--repeats"),
        (["--models", "sd1"], "full_size.py"),
        (["--models", "tiny", "--precision", "fp16"], "fp16"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        refl_step.main(cli.parse(refl_step.Config, flags))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_compiled_setting_has_the_driver_s_compilation(trial: Trial) -> None:
    """The blocks of the trained module are compiled, and the family is told; the released loops are as they were."""
    compiled = replace(trial, compile="on")
    _, denoiser = refl_loops.load(compiled)
    assert any(module._compiled_call_impl for module in denoiser.modules())
    assert compiled.refl().run.compile
    assert {trial.published(*one).compile for one in RELEASED} == {"off"}
