"""What made a picture or a training, kept in files and in Weights & Biases."""
