"""PTX as text into instructions, by syntax alone: what an opcode means, ``machine/instructions.cpp`` knows."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from pathlib import PurePath

MOST_DESTINATIONS = 8
MOST_SOURCES = 24
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
PARAMETER_BYTES = {"64": 8, "32": 4, "16": 2, "f8": 1, "u8": 1, "b8": 1, "s8": 1}


class SyntaxUnknownError(ValueError):
    """A statement that this parser was not made for."""


@dataclass
class Instruction:
    """One instruction; registers are numbers, constants are places in a table."""

    text: str
    place: str
    """file:line that it was compiled from."""
    opcode: str
    guard: int = -1
    guard_negated: bool = False
    label: str = ""
    """Where a branch leads."""
    offset: int = 0
    destinations: list[int] = field(default_factory=list)
    sources: list[tuple[bool, int]] = field(default_factory=list)
    """(whether it is a constant, its number)."""


@dataclass
class Parameter:
    """A kernel's parameter: where it lies, how wide it is, and how its number is written."""

    offset: int
    bytes: int
    kind: str


class Kernel:
    """The one kernel of a PTX module."""

    def __init__(self, ptx: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.constants: dict[int, int] = {}
        self.parameters: list[Parameter] = []
        self.tables: dict[str, bytes] = {}
        """Constant data of the module; their addresses are given when it is loaded."""
        self.table_uses: dict[str, int] = {}
        self.registers = 0
        self._scopes: list[dict[str, int]] = [{}]
        self._places: dict[str, int] = {}
        self._read(ptx)

    def _read(self, ptx: str) -> None:
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
        if entry is None:
            raise SyntaxUnknownError("no kernel in this PTX")
        self.name = entry[1]
        self._read_parameters(entry[2])
        threads = re.search(r"\.reqntid (\d+)", ptx)
        if threads is None:
            raise SyntaxUnknownError("a kernel that does not say how many threads it takes")
        self.warps = int(threads[1]) // 32
        for name, data in re.findall(r"\.global\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\d+\]\s*=\s*\{([^}]*)\}", ptx):
            self.tables[name] = bytes(int(number, 0) for number in data.split(","))
        body = ptx[ptx.index("{", entry.end()) + 1 :]
        files = {number: PurePath(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
        self._read_body(body[: body.index("\n}")], files)

    def _read_parameters(self, text: str) -> None:
        end = 0
        for line in text.split(","):
            found = re.search(r"\.param\s+(?:\.align \d+\s+)?\.(\w+).*?(\w+)$", line.strip(), re.DOTALL)
            if found is None:
                continue
            size = PARAMETER_BYTES[found[1][-2:]]
            offset = -(-end // size) * size
            self._places[found[2]] = offset
            self.parameters.append(Parameter(offset, size, found[1]))
            end = offset + size
        self.parameter_bytes = end

    def _read_body(self, body: str, files: dict[str, str]) -> None:
        place, pending = "", ""
        for line in body.splitlines():
            location = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
            if location:
                inlined = re.search(r"inlined_at (\d+) (\d+)", line)
                place = f"{files.get(location[1], '?')}:{location[2]}"
                if inlined:
                    place += f", called from {files.get(inlined[1], '?')}:{inlined[2]}"
                continue
            pending += " " + line.split("//")[0]
            pending = self._consume(pending, place)
        if pending.strip():
            raise SyntaxUnknownError(f"behind the last statement: {pending.strip()}")

    def _consume(self, text: str, place: str) -> str:
        """Read the statements, labels and scopes that are whole; the rest."""
        while text := text.strip():
            label = re.match(r"([$\w]+):(?!:)", text)
            if label:
                self.labels[label[1]] = len(self.instructions)
                text = text[label.end() :]
            elif text[0] == "{":
                self._scopes.append({})
                text = text[1:]
            elif text[0] == "}":
                self._scopes.pop()
                text = text[1:]
            elif ";" in text:
                statement, text = text.split(";", 1)
                self._read_statement(" ".join(statement.split()), place)
            else:
                break
        return text

    def _read_statement(self, text: str, place: str) -> None:
        if text.startswith(".reg "):
            return self._declare(text)
        if text.startswith((".pragma", ".shared")):
            return None
        if text.startswith("."):
            raise SyntaxUnknownError(text)
        guard = re.match(r"@(!?)([%$\w]+)\s+", text)
        opcode, _, operands = text[guard.end() if guard else 0 :].partition(" ")
        this = Instruction(text, place, opcode)
        if guard:
            this.guard, this.guard_negated = self._register(guard[2]), bool(guard[1])
        self._read_operands(this, split_operands(operands))
        self.instructions.append(this)
        return None

    def _declare(self, text: str) -> None:
        """Registers of a scope: ``%r<9>`` is %r0 to %r8."""
        for name in text.split(None, 2)[2].split(","):
            several = re.match(r"\s*([%$\w]+)<(\d+)>", name)
            names = [f"{several[1]}{k}" for k in range(int(several[2]))] if several else [name.strip()]
            for one in names:
                self._scopes[-1][one] = self.registers
                self.registers += 1

    def _register(self, name: str) -> int:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise SyntaxUnknownError(f"register {name} is not declared")

    def _constant(self, bits: int) -> tuple[bool, int]:
        return True, self.constants.setdefault(bits & (2**64 - 1), len(self.constants))

    def _source(self, token: str, opcode: str) -> tuple[bool, int]:
        pattern = re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})|0[fF]([0-9A-Fa-f]{8})", token)
        if pattern:
            return self._constant(int(pattern[1] or pattern[2], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", token):
            number = int(token.rstrip("U"), 0)
            if opcode.endswith(".f64"):
                return self._constant(struct.unpack("<Q", struct.pack("<d", number))[0])
            width = re.search(r"(\d+)$", opcode)
            bits = int(width[1]) if width and not re.search(r"\.wide\.|\.sh[lr]\.", opcode) else 64
            return self._constant(number & (2**bits - 1))
        if token in ("true", "false"):
            return self._constant(int(token == "true"))
        if token in self._places:
            return self._constant(self._places[token])
        if token == "global_smem":
            return self._constant(0)
        if token in self.tables:
            return True, self.table_uses.setdefault(token, self._new_constant())
        return False, self._register(token)

    def _new_constant(self) -> int:
        """A constant that no other operand shares, to be filled in when the module is loaded."""
        place = len(self.constants)
        self.constants[-1 - place] = place
        return place

    def _read_address(self, this: Instruction, token: str) -> None:
        found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", token)
        if found is None:
            raise SyntaxUnknownError(this.text)
        this.sources.append(self._source(found[1], "b64"))
        this.offset = int(found[2] or "0", 0)

    def _read_operands(self, this: Instruction, tokens: list[str]) -> None:
        base = this.opcode.split(".")[0]
        if base in ("bra", "ret", "exit"):
            this.label = tokens[0] if tokens else ""
            return
        writes = base not in ("st", "stmatrix", "bar", "barrier")
        if this.opcode == "bar.warp.sync":
            return
        if base == "mov" and SPECIAL.fullmatch(tokens[1]):
            this.opcode = f"special.{tokens[1][1:]}"
            tokens = tokens[:1]
        for k, token in enumerate(tokens):
            if token.startswith("["):
                self._read_address(this, token)
            elif k == 0 and writes:
                # "%p|%q": of two comparisons in one; else a second result that nobody reads.
                names = token.strip("{} ").replace("|", "," if base == "setp" else "|").split("|")[0].split(",")
                this.destinations = [-1 if name.strip() == "_" else self._register(name.strip()) for name in names]
            else:
                this.sources += [self._source(name.strip(), this.opcode) for name in token.strip("{} ").split(",")]
        if len(this.destinations) > MOST_DESTINATIONS or len(this.sources) > MOST_SOURCES:
            raise SyntaxUnknownError(f"too many operands: {this.text}")


def split_operands(text: str) -> list[str]:
    """Operands between the commas that stand outside braces and brackets."""
    return [token.strip() for token in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if token.strip()]
