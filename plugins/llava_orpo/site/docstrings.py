"""Docstrings are plain text: `<image>` in one is no HTML. An extension of griffe, named in mkdocs.yml."""

from __future__ import annotations

import griffe

from . import markdown


class Escape(griffe.Extension):
    """Keeps angle brackets of docstrings visible, in the environment of the site alone (see `escaped`)."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown.escaped(obj.docstring.value)
