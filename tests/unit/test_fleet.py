"""Work goes to ready replicas with new enough weights, most urgent first."""

from rlsf_ray.stream.fleet import GROW_S, LEAST_PIECES, SLOW, Fleet, State


def matched(fleet: Fleet) -> list[tuple[tuple[int, ...], str]]:
    return [(ticket.priority, replica.name) for ticket, replica in fleet.match()]


def end_one(fleet: Fleet, name: str, *, done: bool = True) -> None:
    """The oldest piece of `name` has ended."""
    fleet.release(name, next(iter(fleet._replicas[name].begun)), done=done)


def test_a_starting_replica_gets_no_work_until_it_is_ready() -> None:
    fleet = Fleet(["a"])
    fleet.submit((0,), 0)
    assert matched(fleet) == []
    fleet.ready("a", 0)
    assert matched(fleet) == [((0,), "a")]


def test_a_busy_replica_gets_no_second_piece_until_it_is_released() -> None:
    fleet = Fleet(["a"])
    fleet.ready("a", 0)
    fleet.submit((0,), 0)
    fleet.submit((1,), 0)
    assert matched(fleet) == [((0,), "a")]
    assert matched(fleet) == []
    end_one(fleet, "a")
    assert matched(fleet) == [((1,), "a")]


def test_urgent_work_goes_first_then_first_come() -> None:
    fleet = Fleet(["a", "b", "c"])
    for priority in ((1, 0), (0, 7), (0, 2)):
        fleet.submit(priority, 0)
    for name in ("a", "b", "c"):
        fleet.ready(name, 0)
    assert [priority for priority, _ in matched(fleet)] == [(0, 2), (0, 7), (1, 0)]


def test_work_waits_for_weights_that_are_new_enough_while_other_work_goes_on() -> None:
    fleet = Fleet(["a"])
    fleet.ready("a", 1)
    fleet.submit((0,), 2)
    fleet.submit((1,), 1)
    assert matched(fleet) == [((1,), "a")]
    end_one(fleet, "a")
    fleet.ready("a", 2)
    assert matched(fleet) == [((0,), "a")]


def test_the_newest_weights_are_preferred() -> None:
    fleet = Fleet(["a", "b"])
    fleet.ready("a", 1)
    fleet.ready("b", 2)
    fleet.submit((0,), 0)
    assert matched(fleet) == [((0,), "b")]


def test_a_restarted_replica_is_stale_and_forgets_its_version() -> None:
    fleet = Fleet(["a"])
    assert fleet.names(State.STARTING) == ["a"]
    fleet.ready("a", 5)
    fleet.failed("a", restarts=True)
    assert fleet.names(State.RESTARTING) == ["a"]
    fleet.failed("a")
    assert fleet.names(State.STALE) == ["a"]
    fleet.ready("a", 3)
    fleet.submit((0,), 5)
    assert matched(fleet) == []


def test_a_late_answer_does_not_wake_the_dead() -> None:
    fleet = Fleet(["a", "b"])
    fleet.died("a")
    fleet.ready("a", 1)
    fleet.failed("a")
    assert fleet.names(State.DEAD) == ["a"]
    assert fleet.names(State.HEALTHY, State.STARTING) == ["b"]


def test_an_older_load_that_ends_late_does_not_take_a_version_back() -> None:
    fleet = Fleet(["a"])
    fleet.ready("a", 2)
    fleet.ready("a", 1)
    fleet.submit((0,), 2)
    assert matched(fleet) == [((0,), "a")]


def test_withdrawn_work_is_not_handed_out() -> None:
    fleet = Fleet(["a"])
    ticket = fleet.submit((0,), 0)
    fleet.withdraw(ticket)
    fleet.ready("a", 0)
    assert matched(fleet) == []


def test_an_engine_that_batches_continuously_gets_more_at_once_as_long_as_its_cache_has_room() -> None:
    fleet = Fleet(["a"], most_slots=3)
    fleet.ready("a", 0)
    for _ in range(9):
        fleet.submit((0,), 0)
    counts = [len(matched(fleet))]
    for kv_usage in (0.2, 0.8, 0.3, 0.1):  # room; neither; room, but no more slots
        fleet.adapt("a", kv_usage)
        counts.append(len(matched(fleet)))
    assert counts == [2, 1, 0, 0, 0]
    for _ in range(3):
        end_one(fleet, "a")
    fleet.adapt("a", 0.95)
    assert len(matched(fleet)) == 2


def test_work_is_spread_over_equal_replicas() -> None:
    fleet = Fleet(["a", "b"], most_slots=2)
    for name in ("a", "b"):
        fleet.ready(name, 1)
    for _ in range(4):
        fleet.submit((0,), 0)
    assert [name for _, name in matched(fleet)] == ["a", "b", "a", "b"]


def test_a_restarted_replica_has_its_slots_back_once_its_calls_have_failed() -> None:
    fleet = Fleet(["a"], most_slots=2)
    fleet.ready("a", 0)
    for _ in range(3):
        fleet.submit((0,), 0)
    assert len(matched(fleet)) == 2
    fleet.failed("a")
    for _ in range(2):
        end_one(fleet, "a")
    assert matched(fleet) == []
    fleet.ready("a", 0)
    assert len(matched(fleet)) == 1


def test_a_held_fleet_hands_nothing_out_until_it_goes_on() -> None:
    fleet = Fleet(["a"])
    fleet.ready("a", 0)
    fleet.submit((0,), 0)
    fleet.held = True
    assert matched(fleet) == []
    fleet.held = False
    assert len(matched(fleet)) == 1


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def working(names: str, clock: Clock, *, pieces: int = 0, slots: int = 1) -> Fleet:
    """Healthy replicas, which have done `pieces` pieces of 2 s each."""
    fleet = Fleet(names, most_slots=slots, clock=clock)
    for name in names:
        fleet.ready(name, 0)
    for _ in range(pieces):
        fleet.submit((0,), 0)
        ((_, name),) = matched(fleet)
        clock.now += 2.0
        end_one(fleet, name)
    return fleet


def test_a_replica_that_takes_far_longer_than_any_before_is_suspect_until_it_answers() -> None:
    clock = Clock()
    fleet = working("a", clock, pieces=LEAST_PIECES, slots=2)
    fleet.submit((0,), 0)
    assert matched(fleet) == [((0,), "a")]
    clock.now += 2.0 * SLOW
    assert fleet.suspects() == {}
    clock.now += 0.1
    assert fleet.suspects() == {"a": "works on one batch for 6.1 s; the slowest of the last took 2.0 s"}
    assert fleet.suspects() == {}  # said once
    fleet.submit((0,), 0)
    assert matched(fleet) == []  # though it has a free slot
    end_one(fleet, "a")
    assert fleet.states() == {"a": "healthy"}
    assert len(matched(fleet)) == 1


def test_other_kinds_of_work_and_too_few_pieces_make_nobody_suspect() -> None:
    clock = Clock()
    fleet = working("a", clock, pieces=LEAST_PIECES)
    fleet.submit((1,), 0)
    matched(fleet)
    clock.now += 1000.0
    assert fleet.suspects() == {}
    few = working("a", clock, pieces=LEAST_PIECES - 1)
    few.submit((0,), 0)
    matched(few)
    clock.now += 1000.0
    assert few.suspects() == {}


def test_a_draining_replica_ends_its_work_and_gets_no_more() -> None:
    fleet = working("a", Clock())
    fleet.submit((0,), 0)
    matched(fleet)
    assert not fleet.drain("a")
    fleet.ready("a", 1)  # a version that it was loading
    fleet.submit((0,), 0)
    end_one(fleet, "a")
    assert matched(fleet) == []
    assert fleet.drain("a")
    fleet.failed("a", restarts=True)
    assert not fleet.drain("a")  # it starts already
    fleet.ready("a", 1)
    assert len(matched(fleet)) == 1


def test_waiting_work_asks_for_more_replicas_and_counts_those_that_come() -> None:
    clock = Clock()
    fleet = working("a", clock)
    for _ in range(3):
        fleet.submit((0,), 0)
    matched(fleet)
    clock.now += GROW_S - 0.1
    assert fleet.missing(8) == 0
    clock.now += 0.2
    assert fleet.missing(8) == 2
    assert fleet.missing(2) == 1
    assert fleet.missing(1) == 0
    fleet.add("b")
    assert fleet.missing(8) == 1  # one comes, for the other piece
    fleet.held = True
    matched(fleet)
    assert fleet.missing(8) == 0


def test_the_time_in_which_work_waits_begins_anew_once_none_waits() -> None:
    clock = Clock()
    fleet = working("a", clock)
    for _ in range(2):
        fleet.submit((0,), 0)
    matched(fleet)
    clock.now += GROW_S + 1
    end_one(fleet, "a")
    matched(fleet)  # the second is handed out
    fleet.submit((0,), 0)
    matched(fleet)
    assert fleet.missing(8) == 0


def test_only_those_beyond_the_first_are_spare_once_they_are_idle() -> None:
    clock = Clock()
    fleet = working("ab", clock)
    fleet.add("c")  # which has no node yet
    fleet.submit((0,), 0)
    fleet.submit((1,), 0)
    assert len(matched(fleet)) == 2
    clock.now += 50.0
    assert fleet.spare(1, 50.0) == ["c"]
    end_one(fleet, "b")
    assert fleet.spare(1, 50.0) == ["c"]
    clock.now += 50.0
    assert fleet.spare(1, 50.0) == ["b", "c"]
    fleet.submit((0,), 9)  # work waits
    assert fleet.spare(1, 50.0) == []
    fleet.remove("b")
    assert fleet.names(State.HEALTHY) == ["a"]


def test_a_piece_that_failed_says_nothing_about_speed() -> None:
    clock = Clock()
    fleet = working("a", clock, pieces=LEAST_PIECES - 1)
    fleet.submit((0,), 0)
    matched(fleet)
    clock.now += 500.0
    end_one(fleet, "a", done=False)
    fleet.submit((0,), 0)
    matched(fleet)
    clock.now += 100.0
    assert fleet.suspects() == {}
