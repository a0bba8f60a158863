"""What an image, or each image of its chain, says of itself.

The work is in ``underlay.chaininfo``, which needs none of the machinery of the other jobs, so that
``underlay info`` starts quickly.
"""

from underlay.chaininfo import image_info_json, info

__all__ = ["image_info_json", "info"]
