import pytest

from dashinfer.engine.pace import LEAD, SHARE, Pace


def test_unknown_steps_are_planned_behind_at_once():
    pace = Pace()
    pace.observe(100, 1.0)

    assert pace.delay(16) == 0
    assert pace.delay(1000) == 0


def test_short_steps_are_planned_behind_at_once():
    pace = Pace()
    pace.observe(16, 0.004)

    assert pace.delay(16) == 0


def test_long_steps_leave_time_for_arrivals():
    pace = Pace()
    pace.observe(1000, 1.0)

    assert pace.delay(1000) == pytest.approx(SHARE * 1.0 - LEAD)
    assert pace.delay(600) == pytest.approx(SHARE * 0.6 - LEAD)


def test_one_slow_step_changes_little_and_one_quick_step_all():
    pace = Pace()
    pace.observe(64, 0.1)
    pace.observe(64, 1.1)

    assert pace.delay(64) == pytest.approx(SHARE * 0.3 - LEAD)
    pace.observe(64, 0.05)
    assert pace.delay(64) == pytest.approx(SHARE * 0.05 - LEAD)
