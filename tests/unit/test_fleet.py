"""Work goes to ready replicas with new enough weights, most urgent first."""

from rlsf_ray.stream.fleet import Fleet, State


def matched(fleet: Fleet) -> list[tuple[tuple[int, ...], str]]:
    return [(ticket.priority, replica.name) for ticket, replica in fleet.match()]


def test_a_stale_replica_gets_no_work_until_it_is_ready() -> None:
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
    fleet.release("a")
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
    fleet.release("a")
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
    fleet.ready("a", 5)
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
    assert fleet.names(State.READY, State.STALE) == ["b"]


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
        fleet.release("a")
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
        fleet.release("a")
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
