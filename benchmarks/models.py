"""The measured models at real size with random weights: Stable Diffusion 1.x and the published scorers."""

import gzip
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.hardware import fresh
from preftune.families import tiny
from preftune.families.sd import SD
from preftune.files import replacing
from rewards import CARDS
from rewards.aesthetic import Aesthetic
from rewards.clip import ClipScorer
from rewards.clip_tokenizer import find_vocab
from rewards.imagereward import FULL_SIZE, ImageReward, to_authors

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"
PROMPTS = TINY / "prompts.txt"
CLIP_TOKENS = 49408
"""Vocabulary of CLIP's text encoder: 512 bytes, 48,894 merges, start and end."""
SPECIAL_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def unet() -> UNet2DConditionModel:
    """Return the UNet of Stable Diffusion 1.4 and 1.5, 860 M random weights."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def autoencoder() -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion 1.x, 84 M random weights."""
    return AutoencoderKL(
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.18215,
    )


def text_encoder() -> CLIPTextModel:
    """Return the text tower of CLIP ViT-L/14, 123 M random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=CLIP_TOKENS,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            projection_dim=768,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=2,  # the published file says so, though the tokenizer does not: pooling relies on it
            pad_token_id=1,
        )
    )


def _byte_symbols() -> list[str]:
    """Return the characters that CLIP writes the bytes with, in the order of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def tokenizer(clip_vocab: Path | None, folder: Path) -> CLIPTokenizer:
    """Return CLIP's tokenizer, 77 tokens, its vocab.json and merges.txt in folder; None: bytes without merges.

    ValueError when the vocabulary is not the published bpe_simple_vocab_16e6.txt.gz.
    """
    symbols, merges = _byte_symbols(), list[str]()
    if clip_vocab is not None:
        try:
            lines = gzip.decompress(clip_vocab.read_bytes()).decode("utf-8").split("\n")
        except (gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise ValueError(
                f"--clip-vocab {clip_vocab} is not bpe_simple_vocab_16e6.txt.gz: {error}"
            ) from error
        merges = lines[1 : CLIP_TOKENS - 2 - 2 * len(symbols) + 1]  # the file has more merges than CLIP uses
    joined = ["".join(merge.split()) for merge in merges]
    words = [*symbols, *(f"{s}</w>" for s in symbols), *joined, "<|startoftext|>", "<|endoftext|>"]
    if clip_vocab is not None and len(set(words)) != CLIP_TOKENS:
        raise ValueError(
            f"--clip-vocab {clip_vocab} gives {len(set(words))} tokens, the published file {CLIP_TOKENS}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    vocab, rules = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(
        json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False), encoding="utf-8"
    )
    rules.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(vocab), str(rules), model_max_length=77)


def words_for_bert(path: Path, bert_vocab: Path | None) -> Path:
    """Return a vocab.txt with as many lines as ImageReward's; None writes made-up words to path."""
    if bert_vocab is not None:
        return bert_vocab
    number = FULL_SIZE.vocab_size - 2 - len(SPECIAL_BERT)
    path.write_text("\n".join([*SPECIAL_BERT, *(f"word{i}" for i in range(number))]) + "\n")
    return path


def build_sd1(folder: Path, clip_vocab: Path | None = None, bert_vocab: Path | None = None) -> None:
    """Write folder/pipeline (diffusers' format, fp16 on disk) and folder/scorer (ImageReward.save), unless both are there.

    Takes 6 GB of memory and a minute; 4 GB of disk.
    """
    if (folder / "scorer").is_dir() and (folder / "pipeline").is_dir():
        return
    with torch.random.fork_rng(devices=[]), replacing(folder / "pipeline") as partial:
        torch.default_generator.manual_seed(0)
        family = SD(
            unet=unet().half(),
            vae=autoencoder().half(),
            text_encoder=text_encoder().half(),
            tokenizer=tokenizer(clip_vocab, folder / "words"),
            scheduler_config=tiny.SCHEDULER_CONFIG,
        )
        family.save_pipeline(partial)
        del family
    vocab = words_for_bert(folder / "words" / "vocab.txt", bert_vocab)
    with replacing(folder / "scorer") as partial:
        ImageReward.build(FULL_SIZE, vocab, seed=0).save(partial)
    shutil.rmtree(folder / "words", ignore_errors=True)


def write_scorer(name: str, folder: Path, clip_vocab: Path | None, bert_vocab: Path | None) -> Path:
    """Write random weights of a published scorer's size to folder/name, unless they are there; return the weights file.

    ValueError where its vocabulary is not given. ViT-H takes 9 GB of memory and 4 GB of disk.
    """
    home = folder / name
    if (home / "weights.safetensors").is_file():
        return home / "weights.safetensors"
    kind = "bert" if CARDS[name].clip is None else "clip"
    vocab = bert_vocab if kind == "bert" else clip_vocab
    if name != "aesthetic" and (vocab is None or not vocab.is_file()):
        raise ValueError(f"--scorers {name} needs --{kind}-vocab; {vocab or 'nothing'} is no file")
    with replacing(home) as partial, torch.random.fork_rng(devices=[]):
        partial.mkdir()
        if vocab is not None and name != "aesthetic":
            shutil.copy(vocab, partial / ("vocab.txt" if kind == "bert" else vocab.name))
        torch.default_generator.manual_seed(0)
        for file, state in random_states(name, partial).items():
            save_file({key: value.contiguous() for key, value in state.items()}, partial / file)
    return home / "weights.safetensors"


def fresh_scorer(name: str, folder: Path, clip_vocab: Path | None, bert_vocab: Path | None) -> Path:
    """Do what `write_scorer` does in a separate process, to release its memory; ValueError where it was killed, too."""
    path: Path | None = fresh(write_scorer, name, folder, clip_vocab, bert_vocab)
    if path is None:
        raise ValueError(
            f"the process that wrote the weights of {name} was killed; it needs more memory, 9 GB for ViT-H"
        )
    return path


def random_states(name: str, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return file name -> tensors of a scorer whose vocabulary lies in folder, under names that its loader takes."""
    card = CARDS[name]
    if name == "aesthetic":
        predictor = Aesthetic(card)
        layers = {f"layers.{key}": value for key, value in predictor.layers.state_dict().items()}
        return {"weights.safetensors": layers, str(CARDS["clipscore"].file): predictor.vision.state_dict()}
    if card.clip is not None:
        clip = ClipScorer(card, find_vocab(folder / "weights.safetensors"))
        towers = {**clip.vision.state_dict(), **clip.text.state_dict()}
        return {"weights.safetensors": {**towers, "logit_scale": clip.logit_scale.detach()}}
    state = to_authors(ImageReward.build(FULL_SIZE, folder / "vocab.txt", seed=0).state_dict())
    if name == "blipscore":  # the towers alone, as BLIP names them
        state = {key.removeprefix("blip."): value for key, value in state.items() if key.startswith("blip.")}
    return {"weights.safetensors": state}
