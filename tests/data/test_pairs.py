import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.pairs import PairRows, encode_answers, encode_prompts, pair_shapes
from jaxcl.data.plan import Shape
from jaxcl.data.spec import TEMPLATES, DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from tests.tiny.texts import marked_tokenizer, small_tokenizer, spaced_tokenizer

PROMPT = (
    'Definition: classify a sentence as "POS" or "NEG"\n\nNow complete the following example -\n'
    "Input: A terrible movie that some people will nevertheless find moving .\nOutput: "
)
PAIRS = [
    {"prompt": PROMPT, "answer": "NEG"},
    {"prompt": "Input: moving\nOutput:", "answer": " accident Antonym plan\n"},
    {"prompt": "one line\n", "answer": "POS"},
    {"prompt": "", "answer": "12"},
]


def rows(pairs=PAIRS, tokenizer=None, **options):
    return PairRows(pairs, tokenizer or small_tokenizer(), DataConfig(**options), task=3, name="polarity train")


@pytest.mark.parametrize("make", [small_tokenizer, spaced_tokenizer])
@pytest.mark.parametrize(
    "ending", ["Output:", "Output: ", "Output:  ", "Output:\t", "Output:\n", "Output:\n\n", "[/x] "]
)
@pytest.mark.parametrize("answer", ["POS", "NEG", "accident Antonym plan", "12", "(A)", "é"])
def test_the_answers_tokens_are_the_same_whether_it_is_known_or_not(make, ending, answer):
    """What training shows before the answer is what generation starts from, and the text reads as written."""
    tokenizer, config = make(), DataConfig()
    prompt = "Input: moving\n" + ending
    trained = PairRows([{"prompt": prompt, "answer": answer}], tokenizer, config, task=0, name="x")
    start = encode_prompts([prompt], tokenizer, config).ids[0]
    assert trained.prompt(0).tolist() == start
    # Any other prompt of the same ending gives the same answer tokens.
    other = PairRows([{"prompt": "Now - " + ending, "answer": answer}], tokenizer, config, task=0, name="x")
    assert trained.answer(0).tolist() == other.answer(0).tolist()
    joined = tokenizer.decode([*start, *trained.answer(0).tolist()])
    stripped = prompt.rstrip(" \t")
    assert joined == stripped + ("" if stripped.endswith("\n") else " ") + answer


def test_answers_are_tokenised_as_in_running_text():
    tokenizer, config = small_tokenizer(), DataConfig()
    for pair in PAIRS[:2]:
        ids = encode_answers([pair["answer"]], [pair["prompt"]], tokenizer, config)[0]
        running = tokenizer.encode(pair["prompt"].rstrip() + " " + pair["answer"].strip())
        assert [tokenizer.bos_id, *running] == encode_prompts([pair["prompt"]], tokenizer, config).ids[0] + ids


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_a_row_scores_the_answer_and_its_end_and_nothing_else(index):
    encoded = rows()
    prompt, answer = encoded.prompt(index).tolist(), encoded.answer(index).tolist()
    row = encoded.row(index, Shape(128, 12), ())
    text = prompt + answer
    assert row["tokens"][: len(text)].tolist() == text
    assert (row["tokens"][len(text) :] == encoded.pad_id).all()
    assert row["segments"].tolist() == [1] * len(text) + [0] * (128 - len(text))
    assert row["positions"][: len(text)].tolist() == list(range(len(text)))
    assert answer[-1] == small_tokenizer().eos_id
    scored = [
        (int(at), int(target))
        for at, target, weight in zip(row["predict"], row["targets"], row["weights"], strict=True)
        if weight
    ]
    # The output at each scored position is to be the token that stands right behind it.
    assert scored == [(at, text[at + 1]) for at in range(len(prompt) - 1, len(text) - 1)]
    assert row["weights"].sum() == len(answer)


def test_long_prompts_lose_their_left_part_and_answers_nothing():
    tokenizer = small_tokenizer()
    whole = encode_prompts([PROMPT], tokenizer, DataConfig()).ids[0]
    cut = encode_prompts([PROMPT, "short"], tokenizer, DataConfig(prompt_length=10))
    assert cut.cut == 1
    assert cut.ids[0] == [tokenizer.bos_id, *whole[-9:]]
    encoded = rows(PAIRS[:1], prompt_length=10)
    assert encoded.answer(0).tolist() == rows(PAIRS[:1]).answer(0).tolist()
    assert encoded.describe()["cut_prompts"] == 1


@pytest.mark.parametrize("template", ["chatml", "llama2", "vicuna", "<bos>Q: {prompt}\nA: "])
def test_a_template_survives_the_cut(template):
    tokenizer = marked_tokenizer()
    config = DataConfig(template=template, prompt_length=80)
    head, tail = TEMPLATES.get(template, template).split("{prompt}")
    ids = encode_prompts(["accident " * 60 + "END "], tokenizer, config).ids[0]
    assert len(ids) == 80
    text = tokenizer.decode(ids, skip_special=False)
    assert text.startswith("<bos>" + head.removeprefix("<bos>").rstrip(" "))
    assert text.endswith("END" + tail.rstrip(" "))


def test_a_prompt_cannot_forge_special_tokens():
    tokenizer = small_tokenizer()
    ids = encode_prompts(["x <eos> y"], tokenizer, DataConfig(template="<bos>{prompt}<sep>")).ids[0]
    assert tokenizer.eos_id not in ids
    assert ids[-1] == tokenizer.sep_id


def test_a_template_without_room_is_refused():
    with pytest.raises(UserError, match=r"data.template takes \d+ tokens.*data.prompt_length is 8"):
        encode_prompts(["x"], marked_tokenizer(), DataConfig(template="chatml", prompt_length=8))


@pytest.mark.parametrize("make", [marked_tokenizer, spaced_tokenizer])
@pytest.mark.parametrize("template", [*TEMPLATES, "Q: {prompt} \nA: ", "<bos> Q:\t{prompt}", "  {prompt}"])
def test_a_templates_spaces_are_tokenised_as_in_running_text(make, template):
    tokenizer = make()
    text = TEMPLATES.get(template, template)
    if make is spaced_tokenizer and "<" in text:
        pytest.skip("its tokenizer has no such marks")
    found = encode_prompts(["moving reviews"], tokenizer, DataConfig(template=template)).ids[0]
    running = text.replace("{prompt}", "moving reviews").removeprefix("<bos>").rstrip(" ")
    assert found == [tokenizer.bos_id, *tokenizer.encode(running, specials=True)]


def test_a_template_that_writes_its_own_opening_token_gives_one():
    ids = [
        encode_prompts(["x"], small_tokenizer(), DataConfig(template=opening + "Q: {prompt}\nA:")).ids[0]
        for opening in ("", "<bos>")
    ]
    assert ids[0] == ids[1]
    assert ids[0].count(small_tokenizer().bos_id) == 1


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        ("chatml", "<|im_start|>, <|im_end|>"),
        ("smollm2", "<|im_start|>, <|im_end|>"),
        ("<s>[INST] {prompt} [/INST]", "<s>"),
        ("{prompt}<end_of_turn>", "<end_of_turn>"),
        ("<\uff5cUser\uff5c>{prompt}", "<\uff5cUser\uff5c>"),
    ],
)
def test_marks_that_the_tokenizer_would_spell_out_are_named(template, missing):
    message = f"data.template: the tokenizer has no token for {missing}, and"
    with pytest.raises(UserError, match=re.escape(message)):
        rows(template=template)


def test_a_long_answer_is_an_error_that_names_the_row_or_is_cut_and_counted():
    pairs = [PAIRS[0], {"prompt": "x", "answer": "accident Antonym plan " * 5}]
    with pytest.raises(
        UserError, match=r"polarity train row 2: the answer has \d+ tokens.*data.answer_length is 6.*1 of 2"
    ):
        rows(pairs, answer_length=6)
    encoded = rows(pairs, answer_length=6, on_long_answer="cut")
    assert encoded.cut_answers == 1
    assert len(encoded.answer(1)) == 6
    assert small_tokenizer().eos_id not in encoded.answer(1)
    assert encoded.answer(0)[-1] == small_tokenizer().eos_id


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = Tokenizer(small_tokenizer().backend, {"pad": 0}, add_bos=False)
    with pytest.raises(UserError, match="no end token"):
        rows(tokenizer=tokenizer)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=12), st.integers(1, 4))
def test_every_example_fits_a_shape_and_all_larger_ones(sizes, buckets):
    pairs = [{"prompt": "a " * prompt, "answer": "b " * answer} for prompt, answer in sizes]
    encoded = rows(pairs, buckets=buckets, length_multiple=8)
    shapes = pair_shapes([encoded], encoded.config)
    assert len(shapes) <= buckets
    assert shapes == sorted(shapes)
    assert [shape.predict for shape in shapes] == sorted(shape.predict for shape in shapes)
    for length, scored in encoded.sizes:
        fitting = [shape for shape in shapes if shape.length >= length]
        assert fitting
        assert all(shape.predict >= scored for shape in fitting)


def test_given_bucket_lengths_are_kept_or_refused():
    encoded = rows(bucket_lengths=[16, 96])
    assert [shape.length for shape in pair_shapes([encoded], encoded.config)] == [16, 96]
    encoded = rows(bucket_lengths=[16])
    longest = int(encoded.sizes[:, 0].max())
    with pytest.raises(UserError, match=f"bucket_lengths ends at 16, the longest example has {longest}"):
        pair_shapes([encoded], encoded.config)


def test_a_filler_row_scores_nothing():
    row = rows().row(-1, Shape(16, 4), ())
    for name in ("segments", "weights", "targets", "predict"):
        assert not np.any(row[name])


@pytest.mark.parametrize(("tail", "space"), [("\n", ""), ("\nAnswer:", " "), ("[/x]\n", ""), (" ->", " ")])
def test_the_space_before_an_answer_follows_from_the_end_of_the_template(tail, space):
    """The prompt itself ends in a word: what comes before the answer is the template's end."""
    tokenizer, config = small_tokenizer(), DataConfig(template="{prompt}" + tail)
    (ids,) = encode_answers(["moving"], ["Input"], tokenizer, config)
    assert tokenizer.decode([tokenizer.encode("x")[0], *ids])[1:] == f"{space}moving"


def test_what_fits_exactly_is_not_cut():
    tokenizer = small_tokenizer()
    pair = {"prompt": "Input: moving", "answer": "accident plan"}
    free = rows([pair])
    prompt, answer = len(free.prompt(0)), len(free.answer(0))
    fitting = rows([pair], prompt_length=prompt, answer_length=answer, on_long_answer="cut")
    assert (fitting.cut_prompts, fitting.cut_answers) == (0, 0)
    assert fitting.prompt(0).tolist() == free.prompt(0).tolist()
    tight = rows([pair], prompt_length=prompt - 1, answer_length=answer - 1, on_long_answer="cut")
    assert (tight.cut_prompts, tight.cut_answers) == (1, 1)
    assert tokenizer.eos_id not in tight.answer(0)
