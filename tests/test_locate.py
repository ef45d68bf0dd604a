"""Where a model is: a model of the hub is downloaded as far as it is needed, and each wrong --model has its own sentence."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from data_build import generate, simulate_rankings
from eval import compare_methods, grid
from eval.models import parse_column
from finetune import pretrain, raft, refl, reward_weighted, weird_lora
from hub_server import Hub
from preftune import cli, families
from preftune.families import Pretrained, locate
from preftune.families.digest import digest
from preftune.families.locate import locate_vae
from preftune.images import save_image
from preftune.lora import export_lora

REPO = "owner/tiny-sd"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `locate` found in another test is not there any more; and no waiting between attempts."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    locate.cache_clear()
    yield
    locate.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture(scope="module")
def published(folder: Path) -> dict[str, bytes]:
    """A repository as Stable Diffusion 1.5's: variants, other formats, a safety checker, single files."""
    files = files_of(folder)
    for name in [name for name in files if name.endswith(".safetensors")]:
        stem = name.removesuffix(".safetensors")
        for ending in (".fp16.safetensors", ".bin", ".fp16.bin"):
            files[stem.replace("/model", "/pytorch_model") + ending if "bin" in ending else stem + ending] = (
                files[name]
            )
    files["unet/diffusion_pytorch_model.non_ema.safetensors"] = files[
        "unet/diffusion_pytorch_model.safetensors"
    ]
    files |= {
        "safety_checker/config.json": b"{}", "safety_checker/model.safetensors": b"x" * 9999, "unet/model.onnx": b"x" * 9999,
        "v1-5-pruned.ckpt": b"x" * 9999, "README.md": b"hello", "unet/openvino_model.bin": b"x" * 9999,
        "feature_extractor/preprocessor_config.json": b"{}", "text_encoder/flax_model.msgpack": b"x" * 9999,
    }  # fmt: skip
    return files


def downloaded(cache: Path) -> set[str]:
    """The files of the snapshot in the cache."""
    (snapshot,) = cache.glob("models--*/snapshots/*")
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(("variant", "ending"), [(None, ".safetensors"), ("fp16", ".fp16.safetensors")])
def test_what_is_needed_is_downloaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    published: dict[str, bytes],
    variant: str | None,
    ending: str,
) -> None:
    with Hub({REPO: published}) as server, server.in_use(monkeypatch, tmp_path):
        source = Pretrained(model=REPO, variant=variant).source()
        found = downloaded(tmp_path)
        weights = {name for name in found if name.endswith((".safetensors", ".bin"))}
        parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
        assert weights == {part + ending for part in parts}
        assert found - weights == {name for name in files_of(folder) if not name.endswith(".safetensors")}
        assert source.commit == server.commit(REPO)
        families.load(source)
        asked = len(server.requests)
        locate.cache_clear()
        assert Pretrained(model=REPO, variant=variant).source() == source
        assert len(server.requests) == asked  # a complete model in the cache is not asked for again
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        locate.cache_clear()
        assert families.check(REPO if variant is None else source) == families.check(folder)
        first = digest(source)
        page = locate(f"https://huggingface.co/{REPO}", variant=variant)
        assert digest(page) == first


def test_an_interrupted_download_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    published: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is complete stays; a wrong file is removed, and offline the sentence says that the model is not all there."""
    bad = "vae/diffusion_pytorch_model.safetensors"
    with Hub({REPO: published}, corrupted=(bad,)) as server, server.in_use(monkeypatch, tmp_path):
        with pytest.raises(ValueError, match=f"{bad} of {REPO} arrived with SHA-256"):
            locate(REPO)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            ValueError,
            match=r"HF_HUB_OFFLINE=1 forbids .* \(the cache has a part of it: .*/vae has no weights",
        ):
            locate(REPO)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        server.corrupted = ()
        capsys.readouterr()
        families.load(locate(REPO))
        assert f"downloading {bad} of {REPO}" in capsys.readouterr().err
        (snapshot,) = tmp_path.glob("models--*/snapshots/*")
        for lost in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "unet/config.json"):
            (snapshot / lost).resolve().unlink()
            (snapshot / lost).unlink()
            (snapshot / "tokenizer" / "vocab.json").unlink(missing_ok=True)  # tokenizer.json would do
            locate.cache_clear()
            families.check(locate(REPO))
            assert (snapshot / lost).is_file()


def test_configurations_are_checked_before_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, bytes]
) -> None:
    unet = json.loads(published["unet/config.json"]) | {"in_channels": 9}
    index = json.loads(published["model_index.json"]) | {"_class_name": "StableDiffusionInpaintPipeline"}
    for number, (change, words) in enumerate(
        (
            ({"unet/config.json": unet}, "an inpainting model"),
            ({"model_index.json": index}, "StableDiffusionInpaintPipeline; known are"),
        )
    ):
        files = published | {name: json.dumps(content).encode() for name, content in change.items()}
        cache = tmp_path / str(number)
        with Hub({REPO: files}) as server, server.in_use(monkeypatch, cache):
            with pytest.raises(ValueError, match=words):
                locate(REPO)
            assert not [name for name in downloaded(cache) if name.endswith((".safetensors", ".bin"))]
            assert not [path for method, path, _ in server.requests if "/cdn/" in path]


@pytest.mark.parametrize(
    ("files", "options", "call", "words"),
    [
        ({"pytorch_lora_weights.safetensors": b"x"}, {}, {}, "is a LoRA, not a model; name the model that it was trained on"),
        ({"dreamshaper_8.safetensors": b"x"}, {}, {}, f"name one of its files, as https://huggingface.co/{REPO}/blob/main/dreamshaper_8"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, {}, {}, "so it is no pipeline of diffusers"),
        ({}, {"gated": (REPO,)}, {}, f"{REPO} is gated: accept its conditions on .*{REPO}, then run `hf auth login`"),
        ({}, {}, {"revision": "v7"}, f"{REPO} has no revision v7"),
        ({}, {}, {"variant": "int8"}, f"{REPO}: --variant int8 is not there: it has the variants fp16, non_ema"),
        ({}, {"status": 500}, {}, "answers 500; run `hf download"),
    ],
)  # fmt: skip
def test_repositories_that_are_no_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    published: dict[str, bytes],
    files: Mapping[str, bytes],
    options: dict[str, Any],
    call: dict[str, str],
    words: str,
) -> None:
    with (
        Hub({REPO: files or published}, **options) as server,
        server.in_use(monkeypatch, tmp_path),
        pytest.raises(ValueError, match=words) as error,
    ):
        locate(REPO, **call)
    assert len(str(error.value).splitlines()) == 1


def test_an_autoencoder_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    vae = tiny.vae(7)
    vae.save_pretrained(tmp_path / "vae")
    files = {**files_of(tmp_path / "vae"), "sdxl_vae.safetensors": b"x", "README.md": b"x"}
    with (
        Hub({"owner/vae": files, REPO: {"a": b""}}) as server,
        server.in_use(monkeypatch, tmp_path / "cache"),
    ):
        family: Any = families.load(folder, vae=Path("owner/vae"))
        assert torch.equal(family.vae.quant_conv.weight, vae.quant_conv.weight)
        assert downloaded(tmp_path / "cache") == {"config.json", "diffusion_pytorch_model.safetensors"}
        with pytest.raises(ValueError, match=f"{REPO} is no autoencoder of diffusers"):
            families.check(folder, Path(REPO))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        locate_vae.cache_clear()
        families.check(folder, Path("owner/vae"))


def test_programs_take_hub_ids(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    published: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same three flags everywhere, and the same sentence with exit code 2."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = ["--model", REPO, "--revision", "v1", "--variant", "fp16"]
    few = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--output-dir",
        str(tmp_path / "out"),
        "--sample.resolution",
        "64",
    ]
    few += ["--images", "1", "--sample.num-inference-steps", "2", "--sample.solver", "ddim"]
    with (
        Hub({REPO: published}, revisions=("main", "v1")) as server,
        server.in_use(monkeypatch, tmp_path / "cache"),
    ):
        generate.main(cli.parse(generate.Config, [*flags, *few]))
        settings = json.loads((tmp_path / "out" / "job.json").read_text())
        assert (settings["model"], settings["revision"], settings["variant"]) == (REPO, "v1", "fp16")
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in downloaded(tmp_path / "cache")
        for program in (generate, grid, pretrain, refl):
            data = [] if program in (generate, grid) else ["--data", str(tmp_path)]
            prompts = [] if program is pretrain else few[:2]
            config = cli.parse(program.Config, [*flags, *data, *prompts, "--output-dir", str(tmp_path / "x")])
            models = config.models if program is grid else config
            group = models.model.pretrained if program in (pretrain, refl) else models.model
            assert group == Pretrained(model=REPO, revision="v1", variant="fp16")
            assert group.flags() == flags
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for program in (generate, grid):
        with pytest.raises(SystemExit) as stop:
            program.main(
                cli.parse(
                    program.Config,
                    [
                        "--model",
                        "owner/other",
                        "--prompts",
                        str(tmp_path / "prompts.txt"),
                        "--output-dir",
                        str(tmp_path / "y"),
                    ],
                )
            )
        assert stop.value.code == 2
        assert "owner/other is not in the hub's cache" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


WRONG = {
    "prompts of refl": (refl, "--prompts TMP/none.txt --data TMP/kohya", "prompt file TMP/none.txt does not exist"),
    "data of refl": (refl, "--prompts TMP/p.txt --data TMP/none", "there is no data at TMP/none"),
    "validation prompts": (refl, "--prompts TMP/p.txt --pretraining off --validation-prompts TMP/x.txt", "TMP/x.txt"),
    "scorer of refl": (refl, "--prompts TMP/p.txt --pretraining off --rewards shapes=1", "shapes is not differentiable"),
    "output of refl": (refl, "--prompts TMP/p.txt --pretraining off --output-dir TMP/p.txt", "cannot be written"),
    "LoRA of refl": (refl, "--prompts TMP/p.txt --pretraining off --lora-start TMP/none", "no LoRA in TMP/none"),
    "autoencoder": (refl, "--prompts TMP/p.txt --pretraining off --vae ./none", "--vae none does not exist"),
    "prompts of raft": (raft, "--prompts TMP/none.txt --rewards brightness=1", "TMP/none.txt does not exist"),
    "data": (pretrain, "--data TMP/none", "there is no data at TMP/none"),
    "column": (pretrain, "--data TMP/table --caption-column captn", "has no captn; --caption-column names one of"),
    "column of kohya's": (pretrain, "--data TMP/kohya --caption-column captn", "captn names a column, but TMP/kohya has"),
    "prompts of pretrain": (pretrain, "--data TMP/kohya --validation-prompts TMP/none.txt", "TMP/none.txt does not"),
    "data of weird_lora": (weird_lora, "--data TMP/none", "there is no data at TMP/none"),
    "regularisation": (weird_lora, "--data TMP/table --regularisation TMP/none", "there is no data at TMP/none"),
    "data of reward_weighted": (reward_weighted, "--data TMP/none --score s --beta 0", "there is no data at TMP/none"),
    "its other data": (reward_weighted, "--data TMP/table --score s --pretraining-data TMP/n", "no data at TMP/n;"),
    "prompts of grid": (grid, "--prompts TMP/none.txt", "TMP/none.txt does not exist"),
    "column of grid": (grid, "--prompts TMP/p.txt --columns a= b=runs/none@0.5", "column 'b': runs/none does not exist"),
    "prompts of generate": (generate, "--prompts TMP/none.txt", "TMP/none.txt does not exist"),
    "output of generate": (generate, "--prompts TMP/p.txt --output-dir TMP/table", "holds something else"),
    "prompts of a comparison": (compare_methods, "--prompts TMP/none.txt", "TMP/none.txt does not exist"),
    "driver of a comparison": (compare_methods, "--prompts TMP/p.txt --methods a=none.py", "none.py is no driver"),
    "LoRA": (export_lora, "--lora TMP/none --output TMP/x.safetensors", "no LoRA in TMP/none"),
}  # fmt: skip


def test_how_a_page_names_the_model() -> None:
    assert str(Pretrained(model="a/b")) == "a/b"
    assert str(Pretrained(model="a/b", revision="v1", variant="fp16")) == "a/b (revision v1, variant fp16)"


def test_simulated_rankings_take_the_same_flags(tmp_path: Path) -> None:
    few = ["--output-dir", str(tmp_path / "out")]
    config = cli.parse(
        simulate_rankings.Config, [*few, "--model", str(tmp_path), "--revision", "v1", "--variant", "x"]
    )
    with pytest.raises(ValueError, match=r"--revision v1 is for hub ids"):
        config.source()
    assert cli.parse(simulate_rankings.Config, few).source() is None
    with pytest.raises(SystemExit):
        cli.parse(simulate_rankings.Config, [*few, "--revision", "v1"])


@pytest.mark.parametrize("case", WRONG)
def test_what_was_typed_is_checked_before_a_model_is_downloaded(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    program, flags, message = WRONG[case]
    for name in ("kohya", "table"):
        (tmp_path / name).mkdir()
        save_image(torch.zeros(3, 64, 64), tmp_path / name / "a.png")
    (tmp_path / "kohya" / "a.txt").write_text("a red circle\n")
    (tmp_path / "table" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "s": 1.0}\n')
    (tmp_path / "p.txt").write_text("a red circle\n")
    argv = ["--model", REPO, *flags.replace("TMP", str(tmp_path)).split()]
    if program is not export_lora and "--output-dir" not in argv:
        argv += ["--output-dir", str(tmp_path / "out")]
    if program is compare_methods and "--methods" not in argv:
        argv += ["--methods", f"a={refl.__file__}"]
    with Hub({REPO: {}}) as server, server.in_use(monkeypatch, tmp_path / "cache"):
        with pytest.raises(SystemExit) as stop:
            program.main(cli.parse(program.Config, argv))
        assert not server.requests
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.replace("TMP", str(tmp_path)) in error
    assert error.count(": error: ") == 1


def test_a_single_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"lora/style.safetensors": b""}
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    files["lora/style.safetensors"] = (tmp_path / "style.safetensors").read_bytes()
    with Hub({REPO: files}) as server, server.in_use(monkeypatch, tmp_path / "cache"):
        with pytest.raises(ValueError, match=r"style\.safetensors is a LoRA, not a model"):
            locate(f"https://huggingface.co/{REPO}/blob/main/lora/style.safetensors")
        assert downloaded(tmp_path / "cache") == {"lora/style.safetensors"}


def test_four_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A missing path, a LoRA, a hub id without network and a Git LFS pointer are told apart."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for missing in (
        "./absent",
        "models/absent",
        "absent",
        "a/b/c",
        str(tmp_path / "absent"),
        "model.safetensors",
    ):
        with pytest.raises(
            ValueError,
            match=r"does not exist; name a pipeline folder, a .safetensors or .ckpt file, or a hub id",
        ):
            locate(missing)
    save_file({"unet.down_blocks.0.lora_A.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    (tmp_path / "lora").mkdir()
    shutil.copy(tmp_path / "style.safetensors", tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    for lora in ("lora", "style.safetensors"):
        assert not families.names_a_model(lora)
        with pytest.raises(
            ValueError, match=rf"{lora} is a LoRA.* not a model: .*as --model; preftune grid shows it"
        ):
            locate(lora)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"owner/name is not in the hub's cache .*HF_HUB_OFFLINE=1.* run `hf download owner/name --include",
    ):
        locate("owner/name")
    clone = shutil.copytree(folder, tmp_path / "clone")
    pointer = clone / "unet" / "diffusion_pytorch_model.safetensors"
    pointer.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3438167536\n"
    )
    with pytest.raises(
        ValueError, match=r"unet/diffusion_pytorch_model.safetensors is a Git LFS pointer.* `git lfs pull`"
    ):
        families.check(clone)


def test_a_column_of_the_grid_may_be_any_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, published: dict[str, bytes]
) -> None:
    base = locate(str(folder))
    with Hub({REPO: published}) as server, server.in_use(monkeypatch, tmp_path):
        with pytest.raises(
            ValueError, match=r"column 'tuned': runs/refl-gone does not exist; name a run, LoRA"
        ):
            parse_column("tuned=runs/refl-gone", base)  # where there is no runs/, it looks like a hub id
        with pytest.raises(ValueError, match=r"as https://huggingface.co/OWNER/NAME"):
            parse_column(f"other={REPO}", base)
        assert not server.requests
        for name in (f"https://huggingface.co/{REPO}", REPO):  # the second time the cache has it
            column = parse_column(f"other={name}", base)
            assert (column.pipeline.commit, column.tuned) == (server.commit(REPO), None)
    assert parse_column(f"same={folder}", base).pipeline == base
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="column 'a': runs/none does not exist"):
        parse_column("a=runs/none", base)


def test_folders_that_are_no_pipeline(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "run" / "lora").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.ckpt").touch()
    for model, words in (
        (tmp_path / "run", "run is the folder of a run, not a model: name the run's --model"),
        (tmp_path / "checkpoints", r"has no model_index\.json; name one of its files instead: model\.ckpt"),
        (
            folder / "unet",
            r"is not a diffusers pipeline folder but UNet2DConditionModel: it has no model_index\.json",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            locate(str(model))
    with pytest.raises(
        ValueError, match=r"--revision main is for hub ids, but .*pipeline is a path; leave it out"
    ):
        locate(str(folder), revision="main")


def test_digest(tmp_path: Path, folder: Path) -> None:
    """It is that of the files that are loaded: the same elsewhere, another one after one changed weight."""
    first = digest(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "notes.txt").write_text("not read")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    assert digest(copy) == first == digest(locate(str(copy)))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1e-3
    save_file(weights, file)
    second = digest(copy)
    assert second != first
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert digest(copy) not in (first, second)


def test_digest_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A sample of blocks from the start to the end, and the size."""
    monkeypatch.setattr("rewards.digests._WHOLE", 1000)
    monkeypatch.setattr("rewards.digests._BLOCK", 100)
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = digest(copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    for changed in (
        content[:-1] + bytes([content[-1] ^ 1]),
        content + b"\0",
        bytes([content[0] ^ 1]) + content[1:],
    ):
        file.write_bytes(changed)
        assert digest(copy) != first
    file.write_bytes(content)
    assert digest(copy) == first


def test_a_relative_path_is_located_in_each_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found in one folder is not the answer in another."""
    monkeypatch.chdir(folder.parent)
    assert locate(folder.name).folder.resolve() == folder.resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{folder.name} does not exist"):
        locate(folder.name)
