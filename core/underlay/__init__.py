"""Virtual-disk images: open, probe, inspect, read, map, compare and convert them, safe by default.

::

    import underlay

    with underlay.open_any("disk.qcow2") as disk:
        first_sector = disk.read_bytes(0, 512)

Functions here block; ``underlay.aio`` has awaitable twins. ``underlay.jobs`` works on whole images,
``underlay.testing`` has the contract suites for plug-in authors.
"""

import sys

from underlay.lazy import LazyPackage

TYPE_CHECKING = False  # in place of typing's, whose import takes longer than all that is here
if TYPE_CHECKING:
    from underlay.public import *  # noqa: F403 - the names, for type checkers
    from underlay.public import __all__ as __all__

sys.modules[__name__].__class__ = LazyPackage
