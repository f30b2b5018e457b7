"""Connections of the simulation: in order and reliable until they break, and then any prefix of what was on its way arrives.

The two ends learn of the end at different times, so an old and a new connection of the same pair overlap. Connections are
independent of each other: messages of one overtake those of another. On such streams a message is never doubled; what is
doubled is the connection: the proposer gives one up and says the same over a new one, and what it said over the old one still
arrives, before, between or after.
"""

from typing import TYPE_CHECKING, Any

from neon_services.protocols.safekeeper_messages import AcceptorMessage, ProposerMessage

if TYPE_CHECKING:
    from neon_services.simulation.proposer import SimulatedProposer
    from neon_services.simulation.safekeeper import SimulatedSafekeeper
    from neon_services.simulation.world import World

_FOREVER = 1 << 60
#: Directions; a partition may block one of them.
TO_SAFEKEEPER, TO_PROPOSER = 0, 1


class _Direction:
    """One half of a connection."""

    __slots__ = ("closed", "cut", "delivered", "last_us", "sent")

    def __init__(self) -> None:
        self.sent = self.delivered = 0
        self.last_us = 0
        self.cut = _FOREVER  # messages from this number on are lost
        self.closed = False  # the receiver has been told, or has left


class Connection:
    """Between one proposer and one safekeeper."""

    __slots__ = ("node", "number", "proposer", "slot", "stalled_until_us", "to_proposer", "to_safekeeper", "world")

    def __init__(
        self, world: "World", number: int, proposer: "SimulatedProposer", slot: int, node: "SimulatedSafekeeper"
    ) -> None:
        self.world = world
        self.number = number
        self.proposer = proposer
        self.slot = slot
        self.node = node
        self.stalled_until_us = 0
        self.to_safekeeper = _Direction()
        self.to_proposer = _Direction()

    def __str__(self) -> str:
        return f"c{self.number}({self.proposer}-{self.node})"

    def send_to_safekeeper(self, message: ProposerMessage) -> None:
        """From the proposer."""
        self._send(self.to_safekeeper, self._arrive_at_safekeeper, message)

    def send_to_proposer(self, message: AcceptorMessage) -> None:
        """From the safekeeper."""
        self._send(self.to_proposer, self._arrive_at_proposer, message)

    def _send(self, direction: _Direction, arrive: Any, message: Any) -> None:
        world = self.world
        direction.last_us = max(direction.last_us, world.now_us + world.delay_us())
        world.at(direction.last_us, arrive, message, direction.sent)
        direction.sent += 1

    def _arrive_at_safekeeper(self, message: ProposerMessage, number: int) -> None:
        direction = self.to_safekeeper
        if number < direction.cut and not direction.closed:
            if (until_us := self.world.blocked_until(self, TO_SAFEKEEPER)) > self.world.now_us:
                direction.last_us = max(direction.last_us, until_us)
                self.world.at(until_us, self._arrive_at_safekeeper, message, number)
                return
            direction.delivered = number + 1
            self.node.deliver(self, message)

    def _arrive_at_proposer(self, message: AcceptorMessage, number: int) -> None:
        direction = self.to_proposer
        if number < direction.cut and not direction.closed:
            if (until_us := self.world.blocked_until(self, TO_PROPOSER)) > self.world.now_us:
                direction.last_us = max(direction.last_us, until_us)
                self.world.at(until_us, self._arrive_at_proposer, message, number)
                return
            direction.delivered = number + 1
            self.proposer.deliver(self, message)

    # -- the end

    def break_off(self) -> None:
        """The network drops the connection: of each direction a random prefix still arrives."""
        self._close_safekeeper_later()
        self._close_proposer_later()

    def close_by_safekeeper(self) -> None:
        """The safekeeper leaves: nothing reaches it any more; what it sent may still arrive in part."""
        self.to_safekeeper.closed = True
        self._close_proposer_later()

    def close_by_proposer(self) -> None:
        """The proposer leaves."""
        self.to_proposer.closed = True
        self._close_safekeeper_later()

    def _cut(self, direction: _Direction) -> int:
        if direction.cut == _FOREVER:
            direction.cut = self.world.random.randint(direction.delivered, direction.sent)
        return max(direction.last_us, self.world.now_us) + self.world.delay_us()

    def _close_safekeeper_later(self) -> None:
        self.world.at(self._cut(self.to_safekeeper), self._tell_safekeeper)

    def _close_proposer_later(self) -> None:
        self.world.at(self._cut(self.to_proposer), self._tell_proposer)

    def _tell_safekeeper(self) -> None:
        if not self.to_safekeeper.closed:
            self.to_safekeeper.closed = True
            self.node.closed(self)

    def _tell_proposer(self) -> None:
        if not self.to_proposer.closed:
            self.to_proposer.closed = True
            self.proposer.closed(self)
