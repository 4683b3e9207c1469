"""Public function of sampling."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.sampling import cpu
from dashinfer_kernels.sampling.state import Needs, Sampled, SamplingBatch, SamplingState

BLOCK = 2048  # tokens a tile
CAPACITY = 8192  # keys among which a threshold is searched without going through the row again
TOP_BLOCK = 4096  # tokens of which the likeliest are taken at a time; the sums of log-probabilities are grouped by it
PROGRAMS = 4  # a multiprocessor
TOPS = (0, 5, 20)  # how many of the likeliest are taken: the least of these that is enough
MIN_SPLITS = 16  # of a row: the last kernel goes through one of them alone


@cache
def _kernel() -> ModuleType:
    from dashinfer_kernels.sampling import kernel

    return kernel


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tiles_per_split(rows: int, vocab_size: int, multiprocessors: int) -> int:
    """Tiles of a row that one program takes: as many as leave every multiprocessor PROGRAMS programs."""
    tiles = -(-vocab_size // BLOCK)
    splits = max(PROGRAMS * multiprocessors // rows, MIN_SPLITS)
    return -(-tiles // min(splits, tiles))


def sample(logits: Tensor, state: SamplingState, batch: SamplingBatch) -> Sampled:
    """Sample a token a row and record it in the row's slot.

    Neither the other rows nor the size of the batch change a row's token. On CUDA nothing waits for the device, and which
    kernels run depends on `batch.needs` alone.

    Args:
        logits: [rows, vocab] float32, float16 or bfloat16, a row contiguous; may be overwritten.
        state: parameters, counts and history; `batch.slots` had their sequences enter. Counts and history are updated.
        batch: the rows.

    Returns:
        The tokens, and log-probabilities of the unadjusted logits where `batch.needs` asks for them.
    """
    rows, vocab_size = logits.shape
    assert vocab_size == state.vocab_size
    assert logits.stride(1) == 1
    assert batch.slots.shape == batch.positions.shape == (rows,)
    assert (batch.bitmask is None) == (batch.mask_rows is None)
    assert batch.bitmask is None or batch.bitmask.shape[1] == -(-vocab_size // 32)
    if not use_triton(logits):
        return cpu.sample(logits, state, batch)
    return _launch(logits, state, batch)


def _launch(logits: Tensor, state: SamplingState, batch: SamplingBatch) -> Sampled:
    kernel = _kernel()
    rows, vocab_size = logits.shape
    needs, device = batch.needs, logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    failed = torch.empty(rows, dtype=torch.bool, device=device)
    if not rows:
        return Sampled(tokens, failed)
    config = tuning.lookup("sampling", (rows, vocab_size))
    per_split = config["tiles"] if config else tiles_per_split(rows, vocab_size, _multiprocessors(device))
    num_splits = -(-vocab_size // (BLOCK * per_split))
    grid = (rows, num_splits)
    most_splits = -(-vocab_size // BLOCK)  # whatever the number of rows
    splits = max(16, 1 << (most_splits - 1).bit_length())
    raw = logits
    if needs.edits or needs.penalties or batch.bitmask is not None:
        logits = logits.float() if logits.dtype != torch.float32 else logits
        if needs.top_logprobs is not None and raw is logits:
            raw = logits.clone()
    rows_of = {"slots_ptr": batch.slots, "params_ptr": state.params, "params_stride": state.params.stride(0)}
    logits_of = {"logits_ptr": logits, "logits_stride": logits.stride(0)}
    sizes = {"vocab": vocab_size, "tiles": per_split, "BLOCK": BLOCK}

    if needs.edits:
        kernel.edit_kernel[(rows,)](**logits_of, **rows_of, positions_ptr=batch.positions, BLOCK=128)
    if needs.penalties or batch.bitmask is not None:
        kernel.penalise_kernel[grid](
            **logits_of,
            **rows_of,
            **sizes,
            counts_ptr=state.counts,
            bitmask_ptr=batch.bitmask,
            mask_rows_ptr=batch.mask_rows,
            bitmask_stride=0 if batch.bitmask is None else batch.bitmask.stride(0),
            USE_PENALTIES=needs.penalties,
            USE_BITMASK=batch.bitmask is not None,
        )

    peaks = torch.empty(grid, dtype=torch.float32, device=device)
    places = torch.empty(grid, dtype=torch.int32, device=device)
    kernel.peak_kernel[grid](**logits_of, **sizes, slots_ptr=batch.slots, peaks_ptr=peaks, places_ptr=places)
    peaks_of = {"peaks_ptr": peaks, "num_splits": num_splits, "SPLITS": splits}
    masses, thresholds = None, None
    if needs.draws:
        if needs.cuts:
            thresholds = torch.empty(rows, dtype=torch.int32, device=device)
            brackets = torch.empty(rows, 2, dtype=torch.int32, device=device)
            keys = torch.empty(rows, CAPACITY, dtype=torch.int32, device=device)
            bins = torch.zeros(rows, kernel.BINS.value, dtype=torch.int32, device=device)
            sums, found, above = torch.zeros(3, rows, dtype=torch.int64, device=device).unbind(0)
            gathered = {"brackets_ptr": brackets, "found_ptr": found, "above_ptr": above, "keys_ptr": keys}
            kernel.histogram_kernel[grid](
                **logits_of, **rows_of, **peaks_of, **sizes, bins_ptr=bins, sums_ptr=sums, num_warps=8
            )
            kernel.bracket_kernel[(rows,)](**rows_of, **peaks_of, bins_ptr=bins, sums_ptr=sums, brackets_ptr=brackets)
            kernel.gather_kernel[grid](**logits_of, **rows_of, **peaks_of, **sizes, **gathered, CAPACITY=CAPACITY)
            kernel.threshold_kernel[(rows,)](
                **logits_of,
                **rows_of,
                **peaks_of,
                **gathered,
                sums_ptr=sums,
                thresholds_ptr=thresholds,
                vocab=vocab_size,
                CAPACITY=CAPACITY,
                BLOCK=BLOCK,
                num_warps=16,
            )
        masses = torch.empty(grid, dtype=torch.int64, device=device)
        kernel.mass_kernel[grid](
            **logits_of,
            **rows_of,
            **peaks_of,
            **sizes,
            thresholds_ptr=thresholds,
            masses_ptr=masses,
            USE_CUTS=needs.cuts,
            num_warps=8,
        )
    kernel.finish_kernel[(rows,)](
        **logits_of,
        **rows_of,
        **peaks_of,
        **sizes,
        positions_ptr=batch.positions,
        counts_ptr=state.counts,
        history_ptr=state.history,
        places_ptr=places,
        thresholds_ptr=thresholds,
        masses_ptr=masses,
        tokens_ptr=tokens,
        failed_ptr=failed,
        history_stride=state.history.stride(0),
        USE_DRAWS=needs.draws,
        USE_CUTS=needs.cuts,
        num_warps=8,
    )
    if needs.top_logprobs is None:
        return Sampled(tokens, failed)
    return Sampled(tokens, failed, *_logprobs(raw, tokens, state, batch))


def _logprobs(raw: Tensor, tokens: Tensor, state: SamplingState, batch: SamplingBatch) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel()
    rows, vocab_size = raw.shape
    assert batch.needs.top_logprobs is not None
    wanted, tiles = min(batch.needs.top_logprobs, vocab_size), -(-vocab_size // TOP_BLOCK)
    top = min(next((each for each in TOPS if each >= wanted), wanted), vocab_size)
    device = raw.device
    stats = torch.empty(rows, tiles, 2, dtype=torch.float32, device=device)
    best = torch.empty(rows, tiles, top, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    top_tokens = torch.empty(rows, top, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(rows, top, dtype=torch.float32, device=device)
    shared = {
        "logits_ptr": raw,
        "slots_ptr": batch.slots,
        "params_ptr": state.params,
        "stats_ptr": stats,
        "best_ptr": best,
        "logits_stride": raw.stride(0),
        "params_stride": state.params.stride(0),
        "TOP": top,
    }
    kernel.top_kernel[(rows, tiles)](**shared, vocab=vocab_size, BLOCK=TOP_BLOCK)
    kernel.logprob_kernel[(rows,)](
        **shared,
        tokens_ptr=tokens,
        logprobs_ptr=logprobs,
        top_tokens_ptr=top_tokens,
        top_logprobs_ptr=top_logprobs,
        num_tiles=tiles,
        BLOCK_TILES=max(16, 1 << (tiles - 1).bit_length()),
        CANDIDATES=max(16, 1 << (tiles * top - 1).bit_length()) if top else 16,
    )
    return logprobs, top_tokens[:, :wanted], top_logprobs[:, :wanted]


def warm_up_sampling(state: SamplingState) -> None:
    """Have every kernel compiled that `sample` may launch for float32 logits; changes nothing of `state`."""
    nobody = torch.full((1,), -1, dtype=torch.int32, device=state.device)
    words = torch.zeros(1, -(-state.vocab_size // 32), dtype=torch.int32, device=state.device)
    steps = [Needs(top_logprobs=top) for top in TOPS]
    steps += [Needs(draws=True), Needs(draws=True, cuts=True), Needs(edits=True), Needs(penalties=True)]
    for needs in steps:
        logits = torch.zeros(1, state.vocab_size, dtype=torch.float32, device=state.device)
        sample(logits, state, SamplingBatch(nobody, nobody, needs))
        if not needs.draws and needs.top_logprobs is None:
            sample(logits, state, SamplingBatch(nobody, nobody, needs, words, nobody))
