"""The awaitable twins of ``underlay``'s functions: the same names, arguments and results.

::

    async with await underlay.aio.open_any("disk.qcow2") as disk:
        data = await disk.read_bytes(0, 512)
"""

from underlay.access import FormatAccess
from underlay.creating import create
from underlay.inspection import inspect
from underlay.opening import open_any, open_image, probe

__all__ = ["FormatAccess", "create", "inspect", "open_any", "open_image", "probe"]
