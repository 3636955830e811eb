"""Labels of checkpoints and when they are due, by walking through runs."""

import pytest

from improved_diffusion.training.position import Position


def walk(position, steps, interval):
    """{label: updates} of what a loop of so many more steps saves, in its order."""
    saved = {}

    def save():
        saved[position.label()] = position.updates
        position.mark_saved()

    for _ in range(steps):
        position.done = True
        if position.save_due(interval):
            save()
        position.move_to(position.step + 1)
    if position.closing_save_due(interval):
        save()
    return saved


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [
        (7, 3, {0: 1, 3: 4, 6: 7}),
        (8, 3, {0: 1, 3: 4, 6: 7, 8: 8}),
        (5, 1000, {0: 1, 5: 5}),
        (3, 1, {0: 1, 1: 2, 2: 3}),
        (1, 10, {0: 1}),
    ],
)
def test_a_save_inside_the_loop_follows_one_more_update_than_its_label(steps, interval, expected):
    assert walk(Position(), steps, interval) == expected


def test_a_run_of_the_original_is_not_overwritten_where_it_was_resumed():
    position = Position(resume_step=6, saved=(6, 6))
    assert position.is_at_source() and not position.has_news() and not position.save_due(3)
    assert position.next_save(3, None) == 9
    assert walk(position, 5, 3) == {9: 10, 11: 11}


def test_a_run_that_continues_counts_from_its_updates():
    position = Position(step=4, saved=(3, 4))
    assert (position.label(), position.updates, position.has_news()) == (4, 4, False)
    assert walk(position, 3, 3) == {6: 7}


def test_nothing_to_do_saves_nothing():
    assert walk(Position(step=4, saved=(4, 4)), 0, 3) == {}
    assert walk(Position(step=4, saved=(3, 4)), 0, 3) == {}  # the regular one of step 3
    assert walk(Position(step=3, saved=(2, 3)), 0, 5) == {3: 3}  # saved by a signal at step 2


def test_a_failed_step_is_taken_back():
    position = Position(step=5, saved=(3, 4))
    position.move_back()
    assert (position.step, position.label(), position.updates, position.has_news()) == (4, 4, 5, True)


@pytest.mark.parametrize(("step", "last", "expected"), [(0, None, 0), (1, None, 5), (5, 9, 5), (6, 9, 9), (9, 9, 9)])
def test_the_next_save(step, last, expected):
    assert Position(step=step).next_save(5, last) == expected
