"""Tensors of a TorchScript archive come out, and nothing in it runs."""

import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewards.weights import read


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.proj = nn.Parameter(torch.randn(3, 4).half())
        shared = torch.arange(10)
        self.register_buffer("head", shared[:4])
        self.register_buffer("rest", shared[4:].view(2, 3).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.proj.float().T @ self.proj.float()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


@pytest.fixture
def archive(model: nn.Module, tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.randn(1, 4)).save(str(tmp_path / "model.pt"))
    return tmp_path / "model.pt"


def replace_tree(archive: Path, content: bytes) -> None:
    with zipfile.ZipFile(archive) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in parts.items():
            new.writestr(name, content if name.endswith("/data.pkl") else data)


def test_tensors_equal_the_state_dict(archive: Path, model: nn.Module) -> None:
    state, expected = read(archive), model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_the_tree_is_not_executed(archive: Path, tmp_path: Path) -> None:
    replace_tree(archive, pickle.dumps(Hostile(tmp_path / "executed"), protocol=2))
    with pytest.raises(ValueError, match=r"not a readable weights file.*is neither a module nor a tensor"):
        read(archive)
    assert not (tmp_path / "executed").exists()


def test_a_tree_of_something_else_is_refused(archive: Path) -> None:
    replace_tree(archive, pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="the root is a list, not a module"):
        read(archive)


def test_missing_and_short_tensors_are_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    for change in ("drop", "shorten"):
        with zipfile.ZipFile(archive, "w") as new:
            for name, data in parts.items():
                if not name.endswith("/data/0"):
                    new.writestr(name, data)
                elif change == "shorten":
                    new.writestr(name, data[:4])
        with pytest.raises(ValueError, match="not a readable weights file"):
            read(archive)


def test_a_truncated_archive_is_refused(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a readable weights file"):
        read(archive)
