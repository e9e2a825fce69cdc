"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def replacing(path, refusal, flush=False):
    """A temporary file name that becomes ``path`` when the block ends without an error.

    Args:
        path: the file to write; an existing one stays as it was if the block fails.
        refusal: the error to raise, made from the reason (a text), if the file cannot be written.
        flush: flush the file to the disk before it takes its place.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise refusal(error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path):
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
