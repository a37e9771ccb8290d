import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from jaxcl.data.spec import DataConfig, TokenizerConfig
from jaxcl.data.text import TextRows
from jaxcl.data.tokenizer import Tokenizer, _no_panic, prepare_tokenizer
from jaxcl.errors import UserError
from tests.tiny.texts import TEXTS, marked_tokenizer, small_tokenizer, spaced_tokenizer

TRAIN = """
from tests.tiny.texts import small_tokenizer
print(small_tokenizer().fingerprint)
"""


@settings(deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_gives_the_same_tokenizer_in_another_process(pytestconfig):
    output = subprocess.run(
        [sys.executable, "-c", TRAIN], cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == small_tokenizer().fingerprint


def test_saved_tokenizer_loads_alike_and_transformers_reads_it(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    try:
        tokenizer.save(tmp_path)
    finally:
        tokenizer.chat_template = None
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.chat_template == "{{ messages }}"
    assert loaded.add_bos
    for role in ("pad", "bos", "eos", "mask", "cls", "sep"):
        assert getattr(loaded, f"{role}_id") == getattr(tokenizer, f"{role}_id")
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("masked", [True, False])
def test_transformers_frames_texts_as_a_run_does(tmp_path, masked):
    tokenizer = prepare_tokenizer(TokenizerConfig(vocab_size=300), lambda: TEXTS, tmp_path, masked=masked)
    theirs, words = AutoTokenizer.from_pretrained(tmp_path), tokenizer.encode("moving reviews")
    before, after = tokenizer.frame(masked)
    assert theirs("moving reviews").input_ids == before + words + after * masked
    if masked:
        assert theirs("a", "b").input_ids == [4, *tokenizer.encode("a"), 5, *tokenizer.encode("b"), 5]
        assert tokenizer.pair_separator == [5]
    text = "Input : moving , not . n't"
    assert theirs.decode(tokenizer.encode(text)) == text
    again = prepare_tokenizer(TokenizerConfig(vocab_size=300), lambda: TEXTS, tmp_path, masked=masked)
    assert again.fingerprint == tokenizer.fingerprint


def test_a_foreign_tokenizer_is_framed_for_the_network_it_serves(tmp_path):
    small_tokenizer().save(tmp_path / "foreign")
    config = TokenizerConfig(path=str(tmp_path / "foreign"))
    tokenizer = prepare_tokenizer(config, lambda: (), tmp_path / "run", masked=False)
    assert tokenizer.backend.encode("a").ids == [1, *tokenizer.encode("a")]
    # RoBERTa's own framing of pairs is left alone.
    content = json.loads(small_tokenizer().backend.to_str())
    content["post_processor"] = {"type": "RobertaProcessing", "sep": ["<sep>", 5], "cls": ["<cls>", 4]}
    content["post_processor"] |= {"trim_offsets": True, "add_prefix_space": False}
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(content))
    assert prepare_tokenizer(config, lambda: (), tmp_path / "run", masked=True).pair_separator == [5, 5]


def test_a_framed_tokenizer_without_special_tokens(tmp_path):
    tokenizer = Tokenizer(Backend.from_str(small_tokenizer().backend.to_str()), {}, add_bos=False)
    tokenizer.frame_texts(masked=False)
    assert tokenizer.backend.encode("a", "b").ids == [*tokenizer.encode("a"), *tokenizer.encode("b")]


def test_end_tokens_of_all_files_are_kept_together(tmp_path):
    small_tokenizer().save(tmp_path)
    assert Tokenizer.load(tmp_path).end_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2], "temperature": 0.6}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 4}')
    loaded = Tokenizer.load(tmp_path)
    assert loaded.end_ids == (2, 5, 4)
    # What a file says already is kept.
    loaded.save(tmp_path)
    content = json.loads((tmp_path / "generation_config.json").read_text())
    assert content == {"eos_token_id": [5, 2, 4], "temperature": 0.6, "bos_token_id": 1, "pad_token_id": 0}
    loaded.save(tmp_path / "new")
    assert Tokenizer.load(tmp_path / "new").end_ids == (2, 5, 4)


@pytest.mark.parametrize("value", ['"</s>"', "[2, true]", "[[2]]"])
def test_end_tokens_that_are_not_ids_are_refused(tmp_path, value):
    small_tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(UserError, match=r"config.json: eos_token_id is .*allowed are a token id or a list"):
        Tokenizer.load(tmp_path)


def test_special_tokens_in_text_from_outside_stay_text():
    tokenizer = small_tokenizer()
    assert tokenizer.eos_id not in tokenizer.encode("a <eos> b")
    assert tokenizer.decode(tokenizer.encode("a <eos> b")) == "a <eos> b"
    assert tokenizer.eos_id in tokenizer.encode("a <eos> b", specials=True)


def test_fingerprint_tells_tokenizers_apart():
    fewer = Tokenizer.train(TEXTS, 300)
    assert fewer.fingerprint != small_tokenizer().fingerprint


def test_vocabulary_must_fit_the_model():
    tokenizer = small_tokenizer()
    tokenizer.check_vocab(tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"largest id is {tokenizer.vocab_size - 1}.*vocab_size is 100"):
        tokenizer.check_vocab(100)


@pytest.mark.parametrize("text", ["POS", " POS", " accident Antonym plan", "12", "\nNow", "(in", "  two"])
@pytest.mark.parametrize("make", [small_tokenizer, spaced_tokenizer])
def test_a_continued_piece_gets_no_space_it_does_not_have(make, text):
    tokenizer = make()
    joined = tokenizer.decode(tokenizer.encode("Output") + tokenizer.encode(text, continued=True))
    assert joined == "Output" + text


def test_tokenizers_that_open_with_a_space_are_told_apart():
    tokenizer = spaced_tokenizer()
    piece, whole = tokenizer.encode("moving", continued=True), tokenizer.encode("moving")
    assert piece != whole
    assert tokenizer.encode(" moving", continued=True) == whole


def test_frames_of_encoders_and_decoders():
    tokenizer = small_tokenizer()
    assert tokenizer.frame(masked=True) == ([tokenizer.cls_id], [tokenizer.sep_id])
    assert tokenizer.frame(masked=False) == ([tokenizer.bos_id], [tokenizer.eos_id])
    assert tokenizer.pair_separator == [tokenizer.sep_id]
    tokenizer = spaced_tokenizer()
    assert tokenizer.frame(masked=True) == ([1], [2])


def test_roberta_separates_pairs_by_two_tokens(tmp_path):
    content = json.loads(small_tokenizer().backend.to_str())
    content["post_processor"] = {"type": "RobertaProcessing", "sep": ["<sep>", 5], "cls": ["<cls>", 4]}
    content["post_processor"] |= {"trim_offsets": True, "add_prefix_space": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).pair_separator == [5, 5]


def test_special_tokens_are_found_as_the_settings_say(tmp_path):
    small_tokenizer().save(tmp_path)
    settings = {"eos_token": {"content": "<sep>"}, "bos_token": "<bos>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.mask_id, loaded.pad_id) == (5, 1, None, 5)
    assert not loaded.add_bos


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json"),
        ("{}", "not a usable tokenizer"),
        ("nonsense", "line 1 column 1 is not valid JSON"),
    ],
)
def test_unusable_tokenizer_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "absent.json")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="at least 262"):
        Tokenizer.train(TEXTS, 261)


def test_a_run_keeps_the_tokenizer_it_trained(tmp_path):
    config = TokenizerConfig(vocab_size=300)
    first = prepare_tokenizer(config, lambda: TEXTS, tmp_path)

    def untouched():
        raise AssertionError("trained again")

    assert prepare_tokenizer(config, untouched, tmp_path).fingerprint == first.fingerprint
    named = TokenizerConfig(path=str(tmp_path))
    assert prepare_tokenizer(named, untouched, tmp_path / "other").fingerprint == first.fingerprint


def bare_tokenizer() -> Tokenizer:
    """One without special tokens, of words."""
    words = Backend(models.WordLevel({"[UNK]": 0, "a": 1, "moving": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(words, {}, add_bos=False)


def pieces_tokenizer() -> Tokenizer:
    """WordPiece as BERT has it, read without settings: special tokens go by their usual names."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "mov", "##ing"]
    pieces = Backend(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    pieces.add_special_tokens(vocabulary[:5])
    return Tokenizer(pieces, {"pad": 0, "mask": 4, "cls": 2, "sep": 3}, add_bos=False)


def modernbert_files() -> tuple[Backend, dict[str, Any]]:
    """A tokenizer as ModernBERT's files have it: byte-level BPE with BERT's special tokens, and more of them, last."""
    backend = Backend.from_str(small_tokenizer().backend.to_str())
    backend.add_special_tokens([f"[{name}]" for name in ("UNK", "CLS", "SEP", "PAD")])
    backend.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True), AddedToken("[unused0]", special=True)])
    return backend, {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}


def deberta_files() -> tuple[Backend, dict[str, Any]]:
    """A tokenizer as DeBERTa-v3's files have it: Unigram, whose first and last tokens also begin and end texts."""
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split()} | set("".join(TEXTS)) | {"▁"})
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words]
    backend = Backend(models.Unigram([(word, -float(i)) for i, word in enumerate(vocabulary)], unk_id=3))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([*vocabulary[:4], "[MASK]"])
    names = {"bos": "CLS", "eos": "SEP", "cls": "CLS", "sep": "SEP", "pad": "PAD", "unk": "UNK", "mask": "MASK"}
    return backend, {f"{role}_token": f"[{name}]" for role, name in names.items()}


@pytest.mark.parametrize("writes", range(3))
def test_a_tokenizer_that_was_written_in_part_is_written_again(tmp_path, monkeypatch, writes):
    """A run that is killed after any of the files leaves the same files in the end."""
    config = TokenizerConfig(vocab_size=300)

    def prepare(folder):
        return prepare_tokenizer(config, lambda: ["a few words", "and more words"], folder)

    whole = prepare(tmp_path / "whole")
    replace, done = Path.replace, []

    def dies(self, target):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "killed")
    assert prepare(tmp_path / "killed").fingerprint == whole.fingerprint
    left = {
        folder: {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("whole", "killed")
    }
    assert len(left["whole"]) == 3
    assert left["killed"] == left["whole"]


@pytest.mark.parametrize("files", [modernbert_files, deberta_files])
def test_encoders_texts_are_framed_and_masked_with_the_special_tokens_of_their_files(tmp_path, files):
    backend, tokens = files()
    first, last = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", first), ("[SEP]", last)],
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    tokenizer = prepare_tokenizer(TokenizerConfig(path=str(tmp_path)), lambda: (), tmp_path / "run", masked=True)
    assert tokenizer.backend.to_str() == Backend.from_file(str(tmp_path / "tokenizer.json")).to_str()
    assert (tokenizer.frame(masked=True), tokenizer.pair_separator) == (([first], [last]), [last])
    mask = backend.token_to_id("[MASK]")
    assert (tokenizer.mask_id, tokenizer.pad_id) == (mask, backend.token_to_id("[PAD]"))
    config = DataConfig(length=80, packing=False, mask_rate=0.999, mask_replace=0.6, mask_random=0.4)
    rows = TextRows([{"text": TEXTS[3]}], tokenizer, config, objective="masked", task=0, name="news")
    row = rows.row(0, rows.shapes([])[0], (0, 0, 0, 0))
    words = tokenizer.encode(TEXTS[3])
    used = len(words) + 2
    assert (row["tokens"][0], row["tokens"][used - 1]) == (first, last)
    assert set(row["tokens"][used:]) == {tokenizer.pad_id}
    assert row["targets"][: len(words)].tolist() == words
    shown = row["tokens"][1 : used - 1]
    assert mask in shown
    # What takes the place of a token is never a special one.
    assert not set(shown[shown != mask].tolist()) & tokenizer.special_ids


@pytest.mark.parametrize(
    ("make", "masked"),
    [
        *((make, False) for make in (small_tokenizer, spaced_tokenizer, marked_tokenizer, bare_tokenizer)),
        *((make, True) for make in (small_tokenizer, marked_tokenizer, pieces_tokenizer)),
    ],
)
def test_the_copy_in_a_run_folder_has_the_fingerprint_of_the_tokenizer(tmp_path, make, masked):
    make().save(tmp_path / "own")
    (tmp_path / "own" / "tokenizer_config.json").unlink()
    tokenizer = prepare_tokenizer(TokenizerConfig(path=str(tmp_path / "own")), lambda: (), tmp_path, masked=masked)
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def edited(folder, change, **settings):
    """The small tokenizer with another `tokenizer.json` and other settings."""
    small_tokenizer().save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    known = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(known | settings))
    return folder


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("known", [{}, None, []])
def test_a_template_that_names_a_token_it_lacks_is_one_line(tmp_path, known, sequence, capfd):
    pieces = [{"SpecialToken": {"id": "[NO]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": known}

    def change(content):
        content["post_processor"] = {"type": "Sequence", "processors": [template]} if sequence else template

    with pytest.raises(UserError, match=r"tokenizer\.json: post_processor: a template names the token \[NO\]"):
        Tokenizer.load(edited(tmp_path, change))
    assert capfd.readouterr().err == "", "the library's panic writes a stack trace"


def test_a_panic_of_the_library_is_one_line(tmp_path):
    class PanicException(BaseException): ...

    with pytest.raises(UserError, match="x is not a usable tokenizer: no entry"), _no_panic(tmp_path / "x"):
        raise PanicException("no entry")
    with pytest.raises(KeyboardInterrupt), _no_panic(tmp_path / "x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos_token": "\ud800"}, "bos_token holds half of a surrogate pair"),
        ({"eos_token": {"content": "a\udfff"}}, "eos_token holds half of a surrogate pair"),
        ({"chat_template": {"default": 5}}, "chat_template: expected templates"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "chat_template: expected templates"),
    ],
)
def test_settings_of_another_kind_are_one_line(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.load(edited(tmp_path, lambda content: None, **settings))
