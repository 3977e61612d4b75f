"""Writes the table of conf keys into the README, from the dataclasses: `python tools/readme_keys.py`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from caprl_async.conf import markdown_table

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- keys -->\n).*?(<!-- /keys -->)", re.DOTALL)


def with_keys(text: str) -> str:
    """The README's text with the table as it should be.

    Raises:
        ValueError: the marks are not there.
    """
    if not _BLOCK.search(text):
        raise ValueError("README.md has no <!-- keys --> ... <!-- /keys --> block")
    return _BLOCK.sub(lambda match: f"{match[1]}{markdown_table()}\n{match[2]}", text)


def main() -> int:
    """Returns 0."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(with_keys(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README}: keys written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
