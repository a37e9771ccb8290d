"""The bytes of a file, block by block: plain, gzip, zstd or xz, recognised by its first bytes."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO, cast

from jaxcl.data.formats.storage import naming, open_binary
from jaxcl.errors import UserError

#: Bytes that are read at once.
BLOCK = 2**20
#: Bytes that a line or a record may have: what is compressed may stand for a thousand times as many.
LONGEST = 2**25
#: What the names of compressed files end in.
COMPRESSED = (".gz", ".zst", ".xz")
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\x00"}
_SUFFIX = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


def bare(name: str) -> str:
    """A name without what names of compressed files end in.

    >>> bare("rows.jsonl.zst"), bare("rows.jsonl")
    ('rows.jsonl', 'rows.jsonl')
    """
    return name.removesuffix(next((suffix for suffix in COMPRESSED if name.endswith(suffix)), ""))


def compression(path: str) -> str | None:
    """How a file is compressed: gzip, zstd, xz, or none.

    Raises:
      UserError: the file cannot be read, or was cut within its first bytes.
    """
    with naming(path), closing(open_binary(path)) as file:
        return _kind(path, file.read(6))


def blocks(path: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed.

    Raises:
      UserError: the file cannot be read or is damaged.
    """
    kind: str | None = None
    with naming(path), closing(open_binary(path)) as file:
        try:
            kind = _kind(path, file.read(6))
            file.seek(0)
            with closing(_decompressed(file, kind)) as stream:
                while block := stream.read(BLOCK):
                    yield block
        except _DAMAGE as error:
            raise UserError(f"{path} is a damaged {kind} file: {error}") from error
        except OSError as error:
            if kind != "zstd" or error.errno is not None:
                raise
            raise UserError(f"{path} is a damaged zstd file: {error}") from error


def _kind(path: str, head: bytes) -> str | None:
    kind = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)
    named = next((kind for suffix, kind in _SUFFIX.items() if path.endswith(suffix)), None)
    # A file that only is called compressed is read as it is, as some programs decompress what they download.
    if kind is None and named and _MAGIC[named].startswith(head):
        raise UserError(f"{path} is a damaged {named} file: it ends after {len(head)} bytes")
    return kind


def _decompressed(file: BinaryIO, kind: str | None) -> BinaryIO:
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if kind == "xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    if kind == "zstd":
        import pyarrow as pa

        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
    return file
