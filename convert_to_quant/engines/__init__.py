"""Sources of activations: `diffusers` runs the network in diffusers' classes, `layer` simulates one layer at a time.

Modules are imported when they are first used: torch and diffusers take seconds to load.
"""
