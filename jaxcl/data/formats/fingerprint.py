"""Keys of files, by which what was made of them is found again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing

from jaxcl.data import fingerprint
from jaxcl.data.formats import storage

_BYTES = 16
# Behind a URL each block is a request, so few are read where the file system says when a file changed.
_REMOTE_BLOCKS = 4


def files_key(files: Sequence[str]) -> str:
    """Hash of files in their order, from their names (without folders), sizes and content.

    Files up to 32 MiB are read whole. Of larger ones, 512 blocks of 64 KiB are read, and the time of the last change
    counts. Of a file behind a URL that has a time or a checksum, these count, and four blocks.

    Args:
      files: paths or URLs.

    Raises:
      UserError: a file cannot be read.
    """
    found = hashlib.blake2b(digest_size=_BYTES)
    for path in files:
        size, changed = storage.stat(path)
        remote = bool(changed) and storage.is_url(path)
        name = path.replace("\\", "/").rpartition("/")[2]
        stamp = changed if remote or size > fingerprint.BLOCKS * fingerprint.BLOCK else ""
        found.update(repr((name, size, stamp)).encode("utf-8", "surrogateescape"))
        with storage.naming(path), closing(storage.open_binary(path)) as file:
            for block in fingerprint.sampled(file, size, _REMOTE_BLOCKS if remote else None):
                found.update(block)
    return found.hexdigest()
