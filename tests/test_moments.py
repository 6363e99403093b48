import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import Moments
from strategies import tensors

DIMS = {2: (0,), 3: (0, 2), 4: (0, 2, 3), 5: (0, 2, 3, 4)}


def of(x, **options):
    return Moments.of(x, DIMS[x.ndim], **options)


def oracle(x):
    rows = np.moveaxis(x.double().numpy(), 1, 0).reshape(x.shape[1], -1)
    return rows.shape[1], rows.mean(1), ((rows - rows.mean(1, keepdims=True)) ** 2).sum(1)


def assert_same(a, b, scale=1e-9):
    """Equal to rounding: means by the spread and the size of the mean, m2 by itself."""
    assert a.count.tolist() == b.count.tolist()
    sigma = (b.m2 / b.count.clamp(min=1)).sqrt()
    assert torch.all((a.mean - b.mean).abs() <= scale * (sigma + b.mean.abs()) + 1e-300)
    assert torch.all((a.m2 - b.m2).abs() <= scale * (b.m2 + b.count * b.mean.square() * 1e-9))


@given(tensors())
def test_of_agrees_with_numpy(x):
    count, mean, m2 = oracle(x)
    got = of(x)
    assert got.count.tolist() == [count] * x.shape[1]
    np.testing.assert_allclose(got.mean, mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got.m2, m2, rtol=1e-9)


@given(tensors(), tensors(), tensors())
def test_addition_is_commutative_and_associative(a, b, c):
    channels = min(t.shape[1] for t in (a, b, c))
    a, b, c = (of(t[:, :channels]) for t in (a, b, c))
    assert_same(a + b, b + a)
    assert_same((a + b) + c, a + (b + c))


@given(tensors())
def test_an_empty_set_is_the_identity_to_the_bit(x):
    m, nothing = of(x), of(x[:0])
    assert nothing.count.sum() == 0
    for total in (m + nothing, nothing + m):
        assert torch.equal(total.count, m.count)
        assert torch.equal(total.mean, m.mean)
        assert torch.equal(total.m2, m.m2)


@given(tensors(), st.lists(st.integers(0, 6), max_size=4))
def test_any_split_of_a_batch_merges_to_the_whole(x, cuts):
    parts = [of(part) for part in x.tensor_split(sorted(min(c, len(x)) for c in cuts))]
    whole = of(x)
    assert_same(Moments.merge(parts), whole)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert_same(total, whole)


@pytest.mark.parametrize("ratio", [1.0, 3e3, 1e6])
def test_float32_holds_where_the_naive_formula_fails(ratio):
    exact = torch.randn(64, 2, 40, 40, dtype=torch.float64) * 0.3 + 0.3 * ratio
    x = exact.float()
    count, mean, m2 = oracle(x)  # of the rounded values: rounding x is not the formula's fault
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    if ratio >= 3e3:
        assert np.abs(naive.numpy() / (m2 / count) - 1).max() > 0.05
    for parts in (1, 7, 64):
        got = Moments.merge([of(part) for part in x.tensor_split(parts)])
        assert got.mean.dtype == torch.float32
        assert np.all(np.abs(got.mean.numpy() - mean) <= np.spacing(mean.astype(np.float32)))
        np.testing.assert_allclose(got.m2, m2, rtol=1e-3 if ratio == 1e6 else 1e-5)


def test_the_difference_of_means_counts_as_spread():
    # mean(var_i) is 0 here; the pooled variance is not
    zeros, tens = of(torch.zeros(3, 1)), of(torch.full((1, 1), 10.0))
    pooled = zeros + tens
    assert pooled.mean.item() == 2.5
    assert pooled.var().item() == 18.75
    assert pooled.var(unbiased=True).item() == 25.0


@given(tensors(), st.integers(0, 2**31))
def test_masked_elements_do_not_count(x, seed):
    mask = torch.rand(len(x), 1, *x.shape[2:], generator=torch.Generator().manual_seed(seed)) < 0.6
    polluted = torch.where(mask, x, torch.nan)
    rows = x.movedim(1, 0).reshape(x.shape[1], -1)[:, mask.reshape(-1)].T  # (values, c)
    got, want = of(polluted, mask=mask), of(rows)
    assert_same(got, want)
    assert got.count.tolist() == [int(mask.sum())] * x.shape[1]


def test_dtype_is_float32_at_least_and_float64_where_asked():
    x = torch.randn(4, 3)
    assert of(x.half()).mean.dtype == torch.float32
    assert of(x.bfloat16()).mean.dtype == torch.float32
    assert of(x).mean.dtype == torch.float32
    assert of(x.double()).mean.dtype == torch.float64
    assert of(x, dtype=torch.float64).m2.dtype == torch.float64
    assert of(x).count.dtype == torch.int64


def test_no_variance_is_no_number():
    one, nothing = of(torch.ones(1, 1)), of(torch.ones(0, 1))
    assert one.var().item() == 0
    assert one.var(unbiased=True).isnan().item()
    assert nothing.var().isnan().item()
    assert nothing.mean.item() == 0


def test_counts_beyond_what_float32_can_count():
    many = Moments(torch.tensor([2**25]), torch.tensor([1.0]), torch.tensor([4.0]))
    one = Moments(torch.tensor([1]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert (many + one).count.item() == 2**25 + 1
    assert Moments.merge([many, one]).count.item() == 2**25 + 1


@given(tensors())
def test_pool_merges_along_a_dimension(x):
    slices = torch.stack([x, 3 * x + 1, x - 2])  # (3, n, c, …)
    parts = [of(part) for part in slices]
    stacked = Moments(
        *(torch.stack([getattr(p, k) for p in parts]) for k in ("count", "mean", "m2"))
    )
    assert_same(stacked.pool(0), parts[0] + parts[1] + parts[2])


def test_merging_nothing_says_so():
    with pytest.raises(ValueError, match="at least one Moments, got none"):
        Moments.merge([])


def test_gradients_flow_through_mean_and_m2():
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def statistics(x):
        m = Moments.merge([of(x[:2]), of(x[2:])])
        return m.mean, m.m2, m.var(unbiased=True)

    assert torch.autograd.gradcheck(statistics, (x,))
    assert torch.autograd.gradgradcheck(statistics, (x,))


def test_detach_cuts_the_graph():
    m = of(torch.randn(4, 2, requires_grad=True)).detach()
    assert not m.mean.requires_grad
    assert not m.m2.requires_grad


def test_no_dimensions_to_sum_over_are_refused():
    with pytest.raises(ValueError, match="name at least one dimension"):
        Moments.of(torch.arange(3.0), ())


def test_a_constant_is_a_mean_and_a_variance():
    known = Moments.constant(torch.tensor([1.0]), torch.tensor([4.0]))
    assert (known.count.item(), known.mean.item(), known.var().item()) == (1, 1.0, 4.0)
