"""PTX text to a list of instructions: statements, nested scopes with registers and labels of their own, predicates."""

import dataclasses
import re

_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "u16": 16, "u32": 32, "u64": 64, "s32": 32, "f32": 32, "f64": 64}


class Fault(Exception):
    """The program does what the machine does not define."""


class Unknown(Exception):
    """The program uses what this interpreter does not know: it has to be taught."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One statement: `@predicate opcode operands`. `parts` is the opcode without `::` qualifiers, split at dots."""

    text: str
    opcode: str
    operands: tuple[str, ...]
    predicate: str | None

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part.split("::")[0] for part in self.opcode.split("."))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One entry point. `parameters`: name and bytes, in order. `registers`: a number for each name; `widths`: bits, by number."""

    name: str
    parameters: tuple[tuple[str, int], ...]
    threads: int
    cluster: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, int]
    widths: tuple[int, ...]


@dataclasses.dataclass
class _Scope:
    """A pair of braces: the names declared in it, and where it stands."""

    number: int
    parent: "_Scope | None"
    names: set[str] = dataclasses.field(default_factory=set)

    def resolve(self, name: str) -> str:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return f"{name}@{scope.number}" if scope.number else name
            scope = scope.parent
        return name


def parse(text: str) -> Kernel:
    """The only kernel of a PTX module.

    Raises:
        Fault: the module has no entry, or several.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\s*\.loc\b[^\n]*$", "", text, flags=re.M)
    if text.count(".entry") != 1:
        raise Fault(f"{text.count('.entry')} kernels in one module")
    start = text.index(".entry")
    brace = text.index("{", text.index(")", start))
    head = text[start:brace]
    name = re.search(r"\.entry\s+(\w+)", head)
    threads = re.search(r"\.maxntid\s+(\d+)", head)
    cluster = re.search(r"\.reqnctapercluster\s+(\d+)", head)
    if name is None or threads is None:
        raise Fault("an entry without a name or a number of threads")
    parameters = []
    for declaration in re.findall(r"\.param\s+([^,\n]+)", head):
        found = re.search(r"(\w+)(?:\[(\d+)\])?\s*$", declaration.strip())
        assert found is not None
        parameters.append((found[1], int(found[2]) if found[2] else 8))
    statements, widths = _statements(text[brace + 1 :])
    return _kernel(name[1], tuple(parameters), int(threads[1]), int(cluster[1]) if cluster else 1, statements, widths)


def _statements(body: str) -> tuple[list[tuple[_Scope, str]], dict[str, int]]:
    """Statements and labels (`name:`) with their scopes, and bits by name of every register declared."""
    top = scope = _Scope(0, None)
    found: list[tuple[_Scope, str]] = []
    widths: dict[str, int] = {}
    scopes = 0
    current, position = "", 0

    def finish() -> None:
        nonlocal current
        statement = " ".join(current.split())
        current = ""
        while (label := re.match(r"([$\w]+)\s*:(?!:)\s*(.*)", statement)) is not None:
            scope.names.add(label[1])
            found.append((scope, label[1] + ":"))
            statement = label[2]
        if (register := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)) is not None:
            bits = _WIDTHS[register[1]]
            for declared in register[2].split(","):
                declared = declared.strip()
                many = re.match(r"([%\w]+)<(\d+)>", declared)
                for name in [declared] if many is None else [f"{many[1]}{i}" for i in range(int(many[2]))]:
                    scope.names.add(name)
                    widths[scope.resolve(name)] = bits
        elif statement and not statement.startswith("."):
            found.append((scope, statement))

    while position < len(body):
        character = body[position]
        if character == "{" and not current.strip():
            scopes += 1
            scope = _Scope(scopes, scope)
        elif character == "{":
            end = body.index("}", position)
            current += body[position : end + 1]
            position = end
        elif character == "}":
            finish()
            if scope is top:
                break
            assert scope.parent is not None
            scope = scope.parent
        elif character == ";":
            finish()
        else:
            current += character
            # A label ends at its colon, and a scope may open behind it.
            if character == ":" and body[position + 1] != ":" and re.fullmatch(r"\s*[$\w]+\s*:", current):
                finish()
        position += 1
    return found, widths


_NAME = re.compile(r"(?<![\w.%$])[%$]?[A-Za-z_$]\w*")


def _kernel(
    name: str,
    parameters: tuple[tuple[str, int], ...],
    threads: int,
    cluster: int,
    statements: list[tuple[_Scope, str]],
    declared: dict[str, int],
) -> Kernel:
    labels: dict[str, int] = {}
    registers: dict[str, int] = {}
    widths: list[int] = []
    instructions: list[Instruction] = []

    def note(register: str) -> None:
        if register in declared and register not in registers:
            registers[register] = len(widths)
            widths.append(declared[register])

    for scope, statement in statements:
        if statement.endswith(":"):
            labels[scope.resolve(statement[:-1])] = len(instructions)
            continue
        text = statement
        predicate = None
        if (guard := re.match(r"@(!?\S+)\s+(.*)", statement)) is not None:
            negated = guard[1].startswith("!")
            predicate = ("!" if negated else "") + scope.resolve(guard[1].lstrip("!"))
            statement = guard[2]
        opcode, _, rest = statement.partition(" ")
        rest = _NAME.sub(lambda match, scope=scope: scope.resolve(match[0]), rest)  # type: ignore[misc]
        for register in [*re.findall(r"[%\w]+(?:@\d+)?", rest), (predicate or "").lstrip("!")]:
            note(register)
        instructions.append(Instruction(text, opcode, _split(rest), predicate))
    return Kernel(name, parameters, threads, cluster, tuple(instructions), labels, registers, tuple(widths))


def _split(operands: str) -> tuple[str, ...]:
    """Operands at the commas that are not inside brackets or braces."""
    found, depth, current = [], 0, ""
    for character in operands:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return tuple([*found, current.strip()] if current.strip() else found)


def members(operand: str) -> list[str]:
    """The elements of `{a, b}`; an operand without braces is its only element."""
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def address(operand: str) -> tuple[str, int]:
    """Base and offset of `[base+offset]`."""
    inside = operand.strip()[1:-1].strip()
    found = re.fullmatch(r"(.+?)\s*\+\s*(-?\d+)", inside)
    return (found[1], int(found[2])) if found else (inside, 0)
