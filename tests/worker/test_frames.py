from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer.errors import WorkerError
from dashinfer.types import Alive, Chunk, Enter, SamplingParams, StepPlan, StepResult, TokenLogprobs
from dashinfer.worker.frames import MAX_FRAME_BYTES, encode, parent_reader, worker_reader

PLAN = StepPlan(
    step=7,
    enter=[
        Enter(1, b"\x01\x00\x00\x00", 1, SamplingParams(max_tokens=5, seed=-3, logit_bias={4: -100.0}, stop_token_ids=(2,)))
    ],
    chunks=[Chunk(0, 5, 1, True, ()), Chunk(1, 0, 1, True, (3, 4))],
)
RESULT = StepResult(7, [1, 2], {1: TokenLogprobs(-0.5, (2, 3), (-0.5, -1.5))})


@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_messages_survive_any_cut_of_the_stream(cuts):
    stream = encode(RESULT) + encode(Alive()) + encode(RESULT)
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    reader = parent_reader()
    received = [message for start, end in pairwise(edges) for message in reader.feed(stream[start:end])]

    assert received == [RESULT, Alive(), RESULT]


def test_a_plan_round_trips():
    assert list(worker_reader().feed(encode(PLAN))) == [PLAN]


def test_a_message_for_the_other_side_is_refused():
    with pytest.raises(WorkerError, match="does not decode"):
        list(parent_reader().feed(encode(PLAN)))


def test_an_absurd_length_is_refused_before_it_is_awaited():
    with pytest.raises(WorkerError, match="over the limit"):
        list(parent_reader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little")))
