"""A ComfyUI server that runs in this process."""

from comfyui_server import comfyui, flux, serve, types, wan

__all__ = ["comfyui", "flux", "serve", "types", "wan"]
