"""Text to batches, with NumPy alone: sources, tokenizer, rows of fixed width, plans of batches, memory, teacher store.

A task's text goes `load_task` → rows (`PairRows`, `TextRows`, `LabelledRows`) → pipeline → batches as dictionaries of
arrays. Reading a source loads no jax: each name is imported when it is first used.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.data.labelled import LabelledRows
    from jaxcl.data.memory import Memory, TaskMemory, draw_examples
    from jaxcl.data.mix import Interleaved, Mixed, WithGeneral
    from jaxcl.data.mixture import MixedRows, MixturePipeline
    from jaxcl.data.packed_pairs import PackedPairs
    from jaxcl.data.pairs import PairRows, pair_shapes
    from jaxcl.data.pipeline import LabelledPipeline, PairPipeline, Pipeline, TextPipeline, iterate
    from jaxcl.data.plan import Shape
    from jaxcl.data.rows import EncodedRows
    from jaxcl.data.sources import TaskData, load_end_task, load_general, load_source, load_task
    from jaxcl.data.spec import DataConfig, EndTaskSpec, GeneralSpec, MixedSource, SourceSpec, TaskSpec, TokenizerConfig
    from jaxcl.data.teacher_store import TeacherStore, write_records
    from jaxcl.data.text import TextRows
    from jaxcl.data.tokenizer import Tokenizer, prepare_tokenizer

__all__ = [
    "DataConfig",
    "EncodedRows",
    "EndTaskSpec",
    "GeneralSpec",
    "Interleaved",
    "LabelledPipeline",
    "LabelledRows",
    "Memory",
    "Mixed",
    "MixedRows",
    "MixedSource",
    "MixturePipeline",
    "PackedPairs",
    "PairPipeline",
    "PairRows",
    "Pipeline",
    "Shape",
    "SourceSpec",
    "TaskData",
    "TaskMemory",
    "TaskSpec",
    "TeacherStore",
    "TextPipeline",
    "TextRows",
    "Tokenizer",
    "TokenizerConfig",
    "WithGeneral",
    "draw_examples",
    "iterate",
    "load_end_task",
    "load_general",
    "load_source",
    "load_task",
    "pair_shapes",
    "prepare_tokenizer",
    "write_records",
]
