"""Show the contents of a checkpoint of any format, from its headers alone: no tensor is read."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

from nucleate.cli import text
from nucleate.errors import ConfigurationError
from nucleate.garbage import uncollected

if TYPE_CHECKING:
    from nucleate.checkpoint.stored import Contents, StoredTensor

HELP = "show the contents of a checkpoint"

#: The version of the JSON document. It increases when a field changes or goes away.
JSON_VERSION = 1


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("path", metavar="PATH", help="a file or folder of any format")
    parser.add_argument("--keys", metavar="REGEX", default="", help="only tensors whose names match REGEX")
    parser.add_argument("--values", action="store_true", help="also show everything that is not a tensor")
    parser.add_argument("--json", action="store_true", help="write JSON, complete with offsets")
    parser.add_argument("--reader", metavar="NAME", help="the format of PATH, if the files do not show it")


def sources(args: argparse.Namespace) -> list[str]:
    """Return the paths that must exist."""
    return [args.path]


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    try:
        pattern = re.compile(args.keys)
    except re.error as error:
        raise ConfigurationError(f"--keys {args.keys!r} is not a regular expression: {error}.") from error
    with uncollected():
        from nucleate.checkpoint.readers import open_saved
        from nucleate.checkpoint.tools.selection import canonical

        contents = canonical(open_saved(args.path, args.reader, passes_over=True))
        view = _View(contents, pattern)
        lines = view.json() if args.json else view.table(args.values)
    text.write(lines)
    return 0


class _View:
    """The part of a checkpoint's contents that the user asked for."""

    def __init__(self, contents: Contents, pattern: re.Pattern[str]) -> None:
        from nucleate.checkpoint.state import key_of

        self._contents = contents
        self._root = contents.path if contents.path.is_dir() else contents.path.parent
        self._known: dict[str, str] = {}
        # Every name, also all names of tied tensors.
        names = {key_of(place): key for place, key in contents.keys.items()}
        self._names = {name: key for name, key in names.items() if pattern.search(name)}
        self._tensors = {key: contents.tensors[key] for key in dict.fromkeys(self._names.values())}
        self._in_models = {
            key
            for place, key in contents.keys.items()
            if any(place[: len(module)] == module for module in contents.modules)
        }

    def table(self, with_values: bool) -> list[str]:
        """Return the lines of the table and the lines below it."""
        from nucleate.report.memory import format_bytes

        rows = [["tensor", "dtype", "shape", "size", "file"]]
        for name, key in self._names.items():
            stored = self._tensors[key]
            is_tied = name != key and key in self._names
            rows.append(
                [
                    text.printable(name),
                    _dtype(stored),
                    "x".join(map(str, stored.shape)) or "scalar",
                    "" if is_tied else format_bytes(stored.size_bytes),
                    text.printable(f"tied to {key}" if is_tied else self._files_of(stored)),
                ]
            )
        lines = text.table(rows, right=(3,), wide=text.width()) if len(rows) > 1 else []
        lines += ["", *self._totals()]
        for name, note in self._contents.notes.items():
            lines.append(f"{text.printable(name)}: {text.printable(note)}")
        lines += self._values() if with_values else self._entries()
        return lines if rows[1:] else lines[1:]

    def _totals(self) -> list[str]:
        from nucleate.report.memory import format_bytes

        size = format_bytes(sum(stored.size_bytes for stored in self._tensors.values()))
        parts = [text.count(len(self._tensors), "tensor"), text.count(self._num_parameters, "parameter"), size]
        files = self._files()
        of = "" if len(self._tensors) == len(self._contents.tensors) else f" of {len(self._contents.tensors):,}"
        lines = [
            f"{self._contents.format}{', saved by nucleate' if self._contents.is_complete else ''}: "
            f"{parts[0].replace(' tensor', f'{of} tensor')}, {parts[1]}, {parts[2]} in {text.count(len(files), 'file')}"
        ]
        rows = [
            [
                f"  {dtype}",
                text.count(found["num_tensors"], "tensor"),
                text.count(found["num_elements"], "element"),
                size,
            ]
            for dtype, found in self._dtypes().items()
            for size in (format_bytes(found["size_bytes"]),)
        ]
        return lines + (text.table(rows, right=(1, 2, 3)) if len(rows) > 1 else [f"  all {_only(self._dtypes())}"])

    def _entries(self) -> list[str]:
        """Return a line for each entry of a training state."""
        from nucleate.report.memory import format_bytes

        contents = self._contents
        if all(len(place) == 1 for place in contents.keys) and len(contents.keys) == len(contents.skeleton):
            return []
        held: dict[Any, list[StoredTensor]] = {}
        for place, key in contents.keys.items():
            if contents.skeleton.get(place[0]) is not None:
                held.setdefault(place[0], []).append(contents.tensors[key])
        values = dict.fromkeys(contents.skeleton, 0)
        for place, _ in self._leaves():
            values[place[0]] += 1
        rows = []
        for name, node in contents.skeleton.items():
            if (name,) in contents.keys:
                continue
            if name not in held and not isinstance(node, (dict, list, tuple)):
                what = text.cut(text.printable(repr(node)), 60)
            else:
                own = list({id(stored): stored for stored in held.get(name, [])}.values())
                size = format_bytes(sum(stored.size_bytes for stored in own))
                kind = "a model, " if (name,) in contents.modules else ""
                parts = [f"{kind}{text.count(len(own), 'tensor')}, {size}"] if own else []
                if values[name] or not own:
                    parts.append(text.count(values[name], "other value" if own else "value"))
                what = ", ".join(parts)
            rows.append([f"  {text.printable(str(name))}", what])
        return ["entries", *text.table(rows)] if rows else []

    def _values(self) -> list[str]:
        rows = [[f"  {text.printable(_key(place))}", text.printable(repr(value))] for place, value in self._leaves()]
        return ["values", *text.table(rows, wide=text.width())] if rows else ["no values"]

    def json(self) -> list[str]:
        """Return the lines of a JSON document, one for each tensor."""
        contents = self._contents
        head: dict[str, Any] = {
            "version": JSON_VERSION,
            "path": str(contents.path),
            "format": contents.format,
            "is_complete": contents.is_complete,
            "modules": [_key(place) for place in contents.modules],
            "num_tensors": len(self._tensors),
            "num_parameters": self._num_parameters,
            "size_bytes": sum(stored.size_bytes for stored in self._tensors.values()),
            "dtypes": self._dtypes(),
            "files": [{"name": name, "size_bytes": size_bytes} for name, size_bytes in self._files().items()],
            "notes": contents.notes,
            "values": [{"key": _key(place), "value": _plain(value)} for place, value in self._leaves()],
        }
        lines = ["{"]
        lines += [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        tensors = [f"{json.dumps(self._described(name, key))}," for name, key in self._names.items()]
        if tensors:
            tensors[-1] = tensors[-1][:-1]
        return [*lines, '"tensors": [', *tensors, "]", "}"]

    def _described(self, name: str, key: str) -> dict[str, Any]:
        stored = self._tensors[key]
        return {
            "key": name,
            "tied_to": None if name == key else key,
            "dtype": _dtype(stored),
            "shape": list(stored.shape),
            "size_bytes": stored.size_bytes,
            "sharded_dims": self._contents.sharded.get(key),
            "chunks": [
                {
                    "file": self._name(chunk.file.name),
                    "offset": chunk.offset,
                    "begin": list(chunk.begin),
                    "shape": list(chunk.shape),
                    "stride": None if chunk.stride is None else list(chunk.stride),
                }
                for chunk in stored.chunks
            ],
        }

    @property
    def _num_parameters(self) -> int:
        """The number of elements of the models' tensors, or of all tensors if no model is known."""
        return sum(
            stored.numel
            for key, stored in self._tensors.items()
            if key in self._in_models or not self._contents.modules
        )

    def _dtypes(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for stored in self._tensors.values():
            one = found.setdefault(_dtype(stored), {"num_tensors": 0, "num_elements": 0, "size_bytes": 0})
            one["num_tensors"] += 1
            one["num_elements"] += stored.numel
            one["size_bytes"] += stored.size_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]["size_bytes"]))

    def _files(self) -> dict[str, int]:
        found = {chunk.file.name: chunk.file.size_bytes for one in self._tensors.values() for chunk in one.chunks}
        return {self._name(name): size_bytes for name, size_bytes in sorted(found.items())}

    def _files_of(self, stored: StoredTensor) -> str:
        names = list(dict.fromkeys(chunk.file.name for chunk in stored.chunks))
        if not names:
            return ""
        return self._name(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    def _name(self, file: str) -> str:
        """Return the name of a file, relative to the checkpoint's folder."""
        if file not in self._known:
            is_path = os.path.isabs(file)  # Any other name was never a file by itself.
            self._known[file] = os.path.relpath(file, self._root) if is_path else file
        return self._known[file]

    def _leaves(self) -> list[tuple[Any, Any]]:
        from nucleate.checkpoint.tools.comparison import leaves

        return list(leaves(self._contents))


def _dtype(stored: StoredTensor) -> str:
    return str(stored.dtype).removeprefix("torch.")


def _key(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))


def _only(names: dict[str, Any]) -> str:
    return next(iter(names), "nothing")


def _plain(value: Any) -> Any:
    """Return a value in JSON's form, or as `{"repr": ...}` if JSON has no form for it."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (dict, list, tuple)) and not value:
        return {} if isinstance(value, dict) else []
    return {"repr": repr(value)}
