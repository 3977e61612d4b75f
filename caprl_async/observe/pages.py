"""What our HTML pages share: one file each, that fetches nothing; one style sheet, page.css.

All text that a template is given is escaped by it.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

_LARGEST_IMAGE = 512  # pixels on the longer side


def template(path: Path) -> jinja2.Template:
    """A template that may include page.css and what lies beside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)


def write_page(path: Path, page: str) -> Path:
    """Writes a page whole or not at all; returns its path."""
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8", errors="replace")  # JSON may hold what is no Unicode
    partial.replace(path)
    return path


def data_uri(path: Path) -> str:
    """The image itself as text, made smaller if it is large; empty if it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((_LARGEST_IMAGE, _LARGEST_IMAGE))
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""  # the template says that the image is missing
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if max(small.size) <= 256 else "JPEG")
    kind = "png" if max(small.size) <= 256 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
