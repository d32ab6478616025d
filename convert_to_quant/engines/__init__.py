"""Where activations come from.

`diffusers` runs the network itself, in diffusers' transformer classes; `layer` simulates one layer at a time.
Nothing here is imported before it is used: torch and diffusers take seconds to load.
"""
