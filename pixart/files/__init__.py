"""Files and folders of strangers, before anyone knows what is in them."""
