"""What the links between chips move: collectives when all chips are there, messages when both ends are.

Each chip runs until its next ICN instruction. A collective waits for every chip; a SEND leaves its bytes on
the way and goes on; a RECV waits for the peer's. When no chip can go on, they are stuck.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Sequence

import torch

from tongyun.chip.ppu.fault import Fault
from tongyun.chip.ppu.isa import At, Instruction
from tongyun.chip.ppu.tiles import TORCH

Going = Generator[Instruction, None, None]
"""A chip's run: gives its next ICN instruction, and goes on when that is done."""
_MESSAGES = {"SEND", "RECV"}


def together(going: Sequence[Going], memories: Sequence[torch.Tensor]) -> None:
    """Run chips to their ends; `memories` are their HBM, as bytes. Fault when they wait for each other."""
    asked = [next(each, None) for each in going]
    mail: dict[tuple[int, int], deque[tuple[int, torch.Tensor]]] = defaultdict(deque)
    while any(wish is not None for wish in asked):
        moved = False
        for rank, wish in enumerate(asked):
            if wish is not None and wish.op in _MESSAGES and _message(rank, wish, mail, memories):
                asked[rank], moved = next(going[rank], None), True
        if moved:
            continue
        _collective(asked, memories)
        asked = [next(each, None) for each in going]
    if left := [f"{a} to {b}" for (a, b), queue in mail.items() if queue]:
        raise Fault(f"a SEND from chip {left[0]} that no RECV took")


def _place(wish: Instruction, name: str) -> int:
    value = wish.operands.get(name, At())
    return value.imm if isinstance(value, At) else int(value)


def _bytes(memory: torch.Tensor, at: int, size: int, wish: Instruction) -> torch.Tensor:
    if at + size > len(memory):
        raise Fault(f"{wish.op}: bytes {at} to {at + size} outside HBM")
    return memory[at : at + size]


def _message(
    rank: int,
    wish: Instruction,
    mail: dict[tuple[int, int], deque[tuple[int, torch.Tensor]]],
    memories: Sequence[torch.Tensor],
) -> bool:
    """Whether a SEND or RECV could be done."""
    peer, size, target = wish.plain("peer"), wish.plain("bytes"), _place(wish, "target")
    if peer >= len(memories) or peer == rank:
        raise Fault(f"{wish.op} of chip {rank} with peer {peer}; {len(memories)} chips run")
    if wish.op == "SEND":
        source = _bytes(memories[rank], _place(wish, "source"), size, wish)
        mail[rank, peer].append((target, source.clone()))
        return True
    if not mail[peer, rank]:
        return False
    # Delivered as late as is legal, so that a program that reads too early is seen to.
    where, given = mail[peer, rank].popleft()
    if (where, len(given)) != (target, size):
        raise Fault(f"chip {rank} waits for {size} bytes at {target}, {peer} sent {len(given)} to {where}")
    _bytes(memories[rank], target, size, wish).copy_(given)
    return True


def _collective(asked: Sequence[Instruction | None], memories: Sequence[torch.Tensor]) -> None:
    """Move the bytes of one collective; every chip has reached it."""
    wishes = [wish for wish in asked if wish is not None]
    first, count = wishes[0], len(memories)
    kinds = {(wish.op, wish.types, wish.plain("bytes")) for wish in wishes}
    if len(wishes) < count or len(kinds) > 1 or first.op in _MESSAGES:
        raise Fault(f"chips wait for each other: {[wish and wish.op for wish in asked]}")
    if first.plain("ranks") != count:
        raise Fault(f"{first.op} over {first.plain('ranks')} ranks; {count} chips run")
    size = first.plain("bytes")
    wide = size * count if first.op in {"REDUCE_SCATTER", "ALL_TO_ALL"} else size
    sent = [
        _bytes(memory, _place(wish, "source"), wide, wish).clone()
        for memory, wish in zip(memories, wishes, strict=True)
    ]
    for rank, (memory, wish) in enumerate(zip(memories, wishes, strict=True)):
        got = _received(wish, sent, rank, size, memory)
        _bytes(memory, _place(wish, "target"), len(got), wish).copy_(got)


def _received(
    wish: Instruction, sent: Sequence[torch.Tensor], rank: int, size: int, memory: torch.Tensor
) -> torch.Tensor:
    mine = slice(rank * size, (rank + 1) * size)
    if wish.op == "ALL_GATHER":
        return torch.cat(list(sent))
    if wish.op == "ALL_TO_ALL":
        return torch.cat([part[mine] for part in sent])
    dtype = TORCH[wish.types[0]]
    total = torch.zeros(len(sent[0]) // dtype.itemsize)
    for part in sent:
        total += part.view(dtype).float()
    if addend := _place(wish, "addend"):
        total += _bytes(memory, addend, size, wish).view(dtype).float()
    whole = total.to(dtype).view(torch.uint8)
    return whole[mine] if wish.op == "REDUCE_SCATTER" else whole
