"""Nodes for ComfyUI: record what a model's layers receive while it samples, and calibrate its FP8 checkpoint from that.

`nodes` has the nodes, thin over `recording` and `folders`; `pack` puts them into a ComfyUI.
ComfyUI's own modules are imported where they are used: outside of it, only they are missing. This package imports
nothing by itself, so that installing the pack loads no torch.
"""
