"""Files inside of tars.

- Every plain file is listed with the place of its bytes, in each of the formats that tarfile writes.
- Links, devices, sparse files and names that lead out have a problem that says so.
- A tar cut off anywhere, compressed, or damaged in a header is an error of one line; damage never hangs or crashes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import tar_bytes

from cmfg_dgl.data.formats.tars import digest_part, members, read_part
from cmfg_dgl.errors import DataError

FILES = [
    ("a.txt", b"first"),
    ("folder/" + "long" * 60 + ".txt", b"x" * 513),
    ("ünïcode/漢字.txt", b""),
    ("./dot.txt", bytes(range(256)) * 5000),
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_bytes_lie_where_the_list_says(tmp_path: Path, format: int) -> None:
    path = tmp_path / "a.tar"
    files = [(name, content) for name, content in FILES if format != tarfile.USTAR_FORMAT or len(name) < 100]
    with tarfile.open(path, "w", format=format) as archive:
        archive.addfile(folder("folder"))
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = list(members(path))
    assert [member.name for member in found] == [name.removeprefix("./") for name, _ in files]
    for member, (_, content) in zip(found, files, strict=True):
        assert (member.size, member.problem) == (len(content), None)
        assert read_part(path, member.offset, member.size) == content
        assert digest_part(path, member.offset, member.size) == hashlib.sha256(content).hexdigest()


def folder(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member


@pytest.mark.parametrize(
    ("name", "kind", "link", "problem"),
    [
        ("a.jpg", tarfile.SYMTYPE, "/etc/passwd", "a link to '/etc/passwd'"),
        ("a.jpg", tarfile.LNKTYPE, "b.jpg", "a link to 'b.jpg'"),
        ("a.jpg", tarfile.FIFOTYPE, "", "not a plain file"),
        ("a.jpg", tarfile.BLKTYPE, "", "not a plain file"),
        ("../a.jpg", tarfile.REGTYPE, "", "leads out of the archive"),
        ("x/../../a.jpg", tarfile.REGTYPE, "", "leads out of the archive"),
        ("/a.jpg", tarfile.REGTYPE, "", "leads out of the archive"),
        ("..\\a.jpg", tarfile.REGTYPE, "", "leads out of the archive"),
        ("\udcff.jpg", tarfile.REGTYPE, "", "not UTF-8"),
    ],
)
def test_what_must_not_be_used_says_why(tmp_path: Path, name: str, kind: bytes, link: str, problem: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        archive.addfile(member)
        archive.addfile(tarfile.TarInfo("sound.txt"))
    bad, sound = members(path)
    assert bad.problem is not None and problem in bad.problem
    assert bad.name.encode() and (sound.name, sound.problem) == ("sound.txt", None)


def test_a_sparse_file_is_no_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}
        archive.addfile(member)
    assert [member.problem for member in members(path)] == ["not a plain file"]


SMALL = tar_bytes(FILES[:3])


def test_a_tar_cut_off_anywhere_is_an_error(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    whole.write_bytes(SMALL)
    last = list(members(whole))[-1]
    end = last.offset + -(-last.size // 512) * 512
    for length in [*range(0, end + 512, 64), end + 511]:
        cut.write_bytes(SMALL[:length])
        with pytest.raises(DataError, match=r"cut\.tar: truncated, damaged") as error:
            list(members(cut))
        assert "\n" not in str(error.value)
    cut.write_bytes(SMALL[: end + 512])
    assert len(list(members(cut))) == 3, "one block of zeros ends a tar"


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for content in (gzip.compress(SMALL), b"", b"no tar", b"x" * 2048, b"\xff" * 5000):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.tar: truncated, damaged or no uncompressed tar"):
            list(members(path))
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read"):
        list(members(tmp_path / "gone.tar"))


def with_sum(header: bytes) -> bytes:
    """The header with the checksum that its bytes need."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


@pytest.mark.parametrize("size", [-512, -(10**9), 2**62, 10**15])
def test_sizes_that_lie_are_an_error_and_never_a_loop(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.tar"
    header = bytearray(SMALL[:512])
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    path.write_bytes(SMALL[:1024] + with_sum(bytes(header)) + SMALL[512:])
    with pytest.raises(DataError, match=r"a\.tar: truncated, damaged"):
        list(members(path))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 511) | st.integers(0, len(SMALL) - 1),
    bytes_=st.binary(min_size=1, max_size=12),
    mend=st.booleans(),
)
def test_damage_gives_members_or_a_data_error(tmp_path: Path, place: int, bytes_: bytes, mend: bool) -> None:
    path = tmp_path / "a.tar"
    damaged = (SMALL[:place] + bytes_ + SMALL[place + len(bytes_) :])[: len(SMALL)]
    path.write_bytes(with_sum(damaged[:512]) + damaged[512:] if mend else damaged)
    try:
        for member in members(path):
            assert member.name.encode() is not None
            assert 0 <= member.offset <= len(SMALL)
    except DataError as error:
        assert "a.tar" in str(error) and "\n" not in str(error)
