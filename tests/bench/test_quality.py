"""What quantisation costs: the figures, the text, and a run over tiny models."""

import json
import math

import pytest
import torch

from bench.quality import __main__ as quality
from bench.quality.measure import Tally, compare
from bench.quality.subject import TINY
from bench.quality.text import byte_windows, read_text, windows
from dashinfer.models.config import _FAMILIES


def test_figures_of_distributions_known_by_heart():
    truth = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    model = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])) + 3.0  # logits are not normalised
    tally = Tally()

    tally.add(model, truth, torch.tensor([0, 1]))

    assert tally.perplexity == pytest.approx(math.exp((math.log(4) + math.log(1.25)) / 2))
    assert tally.mean_divergence == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)
    assert tally.agreement == 0.5


def test_a_window_predicts_all_of_its_tokens_but_the_first():
    logits = torch.randn(5, 7)
    rows = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 0, 1, 2, 3])]
    done: list[int] = []

    own, other = compare(lambda window: logits, [lambda window: logits.flip(0)], rows, on_window=done.append)

    losses = [-torch.log_softmax(logits, -1)[place, row[place + 1]].item() for row in rows for place in range(4)]
    assert own.tokens == other.tokens == len(losses)
    assert own.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)))
    assert own.mean_divergence == pytest.approx(0, abs=1e-6)
    assert other.mean_divergence > 0.01
    assert done == [1, 2]


def test_the_text_is_long_enough_and_always_the_same():
    assert len(read_text()) > 300_000
    assert read_text() == read_text()


def test_windows_need_enough_tokens():
    assert windows(list(range(10)), count=8, length=4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="has 10 tokens; 12 are needed"):
        windows(list(range(10)), count=9, length=4)


def test_models_without_a_tokeniser_read_the_bytes_of_the_text():
    rows = byte_windows(count=100, length=30)

    assert bytes(rows.flatten().tolist()).decode() == read_text()[:120]
    assert all(settings["vocab_size"] >= 256 for settings in TINY.values())


def test_every_family_of_text_models_has_a_tiny_one():
    assert set(TINY) == {name for name in _FAMILIES if name.endswith("ForCausalLM")}


def test_a_run_over_a_tiny_model(tmp_path, capsys):
    out = tmp_path / "quality.json"
    arguments = ["--model", "Qwen2ForCausalLM", "--modes", "a16w8,a16w4-g32", "--tokens", "1024", "--window", "64"]

    assert quality.main([*arguments, "--data-type", "float32", "--device", "cpu", "--out", str(out)]) == 0

    (result,) = json.loads(out.read_text())["results"]
    assert (result["tokens"], result["window"]) == (16 * 63, 64)
    base, eight, four = result["rows"]
    assert [row["mode"] for row in result["rows"]] == ["float32", "a16w8", "a16w4-g32"]
    assert base["divergence"] == pytest.approx(0, abs=1e-6)
    assert base["agreement"] == 1
    assert 1e-7 < eight["divergence"] < four["divergence"] / 10
    assert eight["agreement"] > four["agreement"] > 0.5
    assert four["weight_bytes"] < eight["weight_bytes"] < base["weight_bytes"]
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out


def test_an_unknown_mode_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--modes", "a4w4"])
    assert "no mode is called a4w4; there are a16w8," in capsys.readouterr().err
