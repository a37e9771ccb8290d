import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from jaxcl.data.labelled import LabelledRows
from jaxcl.data.plan import Shape
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from tests.tiny.texts import small_tokenizer

TEXTS = [
    {"text": "moving reviews", "label": "yes"},
    {"text": "accident " * 40, "pair": "plan", "label": "no"},
    {"text": "accident " * 40, "pair": "plan " * 40, "label": "no"},
    {"text": "a", "pair": "plan " * 40, "label": "no"},
]


def rows(masked, texts=TEXTS):
    config = DataConfig(length=24)
    return LabelledRows(texts, ["no", "yes"], small_tokenizer(), config, masked=masked, task=0, name="polarity")


def test_texts_stand_in_the_frame_of_their_model():
    t = small_tokenizer()
    assert rows(True).tokens[0].tolist() == [t.cls_id, *t.encode("moving reviews"), t.sep_id]
    assert rows(False).tokens[0].tolist() == [t.bos_id, *t.encode("moving reviews"), t.eos_id]


def test_the_longer_text_is_cut_and_the_short_one_kept():
    t = small_tokenizer()
    source = rows(True)
    accident, plan = t.encode("accident " * 40), t.encode("plan " * 40)
    assert source.tokens[1].tolist() == [
        t.cls_id,
        *accident[: 21 - len(t.encode("plan"))],
        t.sep_id,
        *t.encode("plan"),
        t.sep_id,
    ]
    assert source.tokens[2].tolist() == [t.cls_id, *accident[:11], t.sep_id, *plan[:10], t.sep_id]
    assert source.tokens[3].tolist() == [t.cls_id, *t.encode("a"), t.sep_id, *plan[: 21 - len(t.encode("a"))], t.sep_id]
    assert source.cut == 3
    decoder = rows(False)
    assert decoder.tokens[2].tolist() == [t.bos_id, *accident[:11], *t.encode("\n"), *plan[:10], t.eos_id]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_second_texts_have_the_token_type_their_tokenizer_gives_them(kind):
    words = ["<pad>", "[CLS]", "[SEP]", "moving", "reviews", "plan"]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = (("[SEP]", 2), ("[CLS]", 1))
    backend.post_processor = {"bert": processors.BertProcessing, "roberta": processors.RobertaProcessing}[kind](*frame)
    tokenizer = Tokenizer(backend, {"cls": 1, "sep": 2, "pad": 0}, add_bos=False)
    pair, single = {"text": "moving reviews", "pair": "plan plan", "label": "yes"}, {"text": "plan", "label": "yes"}

    def row(index, token_types):
        source = LabelledRows(
            [pair, single],
            ["yes"],
            tokenizer,
            DataConfig(length=12),
            masked=True,
            task=0,
            name="x",
            token_types=token_types,
        )
        return source.row(index, Shape(12, 1), ())

    expected = backend.encode("moving reviews", "plan plan")
    count = len(expected.ids)
    found = row(0, 2)
    assert found["tokens"][:count].tolist() == expected.ids
    assert "types" not in row(0, 1)
    if kind == "roberta":
        assert "types" not in found
        assert not any(expected.type_ids)
    else:
        assert found["types"].tolist() == expected.type_ids + [0] * (12 - count)
        assert sum(expected.type_ids) == 3
        assert not row(1, 2)["types"].any()
        assert not row(-1, 2)["types"].any()


def test_a_row_carries_its_label_and_a_filler_no_weight():
    source = rows(True)
    row, filler = source.row(0, Shape(24, 1), ()), source.row(-1, Shape(24, 1), ())
    assert (int(row["labels"]), row["weights"].tolist()) == (1, [1.0])
    assert (int(filler["labels"]), filler["weights"].tolist(), filler["segments"].any()) == (0, [0.0], False)
    assert source.describe()["labels"] == {"no": 3, "yes": 1}


def test_a_strange_label_is_named_with_its_row():
    with pytest.raises(UserError, match="polarity row 2: label 'maybe' is not one of no, yes"):
        rows(True, [TEXTS[0], {"text": "x", "label": "maybe"}])
