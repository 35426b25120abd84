"""Makes what a user meets in the editor: the workflows of `workflows/` and the help pages of `web/docs/`."""
