"""Prompts of the emoji model: the hashed words of a name instead of a text encoder.

Each of the first TOKENS words gives two fixed random vectors from a generator seeded with the word's SHA-256. The first
vectors are the context tokens, in order, padded with zeros; the sum of the second ones over the square root of their
number is the pooled vector. The empty prompt, also the negative one of guidance, is all zeros.

Limits. The model knows only the words of Unicode's emoji names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TOKENS = 8
"""Context tokens, one per word."""

CHANNELS = 64
"""Size of a context token and of the pooled vector."""

NAMES = (
    "strawberry",
    "bear face",
    "tulip",
    "american football",
    "grinning cat face with smiling eyes",
    "fish",
    "honey pot",
    "snowflake",
)
"""The emoji that the demo generates and measures."""

HELD_OUT = (
    "bear face", "tulip", "american football", "grinning cat face with smiling eyes", "fish", "honey pot", "snowflake",
    "strawberry", "graduation cap", "face with monocle", "pickup truck", "droplet", "robot face", "fly", "baseball",
    "ringing bell", "sandwich", "two hearts", "lady beetle", "desert island", "mobile phone", "smirking face", "prince",
    "cloud with rain", "purse", "snowboarder", "waving hand sign", "moon cake", "ribbon", "microbe", "motor boat",
    "mammoth", "hot dog", "tropical fish", "person frowning", "ice cube", "first quarter moon", "pile of poo",
    "flexed biceps", "satellite", "melting face", "cityscape at dusk", "scarf", "tomato", "hedgehog", "crown",
    "balloon", "key",
)  # fmt: skip
"""Prompts that calibration never uses, on which accuracy is measured."""


def word_vector(word: str) -> Float32:
    """The fixed random vector of a word, standard normal, float32 [CHANNELS]."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(CHANNELS).astype(np.float32)


def embed(prompt: str) -> tuple[Float32, Float32]:
    """Embed a prompt.

    Args:
        prompt: a Unicode name in any case; words after the eighth are ignored.

    Returns:
        Context tokens [TOKENS, CHANNELS] and the pooled vector [CHANNELS], float32.
    """
    words = prompt.lower().replace("-", " ").split()[:TOKENS]
    context = np.zeros((TOKENS, CHANNELS), np.float32)
    pooled = np.zeros(CHANNELS, np.float32)
    for number, word in enumerate(words):
        context[number] = word_vector("ctx:" + word)
        pooled += word_vector("vec:" + word)
    if words:
        pooled /= np.float32(math.sqrt(len(words)))
    return context, pooled


def embed_all(prompts: Sequence[str]) -> tuple[Float32, Float32]:
    """Embed several prompts: [prompts, TOKENS, CHANNELS] and [prompts, CHANNELS]."""
    pairs = [embed(prompt) for prompt in prompts]
    return np.stack([context for context, _ in pairs]), np.stack([pooled for _, pooled in pairs])
