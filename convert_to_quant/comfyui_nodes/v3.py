"""The same nodes in ComfyUI's second form (V3): classes without instances, listed by `comfy_entrypoint`.

ComfyUI 0.33 loads a pack that has both forms in the first one. This one stands ready for a ComfyUI that asks for it
alone. Nothing is described twice: each class is made from the one in `nodes`, whose tables say what goes in and out.
"""

from __future__ import annotations

import importlib
from typing import Any

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

_HOOKS = {"IS_CHANGED": "fingerprint_inputs", "VALIDATE_INPUTS": "validate_inputs"}
"""Class methods of the first form, and what the second one calls them."""


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls: a ComfyExtension with all our nodes."""
    api = importlib.import_module("comfy_api.latest")

    async def get_node_list(_self: Any) -> list[type]:
        return [as_v3(name, api.io) for name in NODE_CLASS_MAPPINGS]

    return type("ConvertToQuant", (api.ComfyExtension,), {"get_node_list": get_node_list})()


def as_v3(name: str, io: Any) -> type:
    """The second form of a node.

    Args:
        name: a key of `NODE_CLASS_MAPPINGS`.
        io: ComfyUI's `comfy_api.latest.io`.
    """
    node: Any = NODE_CLASS_MAPPINGS[name]

    def define_schema(_cls: Any, /) -> Any:
        inputs = node.INPUT_TYPES()
        outputs = zip(node.RETURN_TYPES, node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
        return io.Schema(
            node_id=name,
            display_name=NODE_DISPLAY_NAME_MAPPINGS[name],
            category=node.CATEGORY,
            description=node.DESCRIPTION,
            inputs=[
                _input(io, key, *described, optional=group == "optional")
                for group in ("required", "optional")
                for key, described in inputs.get(group, {}).items()
            ],
            outputs=[io.Custom(kind).Output(said, tooltip=tooltip) for kind, said, tooltip in outputs],
            hidden=[io.Hidden[key] for key in inputs.get("hidden", {})],
            is_output_node=getattr(node, "OUTPUT_NODE", False),
        )

    def execute(cls: Any, /, **inputs: Any) -> Any:
        hidden = {key: getattr(cls.hidden, key) for key in node.INPUT_TYPES().get("hidden", {})}
        return getattr(node(), node.FUNCTION)(**inputs, **hidden)

    members: dict[str, Any] = {theirs: vars(node)[ours] for ours, theirs in _HOOKS.items() if ours in vars(node)}
    members |= {"define_schema": classmethod(define_schema), "execute": classmethod(execute), "__doc__": node.__doc__}
    return type(node.__name__, (io.ComfyNode,), members)


def _input(io: Any, key: str, kind: Any, settings: dict[str, Any], *, optional: bool) -> Any:
    """One input; where its type is a list, one of these is chosen."""
    if isinstance(kind, list):
        return io.Combo.Input(key, options=kind, optional=optional, **settings)
    return io.Custom(kind).Input(key, optional=optional, extra_dict=settings)
