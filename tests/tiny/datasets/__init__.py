"""Data sets for the tests of the tfds: source."""
