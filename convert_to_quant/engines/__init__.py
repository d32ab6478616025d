"""Where activations come from.

`diffusers` runs the network itself, in diffusers' transformer classes; `layer` simulates one layer at a time.
Nothing here is imported before it is used: torch and diffusers take seconds to load.
"""

SAMPLES, STEPS = 8, 8
"""What a model is shown by default: images, and noise levels on the way of each from noise to image. A sample is one
image, an evaluation one call of the network: `STEPS` per sample."""

SIDE_PIXELS, FRAMES, TEXT_TOKENS = 256, 1, 64
"""Default size of an image or video, and length of its text."""
