"""What a compiled kernel's machine code says of its speed: read from the binary, with no GPU present.

The main loop is the smallest that both loads and multiplies; a kernel without a loop is read as a whole. NVIDIA's own
disassembler, which triton ships, gives the text.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MachineCode", "parse", "read"]

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_BITS = re.compile(r"\.[US]?(8|16|64|128)(?:\.|$)")
_TENSOR_CORES = ("UTCHMMA", "HGMMA", "HMMA")  # from the youngest on: where two are found, the kernel is the younger's
_LOADS = ("LDG", "LDGSTS", "UTMALDG")
_LOCAL = ("LDL", "STL")
_WAIT_FOR_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@dataclass(frozen=True)
class MachineCode:
    """registers: of a thread; shared: bytes of a block; spills: bytes that a thread's code moves to and from local
    memory; tensor_core: the instruction, or None; serialised: each product of the main loop waits for the one before it;
    load_bits, widest_bits: of the narrowest and the widest global load of the main loop; asynchronous: all of those go
    to shared memory without passing through registers.
    """

    registers: int
    shared: int
    spills: int
    tensor_core: str | None
    serialised: bool
    load_bits: int
    widest_bits: int
    asynchronous: bool


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: str

    @property
    def family(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """Of a load or store; without a suffix it moves 32."""
        found = _BITS.search(self.opcode)
        return 128 if self.family == "UTMALDG" else int(found[1]) if found else 32


def read(cubin: bytes, shared: int, tools: Path) -> MachineCode:
    """The reading of a binary, which does not say what shared memory it is launched with; ``tools``: the folder of
    nvdisasm and cuobjdump. CalledProcessError if they can't.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(tools / "nvdisasm", "-c", file.name)
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
    return parse(text, registers=int(re.findall(r"REG:(\d+)", usage)[0]), shared=shared)


def parse(disassembly: str, registers: int, shared: int) -> MachineCode:
    """The reading of what ``nvdisasm -c`` printed."""
    code, loops = _listing(disassembly)
    families = {instruction.family for instruction in code}
    tensor_core = next((name for name in _TENSOR_CORES if name in families), None)
    main = _main_loop(code, loops, tensor_core)
    loads = [instruction for instruction in main if instruction.family in _LOADS]
    bits = [load.bits for load in loads] or [0]
    return MachineCode(
        registers=registers,
        shared=shared,
        spills=sum(i.bits // 8 for i in code if i.family in _LOCAL),
        tensor_core=tensor_core,
        serialised=_serialised(main),
        load_bits=min(bits),
        widest_bits=max(bits),
        asynchronous=bool(loads) and all(load.family != "LDG" for load in loads),
    )


def _listing(disassembly: str) -> tuple[list[_Instruction], list[tuple[int, int]]]:
    """The instructions, and the first and last of each loop: what a branch jumps back over."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(code)))
            code.append(_Instruction(found[1], found[2].strip()))
    return code, loops


def _main_loop(
    code: Sequence[_Instruction], loops: Sequence[tuple[int, int]], tensor_core: str | None
) -> Sequence[_Instruction]:
    products = (tensor_core,) if tensor_core else ("FFMA", "FFMA2")
    for body in sorted((code[first : last + 1] for first, last in loops), key=len):
        families = {instruction.family for instruction in body}
        # What lies behind the exit are waits moved out of the way, which branch back into the loop that they are of.
        if "EXIT" not in families and families.intersection(products) and families.intersection(_LOADS):
            return body
    return code


def _serialised(main: Sequence[_Instruction]) -> bool:
    """Whether a Hopper product waits for all before it; in a clean loop the last ones are still under way."""
    waiting = False
    products = 0
    for instruction in main:
        if instruction.family == "HGMMA":
            if waiting and products:
                return True
            products += 1
            waiting = False
        waiting |= f"{instruction.opcode} {instruction.operands}".startswith(_WAIT_FOR_ALL)
    return False


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
