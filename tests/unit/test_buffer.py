"""The queue between scorers and trainer: order, bound, idempotence, lease and commit."""

import numpy as np

from rlsf_ray.records import Pair, TrainingGroup, TrainingTrace
from rlsf_ray.stream.buffer import PairQueue, unknown


def group(sequence: int, round: int = 0) -> TrainingGroup:
    trace = TrainingTrace(
        id="t",
        seed=0,
        version=0,
        score=0.5,
        answer="1",
        token_ids=np.zeros(1, np.int32),
        logprob=np.zeros(1, np.float32),
        reference_logprob=np.zeros(1, np.float32),
    )
    return TrainingGroup(
        id=f"r{round}/{sequence}",
        round=round,
        sequence=sequence,
        prompt_id=str(sequence),
        signal="disparity",
        prompt_ids=np.zeros(1, np.int32),
        traces=(trace, trace),
        pairs=(Pair(chosen=0, rejected=1),),
    )


def leased(queue: PairQueue, round: int = 0, first: int = 0, max_groups: int = 99) -> list[int]:
    return [g.sequence for g in queue.lease(round, first, max_groups).groups]


def test_groups_leave_in_admission_order_whatever_order_they_came_in() -> None:
    queue = PairQueue(capacity=9)
    for sequence in (2, 0, 1):
        queue.put(group(sequence))
    assert leased(queue) == [0, 1, 2]


def test_a_lease_stops_at_a_gap_and_goes_over_skipped_sequences() -> None:
    queue = PairQueue(capacity=9)
    for sequence in (0, 2, 4):
        queue.put(group(sequence))
    queue.skip(0, [1])
    lease = queue.lease(0, 0, 99)
    assert [g.sequence for g in lease.groups] == [0, 2]
    assert (lease.next_sequence, lease.ended) == (3, False)


def test_a_round_ends_when_its_closed_count_is_reached() -> None:
    queue = PairQueue(capacity=9)
    queue.put(group(0))
    queue.skip(0, [1, 2])
    assert not queue.lease(0, 0, 99).ended
    queue.close_round(0, 3)
    assert queue.lease(0, 0, 99).ended


def test_the_lease_limit_leaves_the_rest_for_the_next_lease() -> None:
    queue = PairQueue(capacity=9)
    for sequence in range(3):
        queue.put(group(sequence))
    queue.close_round(0, 3)
    first = queue.lease(0, 0, 2)
    assert (len(first.groups), first.next_sequence, first.ended) == (2, 2, False)
    second = queue.lease(0, first.next_sequence, 2)
    assert (len(second.groups), second.ended) == (1, True)


def test_leased_groups_come_again_until_their_round_is_over() -> None:
    queue = PairQueue(capacity=9)
    queue.put(group(0))
    assert leased(queue) == leased(queue) == [0]
    queue.end_rounds(1)
    again = queue.lease(0, 0, 99)
    assert (again.groups, again.ended) == ((), True)


def test_a_known_group_is_not_taken_twice_even_after_its_round() -> None:
    queue = PairQueue(capacity=9)
    assert queue.put(group(0))
    assert not queue.put(group(0))
    leased(queue)
    assert not queue.put(group(0))
    queue.end_rounds(1)
    assert not queue.put(group(0))
    assert [g.sequence for g in unknown(queue, [group(1, round=1), group(0), group(0, round=1)])] == [0, 1]


def test_a_full_queue_has_room_only_for_what_comes_before_all_that_waits() -> None:
    queue = PairQueue(capacity=2)
    queue.put(group(3))
    queue.put(group(4))
    assert not queue.has_room(group(5))
    assert queue.has_room(group(0))  # or the trainer would wait for it for ever
    queue.put(group(0))
    assert not queue.has_room(group(1))
    assert leased(queue) == [0]
    assert queue.has_room(group(1))


def test_leased_groups_do_not_count_against_the_capacity() -> None:
    queue = PairQueue(capacity=1)
    queue.put(group(0))
    assert not queue.has_room(group(1))
    leased(queue)
    assert queue.has_room(group(1))


def test_ending_rounds_keeps_what_later_rounds_hold() -> None:
    queue = PairQueue(capacity=9)
    queue.put(group(0))
    queue.put(group(0, round=1))
    queue.end_rounds(1)
    assert queue.num_examples(0) == {}
    assert queue.num_examples(1) == {0: len(group(0, round=1).pairs)}
