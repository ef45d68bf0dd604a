"""In half precision on a CPU the decoder keeps its images contiguous: group norm's gradient is many times slower otherwise."""

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder

import tiny
from preftune import families


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_decoder_s_layout(tmp_path, dtype: torch.dtype) -> None:
    family = families.load(tiny.pipeline_folder(tmp_path / "pipeline")).to("cpu", dtype)
    seen: list[tuple[bool, tuple[int, ...]]] = []
    for block in family.vae.decoder.up_blocks:
        block.register_forward_pre_hook(
            lambda module, args: seen.append((args[0].is_contiguous(), args[0].stride()))
        )
    assert isinstance(family.vae.decoder, Decoder)
    x0 = torch.randn(2, 4, 4, 4, requires_grad=True)
    family.decode(x0).sum().backward()
    assert x0.grad.abs().sum() > 0
    assert len(seen) > 1
    assert all(contiguous for contiguous, _ in seen) == (dtype == torch.bfloat16), seen
