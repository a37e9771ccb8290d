import json
import re
import subprocess
import sys

import gguf
import pytest
from transformers import AutoTokenizer

from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from tests.tiny.texts import TEXTS, small_tokenizer


def write_gguf(path, *, kind="gpt2", pre="smollm", leave_out=(), add_bos=False, ends=None, also=(), templates=None):
    """The small tokenizer as GGUF metadata, the way llama.cpp writes it."""
    source = json.loads(small_tokenizer().backend.to_str())["model"]
    tokens = [token for token, _ in sorted(source["vocab"].items(), key=lambda item: item[1])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    tokens += also
    if "tokens" not in leave_out:
        writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in source["merges"]])
    writer.add_token_types([3 if index < 6 or tokens[index] in also else 1 for index in range(len(tokens))])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(templates or "{{ messages }}")
    if ends is not None:
        writer.add_eot_token_id(ends[0])
        writer.add_eom_token_id(ends[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_tokenizer_in_a_gguf_file_encodes_like_its_source(tmp_path):
    loaded = Tokenizer.load(write_gguf(tmp_path / "model.gguf"))
    source = small_tokenizer()
    for text in (*TEXTS, "  two  spaces\n\n\ttab, don't, 2024, naïve 東京 🙂"):
        assert loaded.encode(text) == source.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.mask_id) == (0, 1, 2, None)
    assert not loaded.add_bos
    assert loaded.chat_template == "{{ messages }}"
    assert loaded.encode("<eos>", specials=True) == [2]
    assert set(range(6)) <= loaded.special_ids


def test_every_token_that_ends_a_turn_is_found(tmp_path):
    assert Tokenizer.load(write_gguf(tmp_path / "plain.gguf")).end_ids == (2,)
    assert Tokenizer.load(write_gguf(tmp_path / "ids.gguf", ends=(5, 4))).end_ids == (2, 5, 4)
    named = Tokenizer.load(write_gguf(tmp_path / "names.gguf", also=["<|eot_id|>", "<|fim|>"]))
    assert named.end_ids == (2, named.backend.token_to_id("<|eot_id|>"))


@pytest.mark.parametrize("add_bos", [True, False])
def test_transformers_opens_a_text_as_the_file_says(tmp_path, add_bos):
    loaded = Tokenizer.load(write_gguf(tmp_path / "model.gguf", add_bos=add_bos, ends=(5, 4)))
    loaded.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("moving reviews").input_ids == [1] * add_bos + loaded.encode("moving reviews")
    assert Tokenizer.load(tmp_path / "saved").add_bos == add_bos
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == [2, 5, 4]


def test_named_chat_templates_are_read(tmp_path):
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    loaded = Tokenizer.load(write_gguf(tmp_path / "model.gguf", templates=templates))
    assert loaded.chat_template == {"default": "A", "tool_use": "B"}


@pytest.mark.parametrize("pre", [None, "default"])
def test_rules_that_the_file_does_not_name_are_not_assumed(tmp_path, pre):
    file, copy = write_gguf(tmp_path / "model.gguf", pre=pre), tmp_path / "copy.gguf"
    with pytest.raises(UserError, match=r"model\.gguf: tokenizer\.ggml\.pre is missing.*set tokenizer\.path") as caught:
        Tokenizer.load(file)
    # The remedy works as it is written.
    command = re.search(r"gguf-new-metadata (.*) COPY\.gguf \(known: .*gpt-2", str(caught.value))[1]
    arguments = [*command.replace("NAME", "gpt-2").split(), str(copy)]
    main = "from gguf.scripts.gguf_new_metadata import main; main()"
    subprocess.run([sys.executable, "-c", main, *arguments], check=True, capture_output=True)
    pieces = Tokenizer.load(copy).backend.pre_tokenizer.pre_tokenize_str("in 12345")
    assert [piece for piece, _ in pieces] == ["in", "Ġ12345"]


def test_pre_tokenizers_differ_in_digits(tmp_path):
    def pieces(pre):
        backend = Tokenizer.load(write_gguf(tmp_path / f"{pre}.gguf", pre=pre)).backend
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in 12345")]

    assert pieces("smollm") == ["in", "Ġ", "1", "2", "3", "4", "5"]
    assert pieces("gpt-2") == ["in", "Ġ12345"]
    assert pieces("llama-bpe") == ["in", "Ġ", "123", "45"]
    assert pieces("qwen2") == ["in", "Ġ", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "llama"}, "tokenizer kind 'llama'"),
        ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of' is not known.*smollm"),
        ({"leave_out": ("tokens",)}, "tokenizer.ggml.tokens is missing"),
    ],
)
def test_other_tokenizers_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.load(write_gguf(tmp_path / "model.gguf", **options))


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "absent.gguf")
    (tmp_path / "foreign.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(UserError, match=r"foreign\.gguf is not a complete GGUF file"):
        Tokenizer.load(tmp_path / "foreign.gguf")
