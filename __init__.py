"""PixArt for ComfyUI. Importing this folder imports nothing else; see `comfy_entrypoint`."""

WEB_DIRECTORY = "./web"  # help pages, web/docs/<node_id>.md, and what the editor runs


async def comfy_entrypoint():
    """Give ComfyUI the pack. A failure is logged with its traceback, since the host reports one line of it."""
    import logging

    try:
        from .nodes import PixArtExtension
    except Exception:
        logging.getLogger(__name__).exception("The PixArt pack could not be loaded:")
        raise
    return PixArtExtension()
