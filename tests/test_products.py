"""The check for registers that are written while a product reads them, on code written by hand."""

from __future__ import annotations

import pytest

from tests.products import Instruction, hazards, serialised

LOOP = """
HGMMA.64x64x16.F32.BF16 R152, gdesc[UR8], RZ, !UPT, gsb0
HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR12].tnspB, R24
HGMMA.64x128x16.F32.BF16 R24, R188, gdesc[UR12].tnspB, R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
{after_scores}
WARPGROUP.DEPBAR.LE gsb0, 0x0
FMUL R24, R24, R3
{after_all}
@P0 BRA 0x0
EXIT
"""

CARRIED = """
{at_head}
HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR12].tnspB, R24, gsb0
{branch}
WARPGROUP.DEPBAR.LE gsb0, 0x0
{after_wait}
EXIT
"""


def code(text: str = LOOP, **lines: str) -> list[Instruction]:
    found = []
    names = "after_scores", "after_all", "at_head", "branch", "after_wait", "between"
    lines = dict.fromkeys(names, "NOP") | lines
    for n, line in enumerate(text.format(**lines).strip().splitlines()):
        words = line.split(maxsplit=1)
        predicate = words[0][1:] if words[0].startswith("@") else ""
        opcode, _, operands = (words[1] if predicate else line).partition(" ")
        found.append(Instruction(16 * n, predicate, opcode, operands))
    return found


@pytest.mark.parametrize(
    "line",
    ["FMUL R152, R152, R3", "F2FP.BF16.F32.PACK_AB R192, R153, R152", "STG.E desc[UR4][R4.64], R184",
     "MUFU.EX2 R4, R184", "LDS.64 R182, [R4]", "ISETP.GE.AND P0, PT, R184, R3, PT", "IMAD.WIDE R182, R4, R5, R6",
     "LDG.E.64 R22, desc[UR4][R4.64]", "LDSM.16.M88.4 R180, [R4]", "SHFL.BFLY PT, R5, R184, 0x1, 0x1f",
     "HGMMA.64x64x16.F32.BF16 R88, R184, gdesc[UR8], R88, gsb0"],
)  # fmt: skip
def test_what_a_product_does_not_need_may_be_written(line):
    assert hazards(code(after_scores=line)) == []


@pytest.mark.parametrize(
    "line",
    ["F2FP.BF16.F32.PACK_AB R184, R153, R152", "MOV R191, RZ", "LDS.128 R181, [R4]", "IMAD.WIDE R183, R4, R5, R6",
     "CS2R R190, SRZ", "FMUL R24, R24, R3", "LDG.E.64 R23, desc[UR4][R4.64]", "FMUL R4, R87, R3",
     "STG.E desc[UR4][R4.64], R24", "LDSM.16.M88.4 R181, [R4]", "SHFL.BFLY PT, R184, R5, 0x1, 0x1f",
     "ATOMG.E.ADD.STRONG.GPU PT, R191, desc[UR4][R4.64], R5", "ISETP.GE.AND P0, PT, R24, R3, PT"],
)  # fmt: skip
def test_writes_to_operands_and_uses_of_sums_are_found(line):
    """Ahead of the wait, and fine behind it."""
    found = hazards(code(after_scores=line))
    assert len(found) == 1 and line.split()[0] in found[0]
    assert hazards(code(after_all=line)) == []


@pytest.mark.parametrize(
    "line",
    ["HGMMA.64x64x16.F32.BF16 R160, gdesc[UR8], RZ, !UPT, gsb0",
     "HGMMA.64x64x16.F32.BF16 R120, R84, gdesc[UR8], RZ, !UPT, gsb0"],
)  # fmt: skip
def test_a_product_must_not_sum_up_in_an_operand_nor_read_a_sum_under_way(line):
    found = hazards(code(after_scores=line))
    assert len(found) == 1 and line in found[0]


@pytest.mark.parametrize("branch", ["@P0 BRA 0x0", "@!P0 BRA 0x0", "BRA.U UP0, 0x0", "BRA 0x0"])
def test_an_operand_that_the_next_step_writes_before_anybody_waited(branch):
    """On the way through the loop alone: nothing is under way when it starts."""
    assert hazards(code(CARRIED, at_head="MOV R201, RZ", branch=branch)) == []
    found = hazards(code(CARRIED, at_head="MOV R185, RZ", branch=branch))
    assert [text.split(" writes ")[1] for text in found] == ["R185, which a product reads"]


@pytest.mark.parametrize("branch", ["@P0 BRA 0x30", "BRA.U UP0, 0x30", "BRA.U !UP0, 0x30"])
def test_both_ways_of_a_branch_are_walked(branch):
    """One skips the wait, the other does not branch."""
    around = code(CARRIED, branch=branch.replace("0x30", "0x40"), after_wait="MOV R185, RZ")
    assert len(hazards(around)) == 1
    through = CARRIED.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R185, RZ\nWARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert len(hazards(code(through, branch=branch.replace("0x30", "0x40")))) == 1


def test_a_loop_without_a_wait_ends():
    """The groups under way would grow without end; a write to the operand is found all the same."""
    again = CARRIED.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0\n", "")
    assert len(hazards(code(again, at_head="MOV R185, RZ", branch="@P0 BRA 0x0"))) == 1


CHAIN = """
HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT
{between}
HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], R88, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x0
{after_wait}
HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR12].tnspB, R24, gsb0
EXIT
"""


def test_products_that_wait_for_their_own_sum():
    """A wait inside a sum is found; behind it, or where somebody used the sum, it is as it should be."""
    assert serialised(code(CHAIN, between="NOP")) == []
    found = serialised(code(CHAIN, between="WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    assert len(found) == 1 and "gdesc[UR16]" in found[0]
    again = CHAIN.replace("{between}", "WARPGROUP.DEPBAR.LE gsb0, 0x0\nFMUL R90, R90, R3")
    assert serialised(code(again)) == []
    steps = CARRIED.replace("EXIT\n", "") + CARRIED.replace("{at_head}", "FMUL R24, R24, R3")
    assert serialised(code(steps.replace("\n\n", "\n"))) == []
