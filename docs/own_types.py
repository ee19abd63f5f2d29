"""For the site's reference: in "model, data, seed" each name has its own type, not the first's."""

from typing import Any

import griffe


class OwnTypes(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        for written in parameters(func):
            if written.name in func.parameters:
                own = func.parameters[written.name]
                written.annotation, written.value = own.annotation, own.default

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        for written in parameters(cls):
            field = cls.members.get(written.name)
            if isinstance(field, griffe.Attribute):
                written.annotation, written.value = field.annotation, field.value


def parameters(described: griffe.Object) -> list[Any]:
    """The parameters that a docstring describes."""
    sections = described.docstring.parsed if described.docstring else []
    kind = griffe.DocstringSectionKind.parameters
    return [each for section in sections if section.kind is kind for each in section.value]
