"""What continual learning adds: one file a method, and the pure functions they share."""
