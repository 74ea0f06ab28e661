"""The node pack, as ComfyUI loads it.

Nothing of ComfyUI is imported until ComfyUI asks for the nodes, so that test runners and tools
may import this file without one. The nodes live in `nodes`, which deliberately has no
``__init__.py``: as a namespace package it can never shadow ComfyUI's own ``nodes.py``, whatever
the order of ``sys.path``.
"""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """ComfyUI's V3 entry point: the extension with all nodes of the pack."""
    from .nodes.extension import LDCPExtension

    return LDCPExtension()
