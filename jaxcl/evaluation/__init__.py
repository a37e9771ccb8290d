"""Task metrics and the continual-learning matrix."""
