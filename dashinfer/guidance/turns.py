"""Whose grammar is checked next: clients take turns, and of each no more than one is checked at a time.

Pure policy: knows grammars as strings, no processes and no threads.
"""

from collections import deque
from collections.abc import Hashable
from typing import Any

import trio

from dashinfer.errors import QueueFull


class Ticket:
    """A request that waits for its grammar.

    Attributes:
        found: what the check has found, or the error that there is instead.
        settled: set once that is known.
    """

    def __init__(self, client: Hashable, grammar: str) -> None:
        self.client = client
        self.grammar = grammar
        self.settled = trio.Event()
        self.found: Any = None

    def settle(self, found: Any) -> None:
        self.found = found
        self.settled.set()


class Turns:
    """Hands out `places`, while at most `most_waiting` requests wait."""

    def __init__(self, *, places: int, most_waiting: int) -> None:
        self._places = places
        self._most_waiting = most_waiting
        self._waiting: dict[Hashable, deque[Ticket]] = {}  # by client, the next one's turn first
        self._running: dict[str, Ticket] = {}  # by grammar

    def join(self, client: Hashable, grammar: str) -> Ticket:
        """Queue a request. Where the queue is full, the last one of whoever has the most in it gives way.

        Raises:
            QueueFull: it would be this one.
        """
        total = sum(map(len, self._waiting.values()))
        if total >= self._most_waiting:
            refusal = QueueFull(f"{total} requests wait for their grammars already; try again later")
            longest = max(self._waiting.values(), key=len, default=deque[Ticket]())
            if len(longest) <= len(self._waiting.get(client, ())) + 1:
                raise refusal
            longest.pop().settle(refusal)
        ticket = Ticket(client, grammar)
        self._waiting.setdefault(client, deque()).append(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """A request waits no longer. What is checked for it goes on: nobody else could stop it sooner."""
        if (tickets := self._waiting.get(ticket.client)) is not None and ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del self._waiting[ticket.client]

    def begin(self) -> Ticket | None:
        """The one whose grammar is to be checked now, if there is one and a place for it. A grammar is not checked twice."""
        if len(self._running) == self._places:
            return None
        busy = {ticket.client for ticket in self._running.values()}
        for client, tickets in self._waiting.items():
            ticket = next((each for each in tickets if each.grammar not in self._running), None)
            if client in busy or ticket is None:
                continue
            self._running[ticket.grammar] = ticket
            self.leave(ticket)
            if (others := self._waiting.pop(client, None)) is not None:
                self._waiting[client] = others  # behind everybody
            return ticket
        return None

    def end(self, ticket: Ticket, found: Any) -> None:
        """Its grammar has been checked: everybody who waits for it knows what was found."""
        del self._running[ticket.grammar]
        ticket.settle(found)
        for other in [each for tickets in self._waiting.values() for each in tickets if each.grammar == ticket.grammar]:
            self.leave(other)
            other.settle(found)
