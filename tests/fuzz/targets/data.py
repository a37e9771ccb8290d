"""Data files and what belongs to a tokenizer."""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxcl.data.chat_templates import CHAT_TEMPLATES
from jaxcl.data.conversations import encode_conversations
from jaxcl.data.formats import find_records
from jaxcl.data.images.decode import FORMATS, decode
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.messages import read_messages
from jaxcl.data.spec import ImageConfig
from jaxcl.data.template_worker import TemplateError, render
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.models.vision_config import VisionConfig
from jaxcl.run.images import image_processor
from tests.fuzz.harness import Target
from tests.fuzz.targets.common import ROWS, lines_of, made, text_of, written
from tests.tiny.vision import VISION

MOST = 100_000  # rows that are read of one file

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]},
]  # fmt: skip


def records(scheme: str, suffix: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        place = written(folder / f"train.{suffix}", content)
        found = find_records(scheme, str(place), text_field="text").splits["all"]
        for part in found.parts():
            # Rows come as a stream: a little compressed file may stand for any number of them.
            for where, record in itertools.islice(found.read(part), MOST):
                str(where), dict(record)

    return read


def read_labels(content: bytes, folder: Path) -> None:
    written(folder / "train.jsonl", lines_of(ROWS))
    written(folder / "labels.json", content)
    find_records("jsonl", str(folder), text_field="text")


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{**row, "list": [1, 2], "struct": {"a": b"x"}} for row in ROWS])
    return made(lambda path: pq.write_table(table, path))


def packed(compress: Callable[[bytes], bytes], ending: str) -> Target:
    """Compressed rows: their checksum rejects nearly all changes, so what is not compressed is, and then read."""
    read, magic = records("jsonl", f"jsonl.{ending}"), compress(b"")[:4]

    def reads(content: bytes, folder: Path) -> None:
        read(content if content.startswith(magic) else compress(content), folder)

    return Target(reads, lambda: [compress(lines_of(ROWS)), compress(lines_of(CHATS)), lines_of(ROWS)])


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three one two " * 9], 270)


@functools.cache
def tokenizer_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_chats(content: bytes, folder: Path) -> None:
    place = written(folder / "train.jsonl", content)
    found = find_records("jsonl", str(place), text_field="text").splits["all"]
    for part in found.parts():
        for where, record in found.read(part):
            messages = read_messages(record, str(where))
            encode_conversations(
                [messages], tokenizer(), length=96, learn="all", where=lambda _: "row", template="llama2",
                on_long_answer="cut",
            )  # fmt: skip


def read_template(content: bytes, folder: Path) -> None:
    said = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    render(content.decode("utf-8", "replace"), said, {"bos_token": "<s>", "eos_token": "</s>"}, learned=True)


def tokenizer_file(name: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        for other, kept in tokenizer_files().items():
            written(folder / other, kept)
        written(folder / name, content)
        Tokenizer.load(folder).backend.encode("one two 3")

    return read


def images() -> list[bytes]:
    """A small image in every format that is decoded."""
    found = []
    for kind in FORMATS:
        file = io.BytesIO()
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, kind)
        found.append(file.getvalue())
    return found


def read_processor(content: bytes, folder: Path) -> None:
    """The settings of images beside weights, and an image that is processed so."""
    written(folder / "preprocessor_config.json", content)
    processor = image_processor(VisionConfig(**VISION), ImageConfig(), folder)
    processor.specials()
    tiles = processor.tiles(np.zeros((3, 5, 3), np.uint8))
    processor.text(tiles.rows, tiles.columns)


def processors() -> list[bytes]:
    return [text_of(ImageProcessor(VISION["image_size"], 32, split, 4).content()) for split in (True, False)]


TARGETS: dict[str, Target] = {
    "json": Target(records("json", "json"), lambda: [text_of(ROWS), b"\xef\xbb\xbf [ {} , {\"a\": 1.5} ]\n"]),
    "jsonl": Target(records("jsonl", "jsonl"), lambda: [lines_of(ROWS), lines_of(CHATS), text_of(ROWS)]),
    "text": Target(records("text", "txt"), lambda: ["one\r\ntwo é\r\u2028three\n\n".encode(), b"\xef\xbb\xbfa"]),
    "csv": Target(records("csv", "csv"), lambda: [b'a,b\n1,"x\n""y"""\n2,z\n', b"a\r\n1\r\n"]),
    "tsv": Target(records("tsv", "tsv"), lambda: [b'a\tb\n1\t"x\n2\tz\n']),
    "parquet": Target(records("parquet", "parquet"), lambda: [parquet()]),
    "gzip": packed(functools.partial(gzip.compress, mtime=0), "gz"),
    "xz": packed(functools.partial(lzma.compress, preset=0), "xz"),
    "zstd": packed(zstd, "zst"),
    "labels": Target(read_labels, lambda: [b'["a", "b"]']),
    "conversations": Target(read_chats, lambda: [text_of(chat) for chat in CHATS]),
    "image": Target(lambda content, _: decode(content, "x"), images, weight=2),
    "preprocessor_config": Target(read_processor, processors),
    "chat_template": Target(
        read_template, lambda: [text.encode() for text in CHAT_TEMPLATES.values()], (TemplateError,),
        weight=4, waits=20.0,
    ),
    "tokenizer": Target(tokenizer_file("tokenizer.json"), lambda: [tokenizer_files()["tokenizer.json"]], weight=2),
    "tokenizer_config": Target(
        tokenizer_file("tokenizer_config.json"),
        lambda: [tokenizer_files()["tokenizer_config.json"], text_of({
            "add_bos_token": True, "bos_token": {"content": "<bos>"}, "eos_token": "<eos>",
            "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        })],
        weight=2,
    ),
    "generation_config": Target(
        tokenizer_file("generation_config.json"), lambda: [b'{"eos_token_id": [1, 2]}'], weight=2
    ),
}  # fmt: skip
