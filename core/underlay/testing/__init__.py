"""What a plug-in's author needs to test it: the contract suites, and storages that misbehave.

The suites are classes in pytest's style; subclass one in a test module and fill in its hooks. Ours
pass the same ones. For readable failures, a ``conftest.py`` says
``pytest.register_assert_rewrite("underlay.testing")`` before anything imports this package.
"""

from __future__ import annotations

from underlay.testing.awaitable import AwaitableMemoryStorage
from underlay.testing.driver import DriverContract
from underlay.testing.storage import StorageContract
from underlay.testing.wrappers import AlignedStorage, PausedStorage, WrappedStorage
from underlay.testing.writing import WritableDriverContract

__all__ = [
    "AlignedStorage",
    "AwaitableMemoryStorage",
    "DriverContract",
    "PausedStorage",
    "StorageContract",
    "WrappedStorage",
    "WritableDriverContract",
]
