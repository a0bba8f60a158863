"""Whether an image is sound, and mending it.

The work is in ``underlay.checking``, which needs none of the machinery of the other jobs, so that
``underlay check`` starts quickly.
"""

from underlay.checking import check, repair

__all__ = ["check", "repair"]
