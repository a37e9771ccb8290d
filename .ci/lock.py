"""Prints as constraints what is installed of requirements and all they need: `lock.py 'jaxcl[dev]' torch`."""

import importlib.metadata
import platform
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

found: dict[str, str] = {}
seen: set[tuple[str, str]] = set()


def visit(requirement: Requirement) -> None:
    """Takes in a requirement, with its extras, and what it needs."""
    name = canonicalize_name(requirement.name)
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # for another platform
    # Builds for a kind of device have a label of their own, which other registries may not have.
    found[name] = installed.version.partition("+")[0]
    for extra in ("", *sorted(requirement.extras)):
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in installed.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                visit(needed)


for argument in sys.argv[1:]:
    visit(Requirement(argument))
del found["jaxcl"]
version = ".".join(platform.python_version_tuple()[:2])
print(f"# Python {version} on {platform.system()} {platform.machine()}; written by `make lock`.")
for name in sorted(found):
    print(f"{name}=={found[name]}")
