"""Finished cells on the disk: read again where they were made from the same, refused where they were not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmfg_dgl.config import Config
from cmfg_dgl.config.text import placeless
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import canonical_json, read_json, sha256_bytes, to_json
from cmfg_dgl.ownership import refuse_foreign, write_owned

__all__ = ["CellFile", "cell_settings", "digest_of"]

Record = dict[str, Any]


def digest_of(made_from: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of everything that a cell depends on."""
    return sha256_bytes(canonical_json(made_from))


def cell_settings(config: Config) -> Config:
    """The configuration that a cell is made from: without its seed, which names the cell, and where it runs."""
    config = placeless(config)
    return replace(config, run=replace(config.run, seed=0))


@dataclass(frozen=True)
class CellFile:
    """The file of a cell: its name within the folder of a comparison or an ablation."""

    folder: Path
    name: str

    def read(self, digest: str, *, force: bool) -> Record | None:
        """The finished cell, None where there is no file, or `force` says to replace it.

        Parameters
        ----------
        digest
            Of what the cell must have been made from, see `digest_of`; it stands in the cell as `made_from`.

        Raises
        ------
        ConfigError
            If it was made from other data or settings, or is to be replaced and somebody else wrote or changed it.
        CheckpointError
            If it is damaged.
        """
        path = self.folder / self.name
        if force:
            refuse_foreign(self.folder, [self.name])
            return None
        if not path.is_file():
            return None
        try:
            record = read_json(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); delete it, and the same command runs it again"
            ) from None
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}: holds no cell; delete it, and the same command runs it again")
        if record.get("made_from") != digest:
            raise ConfigError(
                f"{path}: made from other data or settings; add --force to run every cell again, or choose another "
                "-o"
            )
        return record

    def write(self, record: Record) -> None:
        """Write the cell; ConfigError if somebody else wrote or changed the file that is there."""
        write_owned(self.folder, self.name, (to_json(record) + "\n").encode())
