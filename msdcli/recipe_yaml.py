"""YAML with line numbers, `key=value` overrides, and mistakes explained in the user's terms.

Scalars follow YAML 1.2 (so `no` is a word and `1e-4` a number); aliases are refused, which also ends alias bombs.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from msdcli.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 50_000  # keys, values and lists: PyYAML reads some ten thousand in a second
MAX_DIGITS = 400  # more than any float has
MAX_SHOWN = 20  # mistakes
TINY = 1e-20  # a least value below this stands for 0 itself, which is excluded
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of letters that steer instead of being shown

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars."""


_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    "int": (re.compile(r"^[-+]?[0-9]+\Z"), "-+0123456789"),
    "float": (re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"), "-+.0123456789"),
    "null": (re.compile(r"^(?:~|null|Null|NULL|)\Z"), "~nN\0"),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, [*_first])
_Loader.yaml_implicit_resolvers.setdefault("", []).append(("tag:yaml.org,2002:null", re.compile(r"^$")))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


# Two spellings of one value: an override of one replaces the other.
SAME = {"sigmas": "sigma_init", "sigma_init": "sigmas"}


class Document:
    """A parsed recipe that remembers where every key came from."""

    def __init__(self, tree: dict[str, Any], name: str, lines: dict[Path_, str]) -> None:
        self.tree = tree
        self.name = name
        self.lines = lines

    @classmethod
    def read(cls, path: Path) -> Document:
        """Parse the file at `path`; UserError says what is wrong and in which line."""
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) > MAX_BYTES:
                raise UserError(f"{path}: a recipe is at most {MAX_BYTES:,} bytes")
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str) -> Document:
        """Parse YAML text; `name` stands in messages for the file."""
        lines: dict[Path_, str] = {}
        tree = _parse(text, name, lines)
        if not isinstance(tree, dict):
            raise UserError(f"{name}: a recipe is a mapping of keys to values, not {_shown(tree)}")
        return cls(tree, name, lines)

    def override(self, text: str) -> None:
        """Apply `dotted.key=value`; the value is YAML. List items are named by number."""
        key, equals, value_text = text.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"override {text!r} is not of the form key=value", hint="for instance: stages.0.steps=50")
        where = f"override '{text}'"
        self.set(keys, _parse(value_text, where, {}), where)

    def set(self, keys: list[str], value: Any, where: str) -> None:
        """Set the value at the path `keys`; `where` stands in messages for its origin."""
        node: Any = self.tree
        for depth, part in enumerate(keys):
            index = self._index(node, part, where)
            self.lines[tuple(_numbers(keys[: depth + 1]))] = where
            if depth == len(keys) - 1:
                if isinstance(node, dict):
                    node.pop(SAME.get(part), None)
                node[index] = value
            elif isinstance(node, dict) and not isinstance(node.get(index), dict | list):
                node[index] = {}
            node = node[index]

    def _index(self, node: Any, part: str, where: str) -> str | int:
        if not isinstance(node, list):
            return part
        if part.isdecimal() and int(part[:9]) < len(node):
            return int(part)
        raise UserError(f"{where}: {part!r} does not name an item of a list of {len(node)} (0 to {len(node) - 1})")

    def where(self, path: Path_) -> str:
        """Return `file:line` of a key, or of the nearest section that contains it."""
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, self.name)


def _numbers(keys: list[str]) -> list[str | int]:
    return [int(k) if k.isdecimal() and len(k) < 9 else k for k in keys]


def _parse(text: str, name: str, lines: dict[Path_, str]) -> Any:
    try:
        _refuse_aliases_and_depth(text, name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _walk(node, (), name, lines)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def _refuse_aliases_and_depth(text: str, name: str) -> None:
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{name}:{line}: aliases (*{event.anchor}) are not allowed in recipes: write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if number > MAX_VALUES:
            raise UserError(f"{name}:{line}: a recipe has at most {MAX_VALUES:,} keys and values")
        if depth > MAX_DEPTH:
            raise UserError(f"{name}:{line}: nested more than {MAX_DEPTH} deep")


def _walk(node: Node, path: Path_, name: str, lines: dict[Path_, str]) -> None:
    lines.setdefault(path, f"{name}:{node.start_mark.line + 1}")
    _check_tag(node, name)
    if isinstance(node, SequenceNode):
        for i, item in enumerate(node.value):
            _walk(item, (*path, i), name, lines)
    elif isinstance(node, MappingNode):
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise UserError(f"{name}:{line}: a key is a word, not {_shown(getattr(key_node, 'value', '?'))}")
            key = (*path, key_node.value)
            if key in lines:
                raise UserError(f"{name}:{line}: {'.'.join(map(str, key))} is given twice (first at {lines[key]})")
            lines[key] = f"{name}:{line}"
            _walk(value, key, name, lines)


def _check_tag(node: Node, name: str) -> None:
    """Refuse a tag that YAML's core has not, and a value that is none of its tag's."""
    line, tag = node.start_mark.line + 1, node.tag.removeprefix(_TAG)
    kind = {ScalarNode: ("str", *_SCALARS), SequenceNode: ("seq",), MappingNode: ("map",)}[type(node)]
    if not node.tag.startswith(_TAG) or tag not in kind:
        raise UserError(
            f"{name}:{line}: not valid YAML: the tag {_shown(node.tag.replace(_TAG, '!!'))} has no meaning here",
            hint="leave it out",
        )
    if tag in _SCALARS and not _SCALARS[tag][0].match(node.value):
        raise UserError(f"{name}:{line}: not valid YAML: {_shown(node.value)} is no {tag}, as the tag !!{tag} says")
    if tag in ("int", "float") and len(node.value) > MAX_DIGITS:
        raise UserError(f"{name}:{line}: not valid YAML: a number has at most {MAX_DIGITS} digits")


def dump(tree: dict[str, Any]) -> str:
    """Return plain data as YAML. Letters that would steer a terminal instead of being shown are written as escapes, and
    then all that are not ASCII.
    """
    text = ""
    for unicode in (True, False):
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=unicode, width=120)
        if not any(unicodedata.category(ch) in UNSEEN and ch != "\n" for ch in text):
            break
    return text


def explain_all(document: Document, model: type[BaseModel], errors: Sequence[Any], what: str) -> str:
    """Return what is wrong with a recipe or a sweep, line by line; of very many mistakes the first."""
    lines = [explain(document, model, dict(error)) for error in errors[:MAX_SHOWN]]
    more = [f"  and {len(errors) - MAX_SHOWN:,} more"] if len(errors) > MAX_SHOWN else []
    count = "1 mistake" if len(errors) == 1 else f"{len(errors):,} mistakes"
    return "\n".join([f"{count} in {what}", *lines, *more])


def explain(document: Document, model: type[BaseModel], error: dict[str, Any]) -> str:
    """Return one mistake as `  file:line: key: what is wrong; what is allowed; the nearest name`."""
    path = _without_tags(document.tree, error["loc"])
    dotted = ".".join(map(str, path)) or "recipe"
    kind, context = error["type"], error.get("ctx", {})
    value = _shown(error.get("input"))
    allowed: list[str] = []
    if kind == "extra_forbidden":
        allowed = _fields(document.tree, model, path[:-1])
        said = "no such key"
    elif kind == "missing":
        said = "is required"
    elif kind == "union_tag_not_found":
        keys = [str(key) for key in error.get("input") or []]
        said = f"needs the key {context['discriminator']}" + (f", and has {', '.join(keys)[:60]}" if keys else "")
    elif kind == "union_tag_invalid":
        allowed = re.findall(r"'([^']*)'", context["expected_tags"])
        dotted += "." + context["discriminator"].strip("'")
        path = (*path, context["discriminator"].strip("'"))
        value, said = _shown(context["tag"]), f"is {_shown(context['tag'])}, not one of {', '.join(allowed)}"
    elif kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        said = f"is {value}, not one of {', '.join(allowed)}"
    elif kind == "value_error":
        said = str(context["error"])
    elif kind in _BOUNDS:
        said = f"is {value}, and must be {_bound(*_BOUNDS[kind], context)}"
    else:
        said = f"is {value}: {error['msg'][0].lower()}{error['msg'][1:]}"
    tried = str(path[-1]) if kind == "extra_forbidden" and path else value.strip("'\"")
    near = nearest(tried, allowed)
    if kind == "extra_forbidden" and not near and allowed:
        said += f" (there are {', '.join(allowed)})"
    return f"  {document.where(path)}: {dotted}: {said}" + (f"; did you mean `{near}`?" if near else "")


def _bound(short: str, words: str, context: dict[str, Any]) -> str:
    """Say a bound as people write it: 1e-30, the least that is not nothing, is `above 0`."""
    value = context[short]
    if short == "ge" and 0 < value <= TINY:
        return "above 0"
    text = f"{value:,}" if isinstance(value, int) and abs(value) < 1e9 else f"{value:g}"
    return f"{words} {re.sub(r'e([+-])0*', lambda m: 'e' + m[1].strip('+'), text)}"


def nearest(word: str, among: list[str]) -> str | None:
    """Return the name most like `word`, if one is."""
    return next(iter(difflib.get_close_matches(word, among, n=1, cutoff=0.6)), None)


def _without_tags(tree: Any, location: tuple[str | int, ...]) -> Path_:
    """Drop the union tags that pydantic puts into an error's location (`stages.0.dm.steps` -> `stages.0.steps`)."""
    path: list[str | int] = []
    for i, part in enumerate(location):
        is_tag = isinstance(tree, dict) and i < len(location) - 1 and part not in tree and part in tree.values()
        if is_tag:
            continue
        path.append(part)
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            tree = None
    return tuple(path)


def _fields(tree: Any, annotation: Any, path: Path_) -> list[str]:
    """Return the keys that the section at `path` may have."""
    model = _model(annotation, tree)
    if model is None:
        return []
    if not path:
        return list(model.model_fields)
    head, rest = path[0], path[1:]
    inner = model.model_fields[str(head)].annotation if head in model.model_fields else None
    tree = tree.get(head) if isinstance(tree, dict) else None
    if rest and isinstance(rest[0], int):
        inner, tree, rest = get_args(inner)[0], tree[rest[0]], rest[1:]
    return _fields(tree, inner, rest)


def _model(annotation: Any, tree: Any) -> type[BaseModel] | None:
    """Return the model of `annotation`; of a union, the member whose tag the data carries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = [m for m in (_model(a, tree) for a in get_args(annotation)) if m is not None]
    for member in members:
        tags = {k: f.default for k, f in member.model_fields.items() if get_args(f.annotation) == (f.default,)}
        if isinstance(tree, dict) and any(tree.get(k) == v for k, v in tags.items()):
            return member
    return members[0] if members else None


def _shown(value: Any) -> str:
    text = repr(value[:60] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."
