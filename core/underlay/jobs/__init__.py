"""Work on whole images: plain functions that block, with a progress callback where it takes long.

::

    underlay.jobs.convert("disk.qcow2", "disk.raw")

An asynchronous program calls them with ``asyncio.to_thread``. They work on open disks of the
blocking face (or on names, where they say so) and know no format.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from underlay.lazy import LazyPackage

if TYPE_CHECKING:
    from underlay.jobs.public import *  # noqa: F403 - the names, for type checkers
    from underlay.jobs.public import __all__ as __all__


class _Jobs(LazyPackage):
    """A job's module has the job's own name, which here means the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not isinstance(value, ModuleType):  # an import would bind the module
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Jobs
