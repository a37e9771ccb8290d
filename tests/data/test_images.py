"""Images in records: how they are read, what is refused, and which tokens and tiles come of them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxcl.data.chat_rows import ChatRows, encode_openings
from jaxcl.data.conversations import encode_conversations
from jaxcl.data.examples import ExampleTable, read_shards, write_shards
from jaxcl.data.images import decode as decoding
from jaxcl.data.images import thumbnails
from jaxcl.data.images.decode import MAX_PIXELS, check, decode
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.images.reference import MARK, Reference, put_in, read_image, read_images, shown, take_out
from jaxcl.data.images.seen import look
from jaxcl.data.images.thumbnails import image_keys, thumbnail, write_thumbnails
from jaxcl.data.images.tokens import see
from jaxcl.data.messages import read_messages
from jaxcl.data.pairs import PairRows
from jaxcl.data.plan import Shape
from jaxcl.data.sources import load_source
from jaxcl.data.spec import DataConfig
from jaxcl.errors import UserError
from tests.tiny.chats import seeing_tokenizer, show
from tests.tiny.texts import small_tokenizer
from tests.tiny.vision import COLOURS, png

IMAGES = ImageProcessor(tile=8, longest_edge=16, split=True, image_tokens=2)
WHOLE = IMAGES._replace(split=False)
RED, BLUE = png(COLOURS["red"]), png(COLOURS["blue"], 4, 8)
TINY_IMAGE = "<fake_token_around_image><global-img><image><image><fake_token_around_image>"


def of(content: bytes, name: str = "") -> str:
    return Reference(name, content).write()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises this size and whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc + struct.pack(">I", 0) + b"IDAT\x35\xaf\x06\x1e"


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 9_999), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_rgb", lambda _: pytest.fail("it was decoded"))
    for function in (check, decode):
        with pytest.raises(UserError, match=r"^rows row 3: .*allowed are 67,108,864"):
            function(bomb(*size), "rows row 3")


def test_an_image_of_the_largest_size_is_not_a_bomb() -> None:
    check(bomb(MAX_PIXELS // 8192, 8192), "x")


def test_broken_images_are_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    whole = file.getvalue()
    for content, message in (
        (whole[: len(whole) // 2], "the image is broken: .+"),
        (bomb(8, 8), "the image is broken: .+"),
        (b"text", "not an image, or broken; allowed are PNG, JPEG, WEBP, GIF, BMP"),
        (b"", "not an image, or broken"),
        (b"II*\x00" + bytes(100), "not an image, or broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image, or broken"),
    ):
        with pytest.raises(UserError, match=f"^rows row 3: {message}") as caught:
            decode(content, "rows row 3")
        assert "\n" not in str(caught.value)


def test_images_are_turned_as_their_data_say() -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 0] = 255
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    found = decode(file.getvalue(), "x")
    assert found.shape == (4, 2, 3)
    assert np.argwhere(found[..., 0]).tolist() == [[0, 1]]


# ---------------------------------------------------------------- records


def test_forms_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    array = np.full((8, 8, 3), COLOURS["red"], np.uint8)
    for value in ("a.png", RED, {"path": "a.png", "bytes": None}, {"bytes": RED, "path": "far/away.png"}, array):
        (image,) = take_out(read_image(value, "x", tmp_path), "x")[1]
        np.testing.assert_array_equal(decode(image.content, "x"), array)
    assert read_images(None, "x", None) == []
    assert len(read_images(["a.png", RED], "x", tmp_path)) == 2
    assert shown(read_image("a.png", "x", tmp_path) + "b" + of(RED)) == "[image a.png]b[image]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://host/a.png", "https://host/a.png is a URL; images are read from local files only"),
        ("gs://bucket/a.png", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("b.png", "cannot read the image b.png: no such file"),
        ("\x00", "cannot read the image"),
        ("", "expected an image: a path, bytes, or an object with path or bytes"),
        (7, "expected an image"),
        ({}, "expected an image"),
        (b"text", "not an image, or broken"),
        (np.zeros((3, 3)), r"an array of float64 with shape \[3, 3\] is not an image"),
        ("text.png", "text.png: not an image, or broken"),
    ],
)
def test_what_is_not_an_image_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match=f"^rows.jsonl line 3: field 'image': .*{message}"):
        read_image(value, "rows.jsonl line 3: field 'image'", tmp_path)


def test_images_take_their_places() -> None:
    assert put_in("a <image> b <image>", ["1", "2"], "x") == "a 1 b 2"
    assert put_in("a", ["1", "2"], "x") == "12a"
    assert put_in("a <image>", [], "x") == "a <image>"
    with pytest.raises(UserError, match=r"^row 1: 2 images, but <image> occurs 1 times in the text"):
        put_in("a <image>", ["1", "2"], "row 1")


def test_marks_of_a_text_are_no_images() -> None:
    assert take_out(f"a{MARK}b|c", "x") == (f"a{MARK}b|c", [])
    with pytest.raises(UserError, match=r"^row 1: the text holds the character U\+FFFC"):
        take_out(f"a{MARK}b{of(RED)}", "row 1")


def test_images_of_messages(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    gpt = {"role": "assistant", "content": "Red."}
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]
    expected = of(RED, "a.png") + "What?"
    assert read_messages({"messages": [{"role": "user", "content": parts}, gpt]}, "x", (), tmp_path)[0]["content"] == (
        expected
    )
    open_parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    for content in (open_parts, "<image>What?", "What?"):
        record = {"messages": [{"role": "user", "content": content}, gpt]}
        assert read_messages(record, "x", [expected.removesuffix("What?")])[0]["content"] == expected
    user = {"role": "user", "content": "<image>a<image>"}
    later = {"role": "user", "content": "b<image>"}
    found = read_messages({"messages": [user, gpt, later, gpt]}, "x", ["1", "2", "3"])
    assert [message["content"] for message in found[::2]] == ["1a2", "b3"]
    alpaca = {"instruction": "What?", "input": "<image>", "output": "Red."}
    assert read_messages(alpaca, "x", [expected])[0]["content"] == f"What?\n{expected}"
    assert read_messages(alpaca | {"input": ""}, "x", ["1"])[0]["content"] == "1What?"


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ([{"type": "image"}], [], "message 1: part 1 of 'content': an image without a path, and image_field holds 0"),
        ([{"type": "image_url", "image_url": {"url": "http://x"}}], [], "part 1 of 'content' has the type 'image_url'"),
        ([{"type": "image"}], ["1", "2"], "2 images, of which the messages use 1"),
        ("<image>", ["1", "2"], "2 images, but <image> occurs 1 times"),
        ([{"type": "image", "path": "nowhere.png"}], [], "part 1 of 'content': cannot read the image nowhere.png"),
    ],
)
def test_images_that_messages_lack_are_errors(content: Any, images: list[str], message: str) -> None:
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(UserError, match=f"^chats row 2: .*{message}"):
        read_messages(record, "chats row 2", images)


def test_answers_hold_no_images() -> None:
    parts = [{"type": "image", "bytes": RED}]
    record = {"messages": [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": parts}]}
    with pytest.raises(UserError, match=r"^row 2: message 2: an answer holds an image"):
        read_messages(record, "row 2")


def test_a_source_reads_images_beside_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(RED)
    rows = [{"prompt": f"What? {n}", "answer": "Red.", "image": "pictures/a.png"} for n in range(9)]
    chats = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": "pictures/a.png"}, {"type": "text", "text": str(n)}],
                },
                {"role": "assistant", "content": "Red."},
            ]
        }
        for n in range(9)
    ]
    for name, content in (("rows", rows), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    monkeypatch.chdir("/")
    found = load_source(f"jsonl:{tmp_path}/rows.jsonl", image_field="image")
    assert found.train[0]["prompt"].startswith(of(RED, "pictures/a.png") + "What? ")
    chat = load_source(f"jsonl:{tmp_path}/chats.jsonl")
    assert chat.kind == "chat"
    assert json.loads(chat.train[0]["prompt"])[0]["content"].startswith(of(RED, "pictures/a.png"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pictures").rename(tmp_path / "elsewhere" / "pictures")
    for name, given in (("rows", {"image_field": "image"}), ("chats", {})):
        with pytest.raises(UserError, match=r"cannot read the image pictures/a\.png"):
            load_source(f"jsonl:{tmp_path}/{name}.jsonl", **given)
        moved = load_source(f"jsonl:{tmp_path}/{name}.jsonl", image_folder=f"{tmp_path}/elsewhere", **given)
        assert list(moved.train) == list({"rows": found, "chats": chat}[name].train)
    (tmp_path / "elsewhere" / "pictures").rename(tmp_path / "pictures")
    (tmp_path / "pictures" / "a.png").unlink()
    with pytest.raises(UserError, match=r"rows.jsonl line 1: field 'image': cannot read the image pictures/a.png"):
        load_source(f"jsonl:{tmp_path}/rows.jsonl", image_field="image")
    with pytest.raises(UserError, match=r"rows.jsonl line 1: no field 'picture'; its fields are prompt, answer, image"):
        load_source(f"jsonl:{tmp_path}/rows.jsonl", image_field="picture")
    with pytest.raises(UserError, match=r"image_field is for prompts and conversations; the rows of .* are text"):
        load_source(f"jsonl:{tmp_path}/rows.jsonl", image_field="image", kind="text", text_field="prompt")


# ---------------------------------------------------------------- tokens and tiles


def texts_of(rows: PairRows, index: int, tokenizer: Any) -> str:
    return show(tokenizer, *(part.tolist() for part in rows.table[index]))


CONFIG = DataConfig(prompt_length=200, answer_length=8, length_multiple=1, buckets=2)


def test_pairs_with_images() -> None:
    tokenizer = seeing_tokenizer(IMAGES)
    pairs = [
        {"prompt": f"a <image> {of(RED)}is red, {of(BLUE)}", "answer": "b"},
        {"prompt": "no image", "answer": "c"},
    ]
    rows = PairRows(pairs, tokenizer, CONFIG, task=0, name="task")
    tile = "<fake_token_around_image><row_{}_col_{}><image><image>".format
    square = f"{tile(1, 1)}{tile(1, 2)}\n{tile(2, 1)}{tile(2, 2)}\n\n{TINY_IMAGE}"
    wide = f"{tile(1, 1)}{tile(1, 2)}\n\n{TINY_IMAGE}"
    assert texts_of(rows, 0, tokenizer) == f"a <image> {square}is red, {wide}⟦ b<end_of_utterance>⟧"
    assert rows.tiles.tolist() == [8, 0]
    # The text of the prompt that looks like an image token is not one.
    shapes = rows.shapes([])
    assert [shape.images for shape in shapes] == [0, 8]
    row = rows.row(0, shapes[-1], ())
    image_id = tokenizer.backend.token_to_id("<image>")
    np.testing.assert_array_equal(row["image_index"] >= 0, row["tokens"] == image_id)
    assert row["image_index"][row["image_index"] >= 0].tolist() == list(range(16))
    assert [tuple(tile[0, 0]) for tile in row["pixels"]] == 5 * [COLOURS["red"]] + 3 * [COLOURS["blue"]]
    other = rows.row(1, shapes[-1], ())
    assert not other["pixels"].any()
    assert np.all(other["image_index"] == -1)
    assert "pixels" not in rows.row(1, shapes[0], ())
    filler = rows.row(-1, shapes[-1], ())
    assert {name: value.shape for name, value in filler.items()} == {name: value.shape for name, value in row.items()}
    with pytest.raises(UserError, match=r"^task: an example has more images than any example of tasks with data"):
        rows.row(0, Shape(200, 8, 2), ())


def test_examples_keep_their_tiles_in_files(tmp_path: Path) -> None:
    tokenizer = seeing_tokenizer(WHOLE)
    pairs = [
        {"prompt": of(one) + "a", "answer": "b"} if one else {"prompt": "a", "answer": "b"} for one in (RED, b"", BLUE)
    ]
    table = PairRows(pairs, tokenizer, CONFIG, task=0, name="task").table
    write_shards(tmp_path / "a.arrow", table.shards, np.dtype(np.uint16), pixels=True)
    read = ExampleTable(read_shards(tmp_path / "a.arrow"))
    taken = read.take([2, 1])
    assert table.pixel_bytes.tolist() == read.pixel_bytes.tolist() == [192, 0, 192]
    assert taken.pixel_bytes.tolist() == [192, 0]
    for number in range(3):
        np.testing.assert_array_equal(read.pixels(number), table.pixels(number))
    np.testing.assert_array_equal(taken.pixels(0), table.pixels(2))
    assert table.costs[0] - table.costs[1] >= 192


def chat(*contents: str) -> list[Any]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(contents)]


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (("Hi", "a"), "<|im_start|>User: Hi<end_of_utterance>\nAssistant:⟦ a<end_of_utterance>⟧\n"),
        (
            (of(RED) + "What?", "a", "And?", "b"),
            f"<|im_start|>User:{TINY_IMAGE}What?<end_of_utterance>\nAssistant:⟦ a<end_of_utterance>⟧\n"
            "User: And?<end_of_utterance>\nAssistant:⟦ b<end_of_utterance>⟧\n",
        ),
        (
            (f"<image> <end_of_utterance>{of(RED)}", "a <image>", of(RED), "b"),
            f"<|im_start|>User: <image> <end_of_utterance>{TINY_IMAGE}<end_of_utterance>\nAssistant:"
            f"⟦ a <image><end_of_utterance>⟧\nUser:{TINY_IMAGE}<end_of_utterance>\n"
            "Assistant:⟦ b<end_of_utterance>⟧\n",
        ),
    ],
)
def test_conversations_with_images_in_a_template_of_parts(contents: tuple[str, ...], expected: str) -> None:
    tokenizer = seeing_tokenizer(WHOLE)
    found = encode_conversations(
        [chat(*contents)], tokenizer, length=200, learn="all", where=lambda index: f"row {index}"
    )
    assert show(tokenizer, found.ids[0], found.spans[0]) == expected
    real = sum(text.count(MARK) // 2 for text in contents)
    assert found.ids[0].count(tokenizer.backend.token_to_id("<image>")) == 2 * real
    assert (0 if found.pixels[0] is None else len(found.pixels[0])) == real


@pytest.mark.parametrize("template", ["vicuna", "llama2"])
def test_conversations_with_images_in_other_templates(template: str) -> None:
    tokenizer = seeing_tokenizer(WHOLE)
    config = CONFIG.model_copy(update={"chat_template": template})
    row = {"prompt": json.dumps(chat(f"See {of(RED)}?")), "answer": "Red."}
    rows = ChatRows([row], tokenizer, config, task=0, name="task")
    text = texts_of(rows, 0, tokenizer)
    assert f"See {TINY_IMAGE}?" in text
    assert "⟦ Red.<end_of_utterance>⟧" in text
    assert rows.tiles.tolist() == [1]
    opening = encode_openings([row["prompt"]], tokenizer, config)
    assert opening.ids[0] == rows.prompt(0).tolist()
    np.testing.assert_array_equal(opening.pixels[0].ravel(), rows.table.pixels(0))


def test_conversations_with_images_are_not_cut() -> None:
    tokenizer = seeing_tokenizer(WHOLE)
    messages = chat("word " * 40, "a", of(RED) + "What?", "b")
    with pytest.raises(
        UserError, match=r"^row 0: the conversation has \d+ tokens with its images, and one with images"
    ):
        encode_conversations([messages], tokenizer, length=40, learn="all", where=lambda index: f"row {index}")


def test_broken_pixels_name_row_and_file() -> None:
    cut = of(png(COLOURS["red"], 64, 64)[:-30], "dog.png")
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": of(RED) + cut, "answer": "b"}]
    with pytest.raises(UserError, match=r"^task row 2: image 2 \(dog.png\): the image is broken"):
        PairRows(rows, seeing_tokenizer(WHOLE), CONFIG, task=0, name="task")
    with pytest.raises(UserError, match=r"^row 1: an image, but the model does not see"):
        look([of(RED)], None, "row 1")


def test_a_tokenizer_without_tokens_for_images_is_refused() -> None:
    with pytest.raises(
        UserError, match="the tokenizer has no token for <image>, <fake_token_around_image>, <global-img>"
    ):
        see(small_tokenizer(), IMAGES, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"do_resize": False}, "do_resize=False is not supported; allowed is true"),
        ({"size": {"height": 3, "width": 3}}, "expected a number of pixels as longest_edge"),
        ({"size": 7}, "expected a number of pixels as longest_edge"),
        ({"max_image_size": {"longest_edge": 9}}, "max_image_size is 9, but the model's image_size 8"),
        ({"resample": "big"}, "resample=big is not supported; allowed are 0 to 5"),
    ],
)
def test_processors_that_cannot_be_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^file: .*{message}"):
        ImageProcessor.read({"max_image_size": {"longest_edge": 8}} | content, 8, 4, "file")


def test_what_a_processor_writes_it_reads() -> None:
    for one in (IMAGES, IMAGES._replace(split=False, resample=3)):
        assert ImageProcessor.read(one.content(), one.tile, one.image_tokens, "x") == one


# ---------------------------------------------------------------- thumbnails


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    wide = png(COLOURS["red"], 200, 400)
    small = decode(thumbnail(wide, "x"), "x")
    assert small.shape == (48, 96, 3)
    assert (small == COLOURS["red"]).all()
    assert decode(thumbnail(png(COLOURS["blue"], 4, 8), "x"), "x").shape == (4, 8, 3)  # not enlarged


def test_thumbnails_are_written_once_by_names_of_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = image_keys(f"a {of(RED, 'one')} b {of(BLUE)} c {of(RED, 'two')}")
    assert [content for _, content in keys] == [RED, BLUE, RED]
    assert keys[0][0] == keys[2][0] != keys[1][0]
    path = tmp_path / "task00.npz"
    write_thumbnails(path, dict(keys[:1]))
    write_thumbnails(path, dict(keys))  # more than there are
    with np.load(path) as stored:
        assert set(stored.files) == set(dict(keys))
        assert (decode(stored[keys[1][0]].tobytes(), "x") == COLOURS["blue"]).all()
    monkeypatch.setattr(thumbnails, "thumbnail", lambda *_: pytest.fail("it was made again"))
    write_thumbnails(path, dict(keys))
    monkeypatch.undo()
    path.write_bytes(b"PK damaged")
    write_thumbnails(path, dict(keys))
    with np.load(path) as stored:
        assert set(stored.files) == set(dict(keys))
