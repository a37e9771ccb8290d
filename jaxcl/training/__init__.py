"""Train state, step, optimizer, loop, checkpoints, metrics."""
