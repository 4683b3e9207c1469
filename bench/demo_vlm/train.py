"""`python -m bench.demo_vlm.train OUT`: makes the model of `--model demo-vlm`.

Seed 20; 300 steps of 64 pictures for the tower alone, then 4400 of 32 pictures with up to five questions each, of which the
learning rate is level for 2860; each step takes 0.5 and 0.9 seconds of one core of an EPYC with AVX-512 BF16, with
MALLOC_MMAP_THRESHOLD_=8589934592 and MALLOC_TRIM_THRESHOLD_=17179869184 set, so that glibc keeps its memory.

The packaged weights answer 491 of 500 held-out questions right.

`OUT.state` has what `--resume` goes on from; a run that is resumed sees the same batches as one that is not.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer

from bench.demo_vlm.data import Batch, batches, sights
from bench.demo_vlm.files import PREPROCESSOR, model_config, write_files
from bench.demo_vlm.network import Network
from bench.demo_vlm.pictures import COLOURS, SHAPES
from dashinfer.types import Grid
from dashinfer.vision.preprocess import ImageProcessor

SEED = 20
_EMBEDDING = "model.language_model.embed_tokens.weight"
_HEADS = (len(SHAPES) + 1, len(COLOURS) + 1, 2)  # of the classes that tokens of pictures are to tell, while training
_SIDE = 12  # tokens of a side of a picture at most


def initial() -> dict[str, torch.Tensor]:
    """float32, by the names of transformers' class."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(SEED)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**model_config())).float()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _sight(w: dict[str, torch.Tensor], features: torch.Tensor, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of what each token of a picture shows, shapes weighing as much as background; the share of shapes told right."""
    known = torch.from_numpy(labels)
    parts = F.linear(features, w["probe"]).float().split(_HEADS, -1)
    loss = torch.zeros(())
    for index, part in enumerate(parts):
        truth = known[:, index]
        each = F.cross_entropy(part, truth, ignore_index=-1, reduction="none")
        loss = loss + each[truth > 0].mean() + each[truth == 0].mean()
    shown = known[:, 0] > 0
    return loss, (parts[0][shown].argmax(-1) == known[shown, 0]).float().mean()


def _features(
    network: Network, w: dict[str, torch.Tensor], values: np.ndarray, grid: Grid, table: torch.Tensor
) -> torch.Tensor:
    """[tokens, hidden]."""
    channels = torch.arange(3).repeat_interleave(values.shape[2] // 3) * 256
    return network.tower(w, table[torch.from_numpy(values).int() + channels], grid).flatten(0, 1)


def loss_of(network: Network, w: dict[str, torch.Tensor], batch: Batch, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the answers, and of sight and place; the shares of shapes told right and of answer tokens."""
    seen = [_features(network, w, *each, table) for each in zip(batch.pictures, batch.grids, strict=True)]
    features = torch.cat(seen)
    arrays = (batch.tokens, batch.branches, batch.positions, batch.holders)
    hidden, middle = network.decoder(w, *map(torch.from_numpy, arrays), features)
    targets = torch.from_numpy(batch.targets).flatten()
    asked = targets >= 0
    logits = F.linear(hidden.flatten(0, 1)[asked], w[_EMBEDDING]).float()
    sight, shapes = _sight(w, features, batch.labels)
    right = (logits.argmax(-1) == targets[asked]).float().mean()
    places = torch.from_numpy(batch.places)
    for index, part in enumerate(F.linear(middle, w["place probe"]).float().split(_SIDE, -1)):
        sight = sight + F.cross_entropy(part, places[:, index])
    return F.cross_entropy(logits, targets[asked]), sight, shapes, right


def save(weights: dict[str, torch.Tensor], directory: Path) -> None:
    """bfloat16, by the names that checkpoints of Qwen2-VL have."""
    renamed = {}
    for name, value in weights.items():
        if "probe" not in name:
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            renamed[name] = value.to(torch.bfloat16).contiguous()
    save_file(renamed, str(directory / "model.safetensors"), metadata={"format": "pt"})


def _share(step: int, steps: int) -> float:
    """Of the learning rate: up, level, and down to nothing."""
    return min(1.0, (step + 1) / 80, (steps - step) / (0.35 * steps))


class _Learner:
    def __init__(self, masters: dict[str, torch.Tensor], rate: float) -> None:
        self.masters = masters
        self.rate = rate
        turned = [p for name, p in masters.items() if p.ndim == 2 and "probe" not in name and name != _EMBEDDING]
        others = [p for p in masters.values() if all(p is not other for other in turned)]
        self.optimisers = [
            torch.optim.Muon(turned, lr=rate, weight_decay=0.03, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.to(torch.bfloat16) for name, parameter in self.masters.items()}

    def step(self, loss: torch.Tensor, share: float) -> None:
        loss.backward()
        with torch.no_grad():
            torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.rate * share
            optimiser.step()
            optimiser.zero_grad()


def train(out: Path, *, sight_steps: int, steps: int, size: int, rate: float, resume: Path | None) -> None:
    """First the tower alone, told what its tokens show; then all of it."""
    torch.set_num_threads(1)  # on shared cores a second one mostly waits
    write_files(out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    processor = ImageProcessor.from_hf(PREPROCESSOR)
    table = torch.from_numpy(processor.table()).flatten().to(torch.bfloat16)
    network = Network(model_config(), fused=False)
    masters = initial()
    masters["place probe"] = torch.randn(2 * _SIDE, masters[_EMBEDDING].shape[1]) * 0.05
    masters["probe"] = torch.randn(sum(_HEADS), masters[_EMBEDDING].shape[1]) * 0.05
    for parameter in masters.values():
        parameter.requires_grad_()
    print(f"{sum(p.numel() for n, p in masters.items() if n != 'probe'):,} parameters", flush=True)
    began, recent, first = time.monotonic(), [], 0

    def note(phase: str, step: int, *figures: torch.Tensor) -> None:
        recent.append([figure.item() for figure in figures])
        if step % 25 == 0:
            means = " ".join(f"{mean:.4f}" for mean in np.mean(recent, 0))
            recent.clear()
            print(f"{phase} {step}: {means}; {time.monotonic() - began:.0f} s, CPU {time.process_time():.0f} s", flush=True)

    def keep(learner: _Learner, step: int) -> None:
        values = {name: value.detach() for name, value in masters.items()}
        save(values, out)
        optimisers = [optimiser.state_dict() for optimiser in learner.optimisers]
        torch.save({"step": step, "masters": values, "optimisers": optimisers}, out.with_name(f"{out.name}.state"))

    state = None if resume is None else torch.load(resume, weights_only=True)
    if state is not None:
        with torch.no_grad():
            for name, value in state["masters"].items():
                masters[name].copy_(value)
        first = state["step"]
    else:
        learner = _Learner({name: p for name, p in masters.items() if "visual" in name or name == "probe"}, rate)
        source = sights(f"training {SEED}", processor, 2 * size)
        for step in range(sight_steps):
            values, grid, known = next(source)
            w = learner.weights()
            loss, shapes = _sight(w, _features(network, w, values, grid, table), known)
            learner.step(loss, _share(step, sight_steps))
            note("sight", step + 1, loss, shapes)
        keep(learner, 0)
    learner = _Learner(masters, rate)
    if first:
        for optimiser, each in zip(learner.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(each)
    conversations = batches(f"training {SEED}", tokenizer, processor, size, skip=first)
    for step in range(first, steps):
        answers, sight, shapes, right = loss_of(network, learner.weights(), next(conversations), table)
        learner.step(answers + 0.1 * sight, _share(step, steps))
        note("answers", step + 1, answers, sight, shapes, right)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            keep(learner, step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_vlm.train", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sight-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--size", type=int, default=32, help="pictures a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    train(**vars(arguments))


if __name__ == "__main__":
    main()
