"""Fidelity against torch's own losses, in float64 over all predictions at once."""

import math
from dataclasses import astuple

import pytest
import torch
from torch.nn import functional

from sharebasis.linalg import fidelity
from sharebasis.linalg.fidelity import CHUNK, FidelityMeter

D_VOCAB = 37


def window(n, seed=0, noise=0.5):
    """Logits of two models that are alike, and tokens."""
    generator = torch.Generator().manual_seed(seed)
    original = 3 * torch.randn(n, D_VOCAB, generator=generator)
    compressed = original + noise * torch.randn(n, D_VOCAB, generator=generator)
    return original, compressed, torch.randint(D_VOCAB, (n,), generator=generator)


def measured(*windows):
    meter = FidelityMeter()
    for one in windows:
        meter.update(*one)
    return meter.result()


def oracle(*windows):
    """Every number of a Fidelity, by other means."""
    p = torch.cat([original[:-1] for original, _, _ in windows]).double()
    q = torch.cat([compressed[:-1] for _, compressed, _ in windows]).double()
    targets = torch.cat([tokens[1:] for _, _, tokens in windows])
    kl = functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    ordered, place = kl.sort().values, 0.99 * (len(kl) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return (
        functional.cross_entropy(p, targets).exp().item(),
        functional.cross_entropy(q, targets).exp().item(),
        kl.mean().item(),
        (low + (place - math.floor(place)) * (high - low)).item(),
        (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        (p - q).abs().max().item(),
        len(kl),
    )


@pytest.mark.parametrize("lengths", [(2,), (9, 30), (CHUNK + 1, CHUNK + 2, 3 * CHUNK + 5)])
@pytest.mark.parametrize("noise", [0.05, 2.0])
def test_every_number_is_the_oracles(lengths, noise):
    windows = [window(n, seed, noise) for seed, n in enumerate(lengths)]
    assert astuple(measured(*windows)) == pytest.approx(oracle(*windows), rel=2e-6, abs=1e-6)


def test_the_oracle_tells_the_direction_of_the_divergence():
    original, compressed, tokens = window(200, noise=2.0)
    there = measured((original, compressed, tokens)).kl_mean
    back = measured((compressed, original, tokens)).kl_mean
    assert abs(there - back) > 0.01 * there


def test_a_model_agrees_with_itself():
    original, _, tokens = window(100)
    same = measured((original, original.clone(), tokens))
    assert same.dense_perplexity == same.compressed_perplexity
    assert (same.kl_mean, same.kl_p99, same.max_abs_logit_diff) == (0, 0, 0)
    assert same.top1_agreement == 1
    assert same.n_predictions == 99


def test_logits_that_differ_by_a_constant_make_the_same_predictions():
    original, _, tokens = window(100)
    shifted = measured((original, original + 2, tokens))
    assert shifted.kl_mean == pytest.approx(0, abs=1e-6)
    assert shifted.compressed_perplexity == pytest.approx(shifted.dense_perplexity, rel=1e-6)
    assert shifted.max_abs_logit_diff == pytest.approx(2, rel=1e-6)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    original, _, tokens = window(50)
    uniform = measured((original, torch.zeros_like(original), tokens))
    assert uniform.compressed_perplexity == pytest.approx(D_VOCAB, rel=1e-6)


def test_the_99th_percentile_sees_two_bad_predictions_in_a_hundred_but_not_one_in_two_hundred():
    original, _, tokens = window(201)
    compressed = original.clone()
    compressed[:1] = 10 * torch.randn(1, D_VOCAB, generator=torch.Generator().manual_seed(1))
    assert measured((original, compressed, tokens)).kl_p99 == 0
    compressed[:4] = compressed[0]
    result = measured((original, compressed, tokens))
    assert result.kl_p99 > 1 > result.kl_mean


def test_top1_agreement_counts_the_predictions_that_rank_the_same_token_first():
    original, _, tokens = window(11)
    compressed = original.clone()
    for position in (0, 4, 9):
        compressed[position] = -original[position]
    assert measured((original, compressed, tokens)).top1_agreement == 0.7


def test_the_largest_difference_is_found_wherever_it_is_and_whatever_its_sign():
    original, _, tokens = window(2 * CHUNK)
    for position in (0, CHUNK, 2 * CHUNK - 2):
        compressed = original.clone()
        compressed[position, 5] -= 40
        largest = measured((original, compressed, tokens)).max_abs_logit_diff
        assert largest == pytest.approx(40, rel=1e-6)


def test_the_last_position_and_the_first_token_count_for_nothing():
    original, compressed, tokens = window(20)
    before = measured((original, compressed, tokens))
    original[-1], compressed[-1], tokens[0] = 100, -100, (tokens[0] + 1) % D_VOCAB
    assert measured((original, compressed, tokens)) == before


def test_a_prediction_is_scored_by_the_token_that_follows_it():
    tokens = torch.arange(10)
    knows = 50 * functional.one_hot(tokens.roll(-1), D_VOCAB).float()
    late = 50 * functional.one_hot(tokens, D_VOCAB).float()
    result = measured((knows, late, tokens))
    assert result.dense_perplexity == pytest.approx(1, abs=1e-6)
    assert result.compressed_perplexity == pytest.approx(math.exp(50), rel=1e-6)


def test_the_order_of_the_windows_does_not_matter():
    windows = [window(n, seed) for seed, n in enumerate((5, 80, 33))]
    there, back = measured(*windows), measured(*reversed(windows))
    assert astuple(there) == pytest.approx(astuple(back), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 149, 1000])
def test_the_size_of_a_chunk_does_not_matter(chunk, monkeypatch):
    windows = window(150), window(40, seed=1)
    before = measured(*windows)
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    assert astuple(measured(*windows)) == pytest.approx(astuple(before), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_low_precision_are_compared_in_float32(dtype):
    original, compressed, tokens = window(60)
    low = original.to(dtype), compressed.to(dtype), tokens
    assert astuple(measured(low)) == pytest.approx(oracle(low), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_do_not_pass_for_a_small_difference(bad):
    original, compressed, tokens = window(30)
    compressed[3, 2] = bad
    result = measured((original, compressed, tokens))
    assert not math.isfinite(result.kl_mean)
    assert not math.isfinite(result.max_abs_logit_diff)
