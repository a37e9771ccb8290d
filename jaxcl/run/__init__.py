"""One run: its folder, its parts, the sequence of tasks, and the model that comes out of it."""
