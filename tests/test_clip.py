"""CLIP scorers against the authors' numbers, one test a likely mistake; their files, and what is refused."""

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import rewards
from golden_weights import CLIP, CLIP_NAMES, FOLDER, SHARED, fill, tiny_card
from rewards import CARDS
from rewards.clip import ClipScorer, load_scorer
from rewards.clip_state_dict import to_authors, to_transformers
from rewards.clip_tokenizer import MERGES, ClipTokenizer, vocab_size
from rewards.pixels import from_pil, prepare
from rewards.weights import read

TOLERANCE = {"hpsv1": 1e-6, "hpsv2": 1e-6, "pickscore": 3e-5}
TEXTS = CLIP["prompts"] + CLIP["more_texts"]


def load(name: str, clips: Path, dtype: torch.dtype = torch.float32, **clip: Any) -> ClipScorer:
    """The recorded model; keywords change what its card says."""
    card = tiny_card(name)
    assert card.clip is not None
    return load_scorer(replace(card, clip=replace(card.clip, **clip)), clips / f"{name}.pt", "cpu", dtype)


def deviation(scorer: ClipScorer, **preprocess: Any) -> torch.Tensor:
    """Largest distance from the recorded scores, by image; keywords change how files are prepared."""
    assert scorer.card.preprocess is not None
    rule = replace(scorer.card.preprocess, **preprocess)
    scorer.vision.preprocess = rule
    images = torch.stack([from_pil(Image.open(FOLDER / name), rule) for name in CLIP["images"]])
    with torch.no_grad():
        scores = torch.stack([scorer(images, [prompt] * len(images)) for prompt in CLIP["prompts"]])
    recorded = torch.tensor(CLIP["models"][scorer.card.name]["scores"])
    return (scores - recorded).abs().amax(dim=0)


@pytest.mark.parametrize("name", CLIP_NAMES)
def test_scores_equal_the_authors(name: str, clips: Path) -> None:
    assert deviation(load(name, clips)).max() < TOLERANCE[name]


@pytest.mark.parametrize("kind", CLIP["token_ids"])
def test_token_ids_equal_the_authors(kind: Any, clips: Path) -> None:
    tokenizer = ClipTokenizer(kind, MERGES, 77)
    assert [tokenizer.encode(text) for text in TEXTS] == CLIP["token_ids"][kind]
    assert max(len(ids) for ids in CLIP["token_ids"][kind]) == 77  # one had to be cut
    batch = tokenizer(TEXTS)
    assert batch.shape == (len(TEXTS), 77)
    assert [row[: len(ids)].tolist() for row, ids in zip(batch, CLIP["token_ids"][kind], strict=True)] == [
        *CLIP["token_ids"][kind]
    ]


def test_another_vocabulary_gives_the_ids_of_its_pipeline(tmp_path: Path) -> None:
    """The embedded pipeline's 900 tokens; its merges, written down and read again, make the same ones."""
    folder = Path(__file__).parents[1] / "assets" / "tiny" / "pipeline" / "tokenizer"
    file = folder / "tokenizer.json"
    assert vocab_size(file) == 900
    tokenizer = ClipTokenizer("transformers", file, 48, 900)
    theirs = CLIPTokenizer.from_pretrained(folder)
    texts = ["a red circle above a blue square on a white background", "Weird  image. 7&\u00e9", "a " * 40]
    assert [tokenizer.encode(text) for text in texts] == [
        theirs(text, truncation=True, padding=False)["input_ids"] for text in texts
    ]
    assert (tokenizer.start, tokenizer.end) == (898, 899)
    (tmp_path / "merges.txt").write_text(tokenizer.merges, encoding="utf-8")
    again = ClipTokenizer("transformers", tmp_path / "merges.txt", 48, 900)
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    with pytest.raises(ValueError, match="has 386 merges, not the 387 pairs of a vocabulary of 901 tokens"):
        ClipTokenizer("transformers", file, 48, 901)


def test_entities_are_resolved_twice_where_ftfy_leaves_them(clips: Path) -> None:
    """ftfy resolves all of them, but none in a text with a <, which may be HTML."""
    tokenizer = ClipTokenizer("openai", MERGES, 77)
    for nested in ("<&amp;", "<&amp;amp;"):
        assert tokenizer.encode(nested) == tokenizer.encode("<&")
    assert tokenizer.encode("<&amp;amp;amp;") != tokenizer.encode("<&")


# ---------------------------------------------------------------- what the recorded numbers notice


@pytest.mark.parametrize("name", CLIP_NAMES)
@pytest.mark.parametrize(
    ("mistake", "least"),
    [({"activation": None}, 50), ({"eps": 1e-6}, 4), ({"vision_heads": 4}, 100)],
    ids=["activation", "epsilon", "heads"],
)
def test_golden_notices_another_network(
    name: str, mistake: dict[str, Any], least: float, clips: Path
) -> None:
    if "activation" in mistake:
        mistake = {"activation": "gelu" if name == "hpsv1" else "quick_gelu"}
    assert deviation(load(name, clips, **mistake)).max() > least * TOLERANCE[name]


@pytest.mark.parametrize(
    ("name", "mistake", "image"),
    [
        ("hpsv1", {"files": "rgb"}, 1),  # colours under alpha 0 show
        ("hpsv1", {"crop_offset": "floor"}, 2),
        ("hpsv1", {"files": "tensor"}, 0),
        ("hpsv1", {"files": "tensor", "antialias": False}, 0),
        ("hpsv1", {"resize": "longest", "crop": "pad"}, 0),
        ("hpsv1", {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, 0),
        ("hpsv1", {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, 0),
        ("hpsv2", {"antialias": False}, 0),
        ("hpsv2", {"files": "rgb"}, 0),
        ("hpsv2", {"resize": "shortest", "crop": "center"}, 0),
        ("pickscore", {"files": "own mode"}, 1),
        ("pickscore", {"crop_offset": "round"}, 2),
    ],
)
def test_golden_notices_another_preparation(
    name: str, mistake: dict[str, Any], image: int, clips: Path
) -> None:
    assert deviation(load(name, clips), **mistake)[image] > 10 * TOLERANCE[name]


def test_golden_notices_another_tokenizer_and_no_scale(clips: Path) -> None:
    assert deviation(load("pickscore", clips, tokenizer="openai")).max() > 0.1  # &amp; in a prompt
    assert deviation(load("pickscore", clips, scaled=False)).max() > 1


@pytest.mark.parametrize("name", CLIP_NAMES)
def test_golden_notices_another_token(name: str, clips: Path) -> None:
    scorer = load(name, clips)
    scorer.text.text_model.eos_token_id = 49406  # read off at the start
    assert deviation(scorer).max() > 1000 * TOLERANCE[name]


@pytest.mark.parametrize("name", CLIP_NAMES)
def test_golden_notices_lengths_left_in(name: str, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.clip.F.normalize", lambda values, dim: values)
    assert deviation(load(name, clips)).max() > 1000 * TOLERANCE[name]


def test_golden_notices_black_after_the_mean(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding with zeros behind the normalisation is grey: the border shows the mean."""
    scorer = load("hpsv2", clips)
    rule = scorer.vision.preprocess
    images = torch.stack([from_pil(Image.open(FOLDER / name), rule) for name in CLIP["images"]])
    grey = torch.where(images == 0, torch.tensor(rule.mean).view(3, 1, 1), images)
    with torch.no_grad():
        score = scorer(grey[:1], CLIP["prompts"][:1]).item()
    assert abs(score - CLIP["models"]["hpsv2"]["scores"][0][0]) > 1e-3


# ---------------------------------------------------------------- files and tensors


@pytest.mark.parametrize(("name", "most"), [("hpsv1", 5e-4), ("hpsv2", 1e-6), ("pickscore", 2.5e-2)])
def test_tensors_score_like_files(name: str, most: float, clips: Path) -> None:
    """The tensor path does not round to 8 bits between its steps; that is all the difference there is."""
    scorer = load(name, clips)
    images = [Image.open(FOLDER / image).convert("RGB") for image in CLIP["images"]]
    rule = scorer.vision.preprocess
    with torch.no_grad():
        for image in images:
            files = from_pil(image, rule)[None].expand(6, -1, -1, -1)
            tensors = from_pil(image)[None].expand(6, -1, -1, -1)
            difference = scorer(files, CLIP["prompts"]) - scorer(tensors, CLIP["prompts"])
            assert difference.abs().max() < most


@pytest.mark.parametrize("name", CLIP_NAMES)
def test_pixel_gradient_equals_finite_differences(name: str, clips: Path) -> None:
    """Through resize, crop or padding, and the image tower, in float64."""
    scorer = load(name, clips).double()
    noise = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 240, 260, generator=noise, dtype=torch.float64).requires_grad_()
    direction = torch.randn(pixels.shape, generator=noise, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(scorer(pixels, ["cat"]).sum(), pixels)
    with torch.no_grad():
        step = 1e-5 * direction
        numeric = (scorer(pixels + step, ["cat"]) - scorer(pixels - step, ["cat"])).item() / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-6)


def test_half_precision_stays_close_and_returns_float32(clips: Path) -> None:
    """The authors' full-size networks move by up to 1.5e-3 under bfloat16 autocast; two layers move by less."""
    scorer = load("hpsv2", clips, dtype=torch.bfloat16)
    assert scorer.vision.visual_projection.weight.dtype == torch.bfloat16
    assert scorer.logit_scale.dtype == torch.float32
    assert 1e-5 < deviation(scorer).max() < 5e-3


# ---------------------------------------------------------------- the cache of texts


class Counting:
    """Counts the prompts that reach the text tower."""

    def __init__(self, scorer: ClipScorer) -> None:
        self.prompts: list[str] = []
        self.embed = scorer.cache.embed
        scorer.cache.embed = self

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        self.prompts += prompts
        return self.embed(prompts)


def test_a_prompt_is_read_once(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load("hpsv1", clips)
    counting = Counting(scorer)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = scorer(pixels, ["cat", "dog", "cat"])
    assert torch.equal(scorer(pixels, ["cat", "dog", "cat"]), first)
    assert counting.prompts == ["cat", "dog"]
    monkeypatch.setattr("rewards.text_cache.MAX_PROMPTS", 2)
    assert scorer(pixels, ["cat", "bird", "fox"]).shape == (3,)  # more than fit: still all there
    scorer(pixels[:1], ["fox"])
    assert counting.prompts == ["cat", "dog", "bird", "fox"]
    assert list(scorer.cache.known) == ["bird", "fox"]  # the oldest go first
    scorer(pixels[:1], ["bird"])
    scorer(pixels[:1], ["dog"])
    assert list(scorer.cache.known) == ["bird", "dog"]  # and to be asked for makes young
    scorer.to(torch.float64)
    assert not scorer.cache.known


def test_what_is_kept_does_not_depend_on_who_asks_first(clips: Path) -> None:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = load("hpsv1", clips)(pixels, ["cat"])
    scorer = load("hpsv1", clips)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scorer(pixels, ["cat"])
    scored = scorer(pixels.requires_grad_(), ["cat"])
    scored.sum().backward()  # an inference tensor could not be saved for this
    assert pixels.grad is not None
    assert torch.equal(scored, expected)


# ---------------------------------------------------------------- files of others


def rewrite(clips: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The recorded HPS v2, changed, and its vocabulary beside it."""
    content = change(read(clips / "hpsv2.pt"))
    file = path / "changed.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    return file


def reload(file: Path) -> ClipScorer:
    return load_scorer(tiny_card("hpsv2"), file, "cpu", torch.float32)


def same_weights(first: ClipScorer, second: ClipScorer) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_wrapped_and_prefixed_files_are_read(wrapper: str | None, clips: Path, tmp_path: Path) -> None:
    """What a distributed trainer writes, and the sizes that OpenAI keeps among its weights."""

    def change(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        state |= {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}
        state = {f"module.{key}": value for key, value in state.items()}
        return {wrapper: state, "epoch": 3, "name": "x"} if wrapper else state

    assert same_weights(reload(rewrite(clips, tmp_path, change)), load("hpsv2", clips))


def test_either_layout_is_read(clips: Path, tmp_path: Path) -> None:
    state = to_transformers(read(clips / "hpsv2.pt"))
    save_file(state, tmp_path / "mirror.safetensors")
    assert same_weights(reload(tmp_path / "mirror.safetensors"), load("hpsv2", clips))


@pytest.mark.parametrize("name", CLIP_NAMES)
def test_names_go_there_and_back(name: str) -> None:
    """Every tensor of the recorded models: under its name, and with its values, transposed and fused ones too."""
    published = fill(CLIP["models"][name]["shapes"], CLIP["weights_seed"])
    if name == "pickscore":
        published = {key: value for key, value in published.items() if not key.endswith("position_ids")}
    there = to_authors(published) if name == "pickscore" else to_transformers(published)
    back = to_transformers(there) if name == "pickscore" else to_authors(there)
    assert back.keys() == published.keys()
    assert not there.keys() & published.keys() - {"logit_scale"}
    assert all(torch.equal(back[key], value) for key, value in published.items())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published names and shapes in ../shared")
@pytest.mark.parametrize("name", ["hpsv1", "hpsv2", "pickscore", "clipscore"])
def test_all_published_names_go_there_and_back(name: str) -> None:
    table = json.loads((SHARED / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    keys = table["state_dict"]["keys"]
    published = {key: torch.empty(shape, device="meta") for key, (_, shape) in keys.items()}
    ours = to_transformers(published)
    theirs = to_authors(ours)
    assert {key: value.shape for key, value in to_transformers(theirs).items()} == {
        key: value.shape for key, value in ours.items()
    }
    if name.startswith("hps"):
        left_out = {"input_resolution", "context_length", "vocab_size"}
        shapes = {key: value.shape for key, value in published.items() if key not in left_out}
        assert {key: value.shape for key, value in theirs.items()} == shapes


@pytest.mark.parametrize("name", CLIP_NAMES)
def test_a_saved_folder_is_in_the_authors_layout(
    name: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file, with its vocabulary beside it, could be theirs; and the folder is a scorer of equal scores."""
    scorer = load(name, clips)
    scorer.save(tmp_path)
    saved = read(tmp_path / "model.safetensors")
    original = {key: value for key, value in read(clips / f"{name}.pt").items() if "position_ids" not in key}
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    again: Any = rewards.load(str(tmp_path))
    assert again.card == replace(
        scorer.card, name=str(tmp_path), folder=str(tmp_path), summary=again.card.summary, repo=None, source=None, file=None,
        about_bytes=None,
    )  # fmt: skip
    pixels = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(pixels, CLIP["prompts"][:2]), scorer(pixels, CLIP["prompts"][:2]))
    assert same_weights(
        load_scorer(tiny_card(name), tmp_path / "model.safetensors", "cpu", torch.float32), scorer
    )


def test_a_saved_pickscore_is_a_clip_of_transformers(clips: Path, tmp_path: Path) -> None:
    """Its file fills their class, no name more or less, and that gives the same 100 times a cosine."""
    scorer = load("pickscore", clips)
    with torch.no_grad():
        scorer.logit_scale += 0.1
        scorer.vision.visual_projection.weight[0] += 0.1
    scorer.save(tmp_path)
    clip, rule = scorer.card.clip, scorer.card.preprocess
    assert clip is not None
    assert rule is not None
    towers = {
        kind: {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "hidden_act": clip.activation,
        }
        for kind, width, heads in (
            ("text", clip.text_width, clip.text_heads),
            ("vision", clip.vision_width, clip.vision_heads),
        )
    }
    ids = {"bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(
        text_config=towers["text"] | ids,
        vision_config=towers["vision"] | {"patch_size": clip.patch, "image_size": rule.size},
        projection_dim=clip.embed,
    )
    theirs = CLIPModel(config).eval()
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    prompts = CLIP["prompts"][:2]
    with torch.no_grad():
        ids = scorer.text.tokenizer(prompts)
        logits = theirs(input_ids=ids, pixel_values=prepare(pixels, rule)).logits_per_image
        torch.testing.assert_close(scorer(pixels, prompts), logits.diagonal(), atol=3e-5, rtol=0)


def test_a_program_is_refused(clips: Path, tmp_path: Path) -> None:
    """OpenAI publishes CLIP as a TorchScript program, too; the card names the file on the hub that holds tensors alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "archive.pt"))
    with pytest.raises(ValueError, match=r"archive.pt is not a readable weights file .*TorchScript"):
        reload(tmp_path / "archive.pt")


def test_matrices_in_half_precision_are_read(clips: Path, tmp_path: Path) -> None:
    """OpenAI's file keeps them in float16; the scorer computes in float32."""
    half = reload(
        rewrite(clips, tmp_path, lambda state: {k: v.half() if v.ndim > 1 else v for k, v in state.items()})
    )
    assert all(value.dtype == torch.float32 for value in half.state_dict().values())
    assert 0 < deviation(half).max() < 1e-3


def test_missing_unexpected_and_misshapen_tensors_are_named(clips: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del state["ln_final.bias"]
        return state | {"visual.ln_post.bias": torch.zeros(5), "classifier.weight": torch.zeros(2)}

    with pytest.raises(
        ValueError,
        match=r"missing: text_model\.final_layer_norm\.bias; unexpected: classifier\.weight;.*\(5,\) instead of \(80,\)",
    ):
        reload(rewrite(clips, tmp_path, change))


def test_a_foreign_prefix_or_another_architecture_is_refused(clips: Path, tmp_path: Path) -> None:
    def prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"net.{key}": value for key, value in state.items()}

    with pytest.raises(ValueError, match=r"missing: .* more; unexpected: net"):
        reload(rewrite(clips, tmp_path, prefix))
    with pytest.raises(ValueError, match=r"does not hold the CLIP of hpsv2; of another shape: .*\(64,\)"):
        reload(clips / "hpsv1.pt")
    with pytest.raises(ValueError, match=r"does not hold the CLIP of hpsv2; missing: .*unexpected: mlp"):
        reload(rewrite(clips, tmp_path, lambda state: {"mlp.layers.0.weight": torch.zeros(2)}))


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_truncated_and_hostile_files_are_clear_errors(clips: Path, tmp_path: Path) -> None:
    content = (clips / "hpsv2.pt").read_bytes()
    hostile = Hostile(tmp_path / "executed")
    for bad in (content[: len(content) // 2], {"logit_scale": hostile}, pickle.dumps(hostile, protocol=2)):
        file = rewrite(clips, tmp_path, lambda state, bad=bad: bad)  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"changed\.pt is not a readable weights file"):
            reload(file)
    assert not (tmp_path / "executed").exists()


def test_what_is_missing_is_named(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("rewards.weights.ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"put hpc\.pt of github\.com/tgxs002/align_sd .* into weights/"):
        rewards.check("hpsv1")
    with pytest.raises(ValueError, match=r"hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt"):
        rewards.check("hpsv2.1")
    with pytest.raises(ValueError, match=r"lacks hpc\.pt"):
        rewards.check("hpsv1", tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "hpc.pt").write_bytes(b"anything")
    assert rewards.check("hpsv1") == (tmp_path / "weights" / "hpc.pt", MERGES)


@pytest.mark.parametrize("name", ["merges.txt", "bpe_simple_vocab_16e6.txt.gz"])
def test_another_vocabulary_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(MERGES.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"SHA-256|is no list of merges"):
        ClipTokenizer("openai", tmp_path / name, 77)


def test_an_unknown_tokenizer_is_refused(clips: Path) -> None:
    with pytest.raises(ValueError, match=r"'bert'; one of openai, open_clip, transformers"):
        ClipTokenizer("bert", MERGES, 77)  # type: ignore[arg-type]


# ---------------------------------------------------------------- full size


def full_size(name: str, tmp_path: Path) -> tuple[dict[str, Any], ClipScorer]:
    """The published architecture from a file in the authors' layout, with weights by the formula."""
    import recipe

    table = json.loads((SHARED / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    state = recipe.fill_state_dict(table["state_dict"]["keys"], table["weights_seed"])
    wrapper = table["state_dict"]["wrapper"]
    torch.save({wrapper: state} if wrapper else state, tmp_path / "filled.pt")
    del state
    scorer = rewards.load(name, weights=tmp_path / "filled.pt")
    (tmp_path / "filled.pt").unlink()
    return table, scorer  # type: ignore[return-value]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published names and shapes in ../shared")
@pytest.mark.parametrize("name", ["hpsv1", "hpsv2", "pickscore", "clipscore"])
def test_cards_have_the_published_sizes(name: str, clips: Path) -> None:
    """Names and shapes alone: no weights, no memory. Heads show in no shape."""
    table = json.loads((SHARED / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        scorer = ClipScorer(CARDS[name], MERGES)
        state = {key: torch.empty(shape) for key, (_, shape) in table["state_dict"]["keys"].items()}
    published = {key: value.shape for key, value in to_transformers(state).items()}
    ours = {**scorer.vision.state_dict(), **scorer.text.state_dict(), "logit_scale": scorer.logit_scale}
    assert {key: value.shape for key, value in ours.items()} == published
    clip = CARDS[name].clip
    assert clip is not None
    heads = (16, 12) if name in ("hpsv1", "clipscore") else (16, 16)
    assert (clip.vision_heads, clip.text_heads, clip.eps, clip.context) == (*heads, 1e-5, 77)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/golden")
@pytest.mark.parametrize("name", ["hpsv1", "hpsv2", "pickscore", "clipscore"])
def test_full_size_scores_equal_the_authors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 36 scores from files and the prepared pixels; ViT-H needs 8 GB of memory and 4 GB of disk."""
    monkeypatch.syspath_prepend(SHARED / "golden")
    table, scorer = full_size(name, tmp_path)
    rule = CARDS[name].preprocess
    files = [SHARED / "golden" / "inputs" / image for image in table["images"]]

    def worst(key: str, antialias: bool) -> float:
        changed = replace(rule, antialias=antialias)  # type: ignore[type-var]
        images = torch.stack([from_pil(Image.open(file), changed) for file in files])
        with torch.no_grad():
            scores = torch.stack([scorer(images, [prompt] * len(files)) for prompt in table["prompts"]])
        return (scores - torch.tensor(table[key])).abs().max().item()

    tolerance = 3e-5 if name == "pickscore" else 1e-6
    assert worst("scores", antialias=True) < tolerance
    if "scores_antialias_false" in table:
        assert worst("scores_antialias_false", antialias=False) < tolerance
