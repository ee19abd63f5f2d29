"""For the site's reference: in "model, data, seed" each name has its own type, not the first's."""

from typing import Any

import griffe


class OwnTypes(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        sections = func.docstring.parsed if func.docstring else []
        for section in sections:
            if section.kind is griffe.DocstringSectionKind.parameters:
                for written in section.value:
                    if written.name in func.parameters:
                        own = func.parameters[written.name]
                        written.annotation, written.value = own.annotation, own.default
