"""Passes without gradient on the lean copy: the same answers, never those of earlier weights; on tiny real weights."""

import copy
import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from finetune import refl
from preftune import ahead, families
from preftune.families.lean import Lean
from preftune.lora.tuning import LoRA
from preftune.resolution import Resolution
from preftune.sampling import Sampling, sample
from preftune.training.checkpoint import read
from preftune.training.optimizer import EMA
from preftune.training.run_config import RunConfig
from record_trajectories import arguments, train
from record_trajectories import trajectory as trajectory_of

PROMPTS = ["a red circle", "two cats"]
BUILDERS = {"sd": tiny.pipeline_folder, "sdxl": tiny.pipeline_xl_folder}


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline") / "model")


def opened(folder: Path, lora: LoRA | None, dtype: torch.dtype = torch.float32, size: float = 0.05) -> Any:
    """A family whose trained weights have moved, with the run's precision."""
    family: Any = families.load(folder)
    family.trainable(lora, seed=0)
    move(family, size)
    return family.to("cpu", dtype)


@torch.no_grad()
def move(family: Any, size: float = 0.05, seed: int = 1) -> None:
    """Add random numbers to the trained weights, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for weight in family.unet.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=size)


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def said(family: Any, scale: float = 3.0) -> Tensor:
    """What the model itself answers."""
    return predicted(family, scale)


def lean(family: Any, scale: float = 3.0) -> Tensor:
    """What its lean copy answers."""
    with family.lean():
        return predicted(family, scale)


def predicted(family: Any, scale: float) -> Tensor:
    output: Tensor = family.predict(latents(), torch.tensor([800, 40]), family.encode(PROMPTS), scale).output
    return output


def far(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "lora", [None, LoRA(rank=2), LoRA(rank=2, alpha=6, target_modules=("to_q", "conv1"))]
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_lean_copy_answers_as_the_model(folder: Path, lora: LoRA | None, scale: float) -> None:
    family = opened(folder, lora)
    torch.testing.assert_close(lean(family, scale), said(family, scale), atol=1e-5, rtol=0)
    assert far(said(family), said(families.load(folder)))  # the update is large enough to be missed


def optimizer_step(family: Any) -> None:
    weights = [weight for weight in family.unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, lr=0.05).step()


def data_is_replaced(family: Any) -> None:
    for weight in family.unet.parameters():
        if weight.requires_grad:
            weight.data = weight.data + 0.05


def data_is_written(family: Any) -> None:
    for weight in family.unet.parameters():  # no version of a weight tells of this
        if weight.requires_grad:
            before = weight._version
            weight.data.mul_(1.5)
            assert weight._version == before


def parameters_are_replaced(family: Any) -> None:
    for module in family.unet.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.requires_grad:
                setattr(module, name, nn.Parameter(weight.detach() + 0.05))


def a_checkpoint_is_loaded(family: Any) -> None:
    state = family.unet.state_dict()
    family.unet.load_state_dict({name: value * 1.1 for name, value in state.items()})


def a_checkpoint_is_assigned(family: Any) -> None:
    state = family.unet.state_dict()
    family.unet.load_state_dict({name: value * 1.1 for name, value in state.items()}, assign=True)


CHANGES = [
    optimizer_step, data_is_replaced, data_is_written, parameters_are_replaced, a_checkpoint_is_loaded,
    a_checkpoint_is_assigned,
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        (torch.float32, None),
        (torch.bfloat16, LoRA(rank=2)),
        pytest.param(torch.float32, LoRA(rank=2), marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("change", CHANGES)
def test_no_answer_is_that_of_earlier_weights(
    folder: Path, change: Callable[[Any], None], lora: LoRA | None, dtype: torch.dtype
) -> None:
    family = opened(folder, lora, dtype)
    before = lean(family)
    change(family)
    now = lean(family)
    assert far(now, before)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        wanted = said(family)
    if dtype == torch.float32:
        torch.testing.assert_close(now, wanted, atol=1e-5, rtol=1e-5)
    assert (now - wanted).square().mean() < 0.1 * (now - before).square().mean()


def test_the_average_is_seen_while_it_is_swapped_in(folder: Path) -> None:
    family = opened(folder, LoRA(rank=2))
    average = EMA(RunConfig(ema_decay=0.5), [w for w in family.unet.parameters() if w.requires_grad])
    own = lean(family)
    move(family, 0.1, seed=2)
    moved = lean(family)
    with average.swapped_in():
        assert torch.equal(lean(family), own)
    assert torch.equal(lean(family), moved)
    assert far(own, moved)


@pytest.mark.parametrize("order", ["reference outside", "reference inside"])
def test_the_reference_is_the_model_without_its_update(folder: Path, order: str) -> None:
    family = opened(folder, LoRA(rank=2))
    base, tuned = said(families.load(folder)), lean(family)
    contexts: list[Callable[[], AbstractContextManager[None]]] = [family.reference, family.lean]
    with ExitStack() as stack:
        for context in contexts if order == "reference outside" else reversed(contexts):
            stack.enter_context(context())
        assert torch.equal(predicted(family, 3.0), base)
    assert torch.equal(lean(family), tuned)
    with family.lean():
        with family.reference():
            pass
        assert torch.equal(predicted(family, 3.0), tuned)


def test_another_lora_and_another_unet_are_seen(folder: Path, tmp_path: Path) -> None:
    one, other = opened(folder, LoRA(rank=2)), opened(folder, LoRA(rank=3), size=0.1)
    one.save_tuned(tmp_path / "one", LoRA(rank=2))
    other.save_tuned(tmp_path / "other", LoRA(rank=3))
    whole = opened(folder, None)
    whole.save_tuned(tmp_path / "unet", None)
    family: Any = families.load(folder)
    for name, wanted in (("one", one), ("other", other), ("one", one), ("unet", whole)):
        family.load_tuned(tmp_path / name)
        torch.testing.assert_close(lean(family), said(wanted), atol=1e-5, rtol=0)
    with family.lean():
        family.load_tuned(tmp_path / "other")
        inside = predicted(family, 3.0)
    assert far(inside, said(whole))


def test_the_module_that_processes_share_gradients_of_has_the_same_copy(folder: Path, tmp_path: Path) -> None:
    family = opened(folder, LoRA(rank=2))
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, world_size=1, rank=0)
    try:
        family.denoiser = nn.parallel.DistributedDataParallel(family.unet)
        calls: list[int] = []
        family.denoiser.register_forward_hook(lambda *_: calls.append(1))
        move(family)
        torch.testing.assert_close(lean(family), said(family), atol=1e-5, rtol=0)
        assert len(calls) == 1  # of `said`
    finally:
        torch.distributed.destroy_process_group()


def test_the_autocast_that_training_puts_around_the_model_is_not_the_copys(sd_folder: Path) -> None:
    family = opened(sd_folder, LoRA(rank=2))
    wanted = lean(family)
    family.unet.forward = torch.autocast("cpu", torch.bfloat16)(family.unet.forward)  # as accelerate does
    family._lean._copy = None
    assert far(said(family), wanted)
    with torch.autocast("cpu", torch.bfloat16), family.lean():
        cond = family.encode(PROMPTS)  # of the text encoder, under autocast
        inside = family.predict(latents(), torch.tensor([800, 40]), cond, 3.0).output
    assert torch.equal(lean(family), wanted)
    assert not torch.equal(inside, wanted)  # its prompts are rounded


class Doubled(nn.Module):
    """A denoiser of someone's own around the UNet."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **more: Any) -> Any:
        output = self.inner(*args, **more)
        output.sample = output.sample * 2
        return output


def test_a_denoiser_of_ones_own_is_called_itself(folder: Path) -> None:
    family = opened(folder, LoRA(rank=2))
    family.denoiser = Doubled(family.unet)
    assert torch.equal(lean(family), said(family))


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_updates_smaller_than_the_spacing_of_half_precision_are_not_lost(
    sd_folder: Path, on_disk: torch.dtype, half: torch.dtype
) -> None:
    family: Any = families.load(sd_folder, dtype=on_disk)
    family.trainable(LoRA(rank=1, target_modules=("to_q", "to_k", "to_v")), seed=0)
    family.to("cpu", half)
    ratios, lost = [], []
    for layer in [module for module in family.unet.modules() if hasattr(module, "lora_A")]:
        weight = layer.base_layer.weight
        with family.lean():
            (own,) = [weight for other, weight in family._lean._merged if other is layer]
            assert torch.equal(own, weight)  # an update of zero changes no bit
        with torch.no_grad():  # the same number is added to each weight
            size = float(weight.float().abs().mean()) * 2e-4
            layer.lora_A["default"].weight.fill_(size)
            layer.lora_B["default"].weight.fill_(1.0)
        with family.lean():
            moved = float((own.float() - weight.float()).mean())
        lost.append(float(((weight.float() + size).to(half).float() - weight.float()).mean()) / size)
        ratios.append(moved / size)
    assert abs(sum(ratios) / len(ratios) - 1) < 0.35, ratios
    if on_disk == half == torch.bfloat16:
        assert abs(sum(lost) / len(lost)) < 0.3  # what this avoids


def test_what_rounding_took_is_kept_through_a_second_cast_and_forgotten_in_float32(sd_folder: Path) -> None:
    family = opened(sd_folder, LoRA(rank=2), torch.bfloat16)
    kept = lean(family)
    assert torch.equal(lean(family.to("cpu", torch.bfloat16)), kept)
    assert torch.equal(lean(family.to("cpu")), kept)
    family.to("cpu", torch.float32)  # the model has rounded weights from now on
    torch.testing.assert_close(lean(family), said(family), atol=1e-5, rtol=0)


def trajectory(family: Any, precise: bool, autocast: torch.dtype | None = None) -> Tensor:
    """Latents after 35 steps of DDPM."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    cond = family.encode(PROMPTS)
    grid = family.timesteps(40, "ddpm", Resolution(64, 64))[:36]
    x, _, steps = ahead.trajectory(family, grid, "ddpm", (4, 8, 8), generators)
    kind = torch.no_grad() if precise else family.lean()
    with kind, nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        for now in steps:
            x = ahead.step(family.predict(x, now.t, cond, 2.0), now, "ddpm")
    return x


def test_latents_after_35_steps(folder: Path) -> None:
    """Merged and unmerged in float32; in bfloat16 beside the float32 truth, the lean copy and the model under autocast."""
    family = opened(folder, LoRA(rank=4))
    truth = trajectory(family, precise=True)
    assert float((trajectory(family, precise=False) - truth).abs().max()) < 1e-5 * float(truth.std())
    family.to("cpu", torch.bfloat16)
    today = (trajectory(family, precise=True, autocast=torch.bfloat16) - truth).square().mean().sqrt()
    ours = (trajectory(family, precise=False) - truth).square().mean().sqrt()
    assert ours < 1.25 * today, (ours, today)


# ---------------------------------------------------------------- memory and gradients


def test_only_what_training_changes_is_copied_and_addresses_stay(folder: Path) -> None:
    family = opened(folder, LoRA(rank=2), torch.bfloat16)
    lean(family)
    made = family._lean._copy
    own = {name: w.data_ptr() for name, w in made.named_parameters()}
    base = {name.replace(".base_layer", ""): w for name, w in family.unet.named_parameters()}
    assert {name for name, pointer in own.items() if pointer != base[name].data_ptr()} == {
        name.replace(".base_layer", "") for name in base if "lora" not in name and name.endswith(".weight")
        and any(f".{target}." in name for target in LoRA().target_modules)
    }  # fmt: skip
    assert not any("lora" in name for name in own)
    move(family)
    with family.reference():
        lean(family)
    lean(family)
    assert family._lean._copy is made
    assert {name: w.data_ptr() for name, w in made.named_parameters()} == own


def test_all_weights_have_one_shadow_in_half_precision_and_none_in_float32(folder: Path) -> None:
    family = opened(folder, None, torch.bfloat16)
    lean(family)
    assert {w.dtype for w in family._lean._copy.parameters()} == {torch.bfloat16}
    assert {w.dtype for w in family.unet.parameters()} == {torch.float32}
    family = opened(folder, None)
    lean(family)
    shared = zip(family._lean._copy.parameters(), family.unet.parameters(), strict=True)
    assert all(one is other for one, other in shared)


def gradients(family: Any, x: Tensor) -> list[Tensor]:
    family.unet.zero_grad()
    prediction = family.predict(x, torch.tensor([300, 300]), family.encode(PROMPTS), 2.0)
    family.decode(prediction.x0).square().mean().backward()
    return [weight.grad for weight in family.unet.parameters() if weight.requires_grad]


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_what_the_block_returns_is_for_autograd_and_the_step_with_gradient_is_as_before(
    folder: Path, lora: LoRA | None
) -> None:
    family = opened(folder, lora)
    before = gradients(family, latents())
    with family.lean():
        assert not torch.is_grad_enabled()
        x = family.predict(latents(), torch.tensor([800, 800]), family.encode(PROMPTS), 1.0).output
        assert not x.is_inference()
    assert torch.is_grad_enabled()
    assert all(
        torch.equal(one, other) for one, other in zip(before, gradients(family, latents()), strict=True)
    )
    assert all(gradient.isfinite().all() for gradient in gradients(family, x))


def test_an_error_inside_leaves_the_model_as_it_was(sd_folder: Path) -> None:
    family = opened(sd_folder, LoRA(rank=2))
    with pytest.raises(KeyError), family.lean():
        raise KeyError
    assert torch.is_grad_enabled()
    calls: list[int] = []
    hook = family.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    said(family)
    hook.remove()
    assert calls
    assert family._lean._depth == 0


def test_batches_of_images_leave_the_callers_model_between_them(sd_folder: Path) -> None:
    """A generator that is left half read must not leave the copy in place."""
    family = opened(sd_folder, LoRA(rank=2))
    settings = Sampling(num_inference_steps=2, solver="ddim", batch_size=1, resolution="64")
    batches: Iterator[Tensor] = sample(family, PROMPTS, [0, 1], settings)
    first = next(batches)
    assert family._lean._depth == 0
    move(family, 0.2)
    second = next(batches)
    (fresh,) = sample(family, PROMPTS[1:], [1], settings)
    assert torch.equal(second, fresh)
    assert first.shape == (1, 3, 64, 64)


def test_refl_calls_the_model_itself_only_for_its_step_with_gradient(sd_folder: Path) -> None:
    family = opened(sd_folder, LoRA(rank=2))
    calls: list[bool] = []
    config: Any = refl.Config.__new__(refl.Config)
    for name, value in {"num_inference_steps": 5, "solver": "ddpm", "guidance_scale": 2.0}.items():
        object.__setattr__(config, name, value)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    hook = family.unet.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    late = refl.late_step(family, PROMPTS, generators, 3, Resolution(64, 64), config)
    pixels = family.decode(late.prediction.x0)
    pixels.square().mean().backward()
    hook.remove()
    assert calls == [False, False, False, True]  # hooks see the calls of the copy, too
    assert all(weight.grad is not None for weight in family.unet.parameters() if weight.requires_grad)


# ---------------------------------------------------------------- replayed as CUDA graphs


@pytest.fixture
def replayed(folder: Path) -> Any:
    return opened(folder, LoRA(rank=2)).to("cuda", torch.bfloat16)


def on_gpu(family: Any, batch: int, scale: float = 3.0) -> Tensor:
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    t = torch.full((batch,), 500, device="cuda")
    output: Tensor = family.predict(x, t, family.encode(PROMPTS[:1] * batch), scale).output
    return output


@pytest.mark.gpu
def test_replayed_passes_are_those_of_the_present_weights_for_each_shape(replayed: Any) -> None:
    plain = opened_again(replayed)
    plain.compile(graphs=False)
    for weights in (1, 2):
        for batch in (1, 3, 1):
            with replayed.lean():
                first, again = on_gpu(replayed, batch), on_gpu(replayed, batch)
            assert torch.equal(first, again)
            with plain.lean():
                wanted = on_gpu(plain, batch)
            assert torch.equal(first, wanted)
        assert len(replayed._lean._graphs._graphs) == 2
        assert not replayed._lean._graphs._failed
        for family in (replayed, plain):
            move_on_gpu(family, weights)


@pytest.mark.gpu
def test_graphs_are_captured_again_where_weights_move(replayed: Any) -> None:
    with replayed.lean():
        before = on_gpu(replayed, 2)
    for weight in replayed.unet.parameters():  # others' addresses, the old ones are free
        weight.data = weight.data * 1.05
    plain = opened_again(replayed)
    plain.compile(graphs=False)
    with replayed.lean(), plain.lean():
        now, wanted = on_gpu(replayed, 2), on_gpu(plain, 2)
    assert (now - wanted).square().mean() < 0.01 * wanted.square().mean()
    assert not torch.equal(now, before)
    assert not replayed._lean._graphs._failed


def test_graphs_go_with_the_copy_whose_passes_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where layers are quantized, whose LoRA is not merged: in float32 no weight of the copy is its own, nor has moved."""
    monkeypatch.setattr("preftune.families.lean._is_plain", lambda layer: False)
    family = opened(folder, LoRA(rank=2))
    with family.lean():
        copied, graphs = family._lean._copy, family._lean._graphs
        addresses = [weight.data_ptr() for weight in copied.parameters()]
        graphs._graphs, graphs._pool = {"a shape": "a pass with the LoRA"}, "where it computes"
        family._lean.changed()
        assert graphs._graphs
        with family.reference():
            assert not graphs._graphs
            assert graphs._pool is None
            assert [weight.data_ptr() for weight in family._lean._copy.parameters()] == addresses


def test_copies_and_models_are_gone_when_nobody_uses_them(folder: Path, tmp_path: Path) -> None:
    family = opened(folder, LoRA(rank=2))
    family.save_tuned(tmp_path, LoRA(rank=2))
    lean(family)
    gc.disable()  # it would find what holds itself, at some time
    try:
        parts = [weakref.ref(part) for part in family._lean._copy.modules()]
        family.load_tuned(tmp_path)
        lean(family)
        assert not [part() for part in parts if part() is not None]
        weights = [weakref.ref(weight) for weight in family.unet.parameters()]
        del family
        assert not [weight() for weight in weights if weight() is not None], "two models may not fit"
    finally:
        gc.enable()


def test_passes_in_inference_mode_leave_a_copy_that_others_can_write(folder: Path) -> None:
    family = opened(folder, LoRA(rank=2))
    with torch.inference_mode():
        lean(family)
    move(family)
    wanted = said(family)
    torch.testing.assert_close(lean(family), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_a_capture_that_fails_says_so_and_the_passes_go_on(
    replayed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def waits(module: nn.Module, inputs: object, output: Any) -> None:
        torch.cuda.synchronize()  # which no capture allows

    replayed.unet.conv_out.register_forward_hook(waits)
    with replayed.lean():
        first, again = on_gpu(replayed, 2), on_gpu(replayed, 2)
    assert torch.equal(first, again)
    assert capsys.readouterr().err.count("go on without CUDA graphs") == 1


@torch.no_grad()
def move_on_gpu(family: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in family.unet.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn(weight.shape, generator=generator).cuda(), alpha=0.05)


def opened_again(family: Any) -> Any:
    """A copy of the family that is not replayed, with the same weights."""
    other = copy.copy(family)
    other.unet = other.denoiser = copy.deepcopy(family.unet)
    other._lean = Lean(other.unet)
    ours = [layer.get_base_layer() for layer in family.unet.modules() if hasattr(layer, "lora_A")]
    theirs = [layer.get_base_layer() for layer in other.unet.modules() if hasattr(layer, "lora_A")]
    other._lean._lost = {
        twin: (family._lean._lost[base][0], twin.weight._version)
        for base, twin in zip(ours, theirs, strict=True)
        if base in family._lean._lost
    }
    return other


@pytest.mark.slow
def test_a_compiled_run_that_resumes_equals_one_that_never_stopped(root: Path, tmp_path: Path) -> None:
    """To the bit; and its losses are those of a run that is not compiled, to rounding."""
    plain = trajectory_of("refl", root, tmp_path / "plain")
    compiled_losses = trajectory_of("refl", root, tmp_path / "whole", "--compile")
    assert compiled_losses["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    for updates in (2, 3):
        shutil.rmtree(half / f"step_{updates:06d}")
    flags = [*arguments("refl", root, half), "--compile", "--resume-from-checkpoint", "latest"]
    assert train("refl", flags) == 0
    whole, resumed = (read(run / "step_000003")["parameters"] for run in (tmp_path / "whole", half))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
