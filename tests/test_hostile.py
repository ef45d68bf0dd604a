"""Inputs that somebody made to do harm: nothing hangs, fills the memory, starts a program or commands the terminal.

Each test has an alarm far above its own time, so that a hang is a failure. `GS` proves that no image starts Ghostscript.
"""

import gzip
import io
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFont
from transformers import CLIPTokenizer

import rewards
from data_build import decode, readers
from data_build.published import read_published
from data_build.scoring import PrepareEntry
from eval.models import check_scorers
from preftune import cli, families, grid, images, pages, prompts, scorer_digests
from preftune.cli.printable import printable, show
from preftune.prepared_images import Recipe
from preftune.prompts import read_prompts
from preftune.records import read_imagefolder, read_rankings, write_jsonl
from preftune.resolution import Resolution
from rewards import input_files, weights
from rewards.clip_tokenizer import MERGES, ClipTokenizer, read_merges
from rewards.shared_towers import load_all
from rewards.terms import parse_weights, units
from rewards.training import check_trainable, load_trainable

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n/showpage {} def\n%%EOF\n"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What config files are read for."""

    seed: int = 0
    """A number."""
    names: tuple[str, ...] = ()
    """A list."""


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    """End a hang."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def set_aside(data: Path) -> dict[str, str]:
    """file and member -> reason of what a builder cannot use; "usable" for the rest. As the programs do it, with the survey."""
    found = readers.find_data_set(data, prompted=False, prompt="", image_column=None, text_column=None)
    readers.survey(found)
    prepare = PrepareEntry(data=found)
    result = {}
    for *_, listed in readers.entries(found):
        entry, _ = prepare(listed, Recipe(rules=(), on_device=False))
        result[f"{entry.file} {entry.member}".strip()] = getattr(entry, "reason", "usable")
    return result


# ---------------------------------------------------------------- images


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gs on the PATH that says so when it is started: the file that it writes."""
    started = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


def test_nothing_starts_ghostscript(tmp_path: Path, ghostscript: Path) -> None:
    data = tmp_path / "data"
    names = ("a.png", "b.jpg", "c.webp", "d.gif")
    for folder in ("plain", "captioned", "zips", "tables"):
        (data / folder).mkdir(parents=True)
    for name in names:
        (data / "plain" / name).write_bytes(EPS)
        (data / "captioned" / name).write_bytes(EPS)
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}: it is none of PNG"):
            images.load_pixels(data / "plain" / name)
        with pytest.raises(ValueError, match="cannot read the image"):
            images.thumbnail(data / "plain" / name, 8, 8)
    write_jsonl(data / "captioned" / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in names])
    with zipfile.ZipFile(data / "zips" / "part-000001.zip", "w") as archive:
        for name in names:
            archive.writestr(name, EPS)
        archive.writestr("part-000001.json", json.dumps({name: {"p": "x"} for name in names}))
    table = pyarrow.table({"image": [EPS] * 4, "text": ["x"] * 4})
    pyarrow.parquet.write_table(table, data / "tables" / "t.parquet")
    for folder in ("plain", "captioned", "zips", "tables"):
        reasons = set_aside(data / folder)
        assert list(reasons.values()) == ["undecodable"] * 4, folder
    assert not ghostscript.exists()
    with pytest.raises(subprocess.CalledProcessError), Image.open(data / "plain" / "a.png") as image:
        image.load()
    assert ghostscript.exists(), "without a list of formats it starts"


def test_images_that_would_fill_the_memory(tmp_path: Path) -> None:
    for width, height, words in (
        (60_000, 60_000, "3600000000 pixels"), (12_000, 12_000, "12000 x 12000 pixels; at most"), (1, 101, "100 : 1"),
    ):  # fmt: skip
        content = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        content += chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000))
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        with pytest.raises(ValueError, match=f"cannot read the image .*{words}"):
            images.load_pixels(tmp_path / "bomb.png")
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 1_000_000))
    (tmp_path / "texts.png").write_bytes(png()[:33] + text * 100 + png()[33:])
    with pytest.raises(ValueError, match="text"):
        images.load_pixels(tmp_path / "texts.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=rf"huge\.png has more than {images.MAX_BYTES} bytes"):
        images.load_pixels(tmp_path / "huge.png")
    for name, content in {"cut.png": png((64, 64))[:-40], "none.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}"):
            images.load_pixels(tmp_path / name)
    frames = [Image.new("L", (64, 64), k) for k in range(200)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    assert images.load_pixels(tmp_path / "many.gif").max() == 0, "the first frame alone"


# ---------------------------------------------------------------- what is no file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the address has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.fchdir(here)
    os.close(here)


KINDS = {"a named pipe": fifo, "a device": device, "a socket": unix_socket, "a folder": Path.mkdir}


@pytest.mark.parametrize("kind", KINDS)
def test_pipes_devices_sockets_and_folders(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make = KINDS[kind]
    for name in ("x.png", "metadata.jsonl", "rankings.jsonl", "p.txt", "p.csv", "c.yaml", "list.json"):
        make(tmp_path / name)
    wanted = f"is {kind}, not a file"
    with pytest.raises(ValueError, match=rf"x\.png {wanted}"):
        images.load_pixels(tmp_path / "x.png")
    for name in ("p.txt", "p.csv"):
        with pytest.raises(ValueError, match=rf"prompt file .*{name} is no file"):
            read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match=rf"rankings\.jsonl {wanted}"):
        read_rankings(tmp_path)
    with pytest.raises(ValueError, match=rf"list\.json {wanted}"):
        list(read_published("imagereward", tmp_path / "list.json"))
    with pytest.raises(SystemExit):
        cli.parse(Config, ["--config", str(tmp_path / "c.yaml")])
    assert wanted in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        read_imagefolder(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.png").write_bytes(png())
    make(folder / "bad.png")
    found = set_aside(folder)
    assert found.pop("good.png") == "usable"
    assert set(found.values()) <= {"missing", "unsafe name"}
    write_jsonl(
        folder / "metadata.jsonl",
        [{"file_name": "good.png", "text": "x"}, {"file_name": "bad.png", "text": "x"}],
    )
    assert set_aside(folder)["bad.png"] in ("missing", "unsafe name")


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket"])
@pytest.mark.parametrize("suffix", [".zip", ".parquet", ".tar"])
def test_archives_and_tables_that_are_no_files(tmp_path: Path, kind: str, suffix: str) -> None:
    KINDS[kind](tmp_path / f"bad{suffix}")
    with pytest.raises(ValueError, match=r"is no data set|there is no data at"):
        set_aside(tmp_path)
    with pytest.raises(ValueError, match=r"is no data set|there is no data at"):
        set_aside(tmp_path / f"bad{suffix}")
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.png").write_bytes(png())
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        archive.write(tmp_path / "good" / "a.png", "a.png")
        archive.writestr("a.json", json.dumps({"a.png": {"p": "x"}}))
    pyarrow.parquet.write_table(pyarrow.table({"image": [png()], "text": ["x"]}), tmp_path / "good.parquet")
    with tarfile.open(tmp_path / "good.tar", "w") as archive:
        archive.add(tmp_path / "good" / "a.png", "a.png")
    for other in {".zip", ".parquet", ".tar"} - {suffix}:
        (tmp_path / f"good{other}").unlink()
    assert list(set_aside(tmp_path).values()) == ["usable"]


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "b.png").symlink_to(tmp_path / "data" / "b.png")
    found = set_aside(tmp_path / "data")
    assert found == {"a.png": "unsafe name", "b.png": "missing"}


# ---------------------------------------------------------------- text and JSON


def write_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (sparse, "line 1 has more than"),
        (write_bytes(b'{"text": "' + b"a" * (17 << 20) + b'"}\n'), "line 1 has more than"),
        (write_bytes(b'{"file_name": "a.png", "text": "x", "y": ' + DEEP.encode() + b"}"), "nested too deep"),
        (write_bytes(b'{"y": ' + b"[" * 500 + b"]" * 500 + b"}"), "nested too deep; at most 100"),
        (write_bytes(b'{"y": ' + b"9" * 100_000 + b"}"), "is not JSON"),
        (write_bytes(b'{"file_name": "a.png", "text": "\\ud800"}'), "half of a surrogate pair"),
        (write_bytes(b'{"file_name": "a\\u0000.png", "text": "x"}'), "must be a relative path"),
        (write_bytes(b'{"file_name": "\\ud800.png", "text": "x"}'), "must be a relative path"),
        (write_bytes(b'{"file_name": "' + b"a" * 100_000 + b'", "text": "x"}'), "at most 1024 letters"),
        (write_bytes(b'{"file_name": "/etc/passwd", "text": "x"}'), "must be a relative path"),
        (write_bytes(b'{"file_name": "../a.png", "text": "x"}'), "must be a relative path"),
    ],
)
def test_metadata(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    make(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match=words) as caught:
        read_imagefolder(tmp_path)
    assert len(str(caught.value)) < 3000


def test_prompt_files(tmp_path: Path) -> None:
    sparse(tmp_path / "p.txt")
    with pytest.raises(ValueError, match=r"prompt file .* bytes; at most"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        read_prompts(tmp_path / "p.json")
    (tmp_path / "p.csv").write_text("text\n" + "a" * 1_000_000)
    with pytest.raises(ValueError, match="field larger"):
        read_prompts(tmp_path / "p.csv")


def test_rows_of_published_data(tmp_path: Path) -> None:
    for name, layout in (("r.jsonl", "rankings"), ("r.csv", "ratings")):
        (tmp_path / name).write_bytes(b"a" * (17 << 20))
        with pytest.raises(ValueError, match="line 1 has more than"):
            list(read_published(layout, tmp_path / name))
    (tmp_path / "r.json").write_text("[" + DEEP)
    with pytest.raises(ValueError, match="element 1 is not JSON"):
        list(read_published("imagereward", tmp_path / "r.json"))


def laughs(levels: int) -> str:
    """A YAML list whose elements refer to each other: written out it has 9 ** levels words."""
    text = "&a0 [x, x, x, x, x, x, x, x, x]"
    for level in range(1, levels):
        text = f"&a{level} [{text}, {', '.join([f'*a{level - 1}'] * 8)}]"
    return text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"? {laughs(12)}\n: 1\n", "a key must be a name"),
        (f"seed: {laughs(12)}\n", "takes one value"),
        (f"names: {laughs(12)}\n", "takes a list of plain values"),
        (f"other: {laughs(12)}\n", "unknown key"),
        ("names: &a [x, *a]\n", "takes a list of plain values"),
        ("seed: " + "[" * 20_000, "nested too deep"),
        ("# " + "a" * 300_000, "has more than 262144 bytes"),
    ],
)
def test_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--config", str(tmp_path / "c.yaml")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error) < 1000


# ---------------------------------------------------------------- pipelines and weights


@pytest.fixture
def pipeline(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root / "pipeline", tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer/added_tokens.json",
    ],
)
def test_json_of_a_pipeline(pipeline: Path, name: str) -> None:
    for make, words in (
        (write_bytes(DEEP.encode()), "is nested too deep"),
        (sparse, "has more than 33554432 bytes"),
        (write_bytes(b'{"a": ' + b"1" * 5000 + b"}"), "is not JSON"),
    ):
        make(pipeline / name)
        with pytest.raises(ValueError, match=f"{name} {words}"):
            families.check(pipeline)
    (pipeline / name).unlink()
    fifo(pipeline / name)
    with pytest.raises(ValueError, match=f"{name} is (a named pipe|not there)|has no model_index"):
        families.check(pipeline)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"block_out_channels": [2**40, 2**40]}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"hidden_size": 10**18}),
        ("vae", {"block_out_channels": [1] * 100_000}),
    ],
)
def test_sizes_that_no_model_has(pipeline: Path, part: str, change: dict[str, Any]) -> None:
    path = pipeline / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{part}/config.json has .*{next(iter(change))}.*at most"):
        families.check(pipeline)


class Pickled:
    """Unpickled it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def header(content: bytes, size: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content + body


def tensors(offsets: dict[str, list[int]]) -> bytes:
    rows = {name: {"dtype": "F32", "shape": [2], "data_offsets": at} for name, at in offsets.items()}
    return header(json.dumps(rows).encode(), body=b"\0" * 12)


SAFETENSORS = {
    "a header of 2^63 bytes": header(b"{}", 2**63),
    "a header of a terabyte": header(b"{}", 2**40),
    "a deep header": header(b"[" * 1_000_000),
    "tensors that overlap": tensors({"a": [0, 8], "b": [4, 12]}),
    "tensors outside the file": tensors({"a": [0, 8], "b": [2**40, 2**40 + 8]}),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors(pipeline: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors is not a readable weights file"):
        weights.read(tmp_path / "w.safetensors")
    (pipeline / "text_encoder" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"text_encoder cannot be read \(.*header") as caught:
        families.load(pipeline)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "file"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_pickles_are_not_unpickled(pipeline: Path, tmp_path: Path, part: str, file: str) -> None:
    ran = tmp_path / "ran"
    for old in (pipeline / part).glob("*.safetensors"):
        old.unlink()
    torch.save({"a": Pickled(ran)}, pipeline / part / file)
    with pytest.raises(ValueError, match="not a readable weights file"):
        weights.read(pipeline / part / file)
    with pytest.raises(ValueError, match=f"{part} cannot be read"):
        families.load(pipeline)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"])
def test_files_of_a_tokenizer_that_hold_something_else(pipeline: Path, name: str) -> None:
    (pipeline / "tokenizer" / name).write_text("[]")
    with pytest.raises(
        ValueError, match=r"cannot load the model .*; its files are damaged or of another kind"
    ):
        families.load(pipeline)


# ---------------------------------------------------------------- archives


def end_of_zip(directory: int, *, zip64: bool = False) -> bytes:
    """The last records of an archive that says to have so many bytes of a list of members."""
    more = b""
    if zip64:
        more = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 9, 9, directory, 0)
        more += struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
        directory = 0xFFFFFFFF
    return more + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, directory, 0, 0)


@pytest.mark.parametrize("zip64", [False, True])
def test_too_many_members(tmp_path: Path, zip64: bool) -> None:
    (tmp_path / "part-000001.zip").write_bytes(b"\0" * 1000 + end_of_zip(1 << 25, zip64=zip64))
    with pytest.raises(ValueError, match="lists its members in 33554432 bytes; at most 16777216"):
        decode.open_zip(tmp_path / "part-000001.zip")
    assert set_aside(tmp_path) == {"part-000001.zip": "broken file"}
    with pytest.raises(ValueError, match="lists its members"):
        list(read_published("imagerewarddb", tmp_path / "part-000001.zip"))


def test_odd_members(tmp_path: Path) -> None:
    names = ["/etc/passwd.png", "../../up.png", "C:\\x.png", "a\nb.png", "bomb.png", "secret.png", "good.png"]
    notes = {name: {"p": "x"} for name in names}
    path = tmp_path / "part-000001.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, b"\0" * (60 << 20) if name == "bomb.png" else png())
        archive.writestr("part-000001.json", json.dumps(notes))
    content = bytearray(path.read_bytes())
    at = content.index(b"secret.png", content.index(b"PK\1\2"))  # in the list of members
    content[at - 46 + 8] |= 1  # encrypted
    path.write_bytes(bytes(content))
    found = {name.removeprefix("part-000001.zip "): reason for name, reason in set_aside(tmp_path).items()}
    assert found["good.png"] == "usable"
    assert found["bomb.png"] == "too large"
    assert found["secret.png"] == "undecodable"
    assert {found[name] for name in ("/etc/passwd.png", "../../up.png")} == {"unsafe name"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("part-000001.json", b'{"a": "' + os.urandom(1 << 20).hex().encode() * 10 + b'"}')
    assert set_aside(tmp_path) == {"part-000001.zip": "bad metadata"}


def test_tars(tmp_path: Path) -> None:
    def add(archive: tarfile.TarFile, name: str, content: bytes, **facts: Any) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for key, value in facts.items():
            setattr(member, key, value)
        archive.addfile(member, io.BytesIO(content))

    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        add(archive, "../up.png", png())
        add(archive, "/etc/passwd.png", png())
        add(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "pipe.png", b"", type=tarfile.FIFOTYPE)
        for number in range(40):
            add(archive, f"same.{number}.png", png())
        for number in range(2000):
            add(archive, f"text.{number}.npy", b"0")
        add(archive, "deep.png", png())
        add(archive, "deep.json", DEEP.encode())
        add(archive, "good.png", png())
    found = [*set_aside(tmp_path / "odd.tar").values()]
    assert found == ["unsafe name", "unsafe name", "too large", "missing", "bad metadata", "usable"]
    with gzip.open(tmp_path / "bomb.tar.gz", "wb") as file:
        member = tarfile.TarInfo("a.txt")
        member.size = 1 << 40
        file.write(member.tobuf() + b"\0" * (20 << 20))
    assert set_aside(tmp_path / "bomb.tar.gz") == {"bomb.tar.gz 0 and all that follow": "too large"}


def test_tables_of_another_schema(tmp_path: Path) -> None:
    for number, column in enumerate([[1, 2], [["a"], ["b"]], [{"path": "/etc/passwd"}, None]]):
        pyarrow.parquet.write_table(
            pyarrow.table({"image": column, "text": ["x", "y"]}), tmp_path / f"{number}.parquet"
        )
        with pytest.raises(ValueError, match=r"holds .*, not images"):
            set_aside(tmp_path / f"{number}.parquet")
    table = pyarrow.table({"image": [png(), None, b"no"], "text": ["x", "y", "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert [*set_aside(tmp_path / "t.parquet").values()] == ["usable", "missing", "undecodable"]


def test_tables_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that zstd packs, and a text that every row repeats, which parquet stores once."""
    bomb = pyarrow.table({"image": [b"\0" * (80 << 20), png()], "text": ["x", "y"]})
    pyarrow.parquet.write_table(bomb, tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    assert set_aside(tmp_path / "bomb.parquet") == {"bomb.parquet 0 to 1": "too large"}
    (tmp_path / "bomb.parquet").unlink()
    monkeypatch.setattr(prompts, "MAX_BYTES", 1 << 26)
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000, pyarrow.int32()), ["a" * 100_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"p\.parquet unpacks to more than 67108864 bytes"):
        read_prompts(tmp_path / "p.parquet")


# ---------------------------------------------------------------- long and odd texts


WORDS = {
    "a word": "x" * 20_000,
    "marks": "e" + "\u0301" * 100_000,
    "words": "ab " * 100_000,
    "long words": ("y" * 5000 + " ") * 100,
    "lines": "\n" * 100_000,
    "no text": "\ud800\x00\x1b[2J\u202e" * 1000,
}


@pytest.mark.parametrize("text", WORDS.values(), ids=WORDS)
def test_captions_in_grids(text: str) -> None:
    image = Image.new("RGB", (16, 16))
    sheet = grid.captioned_grid(
        [[image, image]],
        row_captions=[text],
        column_titles=[text, "b"],
        cell_captions=[[text, "c"]],
        cell_size=96,
    )
    assert max(sheet.size) < 1000


def test_a_broken_word_loses_no_letter() -> None:
    font = ImageFont.load_default(14)
    word = "".join(chr(ord("a") + k % 26) for k in range(5000))
    lines = grid._wrap(word, font, 90, 10_000)
    assert "".join(lines) == word
    assert all(
        font.getlength(line) <= 90 < font.getlength(line + lines[k + 1][0])
        for k, line in enumerate(lines[:-1])
    )


def test_vocabularies(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "bpe.txt.gz", "wb", compresslevel=1) as file:
        file.write(b"\0" * (40 << 20))
    (tmp_path / "tokenizer.json").write_text(DEEP)
    for name in ("bpe.txt.gz", "tokenizer.json"):
        with pytest.raises(ValueError, match=rf"{name} is no list of merges \(ValueError\)"):
            read_merges(tmp_path / name)


def test_prompts_of_100_000_letters() -> None:
    tokenizers: list[Callable[[str], list[int]]] = [
        ClipTokenizer(kind, MERGES, 77).encode for kind in ("openai", "open_clip", "transformers")
    ]
    ours = Path(__file__).parents[1] / "assets" / "tiny" / "pipeline" / "tokenizer"
    hub = CLIPTokenizer.from_pretrained(ours)
    tokenizers.append(lambda text: hub([text], truncation=True, max_length=77).input_ids[0])
    for encode in tokenizers:
        for text in ("a" * 100_000, "\U0001f600" * 100_000, "&" * 100_000, "e" + "\u0301" * 100_000):
            assert len(encode(text)) == 77


def test_terminals_are_not_commanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"a{ESCAPE}\udcff"
    with pytest.raises(SystemExit), cli.exit_on_user_error():
        read_imagefolder(folder)
    show(f"{folder}\n\u202egnp.exe \u00e9 \U0001f600")
    seen = capsys.readouterr()
    for text in (seen.out, seen.err):
        assert r"\x1b[2J" in text
        assert r"\udcff" in text
        assert not set(text) & {"\x1b", "\x07", "\udcff", "\u202e"}
    assert "\u00e9 \U0001f600" in seen.out, "letters of other languages stay"
    assert seen.out.count("\n") == 2
    assert printable("a\tb\nc") == "a\tb\nc"
    assert len(printable("x" * 10**6)) < 5000


def test_a_name_in_data_runs_no_file(tmp_path: Path) -> None:
    """FILE.py:FUNCTION runs where the user wrote it in --rewards, and nowhere else: a name in data, a summary or a card does not."""
    ran, evil = tmp_path / "ran", tmp_path / "evil.py"
    evil.write_text(
        f"open({str(ran)!r}, 'w')\ndef f(pixels, prompts):\n    return pixels.mean(dim=(1, 2, 3))\n"
    )
    name = f"{evil}:f"
    assert rewards.find_card(name).module == "rewards.own_scorer", "it is only read"
    calls: list[Callable[[], object]] = [
        lambda: rewards.load(name),
        lambda: rewards.check(name),
        lambda: rewards.check_all([name], {}),
        lambda: load_all([name], files={}, device="cpu", dtype=torch.float32),
        lambda: check_scorers([name], {}, ["a"], Resolution(64, 64), tmp_path),
        lambda: scorer_digests.digests([name], {}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="runs only where --rewards names it; in Python"):
            call()
    for trained in (check_trainable, load_trainable):
        with pytest.raises(ValueError, match=r"evil\.py:f cannot be trained here"):
            trained(name)
    stats = tmp_path / "summary.json"
    stats.write_text(
        json.dumps({"scores": {name: {"mean": 0, "std": 1}, "brightness": {"mean": 0, "std": 1}}})
    )
    units([rewards.find_card("brightness")], "dataset", stats)
    shutil.copytree(Path(__file__).parents[1] / "assets" / "tiny" / "imagereward", tmp_path / "scorer")
    facts = {"started_from": name, "licence": name, "typical_range": [0, 1]}
    (tmp_path / "scorer" / "card.json").write_text(json.dumps(facts))
    rewards.check(str(tmp_path / "scorer"))
    assert not ran.exists()
    parse_weights([f"{name}=0.5"])
    assert not ran.exists(), "not before all flags are right"
    rewards.load(name)
    assert ran.exists()


def test_pages_escape(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ text }}")
    page = pages.render(tmp_path / "t.jinja", text="<script>alert(1)</script>")
    assert page == "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert jinja2.Environment(autoescape=False).from_string("{{ t }}").render(t="<") == "<", "not the default"


def test_depth_is_that_of_the_value() -> None:
    levels = input_files.MAX_DEPTH
    assert input_files.parse_json("[" * levels + "]" * levels, "x")
    with pytest.raises(ValueError, match="x is nested too deep"):
        input_files.parse_json("[" * (levels + 1) + "]" * (levels + 1), "x")
    assert input_files.parse_json(json.dumps("[" * 10_000), "x") == "[" * 10_000
    assert len(input_files.parse_json(json.dumps([[k] for k in range(1000)]), "x")) == 1000
