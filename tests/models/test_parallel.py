"""The shares of 2 and 4 ranks add up to the model of one."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from dashinfer.models.kv_cache import allocate_kv_cache, kv_bytes_per_block
from dashinfer.models.parallel import (
    Group,
    HeadShare,
    QKVLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    load_vocab_share,
    share_heads,
)
from dashinfer.models.weights import DummySource, WeightReader
from dashinfer_kernels import pack_linear

from . import toy

UNEVEN = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
PROMPT = [(5 * index * index + index) % 97 for index in range(50)]


@dataclass
class Exchange:
    """What torch.distributed is to processes, for threads: everybody's tensors, once all are there."""

    world_size: int
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world_size, timeout=60)

    def swap(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.tensors[rank] = x.clone()
        self.barrier.wait()
        everybody = [self.tensors[other] for other in range(self.world_size)]
        self.barrier.wait()
        return everybody


@dataclass(frozen=True)
class ThreadGroup(Group):
    exchange: Exchange | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self.exchange.swap(self.rank, x)).sum(0))

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        parts = self.exchange.swap(self.rank, x)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None


def on_ranks(world_size: int, work):
    """What `work(group)` returns on each rank."""
    exchange = Exchange(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, [ThreadGroup(rank, world_size, exchange=exchange) for rank in range(world_size)]))


@pytest.mark.parametrize(
    ("architecture", "settings", "world_size"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, 2),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, 2),
        ("Qwen3ForCausalLM", {"head_dim": 16, "num_key_value_heads": 1}, 2),  # the head is on both ranks
        ("Qwen2ForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 2}, 4),  # a head is on two of the four
        ("Qwen2ForCausalLM", UNEVEN, 2),
        ("LlamaForCausalLM", UNEVEN | {"attention_bias": True}, 4),
    ],
)
def test_ranks_together_equal_one(architecture, settings, world_size, tmp_path):
    reference = toy.hf_model(architecture, **settings)
    reference.save_pretrained(tmp_path)
    config = toy.worker_config(toy.weight_files(tmp_path), reference.config.to_dict())
    expected = toy.Session(toy.load(config), 96).run(PROMPT)

    def work(group):
        model = toy.load(config, group)
        session = toy.Session(model, 96, world_size)
        return model.weight_bytes, [session.run(PROMPT[:31]), session.run(PROMPT[31:])]

    for rank, (held, logits) in enumerate(on_ranks(world_size, work)):
        if rank == 0:
            torch.testing.assert_close(torch.cat(logits), expected, atol=1e-5, rtol=1e-5)
        else:
            assert logits == [None, None]
        assert held < 0.8 * toy.load(config).weight_bytes


def reader(shapes) -> WeightReader:
    return WeightReader(DummySource(shapes), dtype=torch.float32, device=torch.device("cpu"), report=lambda *_: None)


def test_key_value_heads_are_copied_to_neighbours_where_ranks_are_more():
    rows = {"q_proj.weight": [], "k_proj.weight": []}

    class Recorder:
        format = None

        def read(self, *parts):
            for part in parts:
                if part.name in rows:
                    rows[part.name].append(part.rows)
            return torch.zeros(sum(part.local_shape[0] for part in parts), *parts[0].local_shape[1:])

    for rank in range(4):
        QKVLinear.load(Recorder(), "", 32, 8, 2, 4, bias=False, group=Group(rank, 4))

    assert rows["q_proj.weight"] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert rows["k_proj.weight"] == [(0, 4), (0, 4), (4, 8), (4, 8)]


def test_heads_that_ranks_do_not_divide():
    shares = {size: [share_heads(9, 3, rank, size) for rank in range(size)] for size in (1, 2, 3, 4, 5, 8, 9)}

    assert shares[2] == [HeadShare(0, 3, 0, 1), HeadShare(3, 9, 1, 3)]
    assert shares[4] == [HeadShare(0, 3, 0, 1), HeadShare(3, 6, 1, 2), HeadShare(6, 7, 2, 3), HeadShare(7, 9, 2, 3)]
    for each in shares.values():
        assert [head for share in each for head in range(share.start, share.stop)] == list(range(9))
        for share in each:
            assert (share.kv_start, share.kv_stop) == (share.start // 3, (share.stop - 1) // 3 + 1)
            assert share.num_heads == share.num_kv_heads * 3 or share.num_kv_heads == 1


def test_a_vocabulary_that_ranks_do_not_divide():
    vocab, hidden = 10, 16
    weight = load_vocab_share(reader({"w": (vocab, hidden)}), "w", vocab, hidden, Group())
    ids = torch.tensor([0, 3, 4, 8, 9])
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(1))

    def work(group):
        rows = -(-vocab // group.world_size)
        start = group.rank * rows
        share = torch.zeros(rows, hidden)
        share[: len(weight[start : start + rows])] = weight[start : start + rows]
        assert load_vocab_share(reader({"w": (vocab, hidden)}), "w", vocab, hidden, group).shape == share.shape
        return VocabParallelEmbedding(share, group)(ids), VocabParallelHead(pack_linear(share), vocab, group)(x)

    results = on_ranks(4, work)
    for embedded, _ in results:
        assert torch.equal(embedded, weight[ids])
    torch.testing.assert_close(results[0][1], x @ weight.T)


def test_small_tensors_are_summed_by_what_is_faster_for_them():
    class Doubled:
        def take(self, x):
            return x.numel() < 4

        def __call__(self, x):
            return x * 2

    exchange = Exchange(1)
    group = ThreadGroup(0, 2, small=Doubled(), exchange=exchange)

    assert Group.all_reduce(group, torch.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="process group"):  # torch.distributed's turn
        Group.all_reduce(group, torch.ones(4))


def test_one_rank_communicates_nothing():
    class Silent(Group):
        def all_reduce(self, x):
            raise AssertionError("communication")

        gather = broadcast = all_reduce

    config = toy.worker_config((), toy.SIZES | {"architectures": ["LlamaForCausalLM"]}, load_format="dummy")

    assert toy.Session(toy.load(config, Silent()), 96).run(PROMPT).isfinite().all()


def test_kv_cache_sizes():
    config = toy.load(toy.worker_config((), toy.SIZES | {"architectures": ["LlamaForCausalLM"]}, load_format="dummy")).config

    for world_size, heads in ((1, 2), (2, 1), (6, 1)):
        caches = allocate_kv_cache(config, 5, 16, torch.bfloat16, torch.device("cpu"), world_size)
        assert [cache.values.shape for cache in caches] == [(5, 2, heads, 16, 8)] * 3
        total = sum(cache.values.nbytes for cache in caches)
        assert total == 5 * kv_bytes_per_block(config, 16, torch.bfloat16, world_size)
