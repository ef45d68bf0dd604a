"""What scoring uses where nothing is asked, and TF32 by name."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from data_build import diffusiondb, score
from eval import compare_methods, grid, preference_accuracy
from preftune.cli.precision import batch_size_here, precision_here, workers_here
from preftune.machine import cores as cores_module
from preftune.machine.cores import cores
from preftune.machine.tf32 import set_tf32
from preftune.training.run_config import RunConfig, set_torch


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int] | None], None]:
    """Let torch report a CUDA GPU of a compute capability, or none."""

    def report(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return report


@pytest.fixture
def tf32() -> Iterator[None]:
    """Leave torch's settings as they were."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("capability", "precision", "batch"),
    [(None, "fp32", 32), ((7, 5), "fp16", 128), ((8, 0), "bf16", 128), ((9, 0), "bf16", 128)],
)
def test_what_is_not_asked_suits_the_device(
    capability: tuple[int, int] | None,
    precision: str,
    batch: int,
    pretend: Callable[[tuple[int, int] | None], None],
) -> None:
    pretend(capability)
    assert (precision_here(None), batch_size_here(None)) == (precision, batch)
    assert (precision_here("fp32"), batch_size_here(7)) == ("fp32", 7)


def test_workers_are_the_cores_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it is bound to, those of a container's quota, and a share of them where several programs run."""
    monkeypatch.setattr(cores_module, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores_module.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert (cores(), workers_here(None), workers_here(3), workers_here(0)) == (12, 12, 3, 0)
    assert [workers_here(None, programs=number) for number in (2, 5, 100)] == [6, 2, 1]
    for quota, expected in (
        ("max 100000", 12),
        ("400000 100000", 4),
        ("1000 100000", 1),
        ("9900000 100000", 12),
    ):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert cores() == expected


@pytest.mark.parametrize(
    "program", [score, diffusiondb, grid, compare_methods, preference_accuracy], ids=lambda p: p.__name__
)
def test_programs_that_decode_images_use_all_cores(program: object) -> None:
    assert program.Config.__dataclass_fields__["workers"].default is None  # type: ignore[attr-defined]


def test_tf32_is_what_is_asked(
    tf32: None, capsys: pytest.CaptureFixture[str], pretend: Callable[..., None]
) -> None:
    pretend((8, 9))
    for asked in (True, False):
        set_tf32(asked, convolutions=not asked)
        assert torch.backends.cuda.matmul.allow_tf32 is asked
        assert torch.backends.cudnn.allow_tf32 is not asked
    assert capsys.readouterr().err == ""
    for capability in (None, (7, 5)):
        pretend(capability)
        set_tf32(True, convolutions=True)
        assert capsys.readouterr().err == (
            "note: --allow-tf32 changes nothing here: TF32 needs a CUDA GPU of the Ampere generation or newer\n"
        )
    set_tf32(False, convolutions=True)
    assert capsys.readouterr().err == ""


def test_training_allows_tf32_where_it_is_asked(tf32: None, pretend: Callable[..., None]) -> None:
    """Matrix products alone: convolutions keep torch's default."""
    pretend((8, 0))
    threads = torch.get_num_threads()
    try:
        for asked in (True, False):
            set_torch(RunConfig(allow_tf32=asked, threads=1))
            assert torch.backends.cuda.matmul.allow_tf32 is asked
            assert torch.backends.cudnn.allow_tf32 is True
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
