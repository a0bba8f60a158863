"""What a name says: a path as it is, or a ``file:`` URL."""

from __future__ import annotations

import errno
import os

from underlay.errors import StorageError

__all__ = ["folder_of", "path_of"]

_SCHEME = "file:"


def path_of(name: str) -> str:
    """The path that ``name`` means.

    ``file:relative`` and ``file:/absolute`` are the path behind the colon, as it stands (QEMU's
    notation); ``file:///absolute`` is a URL proper, percent-encoded (what ``Path.as_uri()`` gives).

    Raises:
        StorageError: the URL names another machine.
    """
    if not name.startswith(_SCHEME):
        return name
    path = name.removeprefix(_SCHEME)
    if path.startswith("//"):
        from urllib.parse import unquote

        host, slash, path = path[2:].partition("/")
        if host not in {"", "localhost"} or not slash:
            raise StorageError(
                f"'{name}' names a file of another machine; write file:///path for one of this one",
                errno=errno.EINVAL,
                filename=name,
            )
        path = "/" + unquote(path, errors="surrogateescape")
    # So that this path, given as a name again, is not taken for a URL.
    return f"./{path}" if path.startswith(_SCHEME) else path


def folder_of(path: str) -> str | None:
    """The absolute folder of a path, symbolic links and ``..`` left as they are.

    None if the path is relative and the current folder was deleted.
    """
    folder = os.path.dirname(path)
    if os.path.isabs(folder):
        return folder
    try:
        return os.path.join(os.getcwd(), folder)
    except FileNotFoundError:
        return None
