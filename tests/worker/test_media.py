"""What a rank encodes, when and together with what, over a tower that only writes down what it is given."""

import time

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


def test_what_memory_ran_out_for_is_begun_anew():
    tower = FakeTower()
    media = make(tower)
    steps, failures = tower.steps, [MemoryError()]

    def failing(patches, grids):
        for block in steps(patches, grids):
            if tower.blocks == 2 and failures:
                raise failures.pop()
            yield block
        return VisionOutput(patches[::4].float(), ())

    tower.steps = failing
    for value in range(2):
        media.ask(image(value))
    with pytest.raises(InsufficientMemory, match="while images were encoded"):
        media.finish([b"1"])

    assert drain(media) == [b"0", b"1"]
    assert [media[key].embeddings[0, 0].item() for key in (b"0", b"1")] == [0, 1]


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
