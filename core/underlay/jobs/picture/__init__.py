"""A picture of where the data of a disk lies: SVG, HTML, and numbers.

``underlay.jobs.picture`` gathers it in one walk over the mapping; ``Picture`` draws itself. However
large or fragmented the disk, what is gathered fits into a fixed number of cells, and what is drawn
into 300 KiB.
"""

from underlay.jobs.picture.gathering import picture
from underlay.jobs.picture.model import HostFile, Ink, Kind, Picture, PictureLayer

__all__ = ["HostFile", "Ink", "Kind", "Picture", "PictureLayer", "picture"]
