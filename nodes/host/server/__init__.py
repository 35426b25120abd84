"""The host's server: who asks it."""
