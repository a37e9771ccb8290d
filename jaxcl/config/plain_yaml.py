"""YAML with the plain values of YAML 1.2, within bounds; needs nothing but PyYAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

UNREADABLE = (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError)
"""What reading raises, also for values that do not fit their tag (`!!int x`), and thousands of digits or brackets."""

# Plain values that are not text: those of YAML 1.2, in which 010 is ten, 1e-4 a number, and `no` a word. PyYAML follows
# YAML 1.1, and also reads dates and numbers to base 60.
_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float"))
_PLAIN = {
    _BOOL: (re.compile("(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    _INT: (re.compile("([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    _FLOAT: (
        re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        "-+0123456789.",
    ),
}
# Far more than configurations have. PyYAML takes time by the square of the depth, and a few aliases of aliases stand
# for millions of values, which any message that quotes them would write out.
_DEEPEST, _MOST_VALUES = 100, 100_000
_REPLACED = {*_PLAIN, "tag:yaml.org,2002:timestamp"}


class _Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2; rejects duplicate keys, of which plain YAML silently keeps the last."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag not in _REPLACED]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise yaml.MarkedYAMLError(problem="brackets are nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def get_single_data(self) -> Any:
        content = super().get_single_data()
        waiting, count = [content], 0
        while waiting:
            node = waiting.pop()
            below = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
            count += len(below)
            if count > _MOST_VALUES:
                raise yaml.YAMLError(f"more than {_MOST_VALUES:,} values, counting those that aliases repeat")
            waiting += below
        return content

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or `_Loader` would read as another value."""


_Loader.add_constructor(_INT, _Loader.construct_yaml_int)
for _kind, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_kind, _pattern, _first)
    _Dumper.add_implicit_resolver(_kind, _pattern, _first)


def load_yaml(text: str) -> Any:
    """What YAML stands for; raises one of `UNREADABLE`."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def compose_yaml(text: str) -> yaml.Node | None:
    """The first node of YAML; raises one of `UNREADABLE`."""
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return node


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
