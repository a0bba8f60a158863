"""``s3+blocks://bucket/prefix``: a disk as many small objects, written at random.

docs/blocks-format.md says how it is laid out, byte by byte.
"""

from __future__ import annotations
