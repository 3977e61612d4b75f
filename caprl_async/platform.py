"""Mends what a package index leaves broken on a machine without a GPU; torch calls `autoload` on import.

On such machines torchvision's only wheel is built against CUDA's torch, so its binary does not load and
`import torchvision` stops at the first operator it decorates. Image processors need only its Python parts;
declaring the operators is enough for those. With a loadable binary nothing is done.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
)
_library: Any = None  # torch drops the declarations when the library object dies


def _torchvision_binary_loads(folder: Path) -> bool:
    for binary in folder.glob("_C*.so"):
        try:
            ctypes.CDLL(str(binary))
        except OSError:
            return False
    return True


def autoload() -> None:
    """Declares torchvision's operators if, and only if, its own binary cannot be loaded."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    if _torchvision_binary_loads(Path(spec.origin).parent):
        return
    import torch

    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
