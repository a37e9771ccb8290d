"""The six domains of DAS and their end tasks (Ke et al., ICLR 2023, arXiv 2302.03241, table 1)."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxcl.data.builders.base import ManualBuilder, Row
from jaxcl.data.builders.manual import Layout
from jaxcl.data.files import parse_json, read_data_text, split_lines
from jaxcl.data.values import lone_surrogate
from jaxcl.errors import UserError

_SENTIMENTS = {"+": "positive", "-": "negative"}
# Aspects that a sentence both praises and criticises; usually left out of this data, also in the paper.
_LEFT_OUT = "conflict"
_ROWS = 'lines of {"text": ..., "label": ...}'
_ASPECT_ROWS = 'lines of {"text": ..., "aspect": ..., "label": ...}'
_ASPECT_OBJECT = 'a JSON object of id: {"term": ..., "sentence": ..., "polarity": ...}'


@dataclasses.dataclass(frozen=True)
class Domain:
    """One row of the paper's table.

    Attributes:
      corpus: file of unlabelled passages: its name here, and in the authors' archive.
      size: size of the corpus in the paper.
      task: name of the end task.
      labels: its classes.
      layouts: possible layouts of its files.
      moved: percent of the training rows that the paper moves to its test set, see `repartition`; 0: the splits are
        used as they are.
      published: number of training and test rows in the paper.
      aspect: whether a row has an aspect in addition to its text.
    """

    corpus: tuple[str, str]
    size: str
    task: str
    labels: tuple[str, ...]
    layouts: tuple[Layout, ...]
    moved: int
    published: tuple[int, int]
    aspect: bool = False


def _own(folder: str, splits: Sequence[str], what: str, optional: frozenset[str] = frozenset()) -> Layout:
    names = {"train": "train", "validation": "dev", "test": "test"}
    return Layout({split: [f"end_tasks/{folder}/{names[split]}.jsonl"] for split in splits}, what, optional)


def _science(own: str, archive: str) -> tuple[Layout, Layout]:
    """Train, dev and test of a science task, under both names of its folder."""
    splits = ("train", "validation", "test")
    names = {"train": "train", "validation": "dev", "test": "test"}
    return _own(own, splits, _ROWS), Layout({split: [f"{archive}/{names[split]}.jsonl"] for split in splits}, _ROWS)


def _products(own: str, train: Sequence[str], test: Sequence[str]) -> tuple[Layout, Layout]:
    """Reviews of some products to train on, of others to test on; the archive splits both into three files each."""
    archive = {"train": train, "test": test}
    files = {split: [f"absa/dat/{path}.json" for path in paths] for split, paths in archive.items()}
    return _own(own, ("train", "test"), _ASPECT_ROWS), Layout(files, _ASPECT_OBJECT)


DOMAINS: dict[str, Domain] = {
    "restaurant": Domain(
        corpus=("restaurant_reviews.txt", "yelp_restaurant.txt"),
        size="758 MB of Yelp reviews",
        task="aspect sentiment",
        labels=("negative", "neutral", "positive"),
        layouts=(
            _own("restaurant", ("train", "validation", "test"), _ASPECT_ROWS, frozenset({"validation"})),
            Layout({split: [f"SemEval14-res/{split}.json"] for split in ("train", "test")}, _ASPECT_OBJECT),
        ),
        moved=0,
        published=(3452, 1120),
        aspect=True,
    ),
    "phone": Domain(
        corpus=("phone_reviews.txt", "absa/post_train/phone.txt"),
        size="724 MB of Amazon reviews",
        task="aspect sentiment",
        labels=("negative", "positive"),
        layouts=_products(
            "phone",
            [f"Bing5Domains/Nokia6610/{part}" for part in ("train", "dev", "test")],
            [f"Bing9Domains/Nokia6600/{part}" for part in ("train", "dev", "test")],
        ),
        moved=30,
        published=(239, 553),
        aspect=True,
    ),
    "camera": Domain(
        corpus=("camera_reviews.txt", "absa/post_train/camera.txt"),
        size="319 MB of Amazon reviews",
        task="aspect sentiment",
        labels=("negative", "positive"),
        layouts=_products(
            "camera",
            [f"Bing5Domains/CanonG3/{part}" for part in ("train", "test", "dev")],
            [
                f"{product}/{part}"
                for part in ("train", "test", "dev")
                for product in (
                    "Bing5Domains/NikonCoolpix4300",
                    "Bing9Domains/CanonPowerShotSD500",
                    "Bing9Domains/CanonS100",
                )
            ],
        ),
        moved=20,
        published=(230, 626),
        aspect=True,
    ),
    "acl": Domain(
        corpus=("acl_papers.txt", "acl_anthology.txt"),
        size="867 MB of ACL papers",
        task="citation intent (ACL-ARC)",
        labels=("Background", "CompareOrContrast", "Extends", "Future", "Motivation", "Uses"),
        layouts=_science("aclarc", "citation_intent"),
        moved=10,
        published=(1520, 421),
    ),
    "ai": Domain(
        corpus=("ai_papers.txt", "ai_corpus.txt"),
        size="507 MB of AI papers",
        task="relation (SCIERC)",
        labels=("COMPARE", "CONJUNCTION", "EVALUATE-FOR", "FEATURE-OF", "HYPONYM-OF", "PART-OF", "USED-FOR"),
        layouts=_science("scierc", "sciie"),
        moved=30,
        published=(2260, 2388),
    ),
    "pubmed": Domain(
        corpus=("pubmed_abstracts.txt", "format_pubmed_small.txt"),
        size="989 MB of PubMed abstracts",
        task="chemical-protein interaction (ChemProt)",
        labels=(
            "ACTIVATOR",
            "AGONIST",
            "AGONIST-ACTIVATOR",
            "AGONIST-INHIBITOR",
            "ANTAGONIST",
            "DOWNREGULATOR",
            "INDIRECT-DOWNREGULATOR",
            "INDIRECT-UPREGULATOR",
            "INHIBITOR",
            "PRODUCT-OF",
            "SUBSTRATE",
            "SUBSTRATE_PRODUCT-OF",
            "UPREGULATOR",
        ),
        layouts=_science("chemprot", "chemprot"),
        moved=50,
        published=(2667, 7398),
    ),
}


class _Das(ManualBuilder):
    """A domain's passages (`domain`) and its end task, in the splits of the paper or of its source."""

    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="domain", description="unlabelled passages"),
        tfds.core.BuilderConfig(name="end_task", description="labelled rows in the paper's splits"),
        tfds.core.BuilderConfig(name="end_task_original", description="labelled rows in the splits of their source"),
    )

    @property
    @abc.abstractmethod
    def domain(self) -> Domain:
        """The domain. Abstract, so that TFDS registers the six subclasses, not this class."""

    @property
    def layouts(self) -> Sequence[Layout]:
        """The authors' archive as it is, or more descriptive names."""
        own, archive = self.domain.corpus
        if self.builder_config.name == "domain":
            what = f"plain text, one passage per line ({archive} in the authors' archive)"
            return [Layout({"train": [path]}, what) for path in (f"domains/{own}", archive)]
        return self.domain.layouts

    @property
    def published(self) -> Mapping[str, int]:
        """The sizes in the paper's table, which belong to `end_task`."""
        names = ("train", "test") if self.builder_config.name == "end_task" else ()
        return dict(zip(names, self.domain.published, strict=False))

    def read(self, files: Mapping[str, Sequence[Path]]) -> dict[str, list[Row]]:
        """Passages, or labelled rows; see `ManualBuilder.read`."""
        if self.builder_config.name == "domain":
            (path,) = files["train"]
            lines = (line.strip() for line in split_lines(read_data_text(path)))
            return {"train": [{"text": line} for line in lines if line]}
        splits = {
            split: [row for path in paths for row in _labelled(path, self.domain)] for split, paths in files.items()
        }
        if self.builder_config.name == "end_task" and self.domain.moved:
            return repartition(splits, self.domain.labels, self.domain.moved)
        return splits

    def _info(self) -> Any:
        features = {"text": tfds.features.Text()}
        if self.builder_config.name == "domain":
            text = f"Unlabelled passages of a domain of DAS: {self.domain.size} in the paper."
        else:
            features["label"] = tfds.features.ClassLabel(names=list(self.domain.labels))
            if self.domain.aspect:
                features["aspect"] = tfds.features.Text()
            text = f"End task of a domain of DAS, {self.domain.task}: {self.builder_config.description}."
        return self.described(text, "https://github.com/UIC-Liu-Lab/ContinualLM", features)


class DasRestaurant(_Das):
    """Restaurant reviews; sentiment towards an aspect."""

    domain = DOMAINS["restaurant"]


class DasPhone(_Das):
    """Phone reviews; sentiment towards an aspect."""

    domain = DOMAINS["phone"]


class DasCamera(_Das):
    """Camera reviews; sentiment towards an aspect."""

    domain = DOMAINS["camera"]


class DasAcl(_Das):
    """Papers on computational linguistics; why a paper is cited."""

    domain = DOMAINS["acl"]


class DasAi(_Das):
    """Papers on artificial intelligence; how two terms are related."""

    domain = DOMAINS["ai"]


class DasPubmed(_Das):
    """Biomedical abstracts; how a chemical and a protein interact."""

    domain = DOMAINS["pubmed"]


def repartition(splits: Mapping[str, Sequence[Row]], labels: Sequence[str], percent: int) -> dict[str, list[Row]]:
    """The paper's splits, made from those of the source: a smaller training set, and no development set.

    The test set gets the development rows. It also gets `percent` of the training rows, in equal shares per class: the
    first ones of each class (fewer, if a class has fewer).

    Args:
      splits: rows of `train`, `test` and optionally `validation`.
      labels: the classes.
      percent: share of the training set that is moved.

    >>> rows = [{"label": label} for label in "aaab"]
    >>> parts = repartition({"train": rows, "test": []}, "ab", 50)
    >>> [row["label"] for row in parts["train"]], [row["label"] for row in parts["test"]]
    (['a', 'a'], ['a', 'b'])
    """
    quota = len(splits["train"]) * percent // (100 * len(labels))
    kept: list[Row] = []
    test = [*splits["test"], *splits.get("validation", ())]
    moved: Counter[str] = Counter()
    for row in splits["train"]:
        moves = moved[row["label"]] < quota
        moved[row["label"]] += moves
        (test if moves else kept).append(row)
    return {"train": kept, "test": test}


def _labelled(path: Path, domain: Domain) -> Iterator[Row]:
    """Rows of a file: JSON lines with text and label, or, as in the archive, an object of sentences by id."""
    fields = {"text": "text", "label": "label"} | ({"aspect": "aspect"} if domain.aspect else {})
    if ".jsonl" in path.suffixes:
        lines = enumerate(split_lines(read_data_text(path)), 1)
        rows = [(f"line {number}", parse_json(line, path, number)) for number, line in lines if line.strip()]
    else:
        fields = {"text": "sentence", "label": "polarity", "aspect": "term"}
        content = parse_json(read_data_text(path), path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected {_ASPECT_OBJECT}")
        rows = [(f"entry {name}", row) for name, row in content.items()]
    for where, row in rows:
        absent = [name for name in fields.values() if not isinstance(row, dict) or not isinstance(row.get(name), str)]
        if absent:
            raise UserError(f"{path} {where}: expected text in {', '.join(absent)}")
        found = {name: row[field] for name, field in fields.items()}
        for name, text in found.items():
            if half := lone_surrogate(text):
                raise UserError(f"{path} {where}: {fields[name]} holds {half}")
        found["label"] = _SENTIMENTS.get(found["label"], found["label"])
        if found["label"] == _LEFT_OUT:
            continue
        if found["label"] not in domain.labels:
            raise UserError(f"{path} {where}: label {found['label']!r} is not one of {', '.join(domain.labels)}")
        yield found
