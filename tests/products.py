"""Products under way: a check of Hopper machine code for registers that are written while the matrix unit reads them.

A `wgmma` whose left operand lies in registers reads them after it was issued, until a wait says that it is done. The
compiler does not always know: kernels in Gluon name the sums in a wait, not the operands, and a loop that carries an
operand on to the next step may write the new one over the old one. Such a kernel compiles without a warning and gives
NaN (docs/log.md, 2026-11-27). So this walks all paths through the code and keeps, for every product under way, the
registers of its operand and of its sum.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
Groups = tuple[frozenset[int], ...]  # registers of the products of each group under way, the oldest first
MOST_LEFT = 7  # groups that a wait can leave under way: its operand has three bits


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str


def disassemble(cubin: bytes) -> list[Instruction]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-sass", file.name], check=True, capture_output=True, text=True).stdout
    found = (LINE.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in found if m]


def written(i: Instruction) -> range:
    """Registers that an instruction writes: its first operand, or the one behind a predicate."""
    name, *parts = i.opcode.split(".")
    m = re.match(r"(P[T\d]+,\s*)?R(\d+)\b", i.operands)
    # Comparisons write predicates, and read the register behind them.
    if not m or m[1] and name != "SHFL" and not name.startswith("ATOM"):
        return range(0)
    if name == "LDSM":
        wide = int(parts[-1]) if parts[-1] in ("2", "4") else 1
    elif name == "CS2R":
        wide = 1 if "32" in parts else 2
    else:
        wide = 4 if "128" in parts or name in ("HMMA", "IMMA") else 2 if {"64", "WIDE"} & set(parts) else 1
    return range(int(m[2]), int(m[2]) + wide)


def read(i: Instruction) -> list[int]:
    """Registers that an instruction reads: those it names, without the rest of wide ones."""
    names = [int(name) for name in re.findall(r"\bR(\d+)\b", i.operands)]
    return names[1:] if written(i) else names


def product(i: Instruction) -> tuple[range, range]:
    """Registers of the operand (none: it lies in shared memory) and of the sum of a product."""
    rows, columns, depth = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", i.opcode).groups())  # type: ignore[union-attr]
    names = [name.strip() for name in i.operands.split(",")]
    total = int(re.match(r"R(\d+)", names[0])[1])  # type: ignore[index]
    left = re.match(r"R(\d+)", names[1])
    operand = range(int(left[1]), int(left[1]) + rows * depth // 256) if left else range(0)
    return operand, range(total, total + rows * columns // 128)


def hazards(code: list[Instruction]) -> list[str]:
    """Instructions that write a register which a product under way reads, or write or read one that it sums up in."""
    index = {i.address: n for n, i in enumerate(code)}
    found: dict[int, str] = {}
    todo: list[tuple[int, Groups, Groups, frozenset[int], frozenset[int]]] = [(0, (), (), frozenset(), frozenset())]
    seen = set()
    while todo:
        state = todo.pop()
        if state in seen or state[0] >= len(code):
            continue
        seen.add(state)
        n, reads, sums, open_reads, open_sums = state
        i = code[n]
        busy, adding = open_reads.union(*reads), open_sums.union(*sums)
        if i.opcode.startswith("HGMMA"):
            operand, total = product(i)
            # Products add to one sum in order. What a product sums up in must not be an operand, of itself or another.
            if set(total) & (busy | set(operand)) or set(operand) & adding:
                found[n] = f"{i.address:#x} {i.opcode} {i.operands} has an operand that is a sum"
            open_reads, open_sums = open_reads | set(operand), open_sums | set(total)
            if "gsb0" in i.operands:
                reads, sums = _committed(reads, open_reads), _committed(sums, open_sums)
                open_reads = open_sums = frozenset()
        elif i.opcode.startswith("WARPGROUP.DEPBAR"):
            most = int(re.search(r"gsb0, (0x[0-9a-f]+)", i.operands)[1], 16)  # type: ignore[index]
            reads, sums = (reads[-most:], sums[-most:]) if most else ((), ())
        else:
            for register in written(i):
                if register in busy or register in adding:
                    what = "reads" if register in busy else "sums up in"
                    found[n] = f"{i.address:#x} {i.opcode} {i.operands} writes R{register}, which a product {what}"
            for register in read(i):
                if register in adding:
                    found[n] = f"{i.address:#x} {i.opcode} {i.operands} reads R{register}, which a product sums up in"
        for after in _next(i, n, index):
            todo.append((after, reads, sums, open_reads, open_sums))
    return [found[n] for n in sorted(found)]


def serialised(code: list[Instruction]) -> list[str]:
    """Products that wait for the one before although they only go on with its sum.

    The assembler does that where it lacks registers, or meets a branch while a product is under way, and says so in a
    warning that nobody sees. A sum over eight pieces then takes eight times the latency.
    """
    found, last, waited = [], None, False
    for i in code:
        if i.opcode.startswith("HGMMA"):
            total = product(i)[1]
            goes_on = len(i.operands.split(",")) > 3 and f"R{total.start}" in re.split(r",\s*", i.operands)[2:]
            if last == total and waited and goes_on:
                found.append(f"{i.address:#x} {i.opcode} {i.operands} waits for the product before")
            last, waited = total, False
        elif i.opcode.startswith("WARPGROUP.DEPBAR"):
            waited = True
        elif last and (i.opcode.startswith("BRA") or {*written(i), *read(i)} & set(last)):
            last = None  # somebody uses the sum, or it is another step
    return found


def _committed(groups: Groups, newest: frozenset[int]) -> Groups:
    """The groups under way with one more. No wait can tell apart what is older than the newest seven, so that is one
    group: otherwise a loop without a wait would go on for ever with a longer list each time around."""
    groups = (*groups, newest)
    old = max(len(groups) - MOST_LEFT, 1)
    return (frozenset().union(*groups[:old]), *groups[old:])


def _next(i: Instruction, n: int, index: dict[int, int]) -> Iterator[int]:
    """What may run after an instruction. A condition stands ahead of it, or among its operands (`BRA.U UP0, 0x40`)."""
    always = i.predicate in ("", "PT") and "," not in i.operands
    target = re.search(r"0x([0-9a-f]+)\s*$", i.operands)
    if i.opcode.startswith("BRA") and target and int(target[1], 16) in index:
        yield index[int(target[1], 16)]
        if always:
            return
    if i.opcode.startswith(("EXIT", "RET")) and i.predicate in ("", "PT"):
        return
    yield n + 1
