"""Whose grammar is checked next."""

import pytest

from dashinfer.errors import QueueFull
from dashinfer.guidance.turns import Ticket, Turns


def begun(turns: Turns) -> list[Ticket]:
    """All that may begin now."""
    found = []
    while (ticket := turns.begin()) is not None:
        found.append(ticket)
    return found


def test_clients_take_turns_and_each_has_one_place_at_most():
    turns = Turns(places=2, most_waiting=100)
    for client, count in (("a", 4), ("b", 2), ("c", 1)):
        for number in range(count):
            turns.join(client, f"{client}{number}")
    order = []
    running = begun(turns)
    while running:
        order.append([ticket.grammar for ticket in running])
        assert len({ticket.client for ticket in running}) == len(running)
        turns.end(running.pop(0), "found")
        running += begun(turns)

    assert order == [["a0", "b0"], ["b0", "c0"], ["c0", "a1"], ["a1", "b1"], ["b1", "a2"], ["a2"], ["a3"]]


def test_a_grammar_is_checked_once_and_for_whoever_is_first():
    turns = Turns(places=2, most_waiting=100)
    turns.join("a", "own")
    of_a = turns.join("a", "common")
    of_b, again = turns.join("b", "common"), turns.join("b", "common")

    assert begun(turns)[1] is of_b
    late = turns.join("c", "common")
    assert begun(turns) == []
    turns.end(of_b, "found")

    assert [each.found for each in (of_a, of_b, again, late)] == ["found"] * 4
    assert all(each.settled.is_set() for each in (of_a, of_b, again, late))
    assert begun(turns) == []


def test_a_full_queue_is_shared_evenly():
    turns = Turns(places=1, most_waiting=4)
    greedy = [turns.join("a", f"a{number}") for number in range(4)]
    with pytest.raises(QueueFull, match="4 requests wait for their grammars already"):
        turns.join("a", "more")
    modest = [turns.join("b", f"b{number}") for number in range(2)]

    assert [type(ticket.found) for ticket in greedy] == [type(None), type(None), QueueFull, QueueFull]
    for client in ("a", "b"):
        with pytest.raises(QueueFull):
            turns.join(client, "more")
    turns.join("c", "c0")
    assert isinstance(modest[1].found, QueueFull) or isinstance(greedy[1].found, QueueFull)


def test_nobody_waits_where_nobody_may():
    with pytest.raises(QueueFull):
        Turns(places=1, most_waiting=0).join("a", "a")


def test_who_leaves_is_not_begun():
    turns = Turns(places=1, most_waiting=2)
    first, second = turns.join("a", "1"), turns.join("a", "2")
    turns.leave(first)

    assert begun(turns) == [second]
    turns.leave(second)  # too late
    assert begun(turns) == []
    third = turns.join("b", "3")
    turns.end(second, "found")
    assert begun(turns) == [third]
