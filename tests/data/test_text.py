import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.packing import pack
from jaxcl.data.plan import Shape
from jaxcl.data.spec import DataConfig
from jaxcl.data.text import TextRows
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from tests.tiny.texts import TEXTS, small_tokenizer

PASSAGES = [{"text": text} for text in TEXTS * 4]


def rows(passages=PASSAGES, *, objective="causal", tokenizer=None, **options):
    options = {"length": 64, **options}
    config = DataConfig(**options)
    return TextRows(passages, tokenizer or small_tokenizer(), config, objective=objective, task=1, name="news train")


def pieces_of(source):
    found = []
    for index in range(len(source)):
        tokens, spans = source.table[index]
        found += np.split(tokens, np.cumsum(spans)[:-1])
    return [piece.tolist() for piece in found]


def built(source, index, noise=(0, 0, 0, 0)):
    return source.row(index, source.shapes([])[0], noise)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_piece_and_leaves_no_two_rows_that_fit_in_one(lengths):
    packed = pack(lengths, 20)
    assert sorted(piece for row in packed for piece in row) == list(range(len(lengths)))
    loads = sorted(sum(lengths[piece] for piece in row) for row in packed)
    assert all(load <= 20 for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > 20


@pytest.mark.parametrize("packing", [True, False])
def test_causal_rows_predict_the_next_token_of_their_own_segment(packing):
    source = rows(packing=packing)
    for index in range(len(source)):
        row = built(source, index)
        assert "predict" not in row
        for at in range(64):
            last = at == 63 or row["segments"][at] == 0 or row["segments"][at + 1] != row["segments"][at]
            assert row["weights"][at] == (0 if last else 1)
            assert row["targets"][at] == (0 if last else row["tokens"][at + 1])
            first = at == 0 or row["segments"][at] != row["segments"][at - 1]
            if row["segments"][at]:
                assert row["positions"][at] == (0 if first else row["positions"][at - 1] + 1)


def test_packing_loses_no_token():
    tokenizer = small_tokenizer()
    source = rows(length=32)
    kept = sorted(i for piece in pieces_of(source) for i in piece)
    framed = [[tokenizer.bos_id, *tokenizer.encode(text["text"]), tokenizer.eos_id] for text in PASSAGES]
    assert kept == sorted(i for ids in framed for i in ids)
    shown = sum(int((built(source, index)["segments"] > 0).sum()) for index in range(len(source)))
    assert shown == sum(len(tokenizer.encode(text["text"])) + 2 for text in PASSAGES)
    assert source.fill == pytest.approx(shown / (32 * len(source)))


def test_long_passages_go_on_in_another_row_without_a_false_end():
    tokenizer = small_tokenizer()
    source = rows([{"text": "accident " * 100}], length=32)
    pieces = pieces_of(source)
    assert pieces[0][0] == tokenizer.bos_id
    assert pieces[-1][-1] == tokenizer.eos_id
    flat = [i for piece in pieces for i in piece]
    assert flat == [tokenizer.bos_id, *tokenizer.encode("accident " * 100), tokenizer.eos_id]


def test_an_encoder_sees_every_piece_in_its_frame():
    tokenizer = small_tokenizer()
    source = rows([{"text": "accident " * 100}], objective="masked", length=32)
    pieces = pieces_of(source)
    assert all((piece[0], piece[-1]) == (tokenizer.cls_id, tokenizer.sep_id) for piece in pieces)
    assert [i for piece in pieces for i in piece[1:-1]] == tokenizer.encode("accident " * 100)


def test_a_passage_a_row_is_cut_and_counted():
    tokenizer = small_tokenizer()
    passages = [{"text": "accident " * 100}, {"text": "moving"}]
    causal = rows(passages, packing=False, length=32)
    assert (causal.cut, len(causal)) == (1, 2)
    assert len(pieces_of(causal)[0]) == 32
    assert tokenizer.eos_id not in pieces_of(causal)[0]
    assert pieces_of(causal)[1] == [tokenizer.bos_id, *tokenizer.encode("moving"), tokenizer.eos_id]
    masked = rows(passages, objective="masked", packing=False, length=32)
    assert pieces_of(masked)[0][-1] == tokenizer.sep_id
    assert masked.describe()["cut_passages"] == 1


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_exactly_the_rounded_share_is_masked_and_never_a_special_token(rate):
    tokenizer = small_tokenizer()
    source = rows(objective="masked", mask_rate=rate)
    plain = rows(objective="masked", mask_rate=rate, mask_replace=0, mask_random=0)
    scored = math.ceil(rate * 64)
    for index in range(len(source)):
        row, original = built(source, index), built(plain, index)["tokens"]
        assert row["predict"].shape == (scored,)
        usual = [at for at in range(64) if row["segments"][at] and original[at] not in tokenizer.special_ids]
        chosen = row["predict"][row["weights"] == 1]
        assert len(set(chosen)) == len(chosen) == max(1, round(rate * len(usual)))
        assert set(chosen) <= set(usual)
        assert row["targets"][row["weights"] == 1].tolist() == original[chosen].tolist()
        untouched = np.setdiff1d(np.arange(64), chosen)
        assert (row["tokens"][untouched] == original[untouched]).all()


def test_of_masked_tokens_80_percent_are_hidden_and_10_replaced():
    source = rows(objective="masked")
    tokenizer = small_tokenizer()
    hidden = kept = total = 0
    for epoch in range(400):
        row = built(source, 0, (0, epoch, 0, 0))
        chosen = row["weights"] == 1
        shown, true = row["tokens"][row["predict"][chosen]], row["targets"][chosen]
        assert not set(shown.tolist()) & (tokenizer.special_ids - {tokenizer.mask_id})
        hidden += int((shown == tokenizer.mask_id).sum())
        kept += int((shown == true).sum())
        total += int(chosen.sum())
    # Three standard deviations of a binomial count.
    assert abs(hidden / total - 0.8) < 3 * math.sqrt(0.8 * 0.2 / total)
    assert abs(kept / total - 0.1) < 3 * math.sqrt(0.1 * 0.9 / total) + 1 / tokenizer.vocab_size


def test_masking_follows_its_noise():
    source = rows(objective="masked")
    same, again, other = (built(source, 0, (5, epoch, 1, 0)) for epoch in (2, 2, 3))
    assert same["predict"].tolist() == again["predict"].tolist()
    assert same["tokens"].tolist() == again["tokens"].tolist()
    assert same["predict"].tolist() != other["predict"].tolist()


def test_one_short_passage_still_scores_one_token():
    row = built(rows([{"text": "a"}], objective="masked"), 0)
    assert row["weights"].sum() == 1


def test_rows_of_nothing_are_refused():
    with pytest.raises(UserError, match="news train: no passage"):
        rows([{"text": ""}])
    blind = Tokenizer(small_tokenizer().backend, {"eos": 2}, add_bos=False)
    with pytest.raises(UserError, match="no mask token"):
        rows(objective="masked", tokenizer=blind)


def test_rows_of_different_length_share_no_batch():
    with pytest.raises(ValueError, match="expected length 64"):
        rows().shapes([rows(length=32)])
    assert rows().shapes([rows()]) == [Shape(64, None)]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_passage_that_fits_exactly_is_not_cut(objective):
    free = rows(PASSAGES[:1], objective=objective, packing=False)
    length = len(pieces_of(free)[0])
    assert rows(PASSAGES[:1], objective=objective, packing=False, length=length).cut == 0
    assert rows(PASSAGES[:1], objective=objective, packing=False, length=length - 1).cut == 1
