"""Which machine each replica stands on, and which of its chips and ports it takes.

Replicas take machines in the order of the members, the first with enough free chips. One that spans
several machines takes the same chips of each, and has no other such replica beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.codesign.launch.deployment import Deployment, Member

PORT_STEP = 1000
"""Between the ports of two members' first replicas."""
SLOT_STEP = 10
"""Between those of two replicas: SGLang's attention groups take seven more, from 233 above the port on."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Replicas of one member that a machine starts together: several whole ones, or its part of one."""

    member: Member
    machine: int
    first_chip: int
    replicas: int
    slot: int
    """How many replicas of the member the machine has before these."""
    rank: int = 0
    """Which of a replica's machines this is."""
    leader: int = 0
    """The machine with rank 0."""

    @property
    def port_offset(self) -> int:
        """From the engine's usual port to that of the first replica here."""
        return PORT_STEP * self.member.index + SLOT_STEP * self.slot


class _Machine:
    def __init__(self, chips: int) -> None:
        self.free, self.next_chip, self.spanned = chips, 0, False
        self.slots: dict[int, int] = {}

    def take(self, member: Member) -> tuple[int, int]:
        """First chip and slot of one replica, or of one machine's part of it."""
        first, slot = self.next_chip, self.slots.get(member.index, 0)
        self.free -= member.chips_per_node
        self.next_chip += member.chips_per_node
        self.slots[member.index] = slot + 1
        self.spanned = self.spanned or member.nodes > 1
        return first, slot


def seats(deployment: Deployment) -> list[Seat]:
    """Every replica's place, machine by machine."""
    per_node = int(deployment.question.chip.chips_per_node.value)
    machines: list[_Machine] = []
    found: list[Seat] = []
    # Wide replicas first: they need whole machines, others fill what is left.
    for member in sorted(deployment.members, key=lambda member: (member.nodes == 1, member.index)):
        for _ in range(member.plan.replicas):
            found += _place(member, machines, per_node)
    return sorted(found, key=lambda seat: (seat.machine, seat.member.index, seat.slot))


def _place(member: Member, machines: list[_Machine], per_node: int) -> list[Seat]:
    wide = member.nodes > 1
    able = [
        number
        for number, machine in enumerate(machines)
        if machine.free >= member.chips_per_node and not (wide and machine.spanned)
    ][: member.nodes]
    while len(able) < member.nodes:
        machines.append(_Machine(per_node))
        able.append(len(machines) - 1)
    placed = []
    for rank, number in enumerate(able):
        first, slot = machines[number].take(member)
        placed.append(
            Seat(
                member=member,
                machine=number,
                first_chip=first,
                replicas=1,
                slot=slot,
                rank=rank,
                leader=able[0],
            )
        )
    return placed


def started(found: list[Seat]) -> list[Seat]:
    """The same with neighbouring replicas of a member on a machine joined, as one start of a script."""
    joined: list[Seat] = []
    for seat in found:
        last = joined[-1] if joined else None
        if (
            last is not None
            and seat.member.nodes == 1
            and (last.machine, last.member.index) == (seat.machine, seat.member.index)
            and last.first_chip + last.replicas * seat.member.chips_per_node == seat.first_chip
        ):
            joined[-1] = Seat(
                member=last.member,
                machine=last.machine,
                first_chip=last.first_chip,
                replicas=last.replicas + 1,
                slot=last.slot,
                leader=last.leader,
            )
        else:
            joined.append(seat)
    return joined
