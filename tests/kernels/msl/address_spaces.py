"""Check a kernel's types with clang's front end, with Metal's address spaces as distinct ones.

The C++ that runs knows no address spaces: there ``device`` and ``threadgroup`` are empty words.
Here they are real (``MSL_TYPES`` in the shim), and nothing is compiled further than its types.
"""

import re
from collections.abc import Iterator
from typing import Any

from .build import SHIM
from .errors import CompileError, ToolError
from .source import read_source
from .tracing import Call

_FILE = "kernel.cpp"


def check_types(call: Call) -> None:
    """Raise `CompileError` if the kernel mixes address spaces, or a pointer or reference names
    none (C++ reads such a pointer as private; Metal refuses it)."""
    try:
        from clang import cindex
    except ImportError:
        raise ToolError("clang's front end is missing: pip install libclang") from None
    source = read_source(call)
    text = source.text
    if source.is_template:
        text += f"\ntemplate decltype({source.instance}) {source.instance};\n"
    unit = cindex.Index.create().parse(
        _FILE,
        unsaved_files=[(_FILE, text)],
        # The target has bfloat16 arithmetic; nothing is generated for it.
        args=[
            *("--target=aarch64-linux-gnu", "-std=c++17", "-nostdinc", "-w"),
            *("-fno-exceptions", "-fno-rtti", "-DMSL_TYPES"),
            *(f"-I{SHIM}", "-include", str(SHIM / "metal_stdlib")),
        ],
    )
    findings = [
        f"{_place(call, d.location)}: {d.spelling}"
        for d in unit.diagnostics
        if d.severity >= cindex.Diagnostic.Error
    ]
    if not findings:
        findings = [
            f"{_place(call, cursor.location)}: no address space: {cursor.spelling}"
            for cursor in _declarations(unit.cursor, cindex.CursorKind)
            if _is_bare(cursor, text, cindex.TypeKind)
        ]
    if findings:
        raise CompileError("\n".join(findings[:20]))


def _place(call: Call, location: Any) -> str:
    in_kernel = location.file is not None and location.file.name == _FILE
    return f"{call.name if in_kernel else location.file}:{location.line}"


def _declarations(cursor: Any, kinds: Any) -> Iterator[Any]:
    """Every variable, parameter and member of the kernel's own source."""
    for child in cursor.get_children():
        if child.location.file is None or child.location.file.name != _FILE:
            continue
        if child.kind in (kinds.VAR_DECL, kinds.PARM_DECL, kinds.FIELD_DECL):
            yield child
        yield from _declarations(child, kinds)


def _is_bare(cursor: Any, text: str, kinds: Any) -> bool:
    """Whether a pointer or reference points to no space, without a ``thread`` that says so.
    ``auto`` brings the space of what it stands for."""
    if cursor.type.kind not in (kinds.POINTER, kinds.LVALUEREFERENCE):
        return False
    if cursor.type.get_pointee().get_address_space():
        return False
    declaration = re.split(r"[;{}(),]", text[: cursor.location.offset])[-1]
    return re.search(r"\b(thread|auto)\b", declaration) is None
