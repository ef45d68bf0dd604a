"""Prompts as the pipeline encodes them: textual inversion, and the negative prompt of text encoders that are trained."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler

import tiny
from preftune import families
from preftune.families import Family
from preftune.solver_names import SolverName

FOLDERS: dict[str, Callable[[Path], Path]] = {"sd": tiny.pipeline_folder, "sdxl": tiny.pipeline_xl_folder}


def with_tokens(folder: Path, vectors: dict[str, int]) -> Any:
    """Add tokens of textual inversion with so many vectors to a pipeline folder, as `load_textual_inversion` does."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    generator = torch.Generator().manual_seed(0)
    for tokenizer, encoder in (
        (getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None))
        for end in ("", "_2")
    ):
        if encoder is not None:
            for token, number in vectors.items():
                embedding = torch.randn(number, encoder.config.hidden_size, generator=generator)
                pipe.load_textual_inversion(
                    {token: embedding}, token=token, tokenizer=tokenizer, text_encoder=encoder
                )
    pipe.save_pretrained(folder)
    return pipe


@pytest.mark.parametrize("kind", FOLDERS)
def test_tokens_of_several_vectors_expand_as_in_the_pipeline(tmp_path: Path, kind: str) -> None:
    pipe = with_tokens(FOLDERS[kind](tmp_path / "model"), {"<cat>": 3, "<one>": 1})
    family = families.load(tmp_path / "model")
    prompts = ["a <cat> on", "<one>", "a cat"]
    given: Any = {
        "num_images_per_prompt": 1,
        "device": torch.device("cpu"),
        "do_classifier_free_guidance": True,
    }
    with torch.no_grad():
        theirs = pipe.encode_prompt(prompt=prompts, negative_prompt=["<cat>"] * 3, **given)
        ours = family.encode(prompts, negative="<cat>")
    torch.testing.assert_close(ours.positive["embeds"], theirs[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.negative["embeds"], theirs[1][:1], atol=1e-5, rtol=0)
    if kind == "sdxl":
        torch.testing.assert_close(ours.positive["pooled"], theirs[2], atol=1e-5, rtol=0)
    tokens = pipe.tokenizer(
        ["a <cat> <cat>_1 <cat>_2 on"], padding="max_length", truncation=True, max_length=tiny.MAX_LENGTH
    )
    encoder = family.text_encoders[0]
    states = encoder(torch.tensor(tokens.input_ids), output_hidden_states=True)
    plain = states[0] if kind == "sd" else states.hidden_states[-2]
    torch.testing.assert_close(ours.positive["embeds"][:1, :, :32], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("in_training", [True, False])
@pytest.mark.parametrize("kind", FOLDERS)
def test_the_negative_prompt_is_that_of_the_present_text_encoder(
    tmp_path: Path, kind: str, in_training: bool
) -> None:
    """In validation, where the encoder may be in eval mode, and for captions that are dropped."""
    family: Family = families.load(FOLDERS[kind](tmp_path / "model"))
    family.encode(["a"], negative="bad")  # kept: the encoder is frozen
    family.trainable(None, 0)
    family.open_text_encoders()
    for encoder in family.text_encoders:
        encoder.train(in_training)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            cond = family.encode(["bad", ""], negative="bad")
            fresh = families.load(tmp_path / "model")
            for mine, other in zip(family.text_encoders, fresh.text_encoders, strict=True):
                other.load_state_dict(mine.state_dict())
            expected = fresh.encode(["", "x"], negative="bad")
            torch.testing.assert_close(cond.negative["embeds"], expected.negative["embeds"])
            torch.testing.assert_close(cond.positive["embeds"][1], expected.positive["embeds"][0])
            seen.append(cond.negative["embeds"])
            for encoder in family.text_encoders:
                for weight in encoder.parameters():
                    weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("settings", [{"steps_offset": 0}, {}])
def test_a_steps_offset_of_0_is_what_the_pipeline_makes_of_it(
    tmp_path: Path, settings: dict[str, int]
) -> None:
    """Stable Diffusion's pipeline sets it to 1, whatever the folder says, and so do our solvers."""
    folder = tiny.pipeline_folder(tmp_path / "model")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, **settings
    ).save_pretrained(folder / "scheduler")
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipe.scheduler.set_timesteps(5)
    family = families.load(folder)
    assert family.scheduler("pndm", 5).timesteps.tolist() == pipe.scheduler.timesteps.tolist()
    assert family.scheduler("pndm", 5).timesteps[-1] == 1


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler", "pndm", "dpm++"])
def test_more_steps_than_timesteps_are_refused_before_weights_load(
    tmp_path: Path, solver: SolverName
) -> None:
    defaults = families.check(tiny.pipeline_folder(tmp_path / "model"))
    with pytest.raises(
        ValueError,
        match=rf"--num-inference-steps must lie in 1\.\.(999|1000) .*{re.escape(solver)}, got 2000",
    ):
        defaults.check_solver(solver, 2000)
