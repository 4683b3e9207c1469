from dashinfer.engine.media import MediaCache
from dashinfer.types import Encode, Forget

from .fake_rank import medium

ONE, TWO, THREE = medium(0), medium(1), medium(2)  # of as many tokens


def new_cache(tokens: int) -> MediaCache:
    return MediaCache(capacity=10 * tokens, token_bytes=10)


def encode(*media) -> list[Encode]:
    return [Encode(each.key, each.grid, each.patches) for each in media]


def test_a_medium_is_encoded_once_for_all_who_hold_it():
    cache = new_cache(6)
    assert cache.hold("a", ONE, pin=True)
    assert cache.hold("b", ONE, pin=False)

    assert cache.take_messages() == encode(ONE)
    assert cache.take_messages() == []
    assert not cache.ready(ONE.key)
    cache.encoded([ONE.key])
    assert cache.ready(ONE.key)
    assert (cache.hits, cache.misses, cache.used) == (1, 1, 10)


def test_the_least_recently_used_goes_first_and_only_when_room_is_needed():
    cache = new_cache(4)
    for each in (ONE, TWO, ONE):
        assert cache.hold("a", each, pin=True)
        cache.release("a", each.key)
    cache.take_messages()
    assert cache.hold("a", THREE, pin=True)

    assert cache.take_messages() == [Forget([TWO.key]), *encode(THREE)]
    assert cache.used == 40


def test_what_is_pinned_stays_and_what_is_wanted_gives_way_to_it_alone():
    cache = new_cache(3)
    assert cache.hold("waiting", TWO, pin=False)
    assert not cache.hold("another", THREE, pin=False)
    assert cache.hold("running", THREE, pin=True)
    assert not cache.hold("another", ONE, pin=True)
    assert cache.take_messages() == [*encode(TWO), Forget([TWO.key]), *encode(THREE)]
    cache.release("waiting", TWO.key)
    cache.release("running", THREE.key)

    assert cache.hold("waiting", TWO, pin=False)


def test_what_ranks_have_given_up_is_forgotten_and_may_be_asked_for_again():
    cache = new_cache(3)
    for holder, pin in (("running", True), ("waiting", False)):
        assert cache.hold(holder, ONE, pin=pin)
    assert cache.hold("other", TWO, pin=True)
    cache.take_messages()

    assert cache.failed([ONE.key, THREE.key]) == {"running", "waiting"}
    assert (cache.used, cache.num_encoding) == (20, 1)
    cache.abandon("running", ONE.key)
    assert cache.hold("later", ONE, pin=True)
    assert cache.take_messages() == [Forget([ONE.key]), *encode(ONE)]


def test_a_want_becomes_a_pin():
    cache = new_cache(2)
    cache.hold("a", TWO, pin=False)
    cache.hold("a", TWO, pin=True)

    assert not cache.hold("b", ONE, pin=True)
    cache.release("a", TWO.key)
    assert cache.num_pinned == 0


def test_what_is_abandoned_before_it_is_encoded_is_forgotten_unless_another_holds_it():
    cache = new_cache(6)
    for each in (ONE, TWO, THREE):
        cache.hold("a", each, pin=True)
    cache.hold("b", TWO, pin=False)
    cache.encoded([ONE.key])
    cache.take_messages()
    for each in (ONE, TWO, THREE):
        cache.abandon("a", each.key)

    assert cache.take_messages() == [Forget([THREE.key])]
    assert cache.ready(ONE.key)
    assert (cache.used, cache.num_encoding, cache.num_pinned) == (30, 1, 0)


def test_what_is_larger_than_all_room_is_held_alone():
    cache = new_cache(1)
    cache.hold("a", ONE, pin=True)
    assert not cache.hold("a", TWO, pin=True)
    cache.release("a", ONE.key)

    assert cache.hold("a", TWO, pin=True)
    assert cache.take_messages() == [*encode(ONE), Forget([ONE.key]), *encode(TWO)]


def test_what_was_forgotten_while_it_was_encoded_is_not_ready():
    cache = new_cache(1)
    cache.hold("a", ONE, pin=True)
    cache.release("a", ONE.key)
    cache.hold("a", TWO, pin=True)
    cache.encoded([ONE.key])

    assert not cache.ready(ONE.key)
    assert cache.num_encoding == 1
