import copy

import pytest
import torch

from batchnorm import BatchNorm1d, BatchNorm2d, DomainBatchNorm, LazyBatchNorm1d, domain


def norm(**options):
    return DomainBatchNorm(BatchNorm1d(3, momentum=1.0), ["clean", "adversarial"], **options)


def test_each_domain_has_its_own_statistics():
    layer = norm()
    clean, shifted = torch.randn(64, 3), torch.randn(64, 3) * 5 + 20
    layer(clean, domain="clean")
    layer(shifted, domain="adversarial")
    torch.testing.assert_close(layer.layers["clean"].running_mean, clean.mean(0))
    torch.testing.assert_close(layer.layers["adversarial"].running_mean, shifted.mean(0))
    layer.eval()
    assert layer(shifted, domain="adversarial").mean().abs() < 1e-4
    assert layer(shifted, domain="clean").mean() > 10


def test_affine_is_shared_unless_asked():
    shared, separate = norm(), norm(separate_affine=True)
    assert len(list(shared.parameters())) == 2
    assert len(list(separate.parameters())) == 4
    x = torch.randn(8, 3)
    for name in ("clean", "adversarial"):
        shared(x, domain=name)[:, 0].sum().backward()
        separate(x, domain="clean").sum().backward()
    assert shared.layers["clean"].bias is shared.layers["adversarial"].bias
    assert shared.layers["clean"].bias.grad.tolist() == [16, 0, 0]  # the sum of both
    assert separate.layers["adversarial"].bias.grad is None


def test_sharing_survives_deepcopy_and_moving():
    layer = copy.deepcopy(norm()).double().bfloat16()
    assert layer.layers["clean"].weight is layer.layers["adversarial"].weight
    assert len(list(layer.parameters())) == 2
    assert layer.layers["clean"].running_mean.dtype == torch.float32


def test_the_context_routes_a_whole_model_and_nests():
    model = torch.nn.Sequential(norm(), torch.nn.ReLU(), norm())
    x = torch.randn(8, 3)
    with domain("clean"):
        model(x)
        with domain("adversarial"):
            model(x)
            model[0](x, domain="clean")  # the argument wins
        model(x)
    counts = [[int(n.num_batches_tracked) for n in m.layers.values()] for m in (model[0], model[2])]
    assert counts == [[3, 1], [2, 1]]


def test_the_context_ends_with_an_exception():
    def fail():
        with domain("clean"):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    with pytest.raises(ValueError, match="got None"):
        norm()(torch.randn(8, 3))


def test_residual_mask_and_act_pass_through():
    layer = DomainBatchNorm(BatchNorm2d(3, act="relu"), ["a"])
    plain = BatchNorm2d(3, act="relu")
    x, residual = torch.randn(2, 4, 3, 5, 5)
    mask = torch.rand(4, 5, 5) < 0.5
    torch.testing.assert_close(
        layer(x, domain="a", residual=residual, mask=mask), plain(x, residual=residual, mask=mask)
    )


def test_state_dict_round_trip():
    layer, other = norm(), norm()
    layer(torch.randn(8, 3), domain="clean")
    other.load_state_dict(layer.state_dict(), strict=True)
    for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("separate", [False, True])
def test_freezing_all_domains_and_back(separate):
    layer = norm(separate_affine=separate)
    assert layer.freeze() is layer
    layer.train()(torch.randn(1, 3), domain="clean")
    assert not any(p.requires_grad for p in layer.parameters())
    layer.unfreeze()
    assert all(p.requires_grad for p in layer.parameters())
    layer(torch.randn(8, 3), domain="clean")
    assert layer.layers["clean"].num_batches_tracked.item() == 1


def test_each_switch_of_all_domains():
    layer = norm()
    layer.freeze(statistics="batch", learns=True)
    x = torch.randn(8, 3) * 5 + 20
    y = layer(x, domain="clean")
    torch.testing.assert_close(y, BatchNorm1d(3)(x))
    assert layer.layers["clean"].num_batches_tracked == 0
    assert all(p.requires_grad for p in layer.parameters())
    layer.freeze(updates=True)
    torch.testing.assert_close(layer(x, domain="clean"), x / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(layer.layers["clean"].running_mean, x.mean(0))
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.as_installed
def test_bad_input():
    layer = norm()
    with pytest.raises(ValueError, match=r"has the domains \['clean', 'adversarial'\], got 'real'"):
        layer(torch.randn(8, 3), domain="real")
    with pytest.raises(ValueError, match="at least one name"):
        DomainBatchNorm(BatchNorm1d(3), [])
    with pytest.raises(ValueError, match="each once"):
        DomainBatchNorm(BatchNorm1d(3), ["a", "a"])
    with pytest.raises(ValueError, match="without a dot"):
        DomainBatchNorm(BatchNorm1d(3), ["v1.0"])
    with pytest.raises(TypeError, match=r"must be names.*got \[0, 1\]"):
        DomainBatchNorm(BatchNorm1d(3), [0, 1])
    assert list(DomainBatchNorm(BatchNorm1d(3), "clean").layers) == ["clean"]
    for taken in ("clear", "training"):
        with pytest.raises(ValueError, match="no attribute of a module"):
            DomainBatchNorm(BatchNorm1d(3), [taken])
    with pytest.raises(TypeError, match="got LazyBatchNorm1d"):
        DomainBatchNorm(LazyBatchNorm1d(), ["a"])
    with pytest.raises(TypeError, match="got BatchNorm1d"):
        DomainBatchNorm(torch.nn.BatchNorm1d(3), ["a"])


@pytest.mark.as_installed
def test_the_context_holds_under_compile():
    layer = norm()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(8, 3)
    for name in ("clean", "adversarial", "adversarial"):
        with domain(name):
            compiled(x)
    assert [int(n.num_batches_tracked) for n in layer.layers.values()] == [1, 2]
