from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from convert_to_quant.emoji import prompts
from convert_to_quant.emoji.prompts import NAMES, embed, embed_all


def test_words_are_hashed_as_in_training():
    context, pooled = embed("Bear Face")
    assert context.shape == (8, 64)
    assert pooled.shape == (64,)
    assert context.dtype == pooled.dtype == np.float32
    assert context[0, :3] == pytest.approx([0.80447978, 0.90855527, -0.87282956], abs=1e-6)
    assert context[1, :3] == pytest.approx([-0.32336435, 0.44693315, -0.10296044], abs=1e-6)
    assert pooled[:3] == pytest.approx([0.30564061, 0.91008389, -0.62822264], abs=1e-6)


def test_tokens_behind_the_words_are_zero_and_so_is_the_empty_prompt():
    context, _ = embed("bear face")
    assert (context.any(1) == [True] * 2 + [False] * 6).all()
    assert not any(part.any() for part in embed(""))


@pytest.mark.parametrize(
    ("one", "other"), [("Dark-Skin Tone", "dark skin tone"), ("a b c d e f g h i j", "a b c d e f g h")]
)
def test_case_hyphens_and_words_behind_the_eighth_make_no_difference(one, other):
    for mine, theirs in zip(embed(one), embed(other), strict=True):
        assert np.array_equal(mine, theirs)


def test_several_prompts_are_stacked():
    context, pooled = embed_all(["fish", "honey pot"])
    assert context.shape == (2, prompts.TOKENS, prompts.CHANNELS)
    assert np.array_equal(context[1], embed("honey pot")[0])
    assert np.array_equal(pooled[0], embed("fish")[1])


def test_the_demo_asks_for_emoji_that_unicode_has():
    assert len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        unicodedata.lookup(name)
