"""A model on 2 and 4 ranks, its layers split or dealt over stages, answers as on one. Ranks share memory or speak gloo.

All ranks start once and load one small model after the other. The plans are those that a scheduler made for a single rank: they
fit if, and only if, the tokens are the same.
"""

import math
import socket
import subprocess
import sys
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from dashinfer.models.config import ModelConfig
from dashinfer.models.parallel import share_heads
from dashinfer.models.shapes import tensor_shapes
from dashinfer.models.stage import Stage
from dashinfer.types import Alive, Failed, ModelFiles, Progress, Ready, Start, StepPlan, StepResult, WorkerConfig
from dashinfer.worker.frames import encode, parent_reader
from dashinfer.worker.runner import Runner
from tests.worker.tensor_ranks import Done, Job, run_jobs
from tests.worker.toy import CONFIG, MODEL, generate, greedy, prompt

FAMILIES = {
    "Llama": MODEL | {"attention_bias": True, "mlp_bias": True},
    "Mistral": MODEL
    | {"architectures": ["MistralForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 16},
    # three key-value heads, which are shared unevenly
    "Uneven": MODEL | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    # one key-value head, on every rank
    "Qwen2": MODEL | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1, "tie_word_embeddings": True},
    "Qwen3": MODEL | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "Qwen2-VL": MODEL
    | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    },
}
SHARING = ("Mistral", "Uneven", "Qwen3", "a16w8", "fp8")  # memory, where the ranks of others speak gloo
# layers that four stages cannot have as many of, with their own windows
DEEP = MODEL | {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 16,
    "max_window_layers": 3,
}
STAGES = {**dict.fromkeys(((name, 2) for name in FAMILIES), (2, 4)), ("Deep", 4): (4,), ("a8w8", 2): (2,)}  # numbers of ranks
QUANT_TYPES = ("a16w4", "a16w8", "a8w8", "fp8")
TOKENS = 7  # that each is continued with
PROMPTS = [prompt(length, seed) for seed, length in enumerate((23, 37, 5))]
SAMPLING = [
    greedy(TOKENS, logprobs=5),
    greedy(TOKENS, temperature=0.8, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=3),
    greedy(TOKENS, presence_penalty=0.5, logit_bias={7: 2.0}),
]


def save_model(config: dict, path: Path) -> WorkerConfig:
    """A random model's weights in a file, and what loads it."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in tensor_shapes(ModelConfig.from_hf(config, vision=True)).items():
        scale = 0.2 if len(shape) == 2 else 0.1
        weights[name] = torch.randn(shape, generator=generator) * scale + (1 if "norm" in name else 0)
    save_file(weights, path)
    files = ModelFiles("toy", "safetensors", (str(path),), config)
    return msgspec.structs.replace(CONFIG, files=files, load_format="auto", kv_cache_memory=None, num_blocks=24)


class Recorder:
    """A single rank, and what it was told and said."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.runner = Runner(config, ModelConfig.from_hf(config.files.config, vision=True), lambda *_: None)
        self.plans: list[StepPlan] = []
        self.results: list[StepResult] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.results.append(self.runner.execute(plan))
        return self.results[-1]


def record(config: WorkerConfig, prompts=PROMPTS, sampling=SAMPLING, *, stages: int = 1) -> Recorder:
    """With plans for a pipeline of so many stages."""
    recorder = Recorder(config)
    generate(recorder, prompts, sampling, max_step_tokens=24, ahead=stages + 1, stages=stages)
    return recorder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Recorder]:
    """What a single rank makes of each family, of each quantisation, in deterministic mode, and of plans for stages."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    models = FAMILIES | {"Deep": DEEP}
    configs = {name: save_model(config, folder / f"{name}.safetensors") for name, config in models.items()}
    for kind in QUANT_TYPES:
        # groups that no share cuts, so that the scales are those of a single rank
        group_size = 16 if kind in ("a16w4", "a16w8") else None
        configs[kind] = msgspec.structs.replace(configs["Llama"], quant_type=kind, quant_group_size=group_size)
    recorders = {name: record(config) for name, config in configs.items()}
    recorders |= {f"{name} in {stages}": record(configs[name], stages=stages) for name, stages in STAGES}
    recorders["deterministic"] = record(msgspec.structs.replace(configs["Llama"], deterministic=True))
    recorders["deterministic, alone"] = record(
        msgspec.structs.replace(configs["Llama"], deterministic=True), PROMPTS[1:2], SAMPLING[1:2]
    )
    torch.set_num_threads(threads)
    return recorders


def split(config: WorkerConfig, world_size: int, stages: int = 1, *, sharing: bool = False) -> WorkerConfig:
    rendezvous = "file:///met" if sharing else ""
    return msgspec.structs.replace(config, world_size=world_size, pipeline_parallel=stages, rendezvous=rendezvous)


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory) -> dict[tuple[str, int], list[Done]]:
    """What ranks make of the same plans, by name and number of ranks."""
    jobs = {}
    for name in (*FAMILIES, *QUANT_TYPES, "deterministic", "deterministic, alone"):
        for size in (2,) if name in QUANT_TYPES else (2, 4):
            jobs[name, size] = Job(split(alone[name].config, size, sharing=name in SHARING), alone[name].plans)
    for (name, stages), sizes in STAGES.items():
        recorder = alone[f"{name} in {stages}"]
        for size in sizes:
            config = split(recorder.config, size, stages, sharing=name in SHARING)
            jobs[f"{name} in {stages}", size] = Job(config, recorder.plans)
    llama = alone["Llama"].config
    roomy = msgspec.structs.replace(split(llama, 2), num_blocks=None, max_batch=64)
    jobs["unequal memory", 2] = Job(roomy, free=[1 << 27, 6 << 20])
    jobs["blocks that fit", 2] = Job(msgspec.structs.replace(roomy, num_blocks=9), free=[1 << 27, 6 << 20])
    jobs["too many stages", 4] = Job(split(llama, 4, 4))
    jobs["blocks that do not fit", 2] = Job(msgspec.structs.replace(roomy, num_blocks=1 << 20), free=[1 << 27, 6 << 20])
    found = run_jobs(tmp_path_factory.mktemp("ranks"), list(jobs.values()))
    return dict(zip(jobs, found, strict=True))


def logprobs(results: list[StepResult]) -> list[tuple[float, ...]]:
    each = chain.from_iterable(result.logprobs.values() for result in results)
    return [(one.chosen, *one.top_logprobs) for one in each]


@pytest.mark.feature("Parallelism and recovery", "Layers split over ranks")
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", [*FAMILIES, "deterministic"])
def test_ranks_answer_as_one(name: str, world_size: int, alone, together) -> None:
    expected = alone[name].results
    ranks = together[name, world_size]

    assert [result.tokens for result in ranks[0].results] == [result.tokens for result in expected]
    assert len(set(chain.from_iterable(result.tokens for result in expected))) > 10
    for found, one in zip(logprobs(ranks[0].results), logprobs(expected), strict=True):
        assert found == pytest.approx(one, abs=1e-4)
    for other in ranks[1:]:
        assert not any(result.tokens for result in other.results)


@pytest.mark.feature("Parallelism and recovery", "Layers dealt over stages")
@pytest.mark.parametrize(("name", "stages", "world_size"), [(*each, size) for each, sizes in STAGES.items() for size in sizes])
def test_stages_answer_as_one(name: str, stages: int, world_size: int, alone, together) -> None:
    one = alone[f"{name} in {stages}"]
    ranks = together[f"{name} in {stages}", world_size]
    last = ranks[world_size - world_size // stages]

    assert [result.tokens for result in last.results] == [result.tokens for result in one.results]
    assert sorted(chain.from_iterable(result.tokens for result in one.results)) == sorted(
        chain.from_iterable(result.tokens for result in alone[name].results)
    )
    waits = any(later.step > plan.step + 1 for plan, later in pairwise(one.plans))  # the first stage, for tokens
    assert waits == (stages > len(PROMPTS))
    for found, expected in zip(logprobs(last.results), logprobs(one.results), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    for other in ranks:
        assert other is last or not any(result.tokens for result in other.results)


@pytest.mark.parametrize(("name", "stages"), [each for each in STAGES if each[0] not in QUANT_TYPES])
def test_each_stage_reads_its_layers_alone(name: str, stages: int, alone, together) -> None:
    config = ModelConfig.from_hf(alone[name].config.files.config, vision=True)
    ranks = together[f"{name} in {stages}", stages]
    parts = [tensor_shapes(config, Stage(index, stages)) for index in range(stages)]

    assert [done.read for done in ranks] == [sum(4 * math.prod(shape) for shape in shapes.values()) for shapes in parts]
    assert set().union(*parts) == set(tensor_shapes(config))
    assert sum(map(len, parts)) == len(tensor_shapes(config)) + config.tie_word_embeddings
    for shapes, done in zip(parts, ranks, strict=True):
        layers = len({shape.split(".")[2] for shape in shapes if shape.startswith("model.layers.")})
        assert done.ready.kv_cache_bytes * config.num_layers == alone[name].runner.ready.kv_cache_bytes * layers


def test_more_stages_than_layers_are_refused(together) -> None:
    for done in together["too many stages", 4]:
        assert done.error.startswith("UnsupportedModel: --pipeline-parallel 4 is more than the 2 layers of this model")


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_ranks_of_a_quantised_model_are_close_to_one(kind: str, alone, together) -> None:
    """Where a scale is for all inputs, each rank has its own for its share of them."""
    found, expected = (results[:1] for results in (together[kind, 2][0].results, alone[kind].results))
    for one, other in zip(logprobs(found), logprobs(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-4 if kind in ("a16w4", "a16w8") else 0.4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sequence_has_the_same_bits_in_any_company(world_size: int, together) -> None:
    crowded = chain.from_iterable(result.logprobs.items() for result in together["deterministic", world_size][0].results)
    single = chain.from_iterable(result.logprobs.values() for result in together["deterministic, alone", world_size][0].results)
    wanted = list(single)

    assert len(wanted) == TOKENS
    assert [one for _, one in crowded if one in wanted] == wanted


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_rank_reads_its_share_alone(name: str, world_size: int, alone, together) -> None:
    config = ModelConfig.from_hf(alone[name].config.files.config, vision=True)
    shapes = tensor_shapes(config)
    heads = [share_heads(config.num_heads, config.num_kv_heads, rank, world_size) for rank in range(world_size)]
    held = sum(share.num_kv_heads for share in heads)  # some of them twice
    whole = sum(4 * math.prod(shape) for shape in shapes.values())
    kv = sum(4 * math.prod(shape) for tensor, shape in shapes.items() if "k_proj" in tensor or "v_proj" in tensor)
    norms = sum(4 * math.prod(shape) for tensor, shape in shapes.items() if "norm" in tensor)
    added = sum(4 * math.prod(shape) for tensor, shape in shapes.items() if tensor.endswith(("o_proj.bias", "down_proj.bias")))
    read = [done.read for done in together[name, world_size]]

    assert sum(read) == whole + (held - config.num_kv_heads) * kv // config.num_kv_heads + (world_size - 1) * norms
    if len({(share.num_heads, share.num_kv_heads) for share in heads}) == 1:
        assert max(read) - min(read) <= added + 4 * 2 * world_size * config.hidden_size  # the vocabulary is not even


def test_ranks_agree_on_what_the_one_with_the_least_memory_can_take(together) -> None:
    ready = [done.ready for done in together["unequal memory", 2]]

    assert ready[0].num_blocks == ready[1].num_blocks > 0
    assert ready[0].num_blocks < 64 * 8  # that all sequences together could fill


def test_ranks_that_start_again_have_the_blocks_that_they_had(together) -> None:
    assert [done.ready.num_blocks for done in together["blocks that fit", 2]] == [9, 9]
    for done in together["blocks that do not fit", 2]:
        assert done.error.startswith("InsufficientMemory: toy: the KV cache had 2.0 GiB before, but steps leave only ")


class RankProcess:
    """A rank as the supervisor starts it, and what it says."""

    def __init__(self, config: WorkerConfig, stack: ExitStack) -> None:
        ours, theirs = socket.socketpair()
        self.socket = stack.enter_context(ours)
        self.socket.settimeout(120)
        with theirs:
            command = [sys.executable, "-P", "-m", "dashinfer.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self._reader = parent_reader()
        self._messages: list = []
        self.send(Start(config))

    def send(self, message) -> None:
        self.socket.sendall(encode(message))

    def receive(self):
        """The next message that is no sign of life."""
        while not self._messages:
            data = self.socket.recv(1 << 16)
            assert data, "the rank is gone"
            self._messages += [each for each in self._reader.feed(data) if not isinstance(each, Alive | Progress)]
        return self._messages.pop(0)


@pytest.mark.parametrize("stages", [1, 2])
def test_two_processes_answer_and_one_tells_of_the_loss_of_the_other(stages: int, alone, tmp_path: Path) -> None:
    recorder = alone["Llama" if stages == 1 else "Llama in 2"]
    speaks = stages - 1
    with ExitStack() as stack:
        ranks = [
            RankProcess(
                msgspec.structs.replace(
                    recorder.config,
                    rank=rank,
                    world_size=2,
                    pipeline_parallel=stages,
                    local_rank=rank,
                    local_size=2,
                    rendezvous=f"file://{tmp_path}/ranks",
                ),
                stack,
            )
            for rank in range(2)
        ]
        for rank in ranks:
            assert isinstance(rank.receive(), Ready)
        for plan, expected in zip(recorder.plans, recorder.results, strict=True):
            for rank in ranks:
                rank.send(plan)
            assert ranks[speaks].receive().tokens == expected.tokens

        ranks[1 - speaks].process.kill()
        ranks[speaks].send(recorder.plans[0])
        failed = ranks[speaks].receive()

    assert isinstance(failed, Failed)
    assert failed.kind == "PeerLost"
    assert failed.message.startswith("another rank is gone: ")
    if stages == 1:  # they share memory
        assert failed.message.endswith("rank 1 has ended")
    else:
        assert "Connection closed by peer" in failed.message or "reset by peer" in failed.message
