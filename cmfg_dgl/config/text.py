"""Text keys: overrides are taken as they are typed, and paths are expanded and made absolute once."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from cmfg_dgl.config.keys import PACKAGED_ENCODERS, Config

__all__ = ["NOT_TEXT", "absolute", "expanded", "literal", "placeless", "resolve_paths", "text_value"]

NOT_TEXT = object()


def text_value(schema: type, key: str, text: str) -> Any:
    """The value of an override of a text key: its characters as typed; `NOT_TEXT` for a key of another type.

    A key that may be left unset takes an empty text and `null` as unset.
    """
    kind: Any = schema
    for part in key.split("."):
        if is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return NOT_TEXT
    if kind is str:
        return str(literal(text))
    optional = typing.get_origin(kind) in (types.UnionType, typing.Union) and set(typing.get_args(kind))
    if optional == {str, type(None)}:
        return None if text in ("", "null") else str(literal(text))
    return NOT_TEXT


def literal(value: Any) -> Any:
    """A value whose texts OmegaConf gives back as they are, which takes `${...}` for an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [literal(inner) for inner in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: literal(getattr(value, item.name)) for item in fields(value)})
    return value


def resolve_paths(config: Config) -> Config:
    """The configuration with `~` expanded and relative paths made absolute, as seen from the present folder.

    A name that may be a path or a name on a hub is a path where it exists.
    """
    data, features, run = config.data, config.features, config.run
    return replace(
        config,
        data=replace(
            data,
            root=None if data.root is None else _existing(data.root),
            exclude=None if data.exclude is None else absolute(data.exclude),
        ),
        features=replace(
            features,
            dir=None if features.dir is None else absolute(features.dir),
            vision="+".join(map(_encoder, joined_encoders(features.vision))),
            text=_encoder(features.text),
            aligned=None if features.aligned is None else _existing(features.aligned),
        ),
        run=replace(run, output_dir=absolute(run.output_dir)),
    )


def joined_encoders(vision: str) -> list[str]:
    """The encoders that `features.vision` joins by +; a path that exists is one, whatever its name holds."""
    return [vision] if _exists(vision) else vision.split("+")


def placeless(config: Config) -> Config:
    """The configuration without where data, features and results lie and how many threads and processes work."""
    return replace(
        config,
        data=replace(config.data, root=None),
        features=replace(config.features, dir=None, workers=1),
        run=replace(config.run, output_dir="", threads=0),
    )


def absolute(path: str) -> str:
    """A path with `~` expanded, made absolute; symbolic links stay as they are."""
    return os.path.abspath(expanded(path)) if path else path  # noqa: PTH100


def expanded(path: str) -> str:
    """A path with `~` expanded where there is such a home."""
    try:
        # Path.expanduser raises where there is no home.
        return os.path.expanduser(path)  # noqa: PTH111
    except ValueError:  # a text that no file system takes as a path
        return path


def _encoder(name: str) -> str:
    """A packaged encoder as it is, else as `_existing`."""
    return name if name in PACKAGED_ENCODERS else _existing(name)


def _existing(name: str) -> str:
    """`name` as an absolute path where there is such a file or folder, else as it is, with `~` expanded."""
    return absolute(name) if _exists(name) else expanded(name)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(expanded(name)).exists()
    except (OSError, ValueError):  # a text that no file system takes as a path
        return False
