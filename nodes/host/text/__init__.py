"""Prompts in the host: T5 as CLIP, captions as CONDITIONING, and what is kept of both."""
