"""What a rank encodes, when and together with what, over a tower that only writes down what it is given."""

import time
import weakref
from collections import Counter

import pytest
import torch

from dashinfer.errors import InsufficientMemory
from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.vision_qwen import VisionOutput
from dashinfer.types import Encode
from dashinfer.worker.media import Media

VISION = VisionConfig.from_hf(
    {"architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {"patch_size": 1, "temporal_patch_size": 1}}
)
LEVELS = 1


class FakeTower:
    """`depth` blocks; the embedding of a token is what its patches begin with, twice that in the only deep level."""

    engine = "native"
    weight_bytes = 0

    def __init__(self, depth: int = 3) -> None:
        self.batches: list = []
        self.blocks = 0
        self._depth = depth

    def steps(self, patches, grids):
        self.batches.append(list(grids))
        for _ in range(self._depth):
            self.blocks += 1
            yield
        embeddings = patches[::4].to(torch.bfloat16)
        return VisionOutput(embeddings, (embeddings * 2,) * LEVELS)


def make(tower: FakeTower, device: str = "cpu", **changes) -> Media:
    settings = {"name": "toy", "dtype": torch.float32, "batch_patches": 16}
    return Media(tower, VISION, device=torch.device(device), **(settings | changes))


def image(value: int, grid=(1, 2, 2), key: str = "") -> Encode:
    steps, rows, columns = grid
    patches = b"".join(bytes([value + step] * 3 * rows * columns) for step in range(steps))
    return Encode((key or str(value)).encode(), grid, patches)


def drain(media: Media) -> list[bytes]:
    while media.pending:
        media.advance(0)
    return media.take_new()


def test_what_waits_together_is_encoded_together_up_to_a_bound():
    tower = FakeTower()
    media = make(tower)
    for value, grid in enumerate([(1, 2, 2), (1, 2, 4), (1, 2, 4), (1, 6, 6), (1, 2, 2)]):
        media.ask(image(value, grid))

    assert drain(media) == [b"0", b"1", b"2", b"3", b"4"]
    assert tower.batches == [[(1, 2, 2), (1, 2, 4)], [(1, 2, 4)], [(1, 6, 6)], [(1, 2, 2)]]
    assert [media[str(value).encode()].embeddings[:, 0].tolist() for value in range(3)] == [[0], [1, 1], [2, 2]]
    assert media[b"2"].deepstack[0][:, 0].tolist() == [4, 4]
    assert media[b"3"].embeddings.shape == (9, 3)
    assert media[b"3"].embeddings.dtype == media[b"3"].deepstack[0].dtype == torch.float32


class SmallTower(FakeTower):
    """There is memory for so many patches at a time. `short`: for how many more blocks there is none at all."""

    def __init__(self, patches: int, short: int = 0) -> None:
        super().__init__()
        self.most, self.short = patches, short

    def steps(self, patches, grids):
        inner = super().steps(patches, grids)
        while True:
            if self.blocks % 3 == 1 and (len(patches) > self.most or self.short):  # in its second block
                self.short -= bool(self.short)
                self.blocks += 2
                raise MemoryError
            try:
                yield next(inner)
            except StopIteration as end:
                return end.value


def sizes(tower: FakeTower) -> list[int]:
    """Patches of each batch."""
    return [sum(steps * rows * columns for steps, rows, columns in batch) for batch in tower.batches]


def test_where_memory_runs_out_less_is_encoded_together_for_a_while():
    tower = SmallTower(8)
    media = make(tower)
    for value in range(80):
        media.ask(image(value))

    assert drain(media) == [str(value).encode() for value in range(80)]
    assert [media[str(value).encode()].embeddings[0, 0].item() for value in range(80)] == list(range(80))
    assert sizes(tower)[:3] == [16, 8, 8]
    assert Counter(sizes(tower)) == {8: 40, 16: 3}  # each time that it goes well for a while, twice as much is tried
    assert media.take_failed() == {}


def test_what_there_is_not_enough_memory_for_by_itself_is_given_up():
    tower = SmallTower(8)
    media = make(tower)
    for value, grid in enumerate([(1, 2, 2), (1, 4, 4), (1, 2, 2)]):
        media.ask(image(value, grid))

    assert drain(media) == [b"0", b"2"]
    assert not media.pending
    with pytest.raises(InsufficientMemory, match="while images were encoded; lower --max-pixels"):
        media.finish([b"2", b"1"])
    assert list(media.take_failed()) == [b"1"]
    assert media.take_failed() == {}
    media.forget([b"1"])
    tower.most = 16
    media.ask(image(1, (1, 4, 4)))
    assert drain(media) == [b"1"]


def test_what_is_given_up_holds_nothing_of_what_it_was_tried_with():
    held = []

    class Short(FakeTower):
        def steps(self, patches, grids):
            held.append(weakref.ref(patches))
            yield
            raise MemoryError

    def show(hidden):
        held.append(weakref.ref(hidden))
        media.finish([b"0"])

    media = make(Short())
    media.ask(image(0))
    media.advance(0)
    media.advance(0)
    with pytest.raises(InsufficientMemory):
        show(torch.zeros(1))

    assert list(media.take_failed()) == [b"0"]
    assert [each() for each in held] == [None, None]


def test_a_step_needs_what_it_shows_and_not_what_comes_before_that():
    media = make(SmallTower(8))
    media.ask(image(0, (1, 4, 4)))
    media.ask(image(1))
    media.finish([b"1"])

    assert media.take_new() == [b"1"]
    assert list(media.take_failed()) == [b"0"]


def test_a_video_is_cut_smaller():
    tower = SmallTower(8)
    media = make(tower)
    media.ask(image(10, (9, 2, 2), "video"))
    media.ask(image(0, (1, 2, 2)))

    assert drain(media) == [b"video", b"0"]
    assert media[b"video"].embeddings[:, 0].tolist() == list(range(10, 19))
    assert sizes(tower) == [16, 8, 8, 16, 8, 8, 8]


def test_memory_that_runs_out_at_the_end_of_a_batch_costs_nothing(monkeypatch):
    """Embeddings are copied then: a video's pieces, the first of which were encoded before."""
    media = make(FakeTower())
    joined, failures = media._joined, [None, MemoryError()]

    def join(parts):
        if failures and (failure := failures.pop(0)) is not None:
            raise failure
        return joined(parts)

    monkeypatch.setattr(media, "_joined", join)
    media.ask(image(0))
    media.ask(image(10, (9, 2, 2), "video"))
    media.ask(image(1))

    assert sorted(drain(media)) == [b"0", b"1", b"video"]
    assert media[b"video"].embeddings[:, 0].tolist() == list(range(10, 19))
    assert media.take_failed() == {}


def test_a_long_video_that_there_is_no_memory_for_as_a_whole_is_given_up(monkeypatch):
    media = make(FakeTower())
    joined = media._joined

    def join(parts):
        if sum(len(part.embeddings) for part in parts) > 50:
            raise MemoryError
        return joined(parts)

    monkeypatch.setattr(media, "_joined", join)
    media.ask(image(10, (100, 2, 2), "video"))
    media.ask(image(1))
    for _ in range(2000):
        if media.pending:
            media.advance(0)

    assert not media.pending
    assert media.take_new() == [b"1"]
    assert list(media.take_failed()) == [b"video"]


def test_alone_where_company_would_change_the_bits():
    tower = FakeTower()
    media = make(tower, together=False)
    for value in range(3):
        media.ask(image(value))

    assert drain(media) == [b"0", b"1", b"2"]
    assert tower.batches == [[(1, 2, 2)]] * 3


def test_what_comes_later_waits_for_the_batch_under_way():
    tower = FakeTower()
    media = make(tower)
    media.ask(image(0))
    media.advance(0)
    media.ask(image(1))

    assert drain(media) == [b"0", b"1"]
    assert tower.batches == [[(1, 2, 2)], [(1, 2, 2)]]


def test_a_long_video_comes_in_pieces():
    tower = FakeTower()
    media = make(tower)
    media.ask(image(10, (9, 2, 2), "video"))
    media.ask(image(0))

    assert drain(media) == [b"video", b"0"]
    assert tower.batches == [[(4, 2, 2)], [(4, 2, 2)], [(1, 2, 2), (1, 2, 2)]]
    assert media[b"video"].embeddings[:, 0].tolist() == list(range(10, 19))
    assert media[b"video"].deepstack[0][:, 0].tolist() == list(range(20, 38, 2))


def test_embeddings_do_not_hold_the_memory_of_their_batch():
    media = make(FakeTower(), dtype=torch.bfloat16)
    media.ask(image(0))
    media.ask(image(1))
    drain(media)

    assert media[b"0"].embeddings.untyped_storage().nbytes() == 1 * 3 * 2


def test_forgetting():
    tower = FakeTower()
    media = make(tower)
    for value in range(3):
        media.ask(image(value, (1, 2, 4)))  # two at a time
    media.advance(0)
    media.forget([b"0", b"2", b"unknown"])  # under way, waiting, and nowhere

    assert drain(media) == [b"1"]
    assert tower.batches == [[(1, 2, 4)] * 2]
    media.forget([b"1"])
    with pytest.raises(KeyError):
        media[b"1"]


def test_a_batch_that_nobody_wants_any_more_is_dropped():
    tower = FakeTower()
    media = make(tower)
    media.ask(image(0))
    media.advance(0)
    media.forget([b"0"])

    assert not media.pending
    media.ask(image(1))
    assert drain(media) == [b"1"]
    assert tower.blocks == 1 + 3


def test_what_is_asked_for_again_is_encoded_again():
    tower = FakeTower()
    media = make(tower)
    media.ask(image(0))
    media.ask(image(1))
    media.advance(0)
    media.forget([b"0"])
    media.ask(image(0))

    assert drain(media) == [b"1", b"0"]
    assert tower.batches == [[(1, 2, 2)] * 2, [(1, 2, 2)]]
    media.forget([b"0"])
    media.ask(image(0))
    assert drain(media) == [b"0"]


def test_what_was_forgotten_before_it_was_told_is_not_told():
    media = make(FakeTower())
    media.ask(image(0))
    media.finish([b"0"])
    media.forget([b"0"])

    assert media.take_new() == []


def test_finishing_encodes_as_much_as_it_takes():
    tower = FakeTower()
    media = make(tower)
    media.ask(image(0, (1, 4, 4)))
    media.ask(image(1, (1, 4, 4)))
    media.finish([b"0", b"0"])

    assert media.take_new() == [b"0"]
    assert media.pending
    assert tower.blocks == 3
    with pytest.raises(AssertionError, match="nobody asked for"):
        media.finish([b"7"])


@pytest.mark.parametrize(
    "message",
    [
        Encode(b"k", (1, 2, 2), bytes(4 * 3 - 1)),
        Encode(b"k", (1, 2, 3), bytes(6 * 3)),
        Encode(b"k", (0, 2, 2), b""),
        Encode(b"k", (1, 0, 2), b""),
    ],
)
def test_sizes_that_do_not_fit_are_a_mistake_of_ours(message):
    with pytest.raises(AssertionError):
        make(FakeTower()).ask(message)


def test_a_slice_takes_about_as_long_as_it_may(monkeypatch):
    tower = FakeTower(depth=50)
    media = make(tower)
    monkeypatch.setattr(time, "perf_counter", lambda: tower.blocks * 0.004)
    media.ask(image(0))

    media.advance(0.0199)
    assert tower.blocks == 5
    media.advance(0)
    assert tower.blocks == 6


class FakeEvent:
    """A CUDA event over a clock that the test moves."""

    now = 0.0
    done = True

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.now

    def query(self) -> bool:
        return FakeEvent.done

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.time - self.time) * 1e3


def test_a_gpu_gets_slices_by_how_long_the_last_one_took(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    tower = FakeTower(depth=20)
    media = make(tower, "cuda")
    media._pinned = False
    steps = tower.steps

    def slow(patches, grids):  # a millisecond a block
        inner = steps(patches, grids)
        while True:
            try:
                next(inner)
            except StopIteration as end:
                return end.value
            FakeEvent.now += 1e-3
            yield

    tower.steps = slow
    media.ask(image(0))
    media.ask(image(1, (1, 4, 4)))
    media.advance(0.005)
    assert tower.blocks == 1  # nobody knows yet how long it takes
    FakeEvent.done = False
    assert media.running
    FakeEvent.done = True
    assert not media.running
    for expected in (6, 11, 16, 20):  # the last slice ends with its batch
        media.advance(0.00501)
        assert not media.running
        assert tower.blocks == expected
    while media.take_new() != [b"0"]:
        media.advance(0.005)
        assert not media.running
    media.advance(0.005)
    assert len(tower.batches) == 2
    assert tower.blocks == 21, "a block of another batch may take much longer"
