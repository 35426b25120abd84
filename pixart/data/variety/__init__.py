"""What a training makes of each picture and caption: how often, which part of it, and in which variants."""
