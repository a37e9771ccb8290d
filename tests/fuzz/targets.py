"""Every reader of bytes from elsewhere, with small seeds that are made here."""

from __future__ import annotations

import functools
import gzip
import io
import json
import lzma
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxcl.config import parse_config
from jaxcl.config.experiment import override
from jaxcl.config.file import dump_yaml
from jaxcl.data.chat_templates import CHAT_TEMPLATES
from jaxcl.data.conversations import encode_conversations
from jaxcl.data.examples import read_shards
from jaxcl.data.formats import find_records
from jaxcl.data.images.decode import FORMATS, decode
from jaxcl.data.memory import Memory
from jaxcl.data.messages import read_messages
from jaxcl.data.teacher_store import TeacherStore, write_records
from jaxcl.data.template_worker import TemplateError, render
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.evaluation.results import Results
from jaxcl.models.network import Network
from jaxcl.reporting.run_data import read_run
from jaxcl.run.folder import RunFolder
from jaxcl.sharding import roll_call
from jaxcl.sharding.clusters import ProcessId
from jaxcl.training.sinks import JsonLines
from jaxcl.weights import read_config, read_token_ids
from jaxcl.weights.adapters import read_lora
from jaxcl.weights.source import Safetensors
from tests.fuzz.harness import Target
from tests.tiny.runs import PAIRS, SEEKR

ROWS: list[dict[str, Any]] = [
    {"prompt": "1 + 1 =", "answer": "2", "text": "one é", "label": 1},
    {"prompt": "a\u2028b", "answer": "c\n", "text": "x" * 60, "label": 0.5},
]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]},
]  # fmt: skip
HF: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "head_dim": 4,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear",
    "factor": 2.0}, "hidden_act": "silu", "tie_word_embeddings": True, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
RESULTS: dict[str, Any] = {
    "method": "replay", "seed": 0, "tasks": ["a", "b"], "metric": ["accuracy", "accuracy"],
    "higher_is_better": [True, True], "matrix": [[50.0, None], [40.0, 60.0]], "initial": [1.0, 2.0], "finished": True,
    "further": {"other": {"metric": ["x", "x"], "higher_is_better": [True, False], "matrix": [[1.0, None]]}},
    "timing": {"training": 1.5}, "data": {"a": {"task": {"examples": 3}}}, "versions": {"jax": "1"},
    "steps": {"a": 3}, "seconds": 2.5,
}  # fmt: skip
METRICS = [
    {"step": step, "task": 0, "task_step": step, "kind": "task", "loss": 1.5, "steps": 1} for step in range(1, 5)
]


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines_of(values: list[Any]) -> bytes:
    return b"".join(text_of(value) + b"\n" for value in values)


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def made(write: Callable[[Path], object], name: str = "file") -> bytes:
    """The bytes of a file that a library writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


# ---------------------------------------------------------------- data


def records(scheme: str, suffix: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        place = written(folder / f"train.{suffix}", content)
        found = find_records(scheme, str(place), text_field="text").splits["all"]
        for part in found.parts():
            for where, record in found.read(part):
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


def packed(compress: Callable[[bytes], bytes]) -> list[bytes]:
    return [compress(lines_of(ROWS)), compress(lines_of(CHATS))]


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


def read_store(content: bytes, folder: Path) -> None:
    store = TeacherStore.open(written(folder / "task00_process000.array_record", content))
    for position in range(min(len(store), 100)):
        store[position]


def store() -> bytes:
    import ml_dtypes

    rows = [
        (number, {"maps": np.ones((2, number + 1), np.float32), "codes": np.zeros(3, ml_dtypes.bfloat16)})
        for number in range(3)
    ]
    return made(lambda path: write_records(path, rows, {"task": 0, "model": "x"}))


def read_examples(content: bytes, folder: Path) -> None:
    for shard in read_shards(written(folder / "task00.arrow", content)):
        shard.tokens.values.sum()


def examples() -> bytes:
    from jaxcl.data.examples import Shard, write_shards
    from jaxcl.data.ragged import Ragged

    tokens = Ragged.of([np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)], np.int32)
    spans = Ragged.of([np.array([1, 2], np.int32), np.array([2], np.int32)], np.int32)
    return made(lambda path: write_shards(path, [Shard(tokens, spans, {"cut": 1})], np.int32))


# ---------------------------------------------------------------- weights


def gguf_file() -> bytes:
    import gguf

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(32)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", "<s>"])
        writer.add_token_merges(["a b"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_eos_token_id(3)
        writer.add_chat_template("{{ messages }}")
        writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
        writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return made(write, "model.gguf")


def read_gguf(content: bytes, folder: Path) -> None:
    # Named anew, because contents are cached by name.
    path = written(folder / "model.gguf", content)
    read_config(path)
    read_token_ids(path)


def read_gguf_tokenizer(content: bytes, folder: Path) -> None:
    Tokenizer.load(written(folder / "model.gguf", content)).backend.encode("ab <s>")


def safetensors() -> bytes:
    from safetensors.numpy import save

    return save({"model.embed_tokens.weight": np.ones((8, 8), np.float32), "b": np.zeros((2, 3), np.float16)})


def read_tensors(place: Path) -> None:
    with Safetensors(place) as source:
        for name, shape in source.shapes.items():
            source.read(name, tuple(slice(0, size) for size in shape))


def read_safetensors(content: bytes, folder: Path) -> None:
    read_tensors(written(folder / "model.safetensors", content))


def read_index(content: bytes, folder: Path) -> None:
    written(folder / "one.safetensors", safetensors())
    written(folder / "model.safetensors.index.json", content)
    read_tensors(folder)


def read_hf(content: bytes, folder: Path) -> None:
    written(folder / "model.safetensors", safetensors())
    written(folder / "config.json", content)
    read_config(folder)
    read_token_ids(folder)


def hf_seeds() -> list[bytes]:
    from jaxcl.weights.hf_config import to_hf
    from tests.tiny.networks import CONFIGS
    from tests.tiny.vision import SEEING

    written = [to_hf(config, {}, "float32") for config in CONFIGS.values()]
    return [text_of(one) for one in (HF, *written, *SEEING.values())]


def read_adapters(content: bytes, folder: Path) -> None:
    from safetensors.numpy import save

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    written(
        folder / "adapter_model.safetensors",
        save({f"{name}.lora_A.weight": np.ones((2, 16), "f4"), f"{name}.lora_B.weight": np.ones((16, 2), "f4")}),
    )
    written(folder / "adapter_config.json", content)
    read_lora(folder, network())


@functools.cache
def network() -> Network:
    return Network.create(parse_config({**PAIRS, "output": "x", "method": "sequential"}).model)


ADAPTERS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "rank_pattern": {},
    "alpha_pattern": {"q_proj": 8}, "use_rslora": False, "fan_in_fan_out": False,
}  # fmt: skip


# ---------------------------------------------------------------- configurations and run folders


def read_run_config(content: bytes, folder: Path) -> None:
    written(folder / "config.yaml", content)
    parse_config(RunFolder.open(folder).content())


def read_override(content: bytes, folder: Path) -> None:
    given = {"output": "x", **PAIRS, "tasks": [dict(task) for task in PAIRS["tasks"]], "method": dict(SEEKR)}
    given |= {name: dict(PAIRS[name]) for name in ("model", "training", "data", "optimizer")}
    changed = override(given, content.decode("utf-8", "surrogateescape").split("\n"))
    if "weights" not in changed and isinstance(method := changed.get("method"), dict) and method.get("name") == "seekr":
        parse_config(changed)


OVERRIDES = [
    b"seed=1",
    b"tasks.*.train=2\nmethod.layer_budget=1",
    b"model.rope_scaling={type: linear, factor: 2.0}",
    b"training.steps=[1,2]\noptimizer.learning_rate=1e-3",
    b"data.prompt_template={prompt}\nmesh.data=2",
]


def read_results(content: bytes, folder: Path) -> None:
    path = written(folder / "results.json", content)
    written(folder / "metrics.jsonl", lines_of(METRICS))
    try:
        read_run(folder)
    finally:
        Results.read(path)


def beside_results(name: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        written(folder / "results.json", text_of(RESULTS))
        written(folder / name, content)
        read_run(folder)

    return read


def read_metrics(content: bytes, folder: Path) -> None:
    beside_results("metrics.jsonl")(content, folder)
    sink = JsonLines(folder / "metrics.jsonl", after=2)
    sink.write({"step": 3})
    sink.close()


def read_memory(content: bytes, folder: Path) -> None:
    for task in Memory.load(written(folder / "memory.json", content)).tasks:
        len(task.kept)


def memory() -> bytes:
    kept = Memory(seed=3).with_task(0, "first", count=30, examples=[7, 29, 12], sizes=((1, 2, 3),), rows="x")
    return made(kept.cut({0: 2}, after=1).save)


def arrays() -> bytes:
    return made(lambda path: np.savez(path, mlp=np.ones((2, 3)), heads=np.ones(2)), "after0.npz")


# ---------------------------------------------------------------- the roll call


_PROCESS = ProcessId("127.0.0.1", 0, 3, 0)


def read_report(content: bytes, folder: Path) -> None:
    """What somebody sends to the port of process 0, who then leaves."""
    with roll_call._Door(_PROCESS, "token") as door:
        port = door._server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as guest:
            guest.sendall(content[:60000])
            guest.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 5
            door._let_in()
            while door._guests and time.monotonic() < deadline:
                for report in door.reports(deadline):
                    roll_call._contradiction(_PROCESS, {"jax": "1"}, report, {2})
                    int(str(report["index"]))
            assert not door._guests, "a guest who left is still waited for"


def reports() -> list[bytes]:
    return [
        text_of({"index": index, "count": 3, "versions": versions, "proof": roll_call._proof("token", index, 3)})
        + b"\n"
        for index, versions in ((1, {"jax": "1"}), (2, {"jax": "2"}))
    ]


def read_verdict(content: bytes, folder: Path) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(content[:60000])
        there.shutdown(socket.SHUT_WR)
        verdict = roll_call._receive(here, time.monotonic() + 5)
        str(verdict and verdict.get("problem"))


def images() -> list[bytes]:
    """A small image in every format that is decoded."""
    found = []
    for kind in FORMATS:
        file = io.BytesIO()
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, kind)
        found.append(file.getvalue())
    return found


def yaml_seeds() -> list[bytes]:
    content = {**PAIRS, "method": SEEKR, "output": "x"}
    return [text_of(content), dump_yaml(content).encode(), b"# c\nseed: 0x1f\noutput: &a x\nweights: *a\nmodel: {}\n"]


TARGETS: dict[str, Target] = {
    "json": Target(records("json", "json"), lambda: [text_of(ROWS), b"\xef\xbb\xbf [ {} , {\"a\": 1.5} ]\n"]),
    "jsonl": Target(records("jsonl", "jsonl"), lambda: [lines_of(ROWS), lines_of(CHATS), text_of(ROWS)]),
    "text": Target(records("text", "txt"), lambda: ["one\r\ntwo é\r\u2028three\n\n".encode(), b"\xef\xbb\xbfa"]),
    "csv": Target(records("csv", "csv"), lambda: [b'a,b\n1,"x\n""y"""\n2,z\n', b"a\r\n1\r\n"]),
    "tsv": Target(records("tsv", "tsv"), lambda: [b'a\tb\n1\t"x\n2\tz\n']),
    "parquet": Target(records("parquet", "parquet"), lambda: [parquet()]),
    "gzip": Target(records("jsonl", "jsonl.gz"), lambda: packed(gzip.compress)),
    "xz": Target(records("jsonl", "jsonl.xz"), lambda: packed(lzma.compress)),
    "zstd": Target(records("jsonl", "jsonl.zst"), lambda: packed(zstd)),
    "labels": Target(read_labels, lambda: [b'["a", "b"]']),
    "conversations": Target(read_chats, lambda: [text_of(chat) for chat in CHATS]),
    "image": Target(lambda content, _: decode(content, "x"), images, weight=2),
    "chat_template": Target(
        read_template, lambda: [text.encode() for text in CHAT_TEMPLATES.values()], (TemplateError,), weight=4
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
    "teacher_store": Target(read_store, lambda: [store()], weight=2),
    "examples": Target(read_examples, lambda: [examples()]),
    "gguf": Target(read_gguf, lambda: [gguf_file()], weight=2),
    "gguf_tokenizer": Target(read_gguf_tokenizer, lambda: [gguf_file()], weight=2),
    "safetensors": Target(read_safetensors, lambda: [safetensors()]),
    "safetensors_index": Target(
        read_index, lambda: [text_of({"metadata": {}, "weight_map": {"b": "one.safetensors"}})]
    ),
    "hf_config": Target(read_hf, hf_seeds, weight=2),
    "adapter_config": Target(read_adapters, lambda: [text_of(ADAPTERS)]),
    "config": Target(read_run_config, yaml_seeds, weight=2),
    "overrides": Target(read_override, lambda: OVERRIDES, weight=2),
    "results": Target(read_results, lambda: [text_of(RESULTS)]),
    "metrics": Target(read_metrics, lambda: [lines_of(METRICS), text_of(METRICS[0])]),
    "predictions": Target(
        beside_results("predictions/after0_task0_a.jsonl"),
        lambda: [text_of({"after": 0, "task": "a", "prompt": "p", "prediction": "x", "score": 1.0})],
    ),
    "importance": Target(beside_results("importance/after0.npz"), lambda: [arrays()]),
    "memory": Target(read_memory, lambda: [memory()]),
    "roll_call": Target(read_report, reports),
    "verdict": Target(read_verdict, lambda: [b'{"problem": null}\n', b'{"problem": "x"}\n']),
}  # fmt: skip
