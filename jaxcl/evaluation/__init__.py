"""Task metrics, the continual-learning matrix, and what is measured with them after each task."""
