"""What adapters are made of and begin with, beside a LoRA's own layers."""
