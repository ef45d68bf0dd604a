"""The comparison grid: what differs along a row is the weights alone, and the page is safe and names files beside it alone."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import grid_memory
import tiny
from eval import generated, grid
from eval.columns_config import ColumnsConfig
from hub_server import Hub
from preftune import cli, families
from preftune.families import Pretrained
from preftune.images import save_image
from preftune.lora.tuning import FILE, LoRA
from preftune.records import read_imagefolder, read_jsonl
from preftune.resolution import Resolution
from preftune.sampling import Resolved
from test_locate import files_of

CAPTIONS = ["a red circle on a white background", "a blue cross on a black background"]
HOSTILE = "<script>alert(1)</script> \"quoted\" & 'so' </td>"
SAMPLING = Resolved(
    num_inference_steps=2, guidance_scale=3.0, solver="ddim", resolution=Resolution(64, 64), batch_size=8
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a browser would find on a page in a folder: its tags, its text, and its images by row and column title."""

    def __init__(self, html: str, folder: Path = Path()) -> None:
        super().__init__()
        self.folder = folder
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert html.rstrip().endswith("</html>")
        self.shown = [attributes for tag, attributes in self.tags if tag == "img"]
        self.links = [str(attributes["href"]) for tag, attributes in self.tags if tag == "a"]
        assert len(self.links) == len(self.shown)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def images(self, title: str) -> list[np.ndarray]:
        """The column with that title, as uint8 (H, W, 3), from top to bottom."""
        pairs = zip(self.links, self.shown, strict=True)
        links = [link for link, image in pairs if str(image["alt"]).startswith(f"{title}: ")]
        return [np.asarray(Image.open(self.folder / link)) for link in links]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline `model`, another one `other`, runs with a LoRA and with a whole UNet, and prompts."""
    root = tmp_path_factory.mktemp("stage")
    tiny.pipeline_folder(root / "model")
    tiny.pipeline_folder(root / "other", seed=1)
    family = families.load(root / "model")
    trained = family.trainable(LoRA(rank=2, alpha=6.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in (weight for weight in trained.parameters() if weight.requires_grad):
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    family.save_tuned(root / "run" / "lora", LoRA(rank=2, alpha=6.0))
    tiny.unet(seed=2).save_pretrained(root / "full" / "unet")
    (root / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def make(stage: Path, tmp_path: Path) -> Callable[..., Page]:
    """Run the program as from the command line, and read the page it wrote."""

    def run(*columns: str, **flags: str | list[str]) -> Page:
        defaults = {
            "model": str(stage / "model"),
            "prompts": str(stage / "prompts.txt"),
            "rewards": ["brightness=1"],
        }
        defaults |= {"num_inference_steps": "2", "guidance_scale": "3", "solver": "ddim", "workers": "0"}
        defaults |= {"output_dir": str(tmp_path / f"out{len(list(tmp_path.iterdir()))}")}
        flags = {**defaults, **flags}
        argv = list[str]()
        switches = [column for column in columns if column.startswith("--")]
        argv += [
            *switches,
            "--columns",
            *(column.replace("STAGE", str(stage)) for column in columns if column not in switches),
        ]
        for name, value in flags.items():
            argv += [f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
        assert grid.main(cli.parse(grid.Config, argv)) == 0
        folder = Path(str(flags["output_dir"]))
        assert {"grid.png", "images", "index.html"} <= {path.name for path in folder.iterdir()}
        return Page((folder / "index.html").read_text(encoding="utf-8"), folder)

    return run


def apart(one: list[np.ndarray], two: list[np.ndarray]) -> float:
    """The largest difference of two columns, in levels of 255."""
    assert len(one) == len(two) == len(CAPTIONS)
    return max(float(np.abs(a.astype(int) - b).max()) for a, b in zip(one, two, strict=True))


def test_a_row_differs_by_weights_alone(make: Callable[..., Page], stage: Path) -> None:
    """The base stands between tuned columns, so a LoRA or a UNet that stayed on would show."""
    page = make(
        "base=",
        "tuned=STAGE/run/lora",
        "again=",
        "half=STAGE/run@0.5",
        "none=STAGE/run@0",
        "full=STAGE/full",
        "same=STAGE/model",
        "unet=STAGE/full/unet",
        "last=",
        "other=STAGE/other",
    )
    base = page.images("base")
    assert base[0].shape == (64, 64, 3)
    for title in ("again", "none", "same", "last"):
        assert apart(base, page.images(title)) == 0, title
    for title in ("tuned", "half", "full", "other"):
        assert apart(base, page.images(title)) > 2, title
    assert apart(page.images("tuned"), page.images("half")) > 0
    assert apart(page.images("full"), page.images("unet")) == 0


@pytest.mark.parametrize(
    ("column", "source"), [("x=STAGE/run", "run/lora"), ("x=STAGE/full", "unet"), ("x=STAGE/other", "other")]
)
def test_diffusers_generates_the_same(
    make: Callable[..., Page], stage: Path, column: str, source: str
) -> None:
    negative = "Weird image."
    generated = make(column, seed="3", negative=negative).images("x")
    parts = {"unet": tiny.unet(seed=2)} if source == "unet" else {}
    folder = stage / ("other" if source == "other" else "model")
    pipe = StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if source == "run/lora":
        pipe.load_lora_weights(stage / source)
    for index, (caption, image) in enumerate(zip(CAPTIONS, generated, strict=True)):
        expected = pipe(
            caption,
            negative_prompt=negative,
            num_inference_steps=2,
            guidance_scale=3.0,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(3 + index),
            output_type="np",
        ).images[0]
        assert np.abs(expected * 255 - image).max() <= 0.6  # rounding, and float arithmetic in another order


def test_negative_in_some_columns(make: Callable[..., Page]) -> None:
    page = make("a=", "b=", "c=", negative="Weird image. ", negative_columns=["b"])
    everywhere = make("a=", "b=", negative="Weird image. ")
    plain, pointed = page.images("a"), page.images("b")
    assert apart(plain, page.images("c")) == 0
    assert apart(pointed, everywhere.images("a")) == 0
    assert apart(plain, pointed) > 0


def test_seeds_and_rows(make: Callable[..., Page]) -> None:
    several = make("base=", seed="5", num_images_per_prompt="2")
    assert [text for text in several.text if text.startswith("seed ")] == [f"seed {5 + i}" for i in range(4)]
    alts = [str(image["alt"]).removeprefix("base: ") for image in several.shown]
    assert alts == [CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[1]]
    assert len({image.tobytes() for image in several.images("base")}) == 4
    second = make("base=", seed="6", count="1", batch_size="1").images("base")
    assert np.abs(second[0].astype(int) - several.images("base")[1]).max() <= 1


def test_brightness_stands_under_the_image_it_belongs_to(
    make: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    page = make("base=", "tuned=STAGE/run")
    shown = [line for line in page.text if re.fullmatch(r"brightness -?\d+\.\d{3}", line)]
    columns = [page.images(title) for title in ("base", "tuned")]
    expected = [[image.mean() / 255 for image in column] for column in columns]
    assert [float(line.split()[1]) for line in shown] == pytest.approx(
        [expected[c][i] for i in range(2) for c in range(2)], abs=0.002
    )
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0].removeprefix("base  brightness ")) == pytest.approx(
        np.mean(expected[0]), abs=0.002
    )


def test_images_are_made_once_and_never_mixed_up(
    make: Callable[..., Page],
    stage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A rerun uses the images; what would be other images is refused, or replaced where the user says so."""
    run, output = tmp_path / "run", str(tmp_path / "out")
    shutil.copytree(stage / "run", run)
    columns = ["base=", f"a/b..={run}"]
    first = make(*columns, output_dir=output, seed="3")
    folder = tmp_path / "out" / "images"
    assert sorted(path.name for path in folder.iterdir()) == ["a_b..", "base"]
    rows = read_jsonl(folder / "base" / "metadata.jsonl")
    assert rows == [
        {"file_name": f"000{i}.png", "text": caption, "seed": 3 + i} for i, caption in enumerate(CAPTIONS)
    ]
    assert [sample.text for sample in read_imagefolder(folder / "a_b..")] == CAPTIONS
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    with monkeypatch.context() as patch:
        patch.setattr(generated, "sample", lambda *_, **__: pytest.fail("an image was generated"))
        again = make(*columns, output_dir=output, seed="3", batch_size="1")
        assert apart(first.images("a/b.."), again.images("a/b..")) == 0
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == written
        for changed in (
            {"seed": "4"},
            {"guidance_scale": "2"},
            {"negative": "x"},
            {"precision": "bf16"},
            {"count": "1"},
        ):
            with pytest.raises(SystemExit):
                make(*columns, output_dir=output, **({"seed": "3"} | changed))
            assert (
                f"other {next(iter(changed)).replace('count', 'prompts')}"
                in capsys.readouterr().err.replace("seeds", "seed")
            )
        with pytest.raises(SystemExit):
            make("base=", "a/b..=STAGE/run@0.5", output_dir=output, seed="3")
        assert (
            "a_b.. holds other images (other weights); add --overwrite-output-dir" in capsys.readouterr().err
        )
    lost = folder / "base" / "0001.png"
    before = lost.read_bytes()
    lost.unlink()
    make(*columns, output_dir=output, seed="3")
    assert lost.read_bytes() == before, "a folder that lacks an image is made again"
    written |= {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    other = make("base=", "a/b..=STAGE/run@0.5", "--overwrite-output-dir", output_dir=output, seed="3")
    assert apart(other.images("a/b.."), first.images("base")) > 0
    assert (folder / "base" / "0000.png").stat().st_mtime_ns == written[folder / "base" / "0000.png"]
    assert (folder / "a_b.." / "0000.png").stat().st_mtime_ns != written[folder / "a_b.." / "0000.png"]


def test_another_page_is_not_overwritten(
    make: Callable[..., Page], stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command may run again; other scorers, rows or columns need to be told, also where images are reused."""
    output = str(tmp_path / "out")
    make("base=", output_dir=output)
    page = tmp_path / "out" / "index.html"
    before = page.read_bytes()
    make("base=", output_dir=output, batch_size="1")
    assert page.read_bytes() == before
    for columns, changed, words in (
        (("base=",), {"rewards": ["brightness=2"]}, "other rewards"),
        (("base=",), {"grid_rows": "1"}, "other grid rows"),
        (("base=", "again="), {}, "other columns"),
    ):
        with pytest.raises(SystemExit) as stop:
            make(*columns, output_dir=output, **changed)
        assert stop.value.code == 2
        assert (
            f"out holds another report, grid.png ({words}); add --overwrite-output-dir"
            in capsys.readouterr().err
        )
        assert page.read_bytes() == before
        assert not (tmp_path / "out" / "images" / "again").exists()
    make("base=", "again=", "--overwrite-output-dir", output_dir=output)
    assert page.read_bytes() != before
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "grid.png").write_bytes(b"my own")
    with pytest.raises(SystemExit):
        make("base=", output_dir=str(foreign))
    assert "mine holds another report, grid.png (it has no grid.json)" in capsys.readouterr().err
    assert [path.name for path in foreign.iterdir()] == ["grid.png"]


def test_another_autoencoder(make: Callable[..., Page], stage: Path, tmp_path: Path) -> None:
    tiny.vae(seed=3).save_pretrained(tmp_path / "vae")
    output = str(tmp_path / "out")
    page = make("base=", "tuned=STAGE/run", output_dir=output)
    before = [page.images(title) for title in ("base", "tuned")]
    page = make(
        "base=", "tuned=STAGE/run", "--overwrite-output-dir", output_dir=output, vae=str(tmp_path / "vae")
    )
    for images, title in zip(before, ("base", "tuned"), strict=True):
        assert apart(images, page.images(title)) > 2


def test_images_of_another_autoencoder_of_the_hub_are_not_used_again(
    make: Callable[..., Page],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("them/one", "them/two")
    for seed, name in enumerate(names):
        tiny.vae(seed=seed).save_pretrained(tmp_path / name)
    output = str(tmp_path / "out")
    with (
        Hub({name: files_of(tmp_path / name) for name in names}) as server,
        server.in_use(monkeypatch, tmp_path / "cache"),
    ):
        make("base=", output_dir=output, vae="them/one")
        with pytest.raises(SystemExit):
            make("base=", output_dir=output, vae="them/two")
        assert "base holds other images (other vae)" in capsys.readouterr().err
        make("base=", output_dir=output, vae="them/one")


def test_stable_diffusion_xl_in_a_size_that_is_not_square(make: Callable[..., Page], tmp_path: Path) -> None:
    """The program does not know which family it has: LoRA, all weights and base, side by side."""
    model = tiny.pipeline_xl_folder(tmp_path / "xl")
    for name, lora in (("low", LoRA(rank=2)), ("full", None)):
        family = families.load(model)
        trained = family.trainable(lora, seed=0)
        for weight in (weight for weight in trained.parameters() if weight.requires_grad):
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        family.save_tuned(tmp_path / name / ("lora" if lora else "unet"), lora)
    columns = ["base=", f"low={tmp_path / 'low'}", f"full={tmp_path / 'full'}", "again="]
    page = make(*columns, model=str(model), resolution="96x64")
    assert page.images("base")[0].shape == (64, 96, 3)
    assert apart(page.images("base"), page.images("again")) == 0
    for title in ("low", "full"):
        assert apart(page.images("base"), page.images(title)) > 2, title


def test_titles_that_look_alike_have_folders_of_their_own(make: Callable[..., Page], stage: Path) -> None:
    page = make("a b=", "a?b=STAGE/run", "A_B=STAGE/run@0.5")
    assert {link.split("/")[1] for link in page.links} == {"a_b", "a_b~2", "A_B~3"}
    assert apart(page.images("a b"), page.images("a?b")) > 2


def test_large_images_have_thumbnails(make: Callable[..., Page], tmp_path: Path) -> None:
    page = make("base=", resolution="384x328", count="1", output_dir=str(tmp_path / "out"))
    (image,) = page.shown
    assert (page.links, image["src"]) == (["images/base/0000.png"], "thumbnails/base/0000.jpg")
    small = Image.open(tmp_path / "out" / str(image["src"]))
    assert small.size == (320, 273)
    full = Image.open(tmp_path / "out" / page.links[0])
    assert full.size == (384, 328)
    blurred = [np.asarray(each.resize((8, 8), Image.Resampling.BOX)).astype(int) for each in (full, small)]
    assert np.abs(blurred[0] - blurred[1]).max() < 8


def test_two_scorers_give_two_lines_and_a_sum(make: Callable[..., Page]) -> None:
    page = make("base=", rewards=["brightness=2", "shapes=0.5"])
    lines = {
        name: [float(line.split()[1]) for line in page.text if re.match(rf"{name} [\d.]+$", line)]
        for name in ("brightness", "shapes")
    }
    assert [len(values) for values in lines.values()] == [2, 2]
    assert "2 x brightness + 0.5 x shapes, mean" in page.text
    total = 2 * np.mean(lines["brightness"]) + 0.5 * np.mean(lines["shapes"])
    means = [float(text) for text in page.text if re.fullmatch(r"-?\d\.\d{3}", text)]
    assert means == pytest.approx([np.mean(lines["brightness"]), np.mean(lines["shapes"]), total], abs=0.003)


def test_no_scorer_no_scores(make: Callable[..., Page]) -> None:
    page = make("base=", "tuned=STAGE/run", rewards=[])
    assert len(page.shown) == 4
    assert not any("brightness" in text or "Wins" in text for text in page.text)


def sheet(
    folder: Path, scores: list[list[float]], title: str = "base", prompts: list[str] | None = None
) -> grid.Sheet:
    """A sheet with given scores of one scorer, (columns, images), and grey images."""
    count = len(scores[0])
    files = [[folder / "images" / str(c) / f"{i:04d}.png" for i in range(count)] for c in range(len(scores))]
    for c, column in enumerate(files):
        for path in column:
            save_image(torch.full((3, 64, 64), 0.1 * c), path)
    columns = [
        grid.Column(title=title if c == 0 else f"c{c}", source="", pipeline=Path())
        for c in range(len(scores))
    ]
    return grid.Sheet(
        columns=columns,
        prompts=prompts or ["p"] * count,
        seeds=range(count),
        files=files,
        scorers=("s",),
        measures=("s",),
        scores=np.array(scores)[..., None],
    )


def page_of(table: grid.Sheet, config: grid.Config) -> str:
    return grid.to_html(table, config, SAMPLING, grid.write_thumbnails(table, config.output_dir))


def test_wins_by_hand(tmp_path: Path) -> None:
    """Against 1, 2, 3, 4 the second column has a loss, a tie and two wins: 2.5 of 4."""
    table = sheet(tmp_path, [[1, 2, 3, 4], [0, 2, 5, 6], [9, 9, 9, 9]])
    assert table.means()[:, 0].tolist() == [2.5, 3.25, 9]
    assert table.wins()[:, 0].tolist() == [0.5, 0.625, 1]
    assert table.best()[..., 0].tolist() == [[False] * 4, [False] * 4, [True] * 4]
    assert sheet(tmp_path, [[1, 2], [1, 3]]).best()[..., 0].tolist() == [[False, False], [False, True]]
    html = page_of(table, grid.Config(output_dir=tmp_path))
    assert [text for text in Page(html).text if text.endswith(" %")] == ["62 %", "100 %"]


def test_the_page_names_the_model(tmp_path: Path) -> None:
    config = grid.Config(
        models=ColumnsConfig(model=Pretrained(model="a/b", revision="v1")), output_dir=tmp_path
    )
    page = page_of(sheet(tmp_path, [[1.0]]), config)
    assert "Model a/b (revision v1); " in page
    assert "Pretrained" not in page


def test_hostile_text_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    table = sheet(tmp_path, [[1, 2], [3, 4]], title="<b onclick=x>", prompts=[HOSTILE, "{{ 7 * 7 }} ]]>"])
    html = page_of(
        table, grid.Config(models=ColumnsConfig(negative='"><script>', columns=("x=",)), output_dir=tmp_path)
    )
    page = Page(html)
    assert "<script" not in html.lower()
    assert HOSTILE in page.text
    assert "{{ 7 * 7 }} ]]>" in page.text
    assert page.shown[0]["alt"] == f"<b onclick=x>: {HOSTILE}"
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "div"),
        *("table", "thead", "tbody", "tr", "th", "td", "img", "a"),
    }
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"srcset", "style", "onclick", "onerror", "background"}, tag
        for key in attributes.keys() & {"src", "href"}:
            assert re.fullmatch(r"images/[01]/000[01]\.png", str(attributes[key]))
    assert len(page.shown) == 4
    assert not re.search(r"url\(|@import|https?:|file:/", html)


def test_png_has_every_cell(tmp_path: Path) -> None:
    """Two rows of two columns; the second column's images are 10 % grey, and text takes room around them."""
    table = sheet(tmp_path, [[1, 2], [3, 4]])
    image = grid.to_png(table, rows=8)
    assert image.width > 3 * 256
    assert image.height > 2 * 256
    pixels = np.asarray(image)
    assert (pixels == 26).all(-1).sum() >= 2 * 250 * 250
    assert (pixels == 0).all(-1).sum() >= 2 * 250 * 250
    first = np.asarray(grid.to_png(table, rows=1))
    assert 1 * 250 * 250 <= (first == 26).all(-1).sum() < 2 * 250 * 250, "one row of the two"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--columns", "base"], "'base' is not TITLE=WHAT"),
        (["--columns", "=x"], "'=x' is not TITLE=WHAT"),
        (["--columns", "a=", "a="], "repeats the title a"),
        (["--columns"], "--columns is empty"),
        (["--columns", "a=STAGE/nowhere"], "nowhere does not exist"),
        (["--columns", "a=STAGE/prompts.txt"], "is not a LoRA file; expected"),
        (["--columns", "a=STAGE"], "is no pipeline (model_index.json), no LoRA"),
        (["--columns", "a=STAGE/both"], "holds both lora/ and unet/"),
        (["--columns", "a=STAGE/full@0.5"], "@ goes before the weight of a LoRA"),
        (["--columns", "a=STAGE/other@0.5"], "@ goes before the weight of a LoRA"),
        (["--columns", "a=STAGE/run@much"], "@ goes before the weight of a LoRA"),
        (["--columns", "a=STAGE/run@nan"], "@ goes before the weight of a LoRA"),
        (["--columns", "a=STAGE/wide"], "cross_attention_dim 48, but the UNet of"),
        (["--columns", "a=STAGE/vae"], "_class_name AutoencoderKL, but the UNet of"),
        (["--columns", "a=STAGE/broken"], "config.json line 1 is not JSON"),
        (["--columns", "a=STAGE/empty"], "has no diffusion_pytorch_model.safetensors"),
        (["--model", "STAGE/run"], "run is the folder of a run, not a model"),
        (["--prompts", "STAGE/none.txt"], "does not exist"),
        (["--rewards", "beauty=1"], "unknown scorer"),
        (["--rewards", "shapes=1", "--prompts", "STAGE/hostile.txt"], "captions of the shapes world only"),
        (["--rewards", "shapes=1", "--resolution", "128x64"], "have 128 x 64 pixels"),
        (["--reward-files", "imagereward=x"], "which --rewards does not use"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--num-images-per-prompt", "0"], "--num-images-per-prompt must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--num-inference-steps", "0"], "error: --sample.num-inference-steps must lie in 1..1000, got 0"),
        (
            ["--resolution", "60"],
            "error: --sample.resolution: resolution '60': width and height must be positive",
        ),
        (
            ["--negative", "x", "--guidance-scale", "1"],
            "--negative does nothing at --sample.guidance-scale 1;",
        ),
        (
            ["--negative-columns", "a"],
            "--negative-columns names a; it takes titles of --columns, and needs --negative",
        ),
        (["--negative", "x", "--negative-columns", "z"], "--negative-columns names z"),
        (["--grid-rows", "0"], "--grid-rows must be at least 1"),
        (["--output-dir", "STAGE/prompts.txt"], "Not a directory"),
        (["--output-dir", "STAGE/prompts.txt/grid"], "prompts.txt"),
    ],
)
def test_wrong_inputs(
    stage: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    """Exit code 2 and one line, before a model loads."""
    monkeypatch.setattr(families, "load", lambda *_: pytest.fail("a model was loaded"))
    add_wrong_folders(stage)
    defaults = {"--model": "STAGE/model", "--prompts": "STAGE/prompts.txt", "--rewards": "brightness=1"}
    full = [word for flag, value in defaults.items() if flag not in argv for word in (flag, value)] + argv
    with pytest.raises(SystemExit) as stop:
        grid.main(cli.parse(grid.Config, [word.replace("STAGE", str(stage)) for word in full]))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def add_wrong_folders(stage: Path) -> None:
    """Folders and files that are nearly right."""
    (stage / "hostile.txt").write_text(HOSTILE, encoding="utf-8")
    for name in ("lora", "unet"):
        (stage / "both" / name).mkdir(parents=True, exist_ok=True)
    config = json.loads((stage / "model" / "unet" / "config.json").read_text(encoding="utf-8"))
    kinds = {
        "wide": json.dumps(config | {"cross_attention_dim": 48}),
        "vae": (stage / "model" / "vae" / "config.json").read_text(encoding="utf-8"),
        "broken": "{",
        "empty": json.dumps(config),
    }
    for name, text in kinds.items():
        (stage / name).mkdir(exist_ok=True)
        (stage / name / "config.json").write_text(text, encoding="utf-8")


def test_a_lora_that_does_not_fit_stops_before_the_first_image(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generated, "sample", lambda *_, **__: pytest.fail("an image was generated"))
    wrong = {
        name: torch.zeros(value.shape[0] + 1, value.shape[1] + 1)
        for name, value in load_file(stage / "run" / "lora" / FILE).items()
    }
    save_file(wrong, tmp_path / FILE)
    config = grid.Config(
        models=ColumnsConfig(
            model=Pretrained(model=str(stage / "model")), columns=("base=", f"wrong={tmp_path}")
        ),
        prompts=stage / "prompts.txt",
        rewards=(),
        output_dir=tmp_path / "g",
    )
    with pytest.raises(SystemExit) as stop:
        grid.main(config)
    assert stop.value.code == 2
    assert "does not fit this model" in capsys.readouterr().err
    assert not list((tmp_path / "g").rglob("*.png"))


def test_an_at_in_a_folder_name(stage: Path, tmp_path: Path) -> None:
    shutil.copytree(stage / "run", tmp_path / "run@2")
    assert grid.parse_column(f"a={tmp_path}/run@2", stage / "model").weight == 1
    column = grid.parse_column(f"a={tmp_path}/run@2@-0.5", stage / "model")
    assert (column.tuned, column.weight) == (tmp_path / "run@2" / "lora", -0.5)


def test_size_and_bf16(make: Callable[..., Page], stage: Path) -> None:
    page = make(
        "base=", "tuned=STAGE/run", "full=STAGE/full", precision="bf16", resolution="128x64", count="1"
    )
    assert page.images("tuned")[0].shape == (64, 128, 3)
    assert np.abs(page.images("tuned")[0].astype(int) - page.images("base")[0]).max() > 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is checked as text only")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Headless Chromium shows the page: the red image of the second column is there, and nothing ran."""
    table = sheet(tmp_path, [[1.0], [2.0]], prompts=[HOSTILE])
    save_image(torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 64, 64), table.files[1][0])
    page = page_of(table, grid.Config(output_dir=tmp_path))
    (tmp_path / "g.html").write_text(page, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    assert CHROMIUM is not None
    subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={tmp_path / 'shot.png'}", f"file://{tmp_path / 'g.html'}"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert (shot == (255, 0, 0)).all(-1).sum() > 150 * 150


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_grid_stays_in_memory(tmp_path: Path) -> None:
    """13 columns of 256 images of 1024 x 1024 pixels, which together are 42 GB of float32."""
    peak = grid_memory.measure(tmp_path, columns=13, count=256, side=1024)
    assert peak < 2 << 30
