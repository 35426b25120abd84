"""What a training begins with beside a PixArt as it is: a class-conditional DiT, or a PixArt grown to another size."""
