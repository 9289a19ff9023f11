"""The distances against plain numpy and scipy, on features drawn at random; what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ld_pruner_hf.evaluation import (
    cmmd,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_cosine,
    ssim,
)

QUICK = settings(max_examples=15, deadline=None)
shapes = st.tuples(st.integers(8, 40), st.integers(8, 40), st.integers(1, 7), st.integers(0, 10**6))


def features(n: int, m: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mix, rng.normal(rng.normal(), 0.5 + rng.random(), size=(m, d))


@QUICK
@given(shapes)
def test_frechet_distance_is_the_formula(shape):
    a, b = features(*shape)
    ca, cb = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(ca @ cb)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root.real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@QUICK
@given(shapes)
def test_kid_is_the_unbiased_estimate(shape):
    """With one subset of all samples it is one number, which loops can find."""
    n, _, d, seed = shape
    a, b = features(n, n, d, seed)
    kernel = lambda x, y: (x @ y / d + 1) ** 3  # noqa: E731
    inner = sum(kernel(x[i], x[j]) for x in (a, b) for i in range(n) for j in range(n) if i != j)
    across = sum(kernel(x, y) for x in a for y in b)
    expected = inner / (n * (n - 1)) - 2 * across / n**2
    got, spread = kernel_distance(torch.tensor(a), torch.tensor(b), subsets=2, subset_size=n)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-8) and spread == pytest.approx(0, abs=1e-6)


@QUICK
@given(st.integers(5, 60), st.integers(2, 8), st.integers(0, 10**6))
def test_inception_score_is_the_formula(n, classes, seed):
    logits = np.random.default_rng(seed).normal(scale=3, size=(n, classes))
    p = scipy.special.softmax(logits, axis=1)
    expected = np.exp(scipy.stats.entropy(p, np.broadcast_to(p.mean(0), p.shape), axis=1).mean())
    assert inception_score(torch.tensor(logits), splits=1)[0] == pytest.approx(expected, rel=1e-9)


@QUICK
@given(shapes)
def test_cmmd_is_the_formula(shape):
    a, b = features(*shape)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    kernel = lambda x, y: np.exp(-scipy.spatial.distance.cdist(x, y, "sqeuclidean") / 200).mean()  # noqa: E731
    expected = 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    assert cmmd(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_mean_cosine_is_over_all_pairs():
    a, b = (torch.tensor(x) for x in features(5, 9, 4, 0))
    expected = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).mean()
    assert mean_cosine(a, b) == pytest.approx(float(expected))


def test_the_same_features_are_at_distance_0_and_the_seed_decides():
    a = torch.randn(300, 6, generator=torch.Generator().manual_seed(3)).double()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    assert abs(kernel_distance(a, a)[0]) < 0.1 * kernel_distance(a, a + 2)[0]
    state = torch.get_rng_state()
    assert kernel_distance(a, a, seed=1) == kernel_distance(a, a, seed=1) != kernel_distance(a, a, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_samples_are_refused():
    few, many = torch.randn(8, 8), torch.randn(50, 8)
    with pytest.raises(ValueError, match="8 features: got 50 and 8 samples, needs at least 9"):
        frechet_distance(many, few)
    with pytest.raises(ValueError, match="KID: got 3 and 50 samples"):
        kernel_distance(few[:3], many)
    with pytest.raises(ValueError, match="IS: got 8 and 8 samples, needs at least 20"):
        inception_score(few)
    with pytest.raises(ValueError, match="features of 8 and 4 dimensions"):
        frechet_distance(many, many[:, :4])


def test_features_that_are_not_finite_are_refused():
    bad = torch.randn(50, 4)
    bad[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.randn(50, 4), bad)


def test_ssim():
    a = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    b = (a.float() * 0.5 + 60).byte()
    assert torch.allclose(ssim(a, a), torch.ones(2)) and (ssim(a, b) < 0.99).all()
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(a[..., :8], b[..., :8])
