"""The stamps of Tux Paint out of their Debian package, without root and without installing it."""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cmfg_dgl.errors import DataError

__all__ = ["HOW", "PACKAGE", "download_package", "unpack_stamps"]

PACKAGE = "tuxpaint-stamps-default"
STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
LICENCE = PurePosixPath("usr/share/doc") / PACKAGE / "copyright"

HOW = (
    f"the stamps are in Debian's package {PACKAGE} (GPL 2, 161 MB to download, 36 MB of them kept): unpack them "
    "without root by `cmfg data get tuxpaint --to DIR` and set data.root=DIR, or install the package, and "
    "data.root is not needed"
)
"""How to come by the stamps."""

# The stamps of 2022 take 36 MB; a package that unpacks to more than this is another one, or made to fill the disk.
MAX_UNPACKED = 1 << 30


def download_package(folder: Path) -> Path:
    """Let apt download the package into `folder`; apt checks its digest against the signed list of packages.

    Raises
    ------
    DataError
        If there is no apt-get, or it does not get the package.
    """
    remedy = f"download {PACKAGE} from <https://packages.debian.org/{PACKAGE}> and give the file, --deb FILE"
    if shutil.which("apt-get") is None:
        raise DataError(f"apt-get is not on this machine; {remedy}")
    done = subprocess.run(
        ["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    found = sorted(folder.glob("*.deb"))
    if done.returncode or not found:
        lines = done.stderr.strip().splitlines() or ["it gave no file"]
        raise DataError(f"apt-get download {PACKAGE}: {lines[-1]}; run apt-get update first, or {remedy}")
    return found[0]


def unpack_stamps(package: Path, target: Path) -> int:
    """Unpack the pictures, the captions and the licence of the package into `target`, whole or not at all.

    The folders of the stamps come to lie in `target` itself. Sounds and settings are left in the package.

    Parameters
    ----------
    package
        A .deb file (deb(5): an ar archive whose member data.tar.* holds the files).
    target
        A folder that does not exist, or an empty one.

    Returns
    -------
    int
        How many files were unpacked.

    Raises
    ------
    DataError
        If `target` holds something, the package cannot be read, is damaged, or holds what it should not: links
        instead of stamps, paths that lead out, more than a GiB.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: there already; remove it, or give another folder, --to DIR")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as made:
        stamps = Path(made, "stamps")
        stamps.mkdir()
        count = _unpack(package, stamps)
        stamps.replace(target)
    return count


def _unpack(package: Path, folder: Path) -> int:
    gate = _Gate(package)
    try:
        with package.open("rb") as file:
            name = _find_data(file, package)
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                archive.extractall(folder, filter=gate.let_in)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DataError(
            f"{package}: {name} is damaged or compressed in a way that Python cannot read ({error}); download it "
            f"again, or unpack it by `dpkg-deb -x FILE DIR` and set data.root=DIR/{STAMPS}"
        ) from error
    except OSError as error:
        raise DataError(f"{error.filename or package}: {error.strerror or error}") from error
    if not gate.count:
        raise DataError(f"{package}: no stamps under {STAMPS}; give the package {PACKAGE}")
    return gate.count


class _Gate:
    """Lets stamps and the licence out of an archive, under their new names, and counts them."""

    def __init__(self, package: Path) -> None:
        self.package, self.count, self.bytes = package, 0, 0

    def let_in(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        path = PurePosixPath(member.name)
        if path == LICENCE:
            inside = PurePosixPath("copyright")
        elif path.is_relative_to(STAMPS) and path.suffix in (".png", ".svg", ".txt"):
            inside = path.relative_to(STAMPS)
        else:
            return None
        if not member.isreg() or member.size < 0:
            raise DataError(f"{self.package}: {member.name} is not a plain file; download the package again")
        self.bytes += member.size
        if self.bytes > MAX_UNPACKED:
            raise DataError(
                f"{self.package}: unpacks to more than {MAX_UNPACKED:,} bytes; give the package {PACKAGE}"
            )
        try:
            checked = tarfile.data_filter(member.replace(name=str(inside), deep=False), folder)
        except tarfile.FilterError as error:
            raise DataError(f"{self.package}: {member.name} is refused ({error})") from error
        self.count += inside.suffix != ""
        return checked


def _find_data(file: BinaryIO, package: Path) -> str:
    """Go to where the content of data.tar.* begins; returns the member's name."""
    size = package.stat().st_size
    if file.read(8) != b"!<arch>\n":
        raise DataError(f"{package}: not a Debian package; give the .deb file of {PACKAGE}")
    while len(header := file.read(60)) == 60 and header[58:] == b"`\n":
        name, digits = header[:16].decode("latin-1").strip().rstrip("/"), header[48:58].strip()
        length = int(digits) if digits.isdigit() else size
        if file.tell() + length > size:
            raise DataError(f"{package}: the file ends inside of {name}; download it again")
        if name.startswith("data.tar"):
            return name
        file.seek(length + length % 2, os.SEEK_CUR)
    raise DataError(f"{package}: no data.tar in it; download it again")
