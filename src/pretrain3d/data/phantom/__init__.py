"""The embedded data set: seeded synthetic CT volumes with objects to detect, made on the spot.

`make_case` draws one volume in memory, `generate` writes a whole data set in the nnDetection raw layout.
"""

from pretrain3d.data.phantom.anatomy import ORGANS
from pretrain3d.data.phantom.case import make_case
from pretrain3d.data.phantom.lesions import CLASSES
from pretrain3d.data.phantom.write import generate

__all__ = ["CLASSES", "ORGANS", "generate", "make_case"]
