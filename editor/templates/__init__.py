"""Makes `workflows/` and `subgraphs/`: what they are (`pictures`, `files`), how they run with the demo, their pictures.

Run by `python dev.py run -m pixart_pack.editor.templates`.
"""
