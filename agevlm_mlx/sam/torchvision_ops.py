"""Makes ``import torchvision`` work where its compiled operators do not load.

`segment_anything` imports torchvision, and torchvision fails to import unless the operators
of its compiled extension exist. On a Mac, PyPI's torch and torchvision fit each other and
nothing here does anything. Beside a CPU-only torch on Linux the extension, built for CUDA,
does not load ("operator torchvision::nms does not exist"): there the two operators that the
import looks up are declared, and non-maximum suppression, the only one that
`segment_anything` runs (in its automatic mask generator), is given in plain torch.
"""

# pyright: reportMissingImports=false
import sys
from typing import Any

import torch

#: Declarations last as long as the library object that made them.
_libraries: list[Any] = []


def import_torchvision() -> None:
    """Import torchvision, declaring its missing operators first if need be.

    ImportError if it is not installed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        # The failed import leaves submodules behind that a second import would take as whole.
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare()
        import torchvision.extension

        # torchvision.ops refuses to call any operator while this says False.
        torchvision.extension._has_ops = lambda: True


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression: indices i64[k] of the kept boxes [n 4 xyxy], best score first.

    A box is dropped when its IoU with a better kept one is above `iou_threshold`
    (torchvision.ops.nms).
    """
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        both = (high - low).clamp(min=0).prod(dim=1)
        order = rest[both <= iou_threshold * (area[best] + area[rest] - both)]
    return torch.stack(kept) if kept else order


def _declare() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    _libraries.append(library)
