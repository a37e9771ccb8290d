"""Checkpoints of other libraries to params and back."""
