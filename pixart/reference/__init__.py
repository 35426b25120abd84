"""A picture that another is to resemble: attention to its keys and values."""
