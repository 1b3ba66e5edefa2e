"""The plain files of a tar archive, read where they lie: nothing is ever extracted."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cmfg_dgl.data.validation import printable
from cmfg_dgl.errors import DataError

__all__ = ["Member", "digest_part", "members", "read_part"]


@dataclass(frozen=True)
class Member:
    """A file inside of a tar: its name, where its bytes lie, and what forbids to use it."""

    name: str
    offset: int
    size: int
    problem: str | None


def members(path: Path) -> Iterator[Member]:
    """List everything in an uncompressed tar but its folders, in order.

    Links, devices and sparse files, and names that lead out of the archive, have a `problem`.

    Raises
    ------
    DataError
        If the file cannot be read, is no uncompressed tar, or is truncated or damaged. A tar ends with a block of
        zeros (POSIX.1-2001, pax): where the last member is not followed by one, something is missing.
    """
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # By a negative size, tarfile would go back and never end.
                if not 0 <= member.size <= length:
                    raise tarfile.TarError(f"{member.name} is said to have {member.size:,} bytes")
                if not member.isdir():
                    name = printable(str(PurePosixPath(member.name)))
                    yield Member(name, member.offset_data, member.size, _problem(member))
            end = archive.offset
        if read_part(path, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.TarError(f"no end of the archive at byte {end:,}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: truncated, damaged or no uncompressed tar ({printable(str(error))}); decompress it, or "
            "download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _problem(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if member.islnk() or member.issym():
        return f"a link to {printable(member.linkname)!r}, and links are not followed; store the file itself"
    if not member.isreg() or member.issparse():
        return "not a plain file"
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        return "the name leads out of the archive; store it under a relative name"
    if member.name != printable(member.name):
        return "the name is not UTF-8; store it under another name"
    return None


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset` on; fewer where the file ends before."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def digest_part(path: Path, offset: int, size: int) -> str:
    """Hexadecimal SHA-256 of `size` bytes from `offset` on, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while size and (piece := file.read(min(size, 1 << 20))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()
