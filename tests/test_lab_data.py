"""The laboratory's data: what it says it is, in parts that do not overlap."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from sklearn.datasets import load_breast_cancer, load_digits

from batchnorm.lab.data import (
    CHARACTERS,
    CartPole,
    Text,
    batches,
    breast_cancer,
    diabetes,
    digits,
    documentation,
    mnist,
    wine,
)


@pytest.mark.parametrize(
    ("load", "sizes", "shape", "classes"),
    [
        (digits, (1000, 297, 500), (1, 8, 8), 10),
        (mnist, (3000, 1000, 1000), (1, 14, 14), 10),
        (breast_cancer, (300, 100, 169), (30,), 2),
        (wine, (90, 40, 48), (13,), 3),
        (diabetes, (242, 80, 120), (10,), None),
    ],
)
def test_parts_have_their_sizes_and_are_drawn_from_the_seed(load, sizes, shape, classes):
    data = load(0)
    parts = (data.train, data.validation, data.test)
    assert tuple(map(len, parts)) == sizes
    assert all(part.x.shape[1:] == shape for part in parts)
    if classes is not None:
        assert sorted(torch.cat([part.y for part in parts]).unique().tolist()) == list(
            range(classes)
        )
    assert torch.equal(load(0).train.x, data.train.x)
    assert not torch.equal(load(1).train.x, data.train.x)
    # all of what there is, once
    rows = torch.cat([part.x for part in parts]).flatten(1)
    other = load(1)
    if load in (digits, mnist):  # tables are standardized by their training parts
        again = torch.cat([p.x for p in (other.train, other.validation, other.test)]).flatten(1)
        assert torch.equal(rows.double().sum(1).sort().values, again.double().sum(1).sort().values)


def test_digits_are_scikit_learn_s_and_labels_stay_with_images():
    loaded = load_digits()
    by_sum = {}
    for image, label in zip(loaded.images, loaded.target, strict=True):
        by_sum.setdefault(image.tobytes(), label)
    whole = loaded.images
    data = digits(3)
    std = torch.tensor(whole, dtype=torch.float32).std()
    restored = (data.test.x[:, 0] * std + whole.mean()).round().double().numpy()
    assert [by_sum[image.tobytes()] for image in restored] == data.test.y.tolist()


def test_tables_are_standardized_by_what_is_learned_from():
    for load in (breast_cancer, wine, diabetes):
        train = load(0).train.x
        assert train.mean(0).abs().max() < 1e-4
        assert (train.std(0) - 1).abs().max() < 1e-4
    assert diabetes(0).train.y.mean().abs() < 1e-5
    raw = breast_cancer(0, standardize=False)
    values = torch.cat([raw.train.x, raw.validation.x, raw.test.x]).double().sum()
    assert float(values) == pytest.approx(load_breast_cancer().data.sum(), rel=1e-6)


def test_text_is_numbered_in_parts_one_after_the_other():
    text = documentation()
    whole = torch.cat([text.train, text.validation, text.test])
    assert len(text.validation) == pytest.approx(len(whole) / 10, abs=2)
    assert int(whole.min()) >= 0
    assert int(whole.max()) == CHARACTERS - 1
    windows = Text.windows(text.train, 5, torch.tensor([0, 7]))
    assert windows.tolist() == [text.train[:6].tolist(), text.train[7:13].tolist()]


def test_an_epoch_shows_every_example_once_but_its_rest():
    drawn = batches(10, 3, seed=0)
    first, second = ([next(drawn).tolist() for _ in range(3)] for _ in range(2))
    for epoch in (first, second):
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == 9
    assert first != second
    again = batches(10, 3, seed=0)
    assert [next(again).tolist() for _ in range(3)] == first


@pytest.mark.parametrize("size", [0, 11])
def test_a_batch_is_no_larger_than_the_whole(size):
    with pytest.raises(ValueError, match="from 1 to all 10"):
        next(batches(10, size, seed=0))


def equations(force):
    """Barto, Sutton & Anderson's, without friction, in the form of Florian 2007."""

    def rates(_, state):
        _, velocity, angle, spin = state
        sine, cosine = np.sin(angle), np.cos(angle)
        inner = (-force - 0.1 * 0.5 * spin**2 * sine) / 1.1
        turned = (9.8 * sine + cosine * inner) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        moved = (force + 0.1 * 0.5 * (spin**2 * sine - turned * cosine)) / 1.1
        return [velocity, moved, spin, turned]

    return rates


@pytest.mark.parametrize("action", [0.0, 0.4, -1.0])
def test_small_steps_of_the_cart_follow_the_equations_of_motion(action):
    task = CartPole(step=1e-4)
    begun = task.start(3, seed=0).double()
    state = begun
    for _ in range(2000):  # 0.2 s
        state = task.move(state, torch.full((3,), action, dtype=torch.float64))
    force = 10 * np.tanh(action)
    for i in range(3):
        end = solve_ivp(equations(force), (0, 0.2), begun[i].numpy(), rtol=1e-10, atol=1e-12).y[
            :, -1
        ]
        assert state[i].numpy() == pytest.approx(end, abs=2e-3)


def test_the_policy_sees_no_velocity_and_pays_for_what_is_off():
    task = CartPole()
    state = torch.tensor([[1.0, 9.0, 0.0, 9.0], [0.0, 0.0, torch.pi / 2, 0.0]])
    assert task.observe(state).tolist() == [[1.0, 0.0], [0.0, pytest.approx(torch.pi / 2)]]
    cost = task.cost(state, torch.tensor([0.0, 100.0]))
    assert cost.tolist() == pytest.approx([0.1, 1.001])
    assert task.start(100, seed=1).abs().max() <= 0.3
