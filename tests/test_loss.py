"""The contrastive losses of one process, against loops that can be checked by eye.

Over several processes: tests/distributed/test_loss_*.py. GPU: test_loss_triton.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dist.config import LossConfig
from simclr_dist.loss import NonFiniteError, NTXentLoss, SupConLoss, nt_xent, tiled
from simclr_dist.loss.agreement import Settings
from simclr_dist.loss.build import build_loss, choices
from simclr_dist.loss.enumeration import PAIRS, Across, Pairs, Within

IMPLEMENTATIONS = ["plain", "tiled", "tiled by 3"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "tiled by 3" has tiles that straddle the views and do not divide the rows."""
    if request.param == "tiled by 3":
        monkeypatch.setattr(tiled, "_tile_size", lambda *_: 3)
    return str(request.param).split()[0]


def random_rows(n: int, K: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    rows = torch.randn(n, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows * torch.linspace(0.2, 3, n, dtype=torch.float64)[:, None]).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# References: float64, row by row


def unit(x: Tensor) -> list[Tensor]:
    return [row / row.norm() if row.detach().norm() > 1e-12 else row * 0 for row in x]


def nt_xent_by_loops(
    x: Tensor, temperature: Tensor, ids: Tensor | None, num_views: int = 2, decoupled: bool = False
) -> Tensor:
    z = unit(x)
    N, B = len(z), len(z) // num_views
    terms = []
    for i in range(N):
        positives = [j for j in range(N) if j != i and j % B == i % B]
        negatives = [j for j in range(N) if j % B != i % B and (ids is None or ids[j % B] != ids[i % B])]
        for p in positives:
            pos = (z[i] @ z[p] / temperature).exp()
            if not negatives:
                terms.append(0 * pos)
                continue
            neg = torch.stack([(z[i] @ z[j] / temperature).exp() for j in negatives]).sum()
            terms.append(neg.log() - pos.log() if decoupled else (neg / pos).log1p())
    return torch.stack(terms).mean()


def sup_con_by_loops(x: Tensor, temperature: float, labels: Tensor, num_views: int = 2) -> Tensor:
    z = unit(x)
    N, B = len(z), len(z) // num_views
    total = x.new_zeros(())
    for i in range(N):
        own = int(labels[i % B])
        positives = [j for j in range(N) if j != i and (j % B == i % B or own == int(labels[j % B]) >= 0)]
        denominator = torch.stack([(z[i] @ z[j] / temperature).exp() for j in range(N) if j != i]).sum()
        for p in positives:
            total -= ((z[i] @ z[p] / temperature).exp() / denominator).log() / len(positives) / N
    return total


def clip_by_cross_entropy(
    x: Tensor, temperature: Tensor, groups: Tensor | None = None, decoupled: bool = False
) -> Tensor:
    """The mean of both directions of view 0 [G, K] against view 1; groups [G] are no negatives of one another."""
    s = torch.stack(unit(x)).unflatten(0, (2, -1))
    s = s[0] @ s[1].T / temperature
    own = torch.eye(len(s), dtype=torch.bool)
    hidden = own if groups is None else groups[:, None] == groups
    s = s.masked_fill(hidden & ~own, -torch.inf)
    if not decoupled:
        return (F.cross_entropy(s, own.nonzero()[:, 1]) + F.cross_entropy(s.T, own.nonzero()[:, 1])) / 2
    some = ~hidden.all(1)  # a row without negatives adds nothing
    negatives = [x.masked_fill(own, -torch.inf)[some].logsumexp(1) for x in (s, s.T)]
    return sum(((log_q - s.diagonal()[some]).sum() for log_q in negatives), s.new_zeros(())) / (2 * len(s))


def value_and_gradients(function: Callable[..., Tensor], x: Tensor, temperature: float) -> list[Tensor]:
    """The loss and its gradients in x and in -1 / temperature, whose size does not depend on the temperature's."""
    x, tau = x.clone().requires_grad_(), torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = function(x, tau)
    x_grad, tau_grad = torch.autograd.grad(loss, (x, tau), allow_unused=True)
    return [loss.detach(), x_grad, torch.zeros(()) if tau_grad is None else tau_grad * temperature**2]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for name, x, y in zip(("value", "gradient of z", "gradient of the temperature"), found, expected, strict=True):
        assert x.isfinite().all(), f"{name}: {x}"
        assert float((x - y).norm()) <= tolerance * max(1.0, float(y.norm())), f"{name}: {x} instead of {y}"


def opposite(B: int, K: int) -> Tensor:
    rows = random_rows(B, K)
    return torch.cat([rows, -rows])


def with_zero_rows(B: int, K: int) -> Tensor:
    rows = random_rows(2 * B, K)
    rows[1] = 0
    rows[B:] *= torch.arange(B)[:, None] > 1
    return rows


BATCHES = {
    "random": random_rows(14, 5),
    "many rows": random_rows(46, 3),
    "one dimension": random_rows(8, 1),
    "one image": random_rows(2, 4),
    "two images": random_rows(4, 4),
    "identical rows": random_rows(1, 6).expand(10, -1),
    "identical views": random_rows(5, 6).repeat(2, 1),
    "opposite views": opposite(5, 6),
    "zero rows": with_zero_rows(5, 4),
    "all zero": torch.zeros(6, 4, dtype=torch.float64),
}


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_value_and_gradients_equal_the_loops(implementation: str, batch: str, temperature: float) -> None:
    x = BATCHES[batch]
    found = value_and_gradients(lambda z, tau: nt_xent(z, tau, implementation=implementation), x, temperature)
    expected = value_and_gradients(lambda z, tau: nt_xent_by_loops(z, tau, None), x, temperature)
    assert_close(found, expected)


@pytest.mark.parametrize("num_views", [3, 4])
def test_every_other_view_is_a_positive_against_the_negatives_only(implementation: str, num_views: int) -> None:
    x = random_rows(5 * num_views, 6)
    found = value_and_gradients(
        lambda z, tau: nt_xent(z, tau, num_views=num_views, implementation=implementation), x, 0.2
    )
    assert_close(found, value_and_gradients(lambda z, tau: nt_xent_by_loops(z, tau, None, num_views), x, 0.2))


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("ids", [None, [7, 3, 7, 7, 2**40]])
def test_decoupled_loss_leaves_the_positive_out_of_the_denominator(
    implementation: str, num_views: int, ids: list[int] | None
) -> None:
    x, numbers = random_rows(5 * num_views, 6), None if ids is None else torch.tensor(ids)
    options = {"num_views": num_views, "decoupled": True}
    found = value_and_gradients(
        lambda z, tau: nt_xent(z, tau, numbers, implementation=implementation, **options), x, 0.2
    )
    assert_close(found, value_and_gradients(lambda z, tau: nt_xent_by_loops(z, tau, numbers, **options), x, 0.2))


@pytest.mark.parametrize(
    ("ids", "count"),
    [([0, 1, 2, 3, 4], 0), ([5, 1, 5, 3, 4], 1), ([2**40, 2**40 + 2**32, 2**40, 7, 7], 2), ([1, 1, 1, 1, 1], 4)],
)
def test_duplicates_are_no_negatives_and_are_counted(implementation: str, ids: list[int], count: int) -> None:
    x, numbers = random_rows(10, 6), torch.tensor(ids)
    loss = NTXentLoss(0.2, implementation)
    found = value_and_gradients(lambda z, _: loss(z, numbers), x, 0.2)[:2]
    expected = value_and_gradients(lambda z, tau: nt_xent_by_loops(z, tau, numbers), x, 0.2)
    assert_close([*found, expected[2]], expected)
    assert int(loss.masked_duplicates) == count


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_pairs_across_are_cross_entropy_in_both_directions(implementation: str, batch: str, temperature: float) -> None:
    x = BATCHES[batch]
    found = value_and_gradients(
        lambda z, tau: nt_xent(z, tau, pairs="across", implementation=implementation), x, temperature
    )
    assert_close(found, value_and_gradients(clip_by_cross_entropy, x, temperature))


GROUPS = [[0, 1, 2, 3, 4, 5, 6], [5, 1, 5, -3, 1, 5, 9], [2**40, 7, 2**40 + 2**32, -(2**40), 7, 2**40, 0], [4] * 7]


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_rows_of_one_group_are_no_negatives_and_keep_their_positive(
    implementation: str, groups: list[int], decoupled: bool, temperature: float
) -> None:
    x, numbers = random_rows(14, 6), torch.tensor(groups)
    options = {"decoupled": decoupled, "implementation": implementation}
    within = value_and_gradients(lambda z, tau: nt_xent(z, tau, group_ids=numbers, **options), x, temperature)
    assert_close(
        within, value_and_gradients(lambda z, tau: nt_xent_by_loops(z, tau, numbers, 2, decoupled), x, temperature)
    )
    across = value_and_gradients(
        lambda z, tau: nt_xent(z, tau, pairs="across", group_ids=numbers, **options), x, temperature
    )
    assert_close(
        across, value_and_gradients(lambda z, tau: clip_by_cross_entropy(z, tau, numbers, decoupled), x, temperature)
    )


@pytest.mark.parametrize("pairs", PAIRS)
def test_groups_of_one_are_no_groups_and_the_groups_count_before_the_samples(pairs: Pairs) -> None:
    x = random_rows(14, 6, torch.float32)
    loss = NTXentLoss(0.2, pairs=pairs)
    alone = value_and_gradients(lambda z, _: loss(z), x, 0.2)
    for ids in ({"group_ids": torch.arange(7)}, {"sample_ids": [3] * 7, "group_ids": range(7)}):
        for a, b in zip(value_and_gradients(lambda z, _, ids=ids: loss(z, **ids), x, 0.2), alone, strict=True):
            assert torch.equal(a, b)
    together = loss(x, torch.arange(7), group_ids=[0, 0, 1, 2, 3, 4, 4])
    assert int(loss.masked_duplicates) == 2
    assert float(together) < float(alone[0])


def test_gradcheck(implementation: str) -> None:
    x = random_rows(10, 4).requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 3])
    for decoupled, pairs in itertools.product((False, True), PAIRS):
        options = {"decoupled": decoupled, "pairs": pairs, "implementation": implementation}
        assert torch.autograd.gradcheck(lambda z, t, options=options: nt_xent(z, t, ids, **options), (x, tau))
    sup_con = SupConLoss(0.3, implementation, learn_temperature=True).double()  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lambda z, log_tau: sup_con(z, ids), (x, sup_con.log_temperature))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [1, 1, 0, 1, 0], [3, 3, 3, 3, 3], [-1, 2, -1, 2, -1]])
@pytest.mark.parametrize("num_views", [2, 3])
def test_sup_con_equals_the_loops(implementation: str, labels: list[int], num_views: int) -> None:
    x, classes = random_rows(5 * num_views, 6), torch.tensor(labels)
    loss = SupConLoss(0.2, implementation, num_views=num_views)  # type: ignore[arg-type]
    found = value_and_gradients(lambda z, _: loss(z, classes), x, 0.2)
    assert_close(found, value_and_gradients(lambda z, _: sup_con_by_loops(z, 0.2, classes, num_views), x, 0.2))


def test_sup_con_of_unlabelled_images_is_nt_xent() -> None:
    x = random_rows(12, 6)
    assert SupConLoss(0.2)(x, torch.full((6,), -1)).item() == pytest.approx(nt_xent(x, 0.2).item(), rel=1e-13)


@pytest.mark.parametrize("N", [2, 16, 300])
def test_identical_rows_cost_log_of_the_number_of_choices(implementation: str, N: int) -> None:
    rows = torch.full((N, 3), 0.7)
    assert nt_xent(rows, implementation=implementation).item() == pytest.approx(math.log(N - 1), rel=1e-6)


@pytest.mark.parametrize("kind", [Within, Across])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("num_rows", "size"), [(2, 2), (6, 2), (10, 3), (10, 16)])
def test_all_ranks_together_have_a_tile_for_every_pair_once(
    kind: type[Within | Across], world_size: int, num_rows: int, size: int
) -> None:
    """Of Within those of a row with itself, and in its own block both of two rows of a tile, beside."""
    N, B = num_rows * world_size, num_rows // 2
    view = torch.arange(N) // B % 2
    wanted = torch.ones(N, N) if kind is Within else (view[:, None] != view).float()
    once, of_all_columns = torch.zeros(N, N), torch.zeros(N, N)
    for rank in range(world_size):
        tiles, first = kind(rank, world_size, num_rows, size), rank * num_rows
        for own, (i, j) in [*((True, t) for t in tiles.own()), *((False, t) for t in tiles.shared())]:
            assert i.stop - i.start <= size
            assert j.stop - j.start <= size
            rows = slice(i.start + first, i.stop + first)
            columns = slice(j.start + first, j.stop + first) if own else j
            once[rows, columns] += 1
            if rows != columns:
                once[columns, rows] += 1
            if own:
                of_all_columns[rows, columns] = of_all_columns[columns, rows] = 1
        for i, j in tiles.others():
            of_all_columns[i.start + first : i.stop + first, j] += 1
    assert torch.equal(once, wanted)
    assert torch.equal(of_all_columns, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Float32 and less


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows", [512, 1300])
@pytest.mark.parametrize("pairs", PAIRS)
def test_float32_gradient_is_exact_to_a_millionth(rows: int, pairs: Pairs) -> None:
    x = random_rows(rows, 32, torch.float32)
    plain = {"pairs": pairs, "implementation": "plain"}
    expected = value_and_gradients(lambda z, t: nt_xent(z, t, **plain), x.double(), 0.1)
    for name in ("plain", "tiled"):
        found = value_and_gradients(lambda z, t, name=name: nt_xent(z, t, pairs=pairs, implementation=name), x, 0.1)
        assert relative_error(found[0], expected[0]) < 1e-6
        assert relative_error(found[1], expected[1]) < 1e-6
        assert relative_error(found[2], expected[2]) < 1e-5


def test_float32_gradient_keeps_its_digits_when_the_batch_is_nearly_solved() -> None:
    """Softmax minus one-hot would be wrong by more than its own size here."""
    view = torch.eye(64, dtype=torch.float64) + 0.02 * random_rows(64, 64)
    x = torch.cat([view, view + 0.02 * random_rows(64, 64, seed=1)]).float()
    expected = value_and_gradients(lambda z, t: nt_xent(z, t, implementation="plain"), x.double(), 0.02)
    assert expected[0] < 1e-15
    for name in ("plain", "tiled"):
        found = value_and_gradients(lambda z, t, name=name: nt_xent(z, t, implementation=name), x, 0.02)
        assert relative_error(found[0], expected[0]) < 1e-5
        assert relative_error(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_cost_the_input_rounding_only(implementation: str, dtype: torch.dtype) -> None:
    x = random_rows(200, 32, dtype)
    expected = value_and_gradients(lambda z, t: nt_xent(z, t, implementation="plain"), x.double(), 0.1)
    found = value_and_gradients(lambda z, t: nt_xent(z, t, implementation=implementation), x, 0.1)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 2 * torch.finfo(dtype).eps


def test_a_loss_scale_is_applied_before_the_gradient_is_rounded_to_float16() -> None:
    x = random_rows(400, 32, torch.float16).requires_grad_()
    scale = 2.0**14
    (gradient,) = torch.autograd.grad(nt_xent(x, 1.0) * scale, x)
    exact = value_and_gradients(lambda z, t: nt_xent(z, t, implementation="plain"), x.detach().double(), 1.0)[1]
    assert relative_error(gradient.double() / scale, exact) < 1e-3


def test_autocast_around_the_loss_changes_nothing(implementation: str) -> None:
    x = random_rows(40, 16, torch.float32)

    def in_autocast(z: Tensor, tau: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nt_xent(z, tau, implementation=implementation)

    outside = value_and_gradients(lambda z, t: nt_xent(z, t, implementation=implementation), x, 0.1)
    inside = value_and_gradients(in_autocast, x, 0.1)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.005, 0.0125, 0.015, 0.05])
@pytest.mark.parametrize("batch", BATCHES)
def test_low_temperatures_stay_finite_and_right_in_float32(batch: str, temperature: float) -> None:
    x = BATCHES[batch].float()
    expected = value_and_gradients(lambda z, t: nt_xent_by_loops(z, t, None), x.double(), temperature)
    found = value_and_gradients(lambda z, t: nt_xent(z, t, implementation="tiled"), x, temperature)
    assert_close([g.double() for g in found], expected, tolerance=1e-4)
    expected = value_and_gradients(clip_by_cross_entropy, x.double(), temperature)
    found = value_and_gradients(lambda z, t: nt_xent(z, t, pairs="across", implementation="tiled"), x, temperature)
    assert_close([g.double() for g in found], expected, tolerance=1e-4)


def test_a_temperature_beyond_float64_is_refused_with_a_way_out() -> None:
    x = random_rows(8, 4)
    with pytest.raises(
        ValueError, match=r"too low for exp.* in float64; use at least 0.0015, or implementation='plain'"
    ):
        nt_xent(x, 0.001)
    assert nt_xent(x, 0.001, implementation="plain").isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# The module


def test_learned_temperature_descends_like_its_logarithm() -> None:
    x = random_rows(12, 6)
    loss = NTXentLoss(0.3, learn_temperature=True).double()
    loss(x).backward()
    tau = loss.log_temperature.exp().detach()
    expected = value_and_gradients(lambda z, t: nt_xent_by_loops(z, t, None), x, float(tau))[2]
    assert loss.log_temperature.grad is not None
    assert float(loss.log_temperature.grad) == pytest.approx(float(expected / tau), rel=1e-12)
    assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
    supervised = SupConLoss(0.3, learn_temperature=True).double()
    supervised(x, [-1] * 6).backward()  # without a label it is NT-Xent
    assert float(supervised.log_temperature.grad) == pytest.approx(float(loss.log_temperature.grad), rel=1e-12)
    assert repr(NTXentLoss(0.3)) == "NTXentLoss(temperature=0.3, implementation=auto)"


def test_a_learned_temperature_is_kept_between_its_limits_and_the_code_is_chosen_for_the_lowest() -> None:
    loss = NTXentLoss(0.3, learn_temperature=True, temperature_min=0.01, temperature_max=0.5)
    assert loss.settle(torch.device("cpu"), num_rows=8, width=4).code == "tiled in float64"
    for log_temperature, expected in ((-9.0, 0.01), (math.log(0.2), 0.2), (3.0, 0.5)):
        loss.log_temperature.data.fill_(log_temperature)
        loss.limit_temperature()
        assert loss.temperature_now == pytest.approx(expected)
    fixed = NTXentLoss(5.0)
    fixed.limit_temperature()
    assert fixed.temperature == 5.0


KINDS = ("nt_xent", "dcl", "supcon")


@pytest.mark.parametrize(
    ("kind", "num_views", "pairs"),
    [*((kind, V, "within") for kind in KINDS for V in (2, 4)), ("nt_xent", 2, "across"), ("dcl", 2, "across")],
)
def test_guessing_costs_the_logarithm_of_what_the_summary_says(kind: str, num_views: int, pairs: Pairs) -> None:
    """Where all rows are alike, nothing is known: the value of each kind of loss is ln of the rows it chooses among."""
    config, G = LossConfig(kind=kind, pairs=pairs, temperature=0.3), 6  # type: ignore[arg-type]
    z, labels = torch.full((num_views * G, 5), 0.4, dtype=torch.float64), torch.tensor([0, 0, 1, -1, 2, -1])
    value = build_loss(config, num_views)(z, labels if kind == "supcon" else torch.arange(G))
    assert float(value) == pytest.approx(math.log(choices(config, num_views, G)), rel=1e-12)


def test_a_configured_loss_has_all_of_its_settings() -> None:
    settings = {"temperature": 0.2, "learn_temperature": True, "temperature_min": 0.1, "temperature_max": 0.4}
    for kind in KINDS:
        config = LossConfig(kind=kind, implementation="tiled", gather_dtype="bfloat16", row_dtype="float16", **settings)
        loss = build_loss(config, 3)
        assert isinstance(loss, SupConLoss) == (kind == "supcon")
        assert loss.settings == Settings(3, "tiled", torch.bfloat16, torch.float16, decoupled=kind == "dcl")
        loss.log_temperature.data.fill_(1.0)
        loss.limit_temperature()
        assert loss.temperature_now == pytest.approx(0.4)


def test_without_gradients_only_the_value_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_rows(8, 4)
    expected = nt_xent(x, 0.2, implementation="plain")
    monkeypatch.setattr(tiled.Tiles, "gradient_rows", None)
    assert nt_xent(x, 0.2, implementation="tiled").item() == pytest.approx(expected.item())
    with torch.no_grad():
        nt_xent(x.requires_grad_(), 0.2, implementation="tiled")


def test_rows_may_be_a_view_of_something_larger(implementation: str) -> None:
    wide = random_rows(10, 12)
    assert_close(
        value_and_gradients(lambda z, t: nt_xent(z[:, ::2], t, implementation=implementation), wide, 0.2),
        value_and_gradients(lambda z, t: nt_xent_by_loops(z[:, ::2], t, None), wide, 0.2),
    )


@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (
            torch.zeros(5, 4),
            {},
            r"z has the shape \[5, 4\]; expected \[2 \* B, K\]: all rows of view 0, then all of view 1",
        ),
        (torch.zeros(0, 4), {}, r"z has the shape \[0, 4\]"),
        (torch.zeros(4, 0), {}, r"z has the shape \[4, 0\]"),
        (torch.zeros(2, 3, 4), {}, r"z has 3 dimensions; expected \[views \* B, K\]"),
        (torch.zeros(2, 3, 4), {}, r"of a stack of views \[views, B, K\] it is z.flatten\(0, 1\)"),
        (torch.zeros(4), {}, "z has 1 dimensions"),
        (torch.zeros(4, 4), {"temperature": torch.ones(4, 4)}, r"the views go together: torch.cat\(\[z0, z1\]\)"),
        (torch.zeros(4, 4), {"sample_ids": torch.ones(4, 4)}, r"the views go together: torch.cat\(\[z0, z1\]\)"),
        (torch.zeros(4, 4), {"temperature": torch.ones(3)}, "the temperature must be one number"),
        (torch.zeros(4, 4), {"sample_ids": ["cat", "dog"]}, r"must be int64 or int32 of shape \[B\]"),
        (torch.zeros(4, 4), {"sample_ids": [0.5, 1.5]}, r"must be int64 or int32 of shape \[B\]"),
        (torch.zeros(4, 4), {"sample_ids": [[0, 1], [2, 3]]}, r"must be int64 or int32 of shape \[B\]"),
        (torch.zeros(4, 4), {"sample_ids": [0, 1, 2]}, r"3 sample ids \(or labels\) for 2 images"),
        (torch.zeros(4, 4, dtype=torch.int64), {}, "z must be float16, bfloat16, float32 or float64"),
        (torch.zeros(4, 4), {"num_views": 1}, "num_views is 1; a positive needs at least 2 views"),
        (torch.zeros(6, 4), {"num_views": 3, "pairs": "across"}, "view 0 with view 1; num_views must be 2, found 3"),
        (torch.zeros(4, 4), {"pairs": "between"}, "unknown pairs 'between'; known: within, across"),
        (torch.zeros(4, 4), {"group_ids": [0, 1, 2]}, r"3 sample ids \(or labels\) for 2 images"),
        (torch.zeros(4, 4), {"temperature": 0.0}, "the temperature is 0.0; it must be a positive number"),
        (torch.zeros(4, 4), {"temperature": math.nan}, "the temperature is nan"),
        (torch.zeros(4, 4), {"sample_ids": torch.arange(4)}, r"4 sample ids \(or labels\) for 2 images"),
        (torch.zeros(4, 4), {"sample_ids": torch.zeros(2)}, r"must be int64 or int32 of shape \[B\]"),
        (torch.zeros(4, 4), {"sample_ids": torch.arange(2, device="meta")}, "are on another device than z"),
        (
            torch.zeros(4, 4),
            {"implementation": "fast"},
            "unknown implementation 'fast'; known: auto, plain, tiled, triton",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(z: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(z, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: nt_xent((z, z)), r"z must be a tensor .*, found a tuple; .* torch.cat\(\[z0, z1\]\)"),
        (lambda z: SupConLoss()([z, z], [0, 1]), r"found a list; .* torch.cat\(\[z0, z1\]\)"),
        (lambda z: nt_xent(z.numpy()), r"z must be a tensor .*, found a ndarray$"),
        (lambda z: nt_xent(z, "0.1"), "the temperature must be a number, found '0.1'"),
        (lambda z: SupConLoss()(z, None), "needs labels .* use NTXentLoss"),
        (lambda z: SupConLoss(pairs="across")(z, [0, 1]), "argument 'pairs'"),
    ],
)
def test_mistakes_in_the_call_are_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(torch.randn(4, 3))


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_labels_and_ids_may_be_lists(kind: Callable) -> None:
    z, labels = torch.randn(12, 5), [0, 1, 0, 2, 2, -1]
    assert torch.equal(SupConLoss()(z, kind(labels)), SupConLoss()(z, torch.tensor(labels)))
    assert torch.equal(nt_xent(z, 0.2, kind(labels)), nt_xent(z, np.float32(0.2), torch.tensor(labels)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_are_named(value: float) -> None:
    z = torch.ones(6, 4)
    z[2, 1] = z[4, 0] = value
    with pytest.raises(NonFiniteError, match=r"z is NaN or infinite \(2 of 6 rows, first row 2\)") as caught:
        nt_xent(z)
    assert caught.value.bad_rows == {0: (2, 2)}
