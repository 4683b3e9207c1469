"""Turns plans into work on the device, queued so that a GPU never waits for Python.

What steps need of the sequences lives on the device: token histories and sampling parameters (`SamplingState`), block tables.
A step brings a few numbers a sequence in one copy, finds its token ids where earlier steps wrote them, and is queued behind the
step before; its tokens are read back while the next one runs. On a GPU, steps that only decode are replayed from CUDA graphs.
What a grammar allows is known last: the thread waits for it when all of a step but sampling is queued.

Of several ranks the first samples, and the others are told the tokens: they could not differ if they tried. In a pipeline the
last stage samples, and the first is told; plan j's tokens it needs when it begins plan j + M, M being the number of stages.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dashinfer.models.decoder import DecoderLM, InputEmbeddings
from dashinfer.models.kv_cache import KVCache
from dashinfer.types import Chunk, Enter, StepPlan, StepResult, TokenLogprobs
from dashinfer.worker.graphs import DecodeGraphs
from dashinfer.worker.masks import MaskInbox
from dashinfer.worker.media import Media
from dashinfer.worker.pipeline import Arriving, Pipeline
from dashinfer.worker.placements import Placements, Shown
from dashinfer.worker.pooling import LaunchedEmbeddings, Pooling
from dashinfer.worker.prompt_scores import LaunchedScores, PromptScores
from dashinfer.worker.staging import Download, Staging
from dashinfer_kernels import PagedBatch, Sampled, SamplingBatch, SamplingState, sample, warm_up_sampling
from dashinfer_kernels.dispatch import use_triton

# Rows of a decoding step's inputs: the slot, its tokens after the step, and a block that the step adds to a table: whose, where
# and which.
_SLOT, _CONTEXT, _TABLE, _COLUMN, _BLOCK = range(5)


class Executor:
    """Runs a model for up to `max_batch` sequences of up to `max_length` tokens, over caches that `use_caches` brings; with
    `media`, one that sees those; with `pipeline`, a stage of one, without graphs."""

    def __init__(
        self,
        model: DecoderLM,
        *,
        device: torch.device,
        max_batch: int,
        max_length: int,
        block_size: int,
        media: Media | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self._model = model
        self._pipeline = pipeline
        self._expected: deque[_Expected] = deque()  # in the order of the plans
        self._group = model.group
        self._media = media
        self._placements = None if media is None else Placements(max_batch, max_length, device)
        self._device = device
        self._block_size = block_size
        self._kv_caches: list[KVCache] = []
        self._state = SamplingState(max_batch, max_length, model.config.vocab_size, device=device)
        # a row a slot; the last takes what decoding sequences write that need no new block
        self._block_tables = torch.zeros(max_batch + 1, -(-max_length // block_size), dtype=torch.int32, device=device)
        self._num_blocks = [0] * max_batch  # in each slot's table
        self._staging = Staging(device)
        self._scores = PromptScores()
        self._pooling = Pooling()
        self._launched_scores: LaunchedScores | None = None  # of the step that is being launched
        self._launched_embeddings: LaunchedEmbeddings | None = None  # likewise
        self._graphs: DecodeGraphs | None = None
        self.masks = MaskInbox(model.stage.count + 1)

    def use_caches(self, kv_caches: list[KVCache]) -> None:
        """The cache of each layer of the stage, as `allocate_kv_cache` makes them. Graphs recorded over others are dropped."""
        self._kv_caches = kv_caches
        self._graphs = None

    def use_graphs(
        self,
        make: Callable[..., DecodeGraphs] = DecodeGraphs,
        *,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Have `make` record graphs for steps that only decode, and replay those from now on; `report` as of `DecodeGraphs`."""
        assert self._pipeline is None
        padding = np.array([-1, 0, len(self._num_blocks), 0, 0], dtype=np.int32)
        with torch.inference_mode():
            self._graphs = make(
                self._decode, max_batch=len(self._num_blocks), padding=padding, device=self._device, report=report
            )

    def warm_up(self) -> None:
        """Have all kernels compiled that sampling may take, rather than when a request is the first to need one."""
        with torch.inference_mode():
            warm_up_sampling(self._state)

    def reset(self) -> None:
        """No slot has a sequence, and nothing of a step that failed matters. The caches stay."""
        self._num_blocks = [0] * len(self._num_blocks)

    def launch(self, plan: StepPlan) -> "LaunchedStep":
        """Queue a step behind those before it. Call it, and read results, in the order of the plans."""
        with torch.inference_mode():
            if self._pipeline is not None:
                self._take_tokens(plan.step - self._pipeline.stage.count)
            for enter in plan.enter:
                self._num_blocks[enter.slot] = 0
                enter_slot(self._state, enter)
                self._scores.enter(enter)
                self._pooling.enter(enter)
                if self._placements is not None:
                    self._placements.enter(enter)
            self._write_tokens(plan.chunks)
            decodes = all(chunk.length == 1 and chunk.sample and len(chunk.new_blocks) <= 1 for chunk in plan.chunks)
            if decodes and self._placements is not None:
                decodes = not any(map(self._placements.has_positions, plan.chunks))
            self._launched_scores = self._launched_embeddings = None
            decodes = decodes and not self._pooling.wanted(plan.chunks)
            run = self._replay if decodes and self._graphs is not None else self._run
            logits, slots, positions = run(plan.chunks)
            asked = (self._launched_scores, self._launched_embeddings)
            if not len(slots):
                return LaunchedStep(plan.step, [], None, *asked)
            if not self._model.stage.last:
                if self._pipeline is not None and self._model.stage.first:
                    tokens = self._pipeline.expect_tokens(len(slots), self._device)
                    self._expected.append(_Expected(plan.step, slots, positions, tokens))
                return LaunchedStep(plan.step, [], None)
            if self._group.rank > 0:
                self._send_back(self._hear_tokens(slots, positions))
                return LaunchedStep(plan.step, [], None)
            assert logits is not None
            needs = [self._state.needs[chunk.slot] for chunk in plan.chunks if chunk.sample]
            masks = self._take_masks(plan.step, len(slots)) if plan.masked else (None, None)
            sampled = sample(logits, self._state, SamplingBatch(slots, positions, reduce(or_, needs), *masks))
            if self._group.world_size > 1:
                self._group.broadcast(sampled.tokens)
            self._send_back(sampled.tokens)
            return LaunchedStep(plan.step, [each.top_logprobs for each in needs], sampled, *asked)

    def settle(self) -> None:
        """Take what other stages still have to say of the steps that were launched."""
        if self._expected:
            with torch.inference_mode():
                self._take_tokens(self._expected[-1].step)

    def _hear_tokens(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Have the tokens that rank 0 samples written to the history."""
        tokens = self._group.broadcast(torch.empty(len(slots), dtype=torch.int64, device=self._device))
        self._keep_tokens(slots, positions, tokens)
        return tokens

    def _take_tokens(self, last: int) -> None:
        """Have the tokens of all steps up to `last` in the history, on the first stage."""
        while self._expected and self._expected[0].step <= last:
            each = self._expected.popleft()
            self._keep_tokens(each.slots, each.positions, each.tokens.wait())

    def _keep_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Sampled ones, into the history; of a row that failed, too, whose sequence ends."""
        self._state.history.index_put_((slots.long(), positions.long()), tokens.int())

    def _send_back(self, tokens: Tensor) -> None:
        if self._pipeline is not None:
            self._pipeline.send_tokens(tokens)

    def _write_tokens(self, chunks: list[Chunk]) -> None:
        """Token ids that the chunks bring, into the history."""
        written = [chunk for chunk in chunks if chunk.tokens]
        if not written:
            return
        tokens = [np.frombuffer(chunk.tokens, "<i4") for chunk in written]
        lengths = np.array([len(each) for each in tokens])
        ends = np.array([chunk.start + chunk.length for chunk in written])
        positions = np.arange(lengths.sum()) + np.repeat(ends - lengths.cumsum(), lengths)
        slots = np.repeat([chunk.slot for chunk in written], lengths)
        slot, position, token = self._staging.upload([slots, positions, np.concatenate(tokens)])
        self._state.history.index_put_((slot.long(), position.long()), token)

    def _take_masks(self, step: int, count: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The masks of a step, [masks, words], and which of them each of `count` rows takes. Waits for them, and a GPU goes on
        with the step meanwhile."""
        masks = self.masks.take(step)
        if not masks.rows:
            return None, None
        mask_rows = np.full(count, -1, dtype=np.int32)
        mask_rows[list(masks.rows)] = np.arange(len(masks.rows))
        words, rows = self._staging.upload([np.frombuffer(masks.words, "<i4"), mask_rows])
        return words.view(len(masks.rows), -1), rows

    def _take_blocks(self, chunks: list[Chunk]) -> np.ndarray:
        """Slot, column and number of each block that a step adds to the tables, [3, blocks] int32."""
        added = []
        for chunk in chunks:
            first = self._num_blocks[chunk.slot]
            added += [(chunk.slot, first + index, block) for index, block in enumerate(chunk.new_blocks)]
            self._num_blocks[chunk.slot] = first + len(chunk.new_blocks)
        return np.array(added, dtype=np.int32).reshape(-1, 3).T

    def _add_blocks(self, tables: Tensor, columns: Tensor, blocks: Tensor) -> None:
        self._block_tables.index_put_((tables.long(), columns.long()), blocks)

    def _cache_slots(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """Where tokens' keys and values go, int64, from their blocks and positions."""
        return blocks.long() * self._block_size + positions % self._block_size

    # -- any step

    def _run(self, chunks: list[Chunk]) -> tuple[Tensor | None, Tensor, Tensor]:
        """Logits of the chunks that sample, [rows, vocabulary], on rank 0 and where any does, else None; their slots, and the
        positions of the tokens to sample."""
        slots = np.array([chunk.slot for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        lengths = np.array([chunk.length for chunk in chunks], dtype=np.int64)
        context, ends = starts + lengths, np.cumsum(lengths)
        owners, positions = np.repeat(slots, lengths), np.arange(ends[-1]) + np.repeat(context - ends, lengths)
        samplers = np.flatnonzero([chunk.sample for chunk in chunks])
        longer = np.flatnonzero(lengths > 1)
        turned = shown = None
        if self._placements is not None:
            turned = self._placements.positions(chunks, owners, positions)
            shown = self._placements.shown(chunks)
        uploaded = self._staging.upload(
            [
                *self._take_blocks(chunks),
                *(slots, owners, positions, np.concatenate(([0], ends)), context),
                *((ends - 1)[samplers], slots[samplers], context[samplers]),
                *([] if turned is None else [turned.ravel()]),
                *([] if shown is None else [shown.rows]),
            ]
        )
        self._add_blocks(*uploaded[:3])
        slot, owner, position, query_starts, contexts = uploaded[3:8]
        last_rows, sampled_slots, sampled_positions = uploaded[8:11]
        owner, position = owner.long(), position.long()
        tables = self._block_tables[:, : -(-int(context.max()) // self._block_size)].index_select(0, slot.long())
        batch = PagedBatch(
            positions=position,
            slot_mapping=self._cache_slots(self._block_tables[owner, position // self._block_size], position),
            query_starts=query_starts,
            context_lengths=contexts,
            block_tables=tables,
            num_decodes=int(longer[0]) if len(longer) else len(chunks),
            block_size=self._block_size,
            host_starts=starts,
            host_lengths=lengths,
            host_tables=None if use_triton(tables) else tables.numpy(),
        )
        seen: dict[str, Any] = {}
        if turned is not None:
            seen["positions"] = uploaded[11].view(turned.shape).long()
        if shown is not None:
            seen["images"] = self._embeddings(shown, uploaded[-1].long())
        if self._pipeline is None or self._pipeline.stage.first:
            inputs = self._state.history[owner, position].long()
        else:
            inputs = self._pipeline.receive(len(owner), self._model.config.hidden_size, self._device)
        hidden = self._model.forward(inputs, batch, self._kv_caches, **seen)
        if self._pipeline is not None and not self._pipeline.stage.last:
            self._pipeline.send(hidden)
            return None, sampled_slots, sampled_positions
        self._launched_scores = self._scores.compute(chunks, hidden, self._state.history, self._model.logits)
        self._launched_embeddings = self._pooling.compute(chunks, hidden)
        if not len(samplers):
            return None, sampled_slots, sampled_positions
        if len(samplers) < len(hidden):
            hidden = hidden.index_select(0, last_rows.long())
        return self._model.logits(hidden), sampled_slots, sampled_positions

    def _embeddings(self, shown: Shown, rows: Tensor) -> InputEmbeddings:
        """`rows`: those of `shown`, [count] int64 on the device."""
        assert self._media is not None
        self._media.finish(key for key, _, _ in shown.parts)
        parts = [(self._media[key], slice(begin, end)) for key, begin, end in shown.parts]
        levels = zip(*([level[where] for level in seen.deepstack] for seen, where in parts), strict=True)
        return InputEmbeddings(
            rows, torch.cat([seen.embeddings[where] for seen, where in parts]), tuple(torch.cat(level) for level in levels)
        )

    # -- steps that only decode, from graphs

    def _replay(self, chunks: list[Chunk]) -> tuple[Tensor | None, Tensor, Tensor]:
        """As `_run`."""
        assert self._graphs is not None
        columns = np.empty((5, len(chunks)), dtype=np.int32)
        columns[_SLOT] = [chunk.slot for chunk in chunks]
        columns[_CONTEXT] = [chunk.start + 1 for chunk in chunks]
        columns[_TABLE:] = [[len(self._num_blocks)], [0], [0]]
        added = self._take_blocks(chunks)
        columns[_TABLE:, : added.shape[1]] = added
        logits, inputs = self._graphs(columns, self._staging)
        return logits, inputs[_SLOT], inputs[_CONTEXT]

    def _decode(self, inputs: Tensor) -> Tensor | None:
        """What graphs record: logits [rows, vocabulary] of `inputs`, int32 [5, rows], None on other ranks than 0. A row without
        a sequence has slot -1 and no tokens."""
        slot, context = inputs[_SLOT], inputs[_CONTEXT]
        self._add_blocks(*inputs[_TABLE:])
        rows, positions = slot.clamp(min=0).long(), (context - 1).clamp(min=0).long()
        tables = self._block_tables.index_select(0, rows)
        cache_slots = self._cache_slots(tables.gather(1, (positions // self._block_size).unsqueeze(1)).squeeze(1), positions)
        on_host = not use_triton(inputs)
        batch = PagedBatch(
            positions=positions,
            slot_mapping=torch.where(context > 0, cache_slots, -1),
            query_starts=torch.arange(len(slot) + 1, dtype=torch.int32, device=inputs.device),
            context_lengths=context,
            block_tables=tables,
            num_decodes=len(slot),
            block_size=self._block_size,
            host_starts=positions.numpy() if on_host else None,
            host_lengths=np.ones(len(slot), dtype=np.int64) if on_host else None,
            host_tables=tables.numpy() if on_host else None,
        )
        input_ids = self._state.history[rows, positions].long()
        seen = {}
        if self._placements is not None:  # a row without a sequence has the delta of another one's, perhaps below 0
            seen["positions"] = (positions + self._placements.deltas[rows]).clamp(min=0)
        return self._model.logits(self._model.forward(input_ids, batch, self._kv_caches, **seen))


@dataclass(frozen=True)
class _Expected:
    """The tokens of a step, and where in the history they belong."""

    step: int
    slots: Tensor
    positions: Tensor
    tokens: Arriving


def enter_slot(state: SamplingState, enter: Enter) -> None:
    """A sequence takes a slot. Stop tokens beyond the vocabulary, which some models' files name, are dropped."""
    params = enter.sampling
    state.enter(
        enter.slot,
        np.frombuffer(enter.tokens, dtype="<i4"),
        enter.prompt_length,
        seed=params.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        min_tokens=params.min_tokens,
        stop_token_ids=tuple(token for token in params.stop_token_ids if 0 <= token < state.vocab_size),
        logprobs=params.logprobs,
    )


class LaunchedStep:
    """A step on its way. `wanted` says how many of the likeliest tokens each row asked for, None for no log-probabilities."""

    def __init__(
        self,
        number: int,
        wanted: list[int | None],
        sampled: Sampled | None,
        scores: LaunchedScores | None = None,
        embeddings: LaunchedEmbeddings | None = None,
    ) -> None:
        self.number = number
        self._scores, self._embeddings = scores, embeddings
        self._wanted = wanted
        self._download = None
        if sampled is not None:
            tensors = [sampled.tokens, sampled.failed]
            if sampled.logprobs is not None:
                assert sampled.top_tokens is not None and sampled.top_logprobs is not None
                tensors += [sampled.logprobs, sampled.top_tokens, sampled.top_logprobs]
            self._download = Download(tensors)

    def result(self) -> StepResult:
        """What the step produced, once it has."""
        scores = self._scores.result() if self._scores is not None else {}
        embeddings = self._embeddings.result() if self._embeddings is not None else {}
        if self._download is None:
            return StepResult(self.number, [], prompt_logprobs=scores)
        tokens, failed, *logprobs = (each.tolist() for each in self._download.wait())
        failures = [row for row, each in enumerate(failed) if each]
        found = {}
        if logprobs:
            for row, (count, chosen, ids, values) in enumerate(zip(self._wanted, *logprobs, strict=True)):
                if count is not None and not failed[row]:
                    found[row] = TokenLogprobs(chosen, tuple(ids[:count]), tuple(values[:count]))
        return StepResult(self.number, tokens, found, failures, scores, embeddings)
