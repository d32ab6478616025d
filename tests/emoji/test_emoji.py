from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle

from convert_to_quant import emoji
from convert_to_quant.checkpoint import open_checkpoint


def test_weights_are_a_bfloat16_model_of_nine_million_parameters():
    with open_checkpoint(emoji.WEIGHTS) as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
        assert sum(info.elements for info in checkpoint.tensors.values()) == 9_074_752


def test_pictures_are_tokens_unpacked_and_pixel_shuffled_on_white():
    generator = torch.Generator().manual_seed(0)
    latents = 1.5 * torch.randn(2, 64, 64, generator=generator)
    # A token is (channel, row, column) of 2×2 latents, as Flux.1 packs them; a channel is (RGBA, row, column).
    maps = latents.unflatten(1, (8, 8)).unflatten(-1, (16, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 16, 16)
    rgba = (pixel_shuffle(maps, 2) / 2 + 0.5).clamp(0, 1)
    expected = ((rgba[:, :3] + 1 - rgba[:, 3:]).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    found = emoji.to_pictures(latents.numpy())
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.numpy()).max() <= 1
