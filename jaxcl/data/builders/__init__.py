"""Published benchmarks as TFDS builders; importing this registers them, so that `tfds:trace/fomc` is found by name.

The files are put in place by hand, see `docs/data.md`; `jaxcl prepare` turns them into ArrayRecord files. TensorFlow
is never imported.
"""

from jaxcl.data.builders import das, instructions

__all__ = ["das", "instructions"]
