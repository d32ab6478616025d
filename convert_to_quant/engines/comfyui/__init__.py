"""ComfyUI as the engine: its own loader in process, or a running server of it."""
