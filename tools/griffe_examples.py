"""Docstrings here call their examples `Example:`; griffe reads sections called `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Rename the section while a docstring is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
