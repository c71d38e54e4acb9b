"""Loops of a GPU's machine code, and what spills inside them.

``nvdisasm``, which comes with Triton, prints the instructions of a cubin. Here they become basic blocks, and the loops
are the natural ones: the blocks that reach an edge back to a block that dominates its source. Text order would not do,
because the assembler moves rare paths of a loop behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MATRIX = re.compile(r"\bH(G?)MMA\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code.

    Attributes:
        instructions: in all of its blocks.
        matrix: instructions of the matrix units among them.
        local: loads and stores of local memory among them, which are spills in a kernel without arrays.
    """

    instructions: int
    matrix: int
    local: int


def innermost_loops(text: str) -> list[Loop]:
    """Return the loops that hold no other loop, from what ``nvdisasm -c`` prints.

    Where any loop multiplies matrices, only the loops that do so count, here and as loops that are held.
    """
    blocks, edges = _blocks(text)
    bodies = _natural_loops(edges)
    found = {head: [x for block in body for x in blocks[block]] for head, body in bodies.items()}
    multiplying = {head for head, code in found.items() if any(MATRIX.search(x) for x in code)}
    heads = multiplying or set(found)
    inner = [head for head in heads if not any(other != head and bodies[other] < bodies[head] for other in heads)]
    return [
        Loop(
            len(found[head]),
            sum(bool(MATRIX.search(x)) for x in found[head]),
            sum(bool(LOCAL.search(x)) for x in found[head]),
        )
        for head in sorted(inner)
    ]


def _blocks(text: str) -> tuple[list[list[str]], list[list[int]]]:
    """Split the code where it is jumped to and behind jumps; return the blocks and their successors."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.search(line):
            blocks[-1].append(instruction[1].strip())
            if _ends_block(blocks[-1][-1]):
                blocks.append([])
    meetings: dict[str, str] = {}
    edges = []
    for number, block in enumerate(blocks):
        for x in block:
            if met := re.search(r"BSSY\S*\s+(B\d+), `\((\.L\w+)\)", x):
                meetings[met[1]] = met[2]
        targets = _jumps(block[-1], meetings) if block else []
        following = [number + 1] if number + 1 < len(blocks) and not (block and _leaves(block[-1])) else []
        edges.append(sorted({labels[target] for target in targets if target in labels} | set(following)))
    return blocks, edges


def _operation(instruction: str) -> str:
    """Return the name of the operation, without what it depends on."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _ends_block(instruction: str) -> bool:
    return _operation(instruction).split(".")[0] in ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "BSYNC", "WARPSYNC")


def _leaves(instruction: str) -> bool:
    """Return whether the next instruction in memory never follows."""
    operation = _operation(instruction).split(".")[0]
    if operation in ("BRX", "JMX", "RET", "BSYNC", "EXIT"):
        return not instruction.startswith("@")
    return operation == "BRA" and bool(re.match(r"BRA(\.\w+)*\s+`\(", instruction))


def _jumps(instruction: str, meetings: dict[str, str]) -> list[str]:
    """Return the labels that a block's last instruction can go to."""
    operation = _operation(instruction).split(".")[0]
    if operation == "BSYNC":
        met = re.search(r"\b(B\d+)\b", instruction)
        return [meetings[met[1]]] if met and met[1] in meetings else []
    if operation in ("BRX", "JMX"):
        return re.findall(r"\.L\w+", instruction)
    return _TARGET.findall(instruction) if operation in ("BRA", "JMP", "WARPSYNC") else []


def _natural_loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """Return the blocks of each loop by its head."""
    order, before = _reverse_postorder(edges), [[] for _ in edges]  # type: tuple[list[int], list[list[int]]]
    reached = set(order)
    for source, targets in enumerate(edges):
        for target in targets if source in reached else ():
            before[target].append(source)
    everything = (1 << len(edges)) - 1
    dominators = [everything] * len(edges)
    dominators[0], changed = 1, True
    while changed:
        changed = False
        for block in order[1:]:
            common = everything
            for source in before[block]:
                common &= dominators[source]
            common |= 1 << block
            changed |= common != dominators[block]
            dominators[block] = common
    loops: dict[int, set[int]] = {}
    for source in order:
        for head in edges[source]:
            if dominators[source] >> head & 1:
                body, rest = loops.setdefault(head, {head}), [source]
                while rest:
                    block = rest.pop()
                    if block not in body:
                        body.add(block)
                        rest.extend(before[block])
    return loops


def _reverse_postorder(edges: list[list[int]]) -> list[int]:
    """Return the blocks that are reached, each before those behind it but for edges back."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(edges[0]))]
    while stack:
        block, targets = stack[-1]
        target = next((x for x in targets if x not in seen), None)
        if target is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(edges[target])))
    return order[::-1]
