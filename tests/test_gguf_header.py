"""Headers of GGUF files that announce more than there is."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcl.data.gguf_tokenizer import read_gguf_tokenizer
from jaxcl.errors import UserError
from jaxcl.gguf_header import check_header
from jaxcl.weights import read_config


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(*keys: bytes, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(keys)) + b"".join(keys) + tensors + bytes(64)


def listed(kind: int, count: int, content: bytes = b"") -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count) + content


def nested(depth: int) -> bytes:
    return text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin like one"),
        (b"GGUF", "ends too early"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**17), "announces 131072 keys and 0 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**21, 0), "announces 0 keys and 2097152 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**15), "ends too early"),
        (file_of(struct.pack("<Q", 2**60)), "announces 1152921504606847008 bytes or more, it has 96"),
        (file_of(listed(4, 2**60)), "announces a list of 1152921504606846976 values"),
        (file_of(listed(4, 2**20)), "announces 4194353 bytes or more"),
        (file_of(listed(8, 2**20)), "ends too early"),
        (file_of(listed(13, 1)), "a value of the unknown type 13"),
        (file_of(nested(9)), "a value of the unknown type 9"),
        (file_of(tensors=text("t") + struct.pack("<I", 5), count=1), "announces a tensor with 5 axes"),
    ],
)
def test_what_is_not_there_is_not_looked_for(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for read in (check_header, read_config, read_gguf_tokenizer):
        with pytest.raises(UserError, match=rf"model\.gguf is not a complete GGUF file: .*{message}"):
            read(path)


def written(path: Path, order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> bytes:
    """What the gguf package writes, with every kind of value."""
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    writer.add_token_list(["a", "bé", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("lists", [[1, 2], [3]])
    writer.add_bool("yes", True)
    writer.add_float64("real", 1.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_what_the_package_writes_is_accepted(order: gguf.GGUFEndian, tmp_path: Path) -> None:
    written(tmp_path / "model.gguf", order)
    check_header(tmp_path / "model.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 250), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_any_damage_is_one_line(place: int, value: int, cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = bytearray(written(path))
    content[place % len(content)] = value
    path.write_bytes(content[: len(content) - cut])
    for read in (read_config, read_gguf_tokenizer):
        with pytest.raises(UserError):
            read(path)
