"""ComfyUI's interfaces, doubled."""

from comfyui_modules import comfyui, noise

__all__ = ["comfyui", "noise"]
