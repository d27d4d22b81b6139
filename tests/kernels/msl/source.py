"""Read the Metal source that MLX generates, and make it C++.

MLX generates one parameter a line, and after a template one explicit instantiation:

    template <typename T, int D>
    [[kernel]] void custom_kernel_name(
      const device float* x [[buffer(0)]],
      const constant int* x_shape [[buffer(1)]],
      device float* out [[buffer(2)]],
      uint3 thread_position_in_grid [[thread_position_in_grid]]) {
    ...
    template [[host_name("custom_kernel_name")]] [[kernel]] decltype(custom_kernel_name<...>) ...;
"""

import re
from dataclasses import dataclass

from .errors import CompileError
from .tracing import Call


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel: ``type name [[attribute]]``."""

    type: str
    name: str
    attribute: str

    @property
    def is_buffer(self) -> bool:
        return self.attribute.startswith("buffer(")


@dataclass(frozen=True)
class Source:
    """A kernel as C++ that compiles against the shim; its lines are those of the Metal source."""

    text: str
    #: The kernel with its template arguments.
    instance: str
    is_template: bool
    parameters: list[Parameter]


#: A declaration of threadgroup memory, ``threadgroup float a[4], b;``. A pointer or a reference to
#: such memory (``threadgroup float* p = a;``) is none: it has a ``*``, a ``&`` or an ``=``.
_DECLARATION = re.compile(
    r"(?<![\w(,<])threadgroup\s+([A-Za-z_][\w:]*(?:<[^;<>]*>)?)\s+([A-Za-z_][^;=*&()]*);"
)
_DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)")


def read_source(call: Call) -> Source:
    """The parts of ``call.source``, with threadgroup declarations rewritten for the shim."""
    text, _, instantiation = call.source.partition("\ntemplate [[host_name(")
    template = re.search(rf"decltype\({re.escape(call.name)}(<.*?>)\)", instantiation)
    start = text.index(f"[[kernel]] void {call.name}(")
    body = text.index(") {\n", start)
    parameters = re.findall(r"^  (.*?)\b(\w+) \[\[(.*?)\]\][,)]$", text[start : body + 1], re.M)
    return Source(
        text=text[:body] + _DECLARATION.sub(_rewrite, text[body:]),
        instance=call.name + (template[1] if template else ""),
        is_template=template is not None,
        parameters=[Parameter(type.strip(), name, attr) for type, name, attr in parameters],
    )


def _rewrite(declaration: re.Match[str]) -> str:
    """One object for all fibres of a threadgroup has no C++ declaration: a macro makes one."""
    type, names = declaration.groups()
    macros = []
    for part in re.split(r",(?![^\[]*\])", names):
        declarator = _DECLARATOR.fullmatch(part.strip())
        if declarator is None:
            raise CompileError(f"cannot read the threadgroup declaration: {declaration[0]}")
        macros.append(f"MSL_THREADGROUP({declarator[1]}, {declarator[2].strip()}, {type});")
    return " ".join(macros)
