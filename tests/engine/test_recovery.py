import pytest

from dashinfer.engine.recovery import GOOD_STEPS, Recovery, StepLimits, Verdict


def test_one_failure_gives_nobody_up():
    recovery = Recovery(max_restarts=8, window=300)

    assert recovery.failure(["a", "b"], now=0) == Verdict(0.0, [], [])
    assert recovery.suspect() is None


def test_who_was_there_twice_is_computed_alone_and_given_up_at_the_third_time_then():
    recovery = Recovery(max_restarts=8, window=300)
    recovery.failure(["a", "b"], now=0)
    recovery.token("b")
    recovery.failure(["a", "b", "c"], now=1)

    assert recovery.suspect() == "a"
    for now in (2, 3):
        assert recovery.failure(["a"], now=now) == Verdict(0.5, [], [])
    assert recovery.failure(["a"], now=4) == Verdict(0.5, ["a"], [])
    assert recovery.suspect() is None


def test_who_is_alone_from_the_beginning_is_given_up_at_the_third_failure():
    recovery = Recovery(max_restarts=8, window=300)

    assert [recovery.failure(["a"], now=now).culprits for now in range(3)] == [[], [], ["a"]]


def test_strikes_in_company_give_nobody_up():
    recovery = Recovery(max_restarts=8, window=300)
    for now in range(4):
        assert not recovery.failure(["a", "b"], now=now).culprits

    assert not recovery.failure(["b"], now=4).culprits


def test_failures_by_chance_strike_another_suspect_each_time():
    recovery = Recovery(max_restarts=1000, window=300)
    streams = list(range(16))
    verdicts = [recovery.failure(streams, now=now) for now in range(2)]
    verdicts += [recovery.failure([recovery.suspect()], now=2 + n) for n in range(2 * len(streams))]

    assert not any(verdict.culprits or verdict.victims for verdict in verdicts)


def test_suspects_with_fewer_strikes_come_first():
    recovery = Recovery(max_restarts=8, window=300)
    for struck in ("ab", "ab", "a"):
        recovery.failure([*struck, "c"], now=0)
    recovery.token("c")

    assert recovery.suspect() == "b"
    recovery.token("b")
    assert recovery.suspect() == "a"
    recovery.forget("a")
    assert recovery.suspect() is None


def test_failures_that_are_too_frequent_give_up_what_was_computed():
    recovery = Recovery(max_restarts=2, window=300)
    for now in (0, 100):
        assert not recovery.failure(["a"], now=now).victims
        recovery.step()
        recovery.token("a")

    assert recovery.failure(["b", "c"], now=299).victims == ["b", "c"]
    assert recovery.suspect() is None


def test_old_failures_do_not_count():
    recovery = Recovery(max_restarts=2, window=300)
    for now in (0, 100, 301):
        assert not recovery.failure([now], now=now).victims
        recovery.step()


def test_the_delay_grows_to_ten_seconds_until_a_step_has_a_result():
    recovery = Recovery(max_restarts=8, window=1)

    assert [recovery.failure([], now=10 * n).delay for n in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
    recovery.step()
    assert recovery.failure([], now=100).delay == 0


def test_failures_in_a_row_end_the_server():
    recovery = Recovery(max_restarts=3, window=1)

    assert [recovery.failure([], now=10 * n).delay is None for n in range(4)] == [False, False, False, True]


def test_without_restarts_the_first_failure_ends_the_server():
    assert Recovery(max_restarts=0, window=300).failure(["a"], now=0).delay is None


def test_finding_poisoned_requests_does_not_end_the_server():
    """All of a full batch kill: two failures of all, then three of each."""
    recovery = Recovery(max_restarts=8, window=1)
    batch = list(range(32))
    verdicts = [recovery.failure(batch, now=0), recovery.failure(batch, now=10)]
    while (suspect := recovery.suspect()) is not None:
        verdicts.append(recovery.failure([suspect], now=10 * len(verdicts)))

    assert [verdict.culprits for verdict in verdicts] == [[] for _ in range(2 + 2 * len(batch))] + [[n] for n in batch]
    assert all(verdict.delay is not None for verdict in verdicts)


def test_failures_of_idle_ranks_do_not_add_up():
    recovery = Recovery(max_restarts=1, window=300)

    assert [recovery.failure([], now=1000 * n, idle=301).delay for n in range(5)] == [0] * 5
    assert recovery.failure([], now=9000, idle=299).delay is None


def test_steps_are_halved_until_one_sequence_computes_a_block():
    limits = StepLimits(sequences=32, tokens=512, least=16)
    sizes = []
    while limits.shrink(limits.sequences, limits.tokens):
        sizes.append((limits.sequences, limits.tokens))

    assert sizes == [(16, 256), (8, 128), (4, 64), (2, 32), (1, 16)]


def test_the_step_that_failed_is_halved_and_not_the_limit():
    limits = StepLimits(sequences=32, tokens=512, least=16)
    limits.shrink(10, 100)

    assert (limits.sequences, limits.tokens) == (5, 50)


@pytest.mark.parametrize(("sequences", "tokens"), [(2, 2), (1, 17), (3, 8)])
def test_every_sequence_may_decode(sequences, tokens):
    limits = StepLimits(sequences=8, tokens=64, least=4)

    assert limits.shrink(sequences, tokens)
    assert limits.tokens >= limits.sequences >= 1


def test_steps_grow_back():
    limits = StepLimits(sequences=32, tokens=512, least=16)
    limits.shrink(4, 100)
    sizes = []
    for _ in range(4):
        for _ in range(GOOD_STEPS):
            limits.good_step()
        sizes.append((limits.sequences, limits.tokens))

    assert sizes == [(4, 100), (8, 200), (16, 400), (32, 512)]
