"""A data set of a few made-up reviews."""
