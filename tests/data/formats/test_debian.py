"""The stamps of Tux Paint out of a Debian package.

- Exactly the pictures, texts and the licence come out, byte for byte as by dpkg-deb, whatever compresses them.
- Links, devices and names that lead out are refused by name, and so is what would fill the disk.
- A package cut off anywhere is an error, and leaves nothing behind.
- apt's own words are told where it cannot download the package.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from layouts import jpeg, tar_bytes

from cmfg_dgl.data.formats import debian
from cmfg_dgl.data.formats.debian import PACKAGE, download_package, unpack_stamps
from cmfg_dgl.errors import DataError

PREFIX = "./usr/share/tuxpaint/stamps/"
FILES = [
    ("./usr/share/doc/tuxpaint-stamps-default/copyright", b"GPL-2"),
    ("./usr/share/doc/tuxpaint-stamps-default/changelog.gz", b"changes"),
    (f"{PREFIX}animals/crow.png", jpeg(1)),
    (f"{PREFIX}animals/crow.txt", b"A crow.\nfr.utf8=Un corbeau.\n"),
    (f"{PREFIX}animals/crow.dat", b"noflip"),
    (f"{PREFIX}animals/crow.ogg", b"caw"),
    (f"{PREFIX}food/apple.svg", b"<svg/>"),
    (f"{PREFIX}food/apple.txt", b"An apple.\n"),
    ("./etc/passwd.png", b"no stamp"),
]
WANTED = {
    "copyright": b"GPL-2",
    "animals/crow.png": jpeg(1),
    "animals/crow.txt": b"A crow.\nfr.utf8=Un corbeau.\n",
    "food/apple.svg": b"<svg/>",
    "food/apple.txt": b"An apple.\n",
}


def ar(members: list[tuple[str, bytes]]) -> bytes:
    """An ar archive, as deb(5) describes it."""
    parts = [b"!<arch>\n"]
    for name, content in members:
        parts.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
        parts.append(content + b"\n" * (len(content) % 2))
    return b"".join(parts)


def package(path: Path, data: bytes, name: str = "data.tar.xz") -> Path:
    control = tar_bytes([("./control", b"Package: x\n")], "w:gz")
    path.write_bytes(ar([("debian-binary", b"2.0\n"), ("control.tar.gz", control), (name, data)]))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("compression", ["", "gz", "xz", "bz2"])
def test_stamps_and_licence_come_out(tmp_path: Path, compression: str) -> None:
    data = tar_bytes(FILES, f"w:{compression}")
    deb = package(tmp_path / "a.deb", data, f"data.tar.{compression}".rstrip("."))
    assert unpack_stamps(deb, tmp_path / "deep" / "stamps") == 4
    assert content(tmp_path / "deep" / "stamps") == WANTED
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["stamps"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_dpkg_deb_says_the_same(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name, data in [*FILES, ("DEBIAN/control", b"Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\n"
                                                   b"Description: x\n")]:  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    subprocess.run(["dpkg-deb", "-Zxz", "-b", tree, tmp_path / "a.deb"], check=True, capture_output=True)
    subprocess.run(["dpkg-deb", "-x", tmp_path / "a.deb", tmp_path / "x"], check=True)
    unpack_stamps(tmp_path / "a.deb", tmp_path / "stamps")
    ours = content(tmp_path / "stamps")
    assert ours.pop("copyright") == b"GPL-2"
    whole = content(tmp_path / "x" / "usr/share/tuxpaint/stamps")
    assert ours == {name: data for name, data in whole.items() if name[-4:] in (".png", ".svg", ".txt")}


def evil(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    """A tar with one sound stamp and one member that is not."""
    buffer = io.BytesIO(tar_bytes(FILES))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        (f"{PREFIX}a.png", tarfile.SYMTYPE, "/etc/passwd"),
        (f"{PREFIX}a.png", tarfile.SYMTYPE, "animals/crow.png"),
        (f"{PREFIX}a.png", tarfile.LNKTYPE, f"{PREFIX}animals/crow.png"),
        (f"{PREFIX}a.png", tarfile.FIFOTYPE, ""),
        (f"{PREFIX}a.png", tarfile.CHRTYPE, ""),
        (f"{PREFIX}../../../../../evil.png", tarfile.REGTYPE, ""),
        (f"{PREFIX}/../../x/../../../../../../evil.png", tarfile.REGTYPE, ""),
    ],
)
def test_what_is_no_stamp_is_refused_by_name(tmp_path: Path, name: str, kind: bytes, target: str) -> None:
    deb = package(tmp_path / "a.deb", evil(name, kind, target), "data.tar")
    with pytest.raises(DataError, match=name.removeprefix("./").rsplit("/", 1)[1]) as error:
        unpack_stamps(deb, tmp_path / "out" / "stamps")
    assert "\n" not in str(error.value) and "a.deb" in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.deb", "out"]


def test_links_elsewhere_are_passed_over(tmp_path: Path) -> None:
    deb = package(tmp_path / "a.deb", evil("./etc/link", tarfile.SYMTYPE, "/etc/passwd"), "data.tar")
    unpack_stamps(deb, tmp_path / "stamps")
    assert content(tmp_path / "stamps") == WANTED


def test_what_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(name, data) for name, data in FILES if name.startswith(PREFIX) or name.endswith("copyright")]
    total = sum(map(len, WANTED.values()))
    deb = package(tmp_path / "a.deb", tar_bytes(files), "data.tar")
    monkeypatch.setattr(debian, "MAX_UNPACKED", total - 1)
    with pytest.raises(DataError, match="unpacks to more than"):
        unpack_stamps(deb, tmp_path / "stamps")
    assert not (tmp_path / "stamps").exists()
    monkeypatch.setattr(debian, "MAX_UNPACKED", total)
    assert unpack_stamps(deb, tmp_path / "stamps") == 4


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_a_package_cut_off_anywhere_leaves_nothing(tmp_path: Path, compression: str) -> None:
    whole = package(tmp_path / "a.deb", tar_bytes(FILES, f"w:{compression}"), "data.tar").read_bytes()
    cut = tmp_path / "cut.deb"
    for length in [*range(0, 80, 7), *range(80, len(whole), max(1, len(whole) // 40)), len(whole) - 2]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.deb"):
            unpack_stamps(cut, tmp_path / "stamps")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.deb", "cut.deb"]


def test_damage_inside_is_told(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(FILES, "w:xz"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"data\.tar\.xz is damaged or compressed"):
        unpack_stamps(package(tmp_path / "a.deb", bytes(data)), tmp_path / "stamps")
    zstd = package(tmp_path / "b.deb", b"\x28\xb5\x2f\xfd" + bytes(600), "data.tar.zst")
    with pytest.raises(DataError, match=r"data\.tar\.zst is damaged or compressed.*dpkg-deb -x"):
        unpack_stamps(zstd, tmp_path / "stamps")


def test_other_packages_and_missing_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no stamps under usr/share/tuxpaint/stamps"):
        unpack_stamps(package(tmp_path / "a.deb", tar_bytes(FILES[:2], "w:xz")), tmp_path / "stamps")
    with pytest.raises(DataError, match=r"gone\.deb: No such file"):
        unpack_stamps(tmp_path / "gone.deb", tmp_path / "stamps")
    (tmp_path / "b.deb").write_bytes(b"PK\x03\x04" * 30)
    with pytest.raises(DataError, match="not a Debian package"):
        unpack_stamps(tmp_path / "b.deb", tmp_path / "stamps")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    deb = package(tmp_path / "a.deb", tar_bytes(FILES, "w:xz"))
    (tmp_path / "stamps").mkdir()
    unpack_stamps(deb, tmp_path / "stamps")
    with pytest.raises(DataError, match="there already; remove it"):
        unpack_stamps(deb, tmp_path / "stamps")
    assert content(tmp_path / "stamps") == WANTED
    with pytest.raises(DataError, match="there already"):
        unpack_stamps(deb, deb)


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put an apt-get of ours where the programs are looked for."""
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_apt_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", monkeypatch, 'test "$1" = download && echo stamps > "$2_1_all.deb"')
    (tmp_path / "here").mkdir()
    assert download_package(tmp_path / "here") == tmp_path / "here" / f"{PACKAGE}_1_all.deb"


@pytest.mark.parametrize("script", ["echo warning >&2; echo 'E: Unable to locate package' >&2; exit 100", "exit 0"])
def test_apt_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program(tmp_path / "bin", monkeypatch, script)
    told = "E: Unable to locate package" if "echo" in script else "it gave no file"
    with pytest.raises(DataError, match=rf"apt-get download {PACKAGE}: {told}; run apt-get update") as error:
        download_package(tmp_path)
    assert "\n" not in str(error.value)


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DataError, match=r"apt-get is not on this machine; download .* and give the file, --deb FILE"
    ):
        download_package(tmp_path)
