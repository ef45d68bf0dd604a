"""Downloads from the hub: size before, digest after, resumed where they broke off, the cache offline."""

import hashlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects, logging

from hub_server import Hub
from preftune.families import locate
from rewards import hub

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
REPO = {"a/b": {"config.json": b'{"x": 1}', "model.safetensors": WEIGHTS, "sub/other.bin": b"1234" * 1000}}


def one_sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1, text
    return text


def test_a_file_is_downloaded_once_with_size_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Hub(REPO) as server, server.in_use(monkeypatch, tmp_path):
        path = hub.fetch_file("a/b", "model.safetensors", sha256=hashlib.sha256(WEIGHTS).hexdigest())
        assert path.read_bytes() == WEIGHTS
        said = capsys.readouterr().err
        assert "downloading model.safetensors of a/b" in said
        assert "1.0 MiB (1,048,576 bytes)" in said
        asked = len(server.requests)
        assert hub.fetch_file("a/b", "model.safetensors") == path
        assert len(server.requests) == asked  # the cache answers
        assert (
            hub.cached_folder("a/b")
            == path.parent
            == tmp_path / "models--a--b" / "snapshots" / server.commit("a/b")
        )


@pytest.mark.parametrize("broken_after", [100, 400_000])
def test_a_broken_transfer_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_after: int
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 10)
    with Hub(REPO, broken_after=broken_after, breaks=2) as server, server.in_use(monkeypatch, tmp_path):
        path = hub.fetch_file("a/b", "model.safetensors")
    assert path.read_bytes() == WEIGHTS
    ranges = [wanted for method, where, wanted in server.requests if method == "GET" and "/cdn/" in where]
    assert len(ranges) == 3
    if broken_after > 1 << 10:
        assert all(re.fullmatch(r"bytes=\d+-", wanted or "") for wanted in ranges[1:])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_other_bytes_than_promised_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    with Hub(REPO, corrupted=(file,)) as server, server.in_use(monkeypatch, tmp_path):
        with pytest.raises(ValueError, match=f"{file} of a/b arrived with .*removed from the cache") as error:
            hub.fetch_file("a/b", file)
        one_sentence(error)
        assert hub.cached_file("a/b", file) is None
        assert not list((tmp_path / "models--a--b" / "blobs").iterdir())
        server.corrupted = ()
        assert hub.fetch_file("a/b", file).read_bytes() == REPO["a/b"][file]


def test_the_callers_digest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(REPO) as server, server.in_use(monkeypatch, tmp_path):
        with pytest.raises(ValueError, match=f"expected {'0' * 64}"):
            hub.fetch_file("a/b", "model.safetensors", sha256="0" * 64)
        assert hub.cached_file("a/b", "model.safetensors") is None


def test_a_folder_holds_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Hub(REPO) as server, server.in_use(monkeypatch, tmp_path):
        folder = hub.fetch_folder("a/b", lambda names: [name for name in names if name.endswith("json")])
        assert [path.name for path in folder.iterdir()] == ["config.json"]
        assert "downloading config.json of a/b" in capsys.readouterr().err
        folder = hub.fetch_folder("a/b", lambda names: [name for name in names if "model" not in name])
        assert "downloading sub/other.bin of a/b" in capsys.readouterr().err
        assert (folder / "sub/other.bin").read_bytes() == REPO["a/b"]["sub/other.bin"]
        server.corrupted = ("model.safetensors",)
        with pytest.raises(ValueError, match="arrived with SHA-256"):
            hub.fetch_folder("a/b", list)
        assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("call", "options", "expected"),
    [
        (("a/c", "model.bin"), {}, "the hub has no a/c, or it is private"),
        (("a/b", "model.bin"), {}, "a/b has no model.bin; .*/a/b/tree/main lists its files"),
        (("a/b", "model.bin", "v9"), {}, "a/b has no revision v9"),
        (
            ("a/b", "config.json"),
            {"gated": ("a/b",)},
            "a/b is gated: accept its conditions on .* `hf auth login`",
        ),
        (("a/b", "config.json"), {"status": 503}, "answers 503; run `hf download a/b config.json`"),
        (("a b/c/d", "config.json"), {}, "no hub id; expected OWNER/NAME"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: tuple[str, ...],
    options: dict[str, object],
    expected: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with Hub(REPO, **options) as server, server.in_use(monkeypatch, tmp_path):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=expected) as error:
            hub.fetch_file(call[0], call[1], revision=call[2] if len(call) > 2 else None)
        one_sentence(error)


def test_offline_the_cache_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with Hub(REPO) as server, server.in_use(monkeypatch, tmp_path):
        path = hub.fetch_file("a/b", "config.json")
        with monkeypatch.context() as offline:  # undone before the server's own settings are
            offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            assert hub.fetch_file("a/b", "config.json") == path
            for words, call in (
                (" model.safetensors", lambda: hub.fetch_file("a/b", "model.safetensors")),
                ("", lambda: hub.fetch_folder("a/b", list)),
                (" x.json", lambda: hub.fetch_folder("a/b", list, words="x.json")),
            ):
                with pytest.raises(
                    ValueError, match=rf"HF_HUB_OFFLINE=1 forbids .* `hf download a/b{words}`"
                ) as error:
                    call()
                one_sentence(error)
        server.__exit__()
        assert hub.fetch_file("a/b", "config.json") == path
        with pytest.raises(
            ValueError, match=r"cannot be reached; run `hf download a/b config.json --revision v1`"
        ):
            hub.fetch_file("a/b", "config.json", revision="v1")


@pytest.mark.parametrize("call", [lambda: hub.fetch_file("a/b", "x"), lambda: hub.fetch_folder("a/b", list)])
def test_an_unknown_host_is_said_at_once(
    call: Callable[[], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a network the name of the hub is not known: no attempt is repeated, and nothing but the sentence is said."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Hub(REPO) as server, server.in_use(monkeypatch, tmp_path), monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("it waited"))
        with pytest.raises(
            ValueError, match=r"https://hub.invalid cannot be reached; run `hf download a/b"
        ) as error:
            call()
        one_sentence(error)
    assert capsys.readouterr().err == ""


def test_repeated_attempts_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client's warnings of each attempt do not stand before the sentence; afterwards they are as the user set them."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    level = logging.get_verbosity()
    monkeypatch.setattr(logging.get_logger(), "handlers", [caplog.handler])
    with Hub(REPO) as server, server.in_use(monkeypatch, tmp_path):
        server.__exit__()
        with pytest.raises(ValueError, match="cannot be reached"):
            hub.fetch_file("a/b", "config.json")
    assert not caplog.messages
    assert logging.get_verbosity() == level


def test_the_next_step_downloads_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of weights, not those of every program that reads the repository."""
    files = dict.fromkeys(("model_index.json", "unet/config.json", "tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder/model.safetensors", "safety_checker/model.safetensors"), b"x")  # fmt: skip
    wanted = {
        None: "unet/diffusion_pytorch_model.safetensors",
        "fp16": "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    for variant, weights in wanted.items():
        with Hub({"a/b": files}, status=503) as server, server.in_use(monkeypatch, tmp_path):
            monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
            with pytest.raises(ValueError, match="answers 503") as error:
                locate("a/b", None, variant)
        words = shlex.split(str(error.value).split("`")[1])
        assert words[:3] == ["hf", "download", "a/b"]
        chosen = {flag: [] for flag in ("--include", "--exclude")}
        for flag, pattern in zip(words[3::2], words[4::2], strict=True):
            chosen[flag].append(pattern)
        found = set(
            filter_repo_objects(
                files, allow_patterns=chosen["--include"], ignore_patterns=chosen["--exclude"]
            )
        )
        text = {"text_encoder/model.safetensors"} if variant is None else set[str]()
        assert found == {"model_index.json", "unet/config.json", "tokenizer/merges.txt", weights} | text
