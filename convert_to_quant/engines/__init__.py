"""Where activations come from.

`diffusers` runs the network itself, in diffusers' transformer classes; `layer` simulates one layer at a time.
Nothing here is imported before it is used: torch and diffusers take seconds to load.
"""

SAMPLES, STEPS = 16, 4
"""What a model is shown by default: images, and noise levels on the way of each from noise to image. A sample is one
image, an evaluation one call of the network: `STEPS` per sample. Outliers of few tokens differ between images more than
between levels: of 64 evaluations 8 images missed up to nine tenths of a range that 16 images saw (docs/experiments.md).
"""

SIDE_PIXELS, FRAMES, TEXT_TOKENS = 256, 1, 64
"""Default size of an image or video, and length of its text."""
