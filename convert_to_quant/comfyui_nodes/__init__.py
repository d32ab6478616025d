"""ComfyUI nodes: record a model's layer inputs while it samples, and calibrate its FP8 checkpoint from them.

`nodes` has the nodes, thin over `recording` and `folders`; `pack` installs them. ComfyUI's modules are imported inside
functions, since they exist only in ComfyUI. This file imports nothing, so that installing the pack does not load torch.
"""
