"""Images in object storage: S3 and what speaks it, Google Cloud Storage, Azure, and the web.

Needs the extra: ``pip install 'underlay[s3]'``.
"""

from __future__ import annotations
