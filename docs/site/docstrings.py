"""An extension of Griffe: the docstrings and names of steppe as the reference shows them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Extension, Module, Object


class Docstrings(Extension):
    """Sections by the names that Griffe knows, and functions in place of modules."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """``Example:`` has doctests as ``Examples:`` has, which are shown as code."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """``steppe.measure`` is the function, not the module of that name in its package."""
        public = pkg.members["public"]
        for name in public.exports or ():
            found = public.members[str(name)].final_target
            if found.is_module:
                function = found.members[str(name)]
                pkg.set_member(str(name), Alias(str(name), target=function, parent=pkg))
