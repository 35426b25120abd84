"""Makes `workflows/`: what they are (`pictures`, `files`), as the editor saves them (`graph`), and for the API (`api`).

Run by `python dev.py run -m pixart_pack.editor.templates`.
"""
