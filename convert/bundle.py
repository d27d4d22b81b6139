"""One Python file out of several modules: the statements that an entry module needs, no more.

The source is read as it is at run time. Imports between the modules vanish, names that would
collide are told apart by their module, and comments stay.
"""

import ast
import importlib.util
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: The package whose modules are bundled; everything else stays an import.
OWN = "agevlm_mlx"


@dataclass(frozen=True)
class _Import:
    """An import that stays; module.attribute, or only module."""

    module: str
    attribute: str | None = None
    #: ``import a.b`` binds ``a``, and can have no other name.
    whole: bool = False


@dataclass(frozen=True)
class _Module:
    """A name that stands for one of the bundled modules."""

    name: str


@dataclass(eq=False)
class _Statement:
    """A statement of a module's top level."""

    home: "_Source"
    node: ast.stmt
    #: Entries of a dictionary that are left out: their nodes.
    omitted: list[ast.AST] = field(default_factory=list)

    def nodes(self) -> Iterator[ast.AST]:
        waiting: list[ast.AST] = [self.node]
        while waiting:
            node = waiting.pop()
            if not any(node is left for left in self.omitted):
                yield node
                waiting.extend(ast.iter_child_nodes(node))

    def defines(self) -> Iterator[str]:
        """The names that the statement gives to its module."""
        if isinstance(self.node, ast.FunctionDef | ast.ClassDef):
            yield self.node.name
        elif isinstance(self.node, ast.Assign | ast.AnnAssign | ast.If | ast.Try):
            for node in ast.walk(self.node):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id


#: Where a name leads: into a statement (with the name it has there), or to an import.
_Target = tuple[_Statement, str] | _Import | _Module


class _Source:
    """A parsed module: its statements, and what its names mean."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        text = path.read_text(encoding="utf-8")
        self.lines = [line.encode() for line in text.splitlines()]
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.statements: list[_Statement] = []
        self.imports: dict[str, _Import] = {}
        #: Local name -> (module, name in it), for imports between bundled modules.
        self.own: dict[str, tuple[str, str]] = {}
        self.names: dict[str, _Statement] = {}
        #: Every ``import a.b`` by its ``a``.
        self.dotted: dict[str, set[str]] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                self._plain(node)
            elif isinstance(node, ast.ImportFrom):
                self._from(node)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                statement = _Statement(self, node)
                self.statements.append(statement)
                self.names.update(dict.fromkeys(statement.defines(), statement))

    def _plain(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self.imports[alias.asname] = _Import(alias.name)
            else:
                top = alias.name.partition(".")[0]
                self.imports[top] = _Import(top, whole=True)
                self.dotted.setdefault(top, set()).add(alias.name)

    def _from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            parts = self.package.split(".")
            base = parts[: len(parts) - node.level + 1]
            module = ".".join([*base, module] if module else base)
        own = module.split(".")[0] == OWN
        for alias in node.names:
            local = alias.asname or alias.name
            if own:
                self.own[local] = (module, alias.name)
            else:
                self.imports[local] = _Import(module, alias.name)


class _Bundle:
    def __init__(self, only: Mapping[str, str]) -> None:
        self.only = only
        self.sources: dict[str, _Source] = {}
        self.chosen: set[_Statement] = set()
        #: Final name of every definition and import that stays.
        self.final: dict[object, str] = {}
        self.taken: set[str] = set()
        self.dotted: dict[str, set[str]] = {}

    def source(self, name: str, path: Path | None = None) -> _Source:
        """The module `name`, and before it, in order, those it imports."""
        if name not in self.sources:
            if path is None:
                spec = importlib.util.find_spec(name)
                assert spec is not None, name
                assert spec.origin is not None, name
                path = Path(spec.origin)
            source = _Source(name, path)
            for statement in source.statements:
                self._shorten(statement)
            for module, attribute in source.own.values():
                inner = self._is_module(module, attribute)
                self.source(f"{module}.{attribute}" if inner else module)
            self.sources[name] = source
        return self.sources[name]

    @staticmethod
    def _is_module(package: str, name: str) -> bool:
        spec = importlib.util.find_spec(package)
        inside = (spec and spec.submodule_search_locations) or ()
        return any((Path(p) / f"{name}.py").is_file() or (Path(p) / name).is_dir() for p in inside)

    def _shorten(self, statement: _Statement) -> None:
        """Drop the entries of a registry that are not asked for."""
        node = statement.node
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        for name in statement.defines():
            if name in self.only and isinstance(value, ast.Dict):
                for key, entry in zip(value.keys, value.values, strict=True):
                    if not (isinstance(key, ast.Constant) and key.value == self.only[name]):
                        statement.omitted += [key, entry] if key else [entry]

    def resolve(self, source: _Source, name: str) -> _Target | None:
        """What `name` means in a module; None for builtins and names of its functions."""
        if name in source.names:
            return source.names[name], name
        if name in source.own:
            module, attribute = source.own[name]
            if self._is_module(module, attribute):
                return _Module(f"{module}.{attribute}")
            return self.resolve(self.source(module), attribute)
        return source.imports.get(name)

    def references(self, statement: _Statement) -> Iterator[tuple[ast.expr, _Target]]:
        """Each expression of a statement that leads outside of it."""
        inside: set[int] = set()
        for node in statement.nodes():
            assert not (
                isinstance(node, ast.ImportFrom)
                and (node.level or (node.module or "").split(".")[0] == OWN)
            ), f"{statement.home.path}:{node.lineno}: an import inside a function"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                target = self.resolve(statement.home, node.value.id)
                if isinstance(target, _Module):
                    found = self.resolve(self.source(target.name), node.attr)
                    assert found is not None, f"{target.name}.{node.attr}"
                    inside.add(id(node.value))
                    yield node, found
            if isinstance(node, ast.Name) and id(node) not in inside:
                target = self.resolve(statement.home, node.id)
                if target is not None:
                    yield node, target

    def choose(self, statement: _Statement) -> None:
        """Keep a statement and all it refers to."""
        waiting = [statement]
        while waiting:
            statement = waiting.pop()
            if statement in self.chosen:
                continue
            self.chosen.add(statement)
            for _, target in self.references(statement):
                if isinstance(target, tuple):
                    waiting.append(target[0])

    def choose_effects(self) -> None:
        """Keep what a module does with kept definitions: registering a class, for example."""
        for source in list(self.sources.values()):
            for statement in source.statements:
                if any(statement.defines()):
                    continue
                needed = [t[0] for _, t in self.references(statement) if isinstance(t, tuple)]
                if needed and self.chosen.issuperset(needed):
                    self.choose(statement)

    def name(self, key: object, wanted: str, home: str) -> str:
        """The name that a definition or import has in the one file."""
        if key not in self.final:
            final = wanted
            while final in self.taken:
                final += "_" + home.rpartition(".")[2]
            self.final[key] = final
            self.taken.add(final)
        return self.final[key]

    def called(self, source: _Source, target: _Target, written: str) -> str:
        if isinstance(target, tuple):
            return self.name(target, target[1], target[0].home.name)
        assert isinstance(target, _Import), f"{source.path}: {written} is a module of its own"
        final = self.name(target, written, source.name)
        if target.whole:
            assert final == target.module, f"{source.path}: import {target.module} is hidden"
            self.dotted.setdefault(final, set()).update(source.dotted[final])
        return final

    def text(self, statement: _Statement) -> str:
        """The statement's source with the names of the one file, and the comment above it."""
        source, node = statement.home, statement.node
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
        while first and source.lines[first - 1].startswith(b"#"):
            first -= 1
        edits: list[tuple[int, int, int, str]] = []  # line, from, to, what
        for reference, target in self.references(statement):
            own = reference.attr if isinstance(reference, ast.Attribute) else ""
            written = own or (reference.id if isinstance(reference, ast.Name) else "")
            final = self.called(source, target, written)
            if own or final != written:
                assert reference.end_col_offset is not None
                assert reference.end_lineno == reference.lineno
                edits.append(
                    (reference.lineno, reference.col_offset, reference.end_col_offset, final)
                )
        renamed = {f for _, _, _, f in edits}
        for node_in in statement.nodes():
            assert not (isinstance(node_in, ast.arg) and node_in.arg in renamed), node_in.arg
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            final = self.name((statement, node.name), node.name, source.name)
            line = source.lines[node.lineno - 1]
            at = line.index(node.name.encode(), node.col_offset + 4)
            edits.append((node.lineno, at, at + len(node.name.encode()), final))
        for left in statement.omitted:
            edits += self._blank(left)
        lines = dict(enumerate(source.lines[first : node.end_lineno], first + 1))
        for line, start, end, what in sorted(edits, reverse=True):
            lines[line] = lines[line][:start] + what.encode() + lines[line][end:]
        whole = (line for number, line in lines.items() if not self._emptied(source, number, line))
        return b"\n".join(whole).decode()

    @staticmethod
    def _blank(node: ast.AST) -> Iterator[tuple[int, int, int, str]]:
        """Edits that remove a dictionary's key or value; `_emptied` drops what is left of it."""
        assert isinstance(node, ast.expr)
        assert node.end_col_offset is not None
        assert node.end_lineno == node.lineno, "an entry of a registry on one line of its own"
        yield node.lineno, node.col_offset, node.end_col_offset, ""

    @staticmethod
    def _emptied(source: _Source, number: int, line: bytes) -> bool:
        return line.strip() in (b": ,", b":,") and line != source.lines[number - 1]

    def write(self) -> str:
        """The kept statements, module by module, and above them the imports that stay."""
        body = []
        for source in self.sources.values():
            kept = [s for s in source.statements if s in self.chosen]
            if kept:
                body.append(f"# --- {source.name} " + "-" * (94 - len(source.name)))
            body += [self.text(s) for s in kept]
        return "\n".join(self._import_lines()) + "\n\n\n" + "\n\n\n".join(body) + "\n"

    def _import_lines(self) -> Iterator[str]:
        parts: dict[str, set[str]] = {}
        for key, final in self.final.items():
            if not isinstance(key, _Import):
                continue
            if key.whole:
                parts |= {f"import {dotted}": set() for dotted in self.dotted[final]}
            elif key.attribute is None:
                parts[f"import {key.module} as {final}"] = set()
            else:
                alias = "" if final == key.attribute else f" as {final}"
                parts.setdefault(f"from {key.module} import ", set()).add(key.attribute + alias)
        for start in sorted(parts):
            yield start + ", ".join(sorted(parts[start]))


def bundle(entry: Path, only: Mapping[str, str], header: str, exported: Sequence[str]) -> str:
    """The source of one file that does what the module `entry` does.

    entry: a module that imports modules of this package by their full names. only: registry
    (a dictionary at a module's top level) -> the one key of it to keep. header: the docstring.
    exported: names of `entry` that must keep their spelling.
    """
    whole = _Bundle(only)
    source = whole.source(entry.stem, entry)
    for name in exported:
        whole.name((source.names[name], name), name, source.name)
    for statement in source.statements:
        whole.choose(statement)
    whole.choose_effects()
    return f'"""{_wrapped(header.splitlines())}\n"""\n\n' + whole.write()


def _wrapped(lines: Iterable[str]) -> str:
    return "\n".join(textwrap.fill(line, 95) for line in lines)
