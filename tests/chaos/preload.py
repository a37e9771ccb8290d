"""What every life of a run begins with, done once in the process that all lives are forks of.

It takes most of a life's time otherwise: TensorBoard's writer imports torch where that is installed, and the data is a
table of all characters. The backend of jax must not be opened here, since it does not survive a fork.
"""

from __future__ import annotations

import grain.python  # noqa: F401
import tensorboardX  # noqa: F401

import jaxcl.run.sequence  # noqa: F401
import tests.chaos.member  # noqa: F401
from jaxcl.data.stdlib import read_stdlib

read_stdlib("unicode_bidi")
