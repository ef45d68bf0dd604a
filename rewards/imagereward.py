"""ImageReward: BLIP's two towers, where the text tower attends to the image by cross-attention, and a
linear head.

Paper: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation"
(2023, arXiv 2304.05977), section 3. The towers are those of transformers, whose BLIP has only eager
attention, like the authors' code. The class supports any size: FULL_SIZE is the published model, and a
folder's config.json defines another. Files always use the authors' key names, so a published file, a file
trained with the authors' code and a folder written by `save` are read in the same way. Left out: stochastic
depth in the ViT (0.1, in training only).

Shapes: B batch, L = config.max_length text tokens, D = config.text_width, P = config.projection, S =
config.image_size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.models.blip import modeling_blip_text

from rewards.bert_reader import BertReader
from rewards.blip_state_dict import to_authors, to_transformers
from rewards.card import Card, ImageRewardConfig
from rewards.head import apply_head, draw_head, initialise, new_head, set_dropout
from rewards.input_files import read_text
from rewards.on_device import upload
from rewards.pixels import at_least_float32, one_each, prepare, takes_images
from rewards.towers import Tower
from rewards.trained_cards import CARD_FILE, card_of, facts_to_json, imagereward_card
from rewards.vit_init import initialise_image_embeddings, initialise_layers
from rewards.weights import FOLDER_FILE, check, find, read, verify, write_folder

VOCAB = Path(__file__).with_name("vocabularies") / "bert_vocab.txt"
"""The vocabulary of bert-base-uncased, a part of this package."""
VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


FULL_SIZE = ImageRewardConfig()


class ImageReward(nn.Module):
    """The scorer, also for training. Calling it returns (raw - mean) / std, (B,) float32, higher is better.

    Pixels are (B, 3, H, W) float in [0, 1] of any size; resize, crop and normalisation happen inside and are
    differentiable. Scores need no rounding to 8 bits anywhere. The class itself neither freezes weights nor
    leaves training mode: `load_scorer` does both.
    """

    card: Card
    """Of a model that was built: random weights. `load_scorer` gives it the scorer's, `load` what is known of the file."""

    def __init__(self, config: ImageRewardConfig, vocab: str) -> None:
        super().__init__()
        self.config = config
        self.card = imagereward_card("random weights", config.preprocess, licence="Apache-2.0")
        self.vocab = vocab
        self.tokenizer = BertTokenizer(
            vocab={token: index for index, token in enumerate(vocab.removesuffix("\n").split("\n"))},
            bos_token="[DEC]",
            extra_special_tokens=["[ENC]"],
        )
        if config.vocab_size != len(self.tokenizer):
            raise ValueError(
                f"vocab_size is {config.vocab_size}, but vocab.txt with [DEC] and [ENC] has {len(self.tokenizer)} tokens"
            )
        self.reader = BertReader(self.tokenizer, config.max_length)
        self.vision_model = BlipVisionModel(_vision_config(config))
        self.text_model = BlipTextModel(
            _text_config(config, self.tokenizer.pad_token_id, self.tokenizer.sep_token_id),
            add_pooling_layer=False,
        )
        self.vision_proj = nn.Linear(config.vision_width, config.projection)
        self.text_proj = nn.Linear(config.text_width, config.projection)
        self.mlp = new_head(config.text_width, config.head, config.head_dropout)

    @classmethod
    def build(cls, config: ImageRewardConfig, vocab_path: Path, seed: int) -> "ImageReward":
        """Return a model whose random weights depend on seed alone.

        The image tower's are those of OpenAI's CLIP (rewards/vit_init.py), the text tower's N(0, 0.02), the head's the authors'.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = cls(config, vocab_path.read_text(encoding="utf-8"))
            vision = model.vision_model
            initialise_layers(vision, config.vision_width, config.vision_layers)
            image = vision.embeddings
            initialise_image_embeddings(
                image.patch_embedding, image.position_embedding, image.class_embedding
            )
            initialise(model.mlp)
        return model

    @classmethod
    def load(cls, path: Path) -> "ImageReward":
        """Return the model of a folder written by `save`, or of a file in the authors' layout (then FULL_SIZE).

        ValueError names missing, unexpected or misshapen tensors.
        """
        config, vocab, file = find_parts(path)
        with torch.device("meta"):  # no time or memory for random weights that are replaced at once
            model = cls(config, vocab.read_text(encoding="utf-8"))
        state = to_transformers(read(file))
        check(model.state_dict(), state, file, "this ImageReward")
        model.fill(state)
        model.card = card_of(str(path)) if path.is_dir() else imagereward_card(str(path), config.preprocess)
        return model

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Give a model that was built on the meta device its tensors, in float32."""
        self.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
        positions = torch.arange(self.config.max_positions)[None]  # a buffer that is not in the state
        self.text_model.embeddings.position_ids = positions

    def save(self, folder: Path) -> None:
        """Write config.json, vocab.txt, card.json (licence, origin) and model.safetensors (authors' names, float32) as one."""
        state = {key: value.float() for key, value in self.state_dict().items()}
        config = json.dumps(asdict(self.config), indent=2) + "\n"
        texts = {"config.json": config, "vocab.txt": self.vocab, CARD_FILE: facts_to_json(self.card)}
        write_folder(folder, to_authors(state), texts)

    def renew_head(self, seed: int) -> None:
        """Put a head with random weights that depend on seed alone on the towers; its scores are not standardised."""
        self.mlp = draw_head(self.config.text_width, seed, self.config.head, self.config.head_dropout)
        self.set_statistics(0.0, 1.0)

    def set_dropout(self, probability: float) -> None:
        """Let all dropout of the head act with this probability, in [0, 1); the towers keep theirs."""
        self.config = replace(self.config, head_dropout=(probability,) * 3)
        set_dropout(self.mlp, probability)

    def towers(self) -> tuple[Tower, Tower]:
        """Return the image tower and the text tower; the head is on top of the second."""
        vision, text = self.vision_model, self.text_model
        return (
            Tower((vision.embeddings,), (*vision.encoder.layers,), (vision.post_layernorm,)),
            Tower((text.embeddings,), (*text.encoder.layer,), ()),
        )

    def set_statistics(self, mean: float, std: float) -> None:
        """Set the mean and deviation of raw scores that calls subtract and divide by, and that `save` writes."""
        self.config = replace(self.config, mean=mean, std=std)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, each (B, L) int64; longer captions are cut."""
        return self.reader(prompts)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Return the image tower's output, (B, 1 + (S / patch)^2, vision_width)."""
        return self.vision_model(prepare(pixels, self.config.preprocess)).last_hidden_state

    def features(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the text tower's [CLS] state after cross-attention to the image, (B, D) float32."""
        return self.read(one_each(prompts, len(pixels)), self.image_tokens(pixels), pixels.device)

    def raw(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the head's output before mean and deviation, (B,) float32: what the ranking loss is computed on."""
        return apply_head(self.mlp, self.features(pixels, prompts))

    @takes_images
    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B images for B prompts, in the paper's units."""
        return (self.raw(pixels, prompts).float() - self.config.mean) / self.config.std

    def image_embedding(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (B, P) of the images, for contrastive pre-training (BLIP)."""
        return F.normalize(self.vision_proj(at_least_float32(self.image_tokens(pixels)[:, 0])), dim=1)

    def text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors (B, P) of captions read without an image: the cross-attention is skipped (BLIP)."""
        hidden = self.read(prompts, None, self.text_proj.weight.device)
        return F.normalize(self.text_proj(hidden), dim=1)

    def read(self, prompts: Sequence[str], image_tokens: Tensor | None, device: torch.device) -> Tensor:
        """Return [CLS] (B, D) of captions that read these image tokens by cross-attention; None = text alone."""
        ids, mask = (upload(tokens, device) for tokens in self.tokenize(prompts))
        # All image tokens are seen, so no mask. The first token stays [CLS]; BLIP's matching head puts [ENC].
        output = self.text_model(
            input_ids=ids, attention_mask=self._added(mask), encoder_hidden_states=image_tokens
        )
        return at_least_float32(output.last_hidden_state[:, 0])

    def _added(self, mask: Tensor) -> Tensor:
        """Return what is added to attention scores, (B, 1, 1, L): transformers makes it of mask (B, L), too, but lets the CPU read
        the mask first. Releases of transformers that take no mask of this shape do not read it either.
        """
        if not hasattr(modeling_blip_text, "create_bidirectional_mask"):
            return mask
        dtype = self.text_model.dtype
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return added.masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]

    def next_tokens(self, prompts: Sequence[str], image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what captioning is trained on: logits (B, L - 1, V) and the true tokens (B, L - 1), -100 =
        padding (BLIP).

        The text tower uses causal attention, with [DEC] instead of [CLS]; the word embeddings are the
        output layer.
        """
        ids, mask = (upload(tokens, image_tokens.device) for tokens in self.tokenize(prompts))
        start = torch.full_like(ids[:, :1], self.tokenizer.bos_token_id)
        hidden = self.text_model(
            input_ids=torch.cat([start, ids[:, 1:]], dim=1),
            attention_mask=mask,
            encoder_hidden_states=image_tokens,
            is_decoder=True,
            use_cache=False,
        ).last_hidden_state[:, :-1]
        logits = F.linear(hidden, self.text_model.embeddings.word_embeddings.weight)
        return at_least_float32(logits), ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> ImageReward:
    """Return the scorer of a card: frozen, in eval mode, towers in dtype, the small head always in float32."""
    model = ImageReward.load(find(card, weights))
    if card.preprocess != model.config.preprocess:
        raise ValueError(
            f"the weights need {model.config.preprocess}, but the card of {card.name} has {card.preprocess};"
            " these are weights of another scorer"
        )
    model.card = card
    towers: tuple[nn.Module, ...] = (model.vision_model, model.text_model)
    for tower in towers:
        tower.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def find_files(card: Card, weights: Path | None) -> tuple[Path, ...]:
    """Return the files that a scorer is made of; ValueError says which file to put where."""
    path = find(card, weights)
    _, vocab, file = find_parts(path)
    return (file, vocab, path / "config.json") if path.is_dir() else (file, vocab)


def find_parts(path: Path) -> tuple[ImageRewardConfig, Path, Path]:
    """Return config, vocabulary and weights file of a saved folder, or of a file in the authors' layout, which is FULL_SIZE."""
    if path.is_dir():
        missing = [name for name in ("config.json", "vocab.txt", FOLDER_FILE) if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; a folder of ImageReward.save has them")
        config = ImageRewardConfig.from_json(read_text(path / "config.json"))
        return config, path / "vocab.txt", path / FOLDER_FILE
    verify(VOCAB, num_bytes=None, sha256=VOCAB_SHA256)
    return FULL_SIZE, VOCAB, path


# ---------------------------------------------------------------- parts


def _vision_config(config: ImageRewardConfig) -> BlipVisionConfig:
    return BlipVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act="gelu",  # exact
        layer_norm_eps=1e-6,  # transformers' default of 1e-5 moves scores by 1e-4
        initializer_range=0.02,
    )


def _text_config(config: ImageRewardConfig, pad_token: int, sep_token: int) -> BlipTextConfig:
    return BlipTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        encoder_hidden_size=config.vision_width,
        intermediate_size=config.text_intermediate,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        max_position_embeddings=config.max_positions,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        hidden_dropout_prob=config.text_dropout,
        attention_probs_dropout_prob=config.text_dropout,
        initializer_range=0.02,
        pad_token_id=pad_token,
        sep_token_id=sep_token,
        bos_token_id=config.vocab_size - 2,  # [DEC]
        is_decoder=True,  # makes the cross-attention exist; calls still attend in both directions
    )
