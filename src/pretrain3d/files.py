"""Files that are whole or absent: a reader, and a restart after a kill, see the old file or the new one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNSAID = ("inline_container", "creating the NDArray")  # torch.save and blosc2, whatever the system said


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to; it takes the place of ``path`` when the block succeeds.

    The folder is made. Nothing is left behind when the block fails; a killed writer leaves one file, which the next one
    writes over (two processes must not write the same file at once).

    Raises:
        OSError: of ``path``, which cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.touch()  # torch.save would not say that it may not
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    except RuntimeError as error:
        if not any(word in str(error) for word in UNSAID):
            raise
        raise OSError(errno.ENOSPC, "cannot be written whole; is the disk full?", str(path)) from error
    finally:
        with suppress(OSError):  # a disk that refused the file may refuse this, too
            temporary.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Makes a folder and tries it out, before what is to lie in it is computed.

    Raises:
        OSError: of ``folder``, in which no file can be written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
