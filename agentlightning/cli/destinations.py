"""Destinations of an export besides one local file: a folder of parts, and an object store."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any

from agentlightning.cli.formats import MissingPackage

__all__ = ["check_folder", "check_object", "is_object", "opened_object", "write_parts"]

COPIED_AT_ONCE = 8 << 20
ADVICE = "give a folder that does not exist, or is empty"


def is_object(name: str) -> bool:
    """Tell whether an output is an object in a store such as S3, by its URL."""
    return "://" in name


def check_object(url: str, force: bool) -> None:
    """Check that an object can be written, before the work for it begins.

    Args:
        force: replace it if it exists.

    Raises:
        MissingPackage: pyarrow is not installed.
        OSError: it exists, its bucket does not, or the store refuses to answer.
    """
    filesystem, path = _filesystem(url)
    name, _, _ = url.partition("?")
    if name.endswith("/"):
        raise OSError(f"{name} is a folder: name an object in it, or give --rows-per-file")
    bucket = path.partition("/")[0] or "/"
    try:
        has_bucket = filesystem.get_file_info(bucket).type != _import_filesystems().FileType.NotFound
    except OSError as error:
        raise OSError(f"{name} cannot be written: {error}") from error
    if not has_bucket:
        raise FileNotFoundError(f"{name} cannot be written: there is no bucket {bucket}")
    _refuse_to_replace(filesystem, path, name, force)


@contextmanager
def opened_object(url: str, force: bool) -> Iterator[IO[bytes]]:
    """Open an object that `check_object` has passed. It appears when the block ends without an error.

    It is written to a temporary file first: an upload that is abandoned half-way would leave half an object.

    Raises:
        MissingPackage: pyarrow is not installed.
        OSError: the object cannot be written, or has come into being meanwhile.
    """
    filesystem, path = _filesystem(url)
    with tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        _refuse_to_replace(filesystem, path, url.partition("?")[0], force)
        with filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(file, stream, COPIED_AT_ONCE)


def check_folder(name: str) -> None:
    """Check that parts can be written to a folder, beside no older ones.

    Raises:
        MissingPackage: pyarrow is not installed, and the folder is in an object store.
        OSError: there is something in the folder, or it is none.
    """
    if is_object(name):
        from_store = _import_filesystems()
        filesystem, path = _filesystem(name)
        selector = from_store.FileSelector(path.rstrip("/"), allow_not_found=True)
        is_empty = not filesystem.get_file_info(selector)
    else:
        folder = Path(name)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{name} is not a folder, in which --rows-per-file could write: {ADVICE}")
        is_empty = not folder.exists() or next(folder.iterdir(), None) is None
    if not is_empty:
        raise FileExistsError(f"{name} has files already, which would be mixed with the new ones: {ADVICE}")


def write_parts(
    folder: str,
    suffix: str,
    rows_per_file: int,
    records: Iterator[Any],
    opened: Callable[[str], AbstractContextManager[IO[bytes]]],
    write: Callable[[IO[bytes], Iterator[Any]], Any],
) -> None:
    """Write records to files `part-00000.SUFFIX`, `part-00001.SUFFIX`, ... Without records there is one, without rows.

    Args:
        opened: opens a file, by its path or URL.
        write: writes records to it.
    """
    if not is_object(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for number in count():
        first = list(islice(records, 1))
        if not first and number:
            return
        with opened(_part(folder, f"part-{number:05}.{suffix}")) as file:
            write(file, chain(first, islice(records, rows_per_file - 1)))


def _part(folder: str, name: str) -> str:
    """Return the path or URL of a file in a folder; the options of an object store stand behind it, as its query."""
    base, mark, query = folder.partition("?") if is_object(folder) else (folder, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def _refuse_to_replace(filesystem: Any, path: str, name: str, force: bool) -> None:
    if not force and filesystem.get_file_info(path).is_file:
        raise FileExistsError(f"{name} exists: give --force to replace it, or another -o")


def _filesystem(url: str) -> tuple[Any, str]:
    filesystems = _import_filesystems()
    try:
        filesystem, path = filesystems.FileSystem.from_uri(url)
    except (ValueError, NotImplementedError) as error:
        raise OSError(f"{url.partition('?')[0]} cannot be written: {error}") from error
    if "/" not in path.strip("/"):
        raise OSError(f"{url.partition('?')[0]} cannot be written: name an object, as in s3://BUCKET/run.parquet")
    return filesystem, path


def _import_filesystems() -> Any:
    try:
        from pyarrow import fs
    except ImportError as error:
        install = f"{sys.executable} -m pip install 'agentlightning[s3]'"
        raise MissingPackage(f"an object store needs pyarrow: {install}") from error
    return fs
