"""How encoded pictures lie on disk: tensors in shards, and the list of a dataset in mapped columns."""
