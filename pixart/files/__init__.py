"""Files and folders of strangers, read within bounds, and files of our own, which appear whole or not at all."""
