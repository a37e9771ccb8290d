"""Name and layout of every parameter in a checkpoint. The same tables serve reading and writing.

A row is (path of the parameter, name in the file, layout). `{layer}` in a name is the number of the layer; the
parameter then has a leading `layers` axis that is not in the layout. `{expert}` is likewise the number of the expert.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.models.lora import is_adapter
from jaxcl.models.soft_tokens import is_soft
from jaxcl.weights.axes import Layout

# PEFT's prefix of the names of the wrapped model.
ADAPTER_PREFIX = "base_model.model."

_VECTOR = "embed -> embed"
_TABLE = "rows embed -> rows embed"
_UP = "mlp embed -> embed mlp"
_DOWN = "embed mlp -> mlp embed"
_UP_OF_EXPERTS = "experts mlp embed -> experts embed mlp"
_DOWN_OF_EXPERTS = "experts embed mlp -> experts mlp embed"
_SPLIT = "(heads head_dim) embed -> embed heads head_dim"
_SPLIT_BIAS = "(heads head_dim) -> heads head_dim"
_JOIN = "embed (heads head_dim) -> heads head_dim embed"
_SQUARE = "output input -> input output"
# llama.cpp stores the two rotated halves of each query and key head interleaved.
_SPLIT_PAIRS = "(heads half pair) embed -> embed heads (pair half)"
_SPLIT_PAIRS_BIAS = "(heads half pair) -> heads (pair half)"


class Row(NamedTuple):
    """One parameter in a checkpoint.

    Attributes:
      path: the parameter.
      name: the tensor, with `{layer}` for the number of the layer.
      text: the layout, see `Layout`.
      together: the parameters, this one among them, that make up the tensor one after another along an axis; none where
        the parameter has the tensor for itself.
      along: that axis of the tensor.
      first: the first layer that has a tensor; what the parameter holds of layers before it, nothing reads.
    """

    path: str
    name: str
    text: str
    together: tuple[str, ...] = ()
    along: int = 0
    first: int = 0

    @property
    def layout(self) -> Layout:
        """The correspondence of the axes."""
        return Layout.parse(self.text)

    @property
    def stacked(self) -> bool:
        """Whether the file has one tensor per layer."""
        return "{layer}" in self.name

    @property
    def by_expert(self) -> bool:
        """Whether the file has one tensor per layer and expert."""
        return "{expert}" in self.name

    @property
    def lead(self) -> int:
        """Number of leading axes of the parameter, layers and experts, that its tensors do not have."""
        return self.stacked + self.by_expert

    def names(self, sizes: Sequence[int] = ()) -> tuple[str, ...]:
        """Its tensors, by layer and expert; `sizes` are their numbers, without which a stacked parameter has none."""
        if not self.stacked:
            return (self.name,)
        layers, experts = sizes[0] if sizes else 0, sizes[1] if self.by_expert and sizes else 1
        return tuple(
            self.name.format(layer=layer, expert=expert)
            for layer in range(self.first, layers)
            for expert in range(experts)
        )


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one architecture in one file format.

    Attributes:
      prefix: prefix of the names of the body; checkpoints of a model without a head leave it out.
      rows: one row per parameter.
      ignored: regular expressions of tensors that the model does not need, whatever their prefix.
      renamed: regular expressions of older names, and their replacements.
      twins: pairs of names of one parameter. A file may hold either, or both with the same values; the second name may
        also be a parameter of its own.
      other: rows of another form of file, in place of those of the same parameters where a file has the first.
    """

    prefix: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    twins: tuple[tuple[str, str], ...] = ()
    other: tuple[Row, ...] = ()

    def as_in(self, names: Collection[str]) -> Table:
        """The table of the form that a file with tensors of these names has."""
        if not self.other:
            return self
        first = self.other[0].name.format(layer=0)
        if first not in names and first.removeprefix(self.prefix) not in names:
            return self
        replaced = {row.path: row for row in self.other}
        return dataclasses.replace(self, rows=tuple(replaced.get(row.path, row) for row in self.rows), other=())

    def row(self, path: str) -> Row:
        """The row of a parameter. Parts of adapters are named as in PEFT's files.

        Raises:
          ValueError: the table has no row for it.
        """
        for row in self.rows:
            if row.path == path:
                return row
        if is_adapter(path):
            projection, _, part = path.rpartition("/")
            return adapter_row(self.row(f"{projection}/kernel"), path, part)
        if is_soft(path):
            return Row(path, "soft_tokens", _TABLE)
        raise ValueError(f"path: no checkpoint name is known for the parameter {path!r}")

    def ignores(self, name: str) -> bool:
        """Whether a tensor without a parameter in the model can be ignored."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def modern(self, name: str) -> str:
        """The name in current versions of transformers."""
        for old, new in self.renamed:
            name = re.sub(old, new, name)
        return name


def adapter_row(kernel: Row, path: str, part: str) -> Row:
    """The row of a part of an adapter: in the file, `[rank, inputs]` and `[outputs, rank]`.

    >>> row = adapter_row(Row("out/kernel", "o_proj.weight", _JOIN), "out/lora_a", "lora_a")
    >>> row.name, row.text
    ('base_model.model.o_proj.lora_A.weight', 'rank (heads head_dim) -> heads head_dim rank')
    """
    outputs, inputs = (" ".join(group) for group in kernel.layout.source)
    texts = {
        "lora_a": f"rank ({inputs}) -> {inputs} rank",
        "lora_b": f"({outputs}) rank -> rank {outputs}",
    }
    name = kernel.name.removesuffix("weight") + part.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
    return Row(path, f"{ADAPTER_PREFIX}{name}.weight", texts[part])


def linear(path: str, name: str, kernel: str, bias: str | None = None) -> tuple[Row, ...]:
    """The rows of a projection, with a bias if that has a layout."""
    weight = Row(f"{path}/kernel", f"{name}.weight", kernel)
    return (weight,) if bias is None else (weight, Row(f"{path}/bias", f"{name}.bias", bias))


def _norm(path: str, name: str) -> tuple[Row, ...]:
    return (Row(f"{path}/scale", f"{name}.weight", _VECTOR), Row(f"{path}/bias", f"{name}.bias", _VECTOR))


NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""Names of the norms in files of models with norms before the branches."""

SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
"""The same with norms before and after the branches."""

POST_NORMS = {path: name for path, name in SANDWICH_NORMS.items() if path.endswith("post_norm")}
"""The same with norms after the branches only."""

_PARTS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_WHOLE = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_GGUF = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def _decoder_rows(
    block: str,
    names: Mapping[str, str],
    norms: Mapping[str, str],
    *,
    flat_norms: bool = False,
    fused: Mapping[str, tuple[str, ...]] | None = None,
    pairs: bool = False,
    experts: bool = False,
) -> tuple[Row, ...]:
    """The rows of a decoder.

    Args:
      block: prefix of the tensors of a layer.
      names: names of its parts, without `weight`.
      norms: names of those of its norms that it has.
      flat_norms: whether the norms of queries and keys run over all heads.
      fused: tensors that hold several projections, by name: paths of these, one after another.
      pairs: whether the rotated halves of queries and keys are interleaved.
      experts: whether the feed-forward part is a router and experts.
    """
    split, split_bias = (_SPLIT_PAIRS, _SPLIT_PAIRS_BIAS) if pairs else (_SPLIT, _SPLIT_BIAS)
    own_norm = _SPLIT_BIAS if flat_norms else "head_dim -> head_dim"
    layer = [Row(f"blocks/{path}/scale", f"{block}{name}.weight", _VECTOR) for path, name in norms.items()]
    projections = [
        ("attention/query", split, split_bias),
        ("attention/key", split, split_bias),
        ("attention/value", _SPLIT, _SPLIT_BIAS),
        ("attention/out", _JOIN, _VECTOR),
    ]
    feed_forward = [
        ("mlp/gate", _UP, "mlp -> mlp"),
        ("mlp/up", _UP, "mlp -> mlp"),
        ("mlp/down", _DOWN, _VECTOR),
    ]
    layer += _expert_rows(block, names) if experts else ()
    for path, kernel, bias in projections if experts else projections + feed_forward:
        layer += linear(f"blocks/{path}", block + names[path.rpartition("/")[2]], kernel, bias)
    for part in ("query_norm", "key_norm"):
        layer.append(Row(f"blocks/attention/{part}/scale", f"{block}{names[part]}.weight", own_norm))
    for name, paths in (fused or {}).items():
        for kind, ending in (("kernel", "weight"), ("bias", "bias")):
            together = tuple(f"blocks/{path}/{kind}" for path in paths)
            layer = [
                row._replace(name=f"{block}{name}.{ending}", together=together) if row.path in together else row
                for row in layer
            ]
    return (
        Row("embed/embedding", names["embed"] + ".weight", _TABLE),
        *layer,
        Row("final_norm/scale", names["final_norm"] + ".weight", _VECTOR),
        Row("head/kernel", names["head"] + ".weight", _SQUARE),
        Row("classifier/out/kernel", "score.weight", _SQUARE),
    )


def _expert_rows(block: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of a router and of experts, a tensor for each expert."""
    router = Row("blocks/mlp/router/kernel", f"{block}mlp.gate.weight", _SQUARE)
    expert = {part: names[part].replace("mlp.", "mlp.experts.{expert}.") for part in ("gate", "up", "down")}
    layouts = {"gate": _UP, "up": _UP, "down": _DOWN}
    return router, *(Row(f"blocks/mlp/{p}/kernel", f"{block}{expert[p]}.weight", layouts[p]) for p in expert)


def _stacked_expert_rows(block: str) -> tuple[Row, ...]:
    """The rows of experts whose tensors hold all of a layer, as transformers 5 has them in memory."""
    both = ("blocks/mlp/gate/kernel", "blocks/mlp/up/kernel")
    down = Row("blocks/mlp/down/kernel", f"{block}mlp.experts.down_proj", _DOWN_OF_EXPERTS)
    return down, *(Row(path, f"{block}mlp.experts.gate_up_proj", _UP_OF_EXPERTS, both, along=1) for path in both)


def decoder_table(norms: Mapping[str, str] = NORMS, body: str = "model.", **changes: Any) -> Table:
    """The names of a decoder in safetensors files.

    Args:
      norms: names of those of its norms that it has.
      body: prefix of everything but the head.
      **changes: further arguments of `Table` and of the rows; `rows` are those of what else the model has.
    """
    of_table = {name: changes.pop(name) for name in ("renamed", "ignored") if name in changes}
    further = changes.pop("rows", ())
    block, whole = f"{body}layers.{{layer}}.", {part: name.replace("model.", body) for part, name in _WHOLE.items()}
    rows = (*_decoder_rows(block, _PARTS | whole, norms, **changes), *further)
    other = _stacked_expert_rows(block) if changes.get("experts") else ()
    ignored = (*_BUFFERS, *of_table.pop("ignored", ()))
    twins = ((f"{body}embed_tokens.weight", "lm_head.weight"),)
    return Table(prefix="model.", rows=rows, ignored=ignored, twins=twins, other=other, **of_table)


def _encoder_layer(block: str, projection: str = "") -> tuple[Row, ...]:
    """The rows of a layer; `projection` ends the names of queries, keys and values."""
    own = f"{block}attention.self."
    return (
        *linear("blocks/attention/query", f"{own}query{projection}", _SPLIT, _SPLIT_BIAS),
        *linear("blocks/attention/key", f"{own}key{projection}", _SPLIT, _SPLIT_BIAS),
        *linear("blocks/attention/value", f"{own}value{projection}", _SPLIT, _SPLIT_BIAS),
        *linear("blocks/attention/out", block + "attention.output.dense", _JOIN, _VECTOR),
        *_norm("blocks/attention_norm", block + "attention.output.LayerNorm"),
        *linear("blocks/mlp/up", block + "intermediate.dense", _UP, "mlp -> mlp"),
        *linear("blocks/mlp/down", block + "output.dense", _DOWN, _VECTOR),
        *_norm("blocks/mlp_norm", block + "output.LayerNorm"),
    )


def _encoder_rows(prefix: str, head: str, bias: str, norm: str, classifier: tuple[str, str]) -> tuple[Row, ...]:
    return (
        *(
            Row(f"embed/{kind}/embedding", f"{prefix}embeddings.{name}_embeddings.weight", _TABLE)
            for kind, name in (("word", "word"), ("position", "position"), ("type", "token_type"))
        ),
        *_norm("embed/norm", prefix + "embeddings.LayerNorm"),
        *_encoder_layer(prefix + "encoder.layer.{layer}."),
        *linear("head/dense", f"{head}dense", _SQUARE, _VECTOR),
        *_norm("head/norm", f"{head}{norm}"),
        Row("head/bias", bias, "vocab -> vocab"),
        *linear("classifier/dense", classifier[0], _SQUARE, _VECTOR),
        *linear("classifier/out", classifier[1], _SQUARE, _VECTOR),
    )


_OLD_LAYER_NORM = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# Buffers that are computed from the configuration.
_BUFFERS = (r".*rotary_emb\.inv_freq", r".*embeddings\.(position_ids|token_type_ids)")

ROBERTA = Table(
    prefix="roberta.",
    rows=_encoder_rows(
        "roberta.", "lm_head.", "lm_head.bias", "layer_norm", ("classifier.dense", "classifier.out_proj")
    ),
    # No head of jaxcl uses the pooler.
    ignored=(*_BUFFERS, r"(roberta\.)?pooler\.dense\.(weight|bias)"),
    renamed=_OLD_LAYER_NORM,
    twins=(
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("lm_head.bias", "lm_head.decoder.bias"),
    ),
)
BERT = Table(
    prefix="bert.",
    rows=_encoder_rows(
        "bert.",
        "cls.predictions.transform.",
        "cls.predictions.bias",
        "LayerNorm",
        ("bert.pooler.dense", "classifier"),
    ),
    # Next-sentence prediction has no counterpart.
    ignored=(*_BUFFERS, r"cls\.seq_relationship\.(weight|bias)"),
    renamed=_OLD_LAYER_NORM,
    twins=(
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
)


_DEBERTA_HEAD = "cls.predictions.transform."
DEBERTA = Table(
    prefix="deberta.",
    rows=(
        Row("embed/word/embedding", "deberta.embeddings.word_embeddings.weight", _TABLE),
        *_norm("embed/norm", "deberta.embeddings.LayerNorm"),
        Row("embed/distance/embedding", "deberta.encoder.rel_embeddings.weight", _TABLE),
        *_norm("embed/distance_norm", "deberta.encoder.LayerNorm"),
        *_encoder_layer("deberta.encoder.layer.{layer}.", "_proj"),
        *linear("head/dense", _DEBERTA_HEAD + "dense", _SQUARE, _VECTOR),
        *_norm("head/norm", _DEBERTA_HEAD + "LayerNorm"),
        Row("head/bias", "cls.predictions.bias", "vocab -> vocab"),
        *linear("classifier/dense", "pooler.dense", _SQUARE, _VECTOR),
        *linear("classifier/out", "classifier", _SQUARE, _VECTOR),
    ),
    # The published files also hold absolute positions, not used, and the head that tells replaced tokens.
    ignored=(*_BUFFERS, r"(deberta\.)?embeddings\.position_embeddings\.weight", r"mask_predictions\..*"),
    # The same head by its newer name.
    renamed=(
        *_OLD_LAYER_NORM,
        (r"^lm_predictions\.lm_head\.bias$", "cls.predictions.bias"),
        (r"^lm_predictions\.lm_head\.", _DEBERTA_HEAD),
    ),
    twins=(
        ("deberta.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
)


def _modernbert_rows() -> tuple[Row, ...]:
    block = "model.layers.{layer}."
    rows = [
        Row("embed/embedding", "model.embeddings.tok_embeddings.weight", _TABLE),
        *_norm("embed_norm", "model.embeddings.norm"),
        *(row._replace(first=1) for row in _norm("blocks/attention_norm", block + "attn_norm")),
        *linear("blocks/attention/out", block + "attn.Wo", _JOIN, _VECTOR),
        *_norm("blocks/mlp_norm", block + "mlp_norm"),
        *linear("blocks/mlp/down", block + "mlp.Wo", _DOWN, _VECTOR),
        *_norm("final_norm", "model.final_norm"),
        *linear("head/dense", "head.dense", _SQUARE, _VECTOR),
        *_norm("head/norm", "head.norm"),
        Row("head/bias", "decoder.bias", "vocab -> vocab"),
        *linear("classifier/out", "classifier", _SQUARE, _VECTOR),
    ]
    for name, part, parts, kernel, bias in (
        ("attn.Wqkv", "attention", ("query", "key", "value"), _SPLIT, _SPLIT_BIAS),
        ("mlp.Wi", "mlp", ("gate", "up"), _UP, "mlp -> mlp"),
    ):
        for kind, ending, text in (("kernel", "weight", kernel), ("bias", "bias", bias)):
            together = tuple(f"blocks/{part}/{one}/{kind}" for one in parts)
            rows += [Row(path, f"{block}{name}.{ending}", text, together) for path in together]
    return tuple(rows)


MODERNBERT = Table(
    prefix="model.",
    rows=_modernbert_rows(),
    ignored=_BUFFERS,
    twins=(("model.embeddings.tok_embeddings.weight", "decoder.weight"),),
)


def _gguf_table(pairs: bool) -> Table:
    return Table(
        prefix="",
        rows=_decoder_rows(
            "blk.{layer}.",
            _GGUF | {"embed": "token_embd", "final_norm": "output_norm", "head": "output"},
            {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
            pairs=pairs,
        ),
        # The scaled rotary frequencies are read with the configuration.
        ignored=(r"rope_freqs\.weight",),
        twins=(("token_embd.weight", "output.weight"),),
    )


GGUF_TABLES = {
    "llama": _gguf_table(pairs=True),
    "mistral": _gguf_table(pairs=True),
    "qwen2": _gguf_table(pairs=False),
    "qwen3": _gguf_table(pairs=False),
}
"""The names in GGUF files, by family. llama.cpp interleaves the rotated halves of LLaMA's queries and keys only."""
