"""Shared by the tests of benchmarks: images and files as VLMEvalKit's are."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(out, "PNG")
    return out.getvalue()


def in_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_tsv(path: Path, *rows: dict[str, Any]) -> Path:
    pd.DataFrame(
        [{"index": str(i + 1), "image": in_text(png()), **row} for i, row in enumerate(rows)]
    ).to_csv(path, sep="\t", index=False)
    return path
