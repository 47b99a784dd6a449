"""ITK's own formats, MetaImage (.mhd with .raw or .zraw, .mha) and NRRD (.nrrd, .nhdr), read with SimpleITK.

SimpleITK is an extra and imported only for such a file. What a damaged MetaImage lacks is found here: ITK calls it "no
such file", and gives voxels that it could not unpack without a word.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError

SUFFIXES = (".mhd", ".mha", ".nrrd", ".nhdr")
RAS = np.array([[-1.0], [-1.0], [1.0]])  # ITK's world is LPS
LAST = ("elementdatafile", "datafile")  # keys that name the file of the voxels, without blanks
MAX_LINE = 2**16  # bytes; a longer line is none of a header


@dataclass(frozen=True)
class _Header:
    """What the text at the beginning of a file says.

    Attributes:
        fields: by lower-case key without blanks.
        files: that hold the voxels; none where they follow in the same file.
        length: of the text in bytes.
    """

    fields: dict[str, str]
    files: tuple[Path, ...]
    length: int


def read_geometry(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine (4, 4), voxel centre -> RAS mm, and shape with all its axes, from the header.

    Raises:
        UserError: missing, unreadable, or SimpleITK is not installed.
    """
    reader, _ = _open(path)
    return _affine(reader), tuple(reader.GetSize())


def read_voxels(path: Path) -> np.ndarray:
    """Voxels as stored, x first.

    Raises:
        UserError: as `read_geometry`, or truncated, damaged (as far as a compressed file can tell) or of vectors.
    """
    reader, header = _open(path)
    if (parts := reader.GetNumberOfComponents()) > 1:
        raise UserError(f"{path}: every voxel is a vector of {parts} values; expected one value, a file per channel")
    if path.suffix in (".mhd", ".mha"):
        _check_data(path, header, reader)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot read the voxels, the file is damaged ({reason(error)})") from error
    return np.asarray(simple_itk(path).GetArrayFromImage(image)).T


def data_files(path: Path) -> tuple[Path, ...]:
    """The files in which the voxels of a header lie; none where they follow it in the same file, or without a header.

    Raises:
        UserError: the header is none, or its voxels are in files that it only numbers.
    """
    return _header(path).files if path.is_file() else ()


def simple_itk(path: Path) -> Any:
    """The package, imported.

    Args:
        path: that needs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(f"{path} needs SimpleITK: pip install 'pretrain3d[itk]'") from error
    return SimpleITK


def _open(path: Path) -> tuple[Any, _Header]:
    """A reader that knows the header, and the header."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    header = _header(path)
    space = header.fields.get("space", "LPS")
    if space.lower().startswith(("las", "left-anterior")):
        raise UserError(f"{path}: its space is {space}, which releases of ITK read differently; store it in LPS or RAS")
    for file in header.files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; the voxels of {path} should be in it")
    itk = simple_itk(path)
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{path}: not a readable MetaImage or NRRD file ({reason(error)})") from error
    return reader, header


def _affine(image: Any) -> np.ndarray:
    """Of an image or a reader; of a fourth axis nothing is kept."""
    size = image.GetDimension()
    direction = np.asarray(image.GetDirection()).reshape(size, size)
    affine = np.eye(4)
    space = min(size, 3)
    affine[:space, :space] = (direction * image.GetSpacing())[:space, :space]
    affine[:space, 3] = image.GetOrigin()[:space]
    affine[:3] *= RAS
    return affine + 0.0  # no -0


def _header(path: Path) -> _Header:
    """The text of a MetaImage, up to the key that names its voxels, or of a NRRD file, up to a blank line."""
    nrrd = path.suffix in (".nrrd", ".nhdr")
    fields: dict[str, str] = {}
    names: list[str] | None = None  # of the files of the voxels, where they are a list
    length = 0
    with open(path, "rb") as file:
        for line in _lines(file):
            length += len(line)
            text = line.decode("latin-1").strip()
            if names is not None:
                names += [text] if text else []
                continue
            key, separator, value = text.partition(":" if nrrd else "=")
            key, value = key.replace(" ", "").lower(), value.removeprefix("=").strip()  # NRRD has key:=value, too
            if separator:
                fields[key] = value
            if separator and key in LAST and value.split()[:1] == ["LIST"]:
                names = []
            elif (nrrd and not text) or (not nrrd and key in LAST):
                break
    if not fields:
        raise UserError(f"{path}: not a readable MetaImage or NRRD file (it has no header)")
    named = next((fields[key] for key in LAST if key in fields), "LOCAL")
    if names is None:
        names = [] if named == "LOCAL" else [named]
    if any("%" in name for name in names):
        raise UserError(f"{path}: its voxels are in numbered files ({named}), which are not read; store them as one")
    return _Header(fields, tuple(path.parent / name for name in names), length)


def _lines(file: Any) -> Iterator[bytes]:
    """The lines of a binary file, up to one that cannot be of a header."""
    while (line := file.readline(MAX_LINE)) and len(line) < MAX_LINE:
        yield line


def _check_data(path: Path, header: _Header, reader: Any) -> None:
    """Refuses a MetaImage whose voxels end too early or cannot be unpacked.

    Raises:
        UserError: it is one; names the file of the voxels.
    """
    fields = header.fields
    if len(header.files) > 1 or "headersize" in fields or fields.get("binarydata", "").lower() == "false":
        return  # slices, a foreign format, text: left to ITK
    file, start = (header.files[0], 0) if header.files else (path, header.length)
    needed = (
        int(np.prod(reader.GetSize())) * simple_itk(path).Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
    )
    unpacked = file.stat().st_size - start
    if fields.get("compresseddata", "").lower() == "true":
        unpacker, unpacked = zlib.decompressobj(wbits=47), 0  # of zlib or gzip
        with open(file, "rb") as stream:
            stream.seek(start)
            try:
                while block := stream.read(2**20):
                    unpacked += len(unpacker.decompress(block))
            except zlib.error as error:
                raise UserError(f"{file}: cannot read the voxels, the file is damaged ({error})") from error
        unpacked = unpacked if unpacker.eof else min(unpacked, needed - 1)
    if unpacked < needed:
        raise UserError(f"{file}: cannot read the voxels, the file is damaged (it ends too early, after {unpacked} of "
                        f"{needed} bytes)")  # fmt: skip


def reason(error: RuntimeError) -> str:
    """The last thing that ITK says, on one line, without the places in its code and what it makes of any failure."""
    text = " ".join(re.split(r"ERROR: |\[nrrd\]", str(error))[-1].split())
    return re.sub(r"^\w+\(0x[0-9a-f]+\): | Reason: No such file or directory$", "", text)[:200]
