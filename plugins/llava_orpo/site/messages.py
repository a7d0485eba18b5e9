"""Every error that this project raises by design, read from its sources, and docs/troubleshooting.md made of them.

A message is known by its skeleton: the text with `…` for each part that a run fills in. Sentences are followed from the
place where an error is raised to the functions and variables that word them, so that those of `precheck` are found too.
Needs the standard library alone; nothing is imported or run.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GAP = "…"
ROOT_ERRORS = {"UserError", "UsageError"}
REMEDIES = Path("docs") / "troubleshooting.json"
PAGE = Path("docs") / "troubleshooting.md"
FOLDERS = ("plugins/llava_orpo", "scripts", "evals")
SHELL = re.compile(r'echo "(error: [^"]*)"')
SHORTEST = 8  # letters: below that a skeleton says nothing that can be looked up

# What a reader was doing when the message came, by the file that words it: the first that fits.
AREAS = (
    (
        "Recipes and command lines",
        r"plugins/llava_orpo/(recipe|keys|precheck|early|arguments|accelerator|errors|launcher)",
    ),
    ("Data", r"plugins/llava_orpo/(data|files)"),
    ("Training", r"plugins/llava_orpo/(training|step|integration|tiny|upstream)"),
    ("Models, adapters and checkpoints", r"plugins/llava_orpo/checkpoint"),
    ("Plan, check and measurements", r"plugins/llava_orpo/(plan|gpu)|scripts/(plan|check|gpu|kill)"),
    ("Evaluation", r"plugins/llava_orpo/(preference|evaluation|report)|evals/"),
    ("Serving and the demo", r"plugins/llava_orpo/(serving|demo)|scripts/(serve|demo|ask)"),
    (
        "Other forms of a model",
        r"plugins/llava_orpo/export|scripts/(gguf|export|openvino|run_openvino|quantize|model_card|convert)",
    ),
    ("Other commands", r""),
)
HEAD = """# Troubleshooting, by error message

Every error that this project raises by design is one line behind `error: `, says what to do, and stands here.
`…` is what your run fills in. Search this page for a few words of your message. Where the message alone does not tell
enough, a line below it does.

- The exit code is 2 for a mistake in a recipe or on a command line and 1 for what is found later.
- `LLAVA_ORPO_DEBUG=1` in front of the command shows the traceback of any of them.
- A traceback without that variable is an error that nobody foresaw: please report it with its last 30 lines.
- Rows that are left out are no errors: `skipped_rows.jsonl` lists them with their reasons
  ([datasets.md](datasets.md#bad-rows)).

`python scripts/make_docs.py` makes this page from the sources and `docs/troubleshooting.json`, which holds the lines
below the messages.
"""


@dataclass(frozen=True, order=True)
class Message:
    """One message: its skeleton, the file that words it, and the function in which it stands ("" at the top)."""

    file: str
    function: str
    text: str


def collect(root: Path) -> list[Message]:
    """The messages of the checkout `root`, in the order of their files and lines, each skeleton once per function."""
    sources = Sources(root)
    found = dict.fromkeys(sources.messages())
    for script in sorted((root / "scripts").glob("*.sh")):
        for match in SHELL.finditer(script.read_text(encoding="utf-8")):
            text = re.sub(r"\$\{?[A-Za-z_]\w*\}?|\$\(.*?\)", GAP, match[1]).removeprefix("error: ")
            found[Message(script.relative_to(root).as_posix(), "", text)] = None
    return list(found)


def page(root: Path) -> str:
    """docs/troubleshooting.md. Raises ValueError naming a remedy that belongs to no message, or to more than one."""
    messages = collect(root)
    remedies = json.loads((root / REMEDIES).read_text(encoding="utf-8"))
    below: dict[Message, str] = {}
    for words, remedy in remedies.items():
        meant = [message for message in messages if words in message.text]
        if len(meant) != 1:
            raise ValueError(f"{REMEDIES}: {words!r} is in {len(meant)} messages; it must be in one.")
        below[meant[0]] = remedy
    parts = [HEAD]
    for area, _ in AREAS:
        own = [message for message in messages if _area(message) == area]
        parts.append(f"## {area}\n")
        for file in dict.fromkeys(message.file for message in own):
            parts.append(f"From [{file}](../{file}):\n")
            parts += [_entry(message, below.get(message)) for message in own if message.file == file]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _area(message: Message) -> str:
    return next(name for name, pattern in AREAS if re.match(pattern, message.file))


def _entry(message: Message, remedy: str | None) -> str:
    ticks = "``" if "`" in message.text else "`"
    inner = f" {message.text} " if ticks == "``" else message.text
    return f"- {ticks}{inner}{ticks}" + (f"<br>{remedy}" if remedy else "")


class Sources:
    """The parsed sources, with every function by its name and every module's constants."""

    def __init__(self, root: Path):
        self.trees: dict[str, ast.Module] = {}
        self.functions: dict[str, list[tuple[str, ast.FunctionDef]]] = {}
        self.constants: dict[tuple[str, str], ast.expr] = {}
        self.classes = set(ROOT_ERRORS)
        for folder in FOLDERS:
            for path in sorted((root / folder).rglob("*.py")):
                file = path.relative_to(root).as_posix()
                self.trees[file] = ast.parse(path.read_text(encoding="utf-8"))
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append((file, node))
                if isinstance(node, ast.ClassDef) and any(_name(base) in ROOT_ERRORS for base in node.bases):
                    self.classes.add(node.name)
            for node in tree.body:
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        if isinstance(target, ast.Name):
                            self.constants[file, target.id] = node.value

    def unworded(self) -> list[str]:
        """`file:line` of each error whose words could not be found, because they come from somewhere else."""
        return [
            f"{file}:{node.lineno} {ast.unparse(node)}"
            for file, tree in self.trees.items()
            for function, node in _calls(tree)
            if _name(node.func) in self.classes
            and not any(self.worded(argument, file, function, frozenset()) for argument in node.args)
        ]

    def messages(self) -> Iterator[Message]:
        """What every call of an error's class is given, in the order of files and lines."""
        for file, tree in self.trees.items():
            found = []
            for function, node in _calls(tree):
                is_validator = function is not None and any(
                    "validator" in ast.unparse(d) for d in function.decorator_list
                )
                if _name(node.func) in self.classes or (is_validator and _name(node.func) == "ValueError"):
                    for argument in node.args:
                        found += self.worded(argument, file, function, frozenset())
            for where, function, text in found:
                if len(re.findall(r"[A-Za-z]", text)) >= SHORTEST:
                    yield Message(where, function, text.strip())

    def worded(self, node, file, function, seen) -> list[tuple[str, str, str]]:
        """(file, function, skeleton) of every sentence that the expression `node` can be.

        file, function: where it stands; seen: functions and names that were followed to come here.
        """
        name = function.name if function is not None else ""
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and (texts := _skeletons(node)):
            return [(file, name, text) for text in texts]
        if isinstance(node, ast.IfExp):
            return [one for part in (node.body, node.orelse) for one in self.worded(part, file, function, seen)]
        if isinstance(node, ast.BoolOp):
            return [one for part in node.values for one in self.worded(part, file, function, seen)]
        if isinstance(node, ast.BinOp):
            return [one for part in (node.left, node.right) for one in self.worded(part, file, function, seen)]
        if isinstance(node, ast.Starred | ast.NamedExpr | ast.Await):
            return self.worded(node.value, file, function, seen)
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return [one for part in node.elts for one in self.worded(part, file, function, seen)]
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            inner = self.worded(node.elt, file, function, seen)
            for loop in node.generators:
                for test in loop.ifs:
                    if isinstance(test, ast.NamedExpr):
                        inner += self.worded(test.value, file, function, seen)
            return inner
        if isinstance(node, ast.Call):
            return self._called(node, file, function, seen)
        if isinstance(node, ast.Name):
            return self._named(node.id, file, function, seen)
        if isinstance(node, ast.Attribute) and node.attr.isupper():
            return [
                one
                for (where, constant), value in self.constants.items()
                if constant == node.attr and Path(where).stem == _name(node.value) and (where, constant) not in seen
                for one in self.worded(value, where, None, seen | {(where, constant)})
            ]
        return []

    def _called(self, node, file, function, seen):
        if _name(node.func) in self.classes:
            return []  # found where it stands
        functions = self._meant(node.func, file, function)
        found = []
        for where, definition in functions:
            if (where, definition.name) in seen:
                continue
            within = seen | {(where, definition.name)}
            for inner in _own_nodes(definition):
                if isinstance(inner, ast.Return | ast.Yield | ast.YieldFrom) and inner.value is not None:
                    found += self.worded(inner.value, where, definition, within)
        return found

    def _meant(self, called: ast.expr, file: str, function: ast.FunctionDef | None):
        """The functions that a call may mean: of this file, of the module it names, or of a table in a loop."""
        name = _name(called)
        functions = self.functions.get(name, [])
        own = [one for one in functions if one[0] == file]
        if isinstance(called, ast.Attribute):
            module = _name(called.value)
            of_module = [one for one in functions if Path(one[0]).stem == module]
            alone = functions if len(functions) == 1 else []
            return own if module in ("self", "cls") and own else of_module or alone
        if not isinstance(called, ast.Name) or own:
            return own
        for node in ast.walk(self.trees[file]):
            if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
                module = (node.module or "").rpartition(".")[2]
                return [one for one in functions if Path(one[0]).stem == module]
        return self._of_loop(name, file, function) if function is not None else []

    def _of_loop(self, name: str, file: str, function: ast.FunctionDef):
        """The functions of a table that `for key, name in TABLE.items()` goes through."""
        for node in _own_nodes(function):
            if isinstance(node, ast.For) and name in {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}:
                table = _name(getattr(getattr(node.iter, "func", None), "value", None)) or ""
                values = getattr(self.constants.get((file, table)), "values", [])
                names = dict.fromkeys(value.id for value in values if isinstance(value, ast.Name))
                return [one for n in names for one in self.functions.get(n, []) if one[0] == file]
        return []

    def _named(self, name, file, function, seen):
        """What a variable holds: all that its function assigns, appends or adds to it, or the module's constant."""
        key = (file, function.name if function is not None else "", name)
        if key in seen:
            return []
        seen = seen | {key}
        found = []
        for node in _own_nodes(function) if function is not None else ():
            targets, value = [], None
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
                targets, value = [node.target], node.value
            elif isinstance(node, ast.For):
                targets, value = [node.target], node.iter
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("append", "extend", "insert")
                and isinstance(node.func.value, ast.Name)
            ):
                targets, value = [node.func.value], node.args[-1]
            for target in targets:
                if isinstance(target, ast.Name) and target.id == name and value is not None:
                    found += self.worded(value, file, function, seen)
                elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    for one, of in zip(target.elts, value.elts, strict=False):
                        if isinstance(one, ast.Name) and one.id == name:
                            found += self.worded(of, file, function, seen)
        if not found and (file, name) in self.constants:
            found = self.worded(self.constants[file, name], file, None, seen)
        return found


def _skeletons(node: ast.expr) -> list[str]:
    """The texts that a literal, an f-string or a sum of them can be; [] for anything else."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
        return [_tidy("".join(parts))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _either(node.left), _either(node.right)
        if left or right:
            return [_tidy(a + b) for a in left or [GAP] for b in right or [GAP]]
    return []


def _either(node: ast.expr) -> list[str]:
    """As `_skeletons`, and both texts of a condition inside a sum."""
    return (
        [text for part in (node.body, node.orelse) for text in _skeletons(part)]
        if isinstance(node, ast.IfExp)
        else _skeletons(node)
    )


def _tidy(text: str) -> str:
    return re.sub(f"{GAP}(?:{GAP})+", GAP, re.sub(r"\s+", " ", text))


def _name(node: ast.expr | None) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _calls(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Every call, with the innermost function around it, in the order of lines."""
    found = []

    def walk(node: ast.AST, function: ast.FunctionDef | None) -> None:
        if isinstance(node, ast.Call):
            found.append((function, node))
        for child in ast.iter_child_nodes(node):
            walk(child, node if isinstance(node, ast.FunctionDef) else function)

    walk(tree, None)
    return iter(sorted(found, key=lambda one: (one[1].lineno, one[1].col_offset)))


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
