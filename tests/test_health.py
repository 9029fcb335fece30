"""Each number of the health panel against another way to compute it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.health import figures as health
from simclr_dist.health.check import WATCH_PATIENCE, Findings, HealthCheck, RankFacts, own_sample
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.parallel.distributed import World
from tests.distributed.spawn import run_ranks

M, K = 23, 7


@pytest.fixture(params=[2, 3])
def z(request: pytest.FixtureRequest) -> Tensor:
    """[V, M, K]: positives that are near, not the same."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(M, K, generator=generator)
    return image + 0.7 * torch.randn(request.param, M, K, generator=generator)


def pairs_by_hand(z: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Of each row: the cosines with its positives, and those with its negatives."""
    rows = [(i, z[v, i].double()) for v in range(len(z)) for i in range(M)]
    positives, negatives = [], []
    for a, (image, x) in enumerate(rows):
        cosines = [(i == image, float(x @ y / x.norm() / y.norm())) for b, (i, y) in enumerate(rows) if b != a]
        positives.append([s for same, s in cosines if same])
        negatives.append([s for same, s in cosines if not same])
    return positives, negatives


def test_similarities_are_those_of_pairs(z: Tensor) -> None:
    positives, negatives = pairs_by_hand(z)
    found = health.similarities(z)
    assert found.positives.numpy() == pytest.approx(np.array(positives), abs=1e-6)
    assert np.sort(found.negatives, 1) == pytest.approx(np.sort(negatives, 1), abs=1e-6)


GROUPS = [i % 20 for i in range(M)]  # three pairs of images belong together


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("across", [False, True])
def test_negatives_are_those_of_the_loss(z: Tensor, across: bool, groups: list[int] | None) -> None:
    """Pairs across views, and rows of one group, which are no negatives of one another."""
    unit, of_image, V = F.normalize(z.double(), dim=2), groups or list(range(M)), len(z)
    found = health.similarities(z, across=across, groups=None if groups is None else torch.tensor(groups) + 2**40)
    hits, seen = [], 0
    for v, i in itertools.product(range(V), range(M)):
        row = sorted(
            float(unit[v, i] @ unit[w, j])
            for w, j in itertools.product(range(V), range(M))
            if of_image[j] != of_image[i] and (w != v or not across)
        )
        mine = found.negatives[v * M + i]
        assert np.sort(mine[~mine.isnan()]) == pytest.approx(row, abs=1e-6)
        positives = [float(unit[v, i] @ unit[w, i]) for w in range(V) if w != v]
        assert found.positives[v * M + i].tolist() == pytest.approx(positives, abs=1e-6)
        hits += [sum(n > p for n in row) < 5 for p in positives]
        seen += len(row)
    assert int((~found.negatives.isnan()).sum()) == seen
    assert float(health.contrastive_accuracy(found, 5)) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("k", [1, 5])
def test_contrastive_accuracy_counts_rows_whose_positive_is_near(z: Tensor, k: int) -> None:
    positives, negatives = pairs_by_hand(z)
    hits = [sum(n > p for n in row) < k for near, row in zip(positives, negatives, strict=True) for p in near]
    assert 0 < sum(hits) < len(hits)
    assert float(health.contrastive_accuracy(health.similarities(z), k)) == pytest.approx(sum(hits) / len(hits))


def test_contrastive_accuracy_of_a_collapsed_network_is_zero() -> None:
    same = torch.ones(2, M, K)
    assert float(health.contrastive_accuracy(health.similarities(same), 5)) == 0


def test_alignment_and_uniformity_are_those_of_wang_and_isola(z: Tensor) -> None:
    unit = F.normalize(z.double(), dim=2)
    pairs = itertools.combinations(unit, 2)
    by_definition = torch.stack([(a - b).norm(dim=1).pow(2).mean() for a, b in pairs]).mean()
    assert float(health.alignment(health.similarities(z))) == pytest.approx(float(by_definition), rel=1e-5)
    by_pdist = [torch.pdist(view).pow(2).mul(-2).exp().mean().log() for view in unit]
    assert float(health.uniformity(z)) == pytest.approx(float(sum(by_pdist) / len(z)), rel=1e-5)


def test_uniformity_of_even_and_collapsed_directions() -> None:
    assert float(health.uniformity(torch.ones(2, M, K))) == pytest.approx(0, abs=1e-5)
    even = torch.randn(2, 4000, 256, generator=torch.Generator().manual_seed(0))
    assert float(health.uniformity(even)) == pytest.approx(-4 + 2 * 4 / 256, abs=0.02)  # E exp(4 s), s of variance 1/d


def test_lidar_is_the_rank_of_linear_discriminant_analysis() -> None:
    """By the square root of S_w and sums over views, as the paper has it."""
    x = np.random.default_rng(0).normal(size=(4, 60, 1, 7)) * 0.3 + np.random.default_rng(1).normal(size=(60, 1, 7))
    x = x[:, :, 0] * np.linspace(0.1, 2, 7)
    S_w, S_b, centre = np.zeros((7, 7)), np.zeros((7, 7)), x.mean((0, 1))
    for i in range(60):
        mean = x[:, i].mean(0)
        S_b += np.outer(mean - centre, mean - centre) / 60
        for view in x[:, i]:
            S_w += np.outer(view - mean, view - mean) / 240
    S_w += 1e-4 * np.trace(S_w) / 7 * np.eye(7)
    eigenvalues, vectors = np.linalg.eigh(S_w)
    root = vectors @ np.diag(eigenvalues**-0.5) @ vectors.T
    p = np.linalg.eigvalsh(root @ S_b @ root)
    p = p / p.sum() + 1e-7
    assert float(health.lidar(torch.tensor(x))) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_lidar_counts_the_directions_that_tell_images_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(4000, 6, generator=generator), torch.randn(4, 4000, 6, generator=generator)
    assert float(health.lidar(image + 0.01 * noise)) == pytest.approx(6, rel=0.01)
    assert float(health.lidar(3e4 * (image + 0.01 * noise))) == pytest.approx(6, rel=0.01)  # whatever the scale
    image[:, 1:] = 0  # the other directions differ between views only: their rest of 1/V is no signal
    assert float(health.lidar(image + 0.01 * noise)) == pytest.approx(1, rel=0.01)
    assert float(health.lidar(torch.ones(4, 20, 6))) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("a", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(80, 40), (30, 90)])
def test_alpha_req_is_the_power_of_a_spectrum(a: float, shape: tuple[int, int]) -> None:
    M, d = shape
    generator = np.random.default_rng(0)
    u = np.linalg.qr(generator.normal(size=(M, M)))[0]
    u = np.linalg.qr((u - u.mean(0))[:, : min(M - 1, d)])[0]  # columns of mean 0
    v = np.linalg.qr(generator.normal(size=(d, d)))[0][: u.shape[1]]
    x = 7 + u @ np.diag(np.arange(1, u.shape[1] + 1.0) ** (-a / 2)) @ v
    assert float(health.alpha_req(torch.tensor(x))) == pytest.approx(a, rel=1e-6)


def test_neighbours_shared_are_those_that_scikit_learn_finds_in_both() -> None:
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    a = np.random.default_rng(0).normal(size=(90, 6))
    b = a[:, :4] + 0.5 * np.random.default_rng(1).normal(size=(90, 4))  # another width: two encoders
    found = [NearestNeighbors(n_neighbors=5, metric="cosine").fit(x).kneighbors(return_distance=False) for x in (a, b)]
    expected = [len(set(i) & set(j)) / 5 for i, j in zip(*found, strict=True)]
    assert 0.1 < np.mean(expected) < 0.9
    assert health.neighbours_shared(torch.tensor(a), torch.tensor(b), 5).tolist() == pytest.approx(expected)
    assert health.neighbours_shared(torch.tensor(a), torch.tensor(3 * a), 5).tolist() == [1] * 90


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_rankme_is_the_entropy_of_singular_values(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape) @ np.diag(np.linspace(0.01, 3, shape[1]))
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert float(health.rankme(torch.from_numpy(x).float())) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_rankme_counts_equal_directions() -> None:
    assert float(health.rankme(torch.eye(6).repeat(3, 1))) == pytest.approx(6, rel=1e-4)
    assert float(health.rankme(torch.ones(20, 6))) == pytest.approx(1, rel=1e-4)
    assert float(health.rankme(torch.zeros(20, 6))) == pytest.approx(1, rel=1e-4)


def test_spread_is_one_for_even_directions_and_zero_for_one() -> None:
    even = torch.randn(50_000, 16, generator=torch.Generator().manual_seed(0))
    assert health.spread(even).tolist() == pytest.approx([1] * 16, abs=0.02)
    assert health.spread(torch.ones(9, 16)).abs().amax() < 1e-5
    x = np.random.default_rng(0).normal(1, 2, (30, 5))
    by_numpy = (x / np.linalg.norm(x, axis=1, keepdims=True)).std(0) * math.sqrt(5)
    assert health.spread(torch.from_numpy(x)).tolist() == pytest.approx(by_numpy.tolist())


def test_histogram_counts_as_numpy_does() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = health.histogram(values)
    counts, edges = np.histogram(values.numpy(), 64, (-1, 1))
    assert found.counts == counts.tolist()
    assert found.upper_edges == pytest.approx(edges[1:].tolist())
    assert found.total == pytest.approx(float(values.sum()), rel=1e-4)
    assert (found.low, found.high) == (float(values.amin()), float(values.amax()))
    assert found.total_of_squares == pytest.approx(float(values.square().sum()), rel=1e-4)


def test_alarm_rings_once_an_episode() -> None:
    alarm = health.Alarm(patience=2)
    bad = [True, False, True, True, True, True, False, True, True]
    assert [alarm.rings(b) for b in bad] == [False, False, False, True, False, False, False, False, True]


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)).double()


def test_batch_norm_drift_compares_the_batch_with_what_was_known() -> None:
    network = small_network()
    norms = health.tracking_norms(network)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(3):
        network(x)
    before = health.running_statistics(norms)
    seen: list[Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(1.7 * x + 1)
    shifts, ratios = [], []
    for y, (mean, var) in zip(seen, before, strict=True):
        shifts.append(((y.mean(0) - mean) / (var + 1e-5).sqrt()).pow(2).mean().sqrt())
        ratios.append(((y.var(0) + 1e-5) / (var + 1e-5)).log().abs().mean())
    shift, ratio = health.batch_norm_drift(norms, before)
    assert float(shift) == pytest.approx(float(max(shifts)), rel=1e-6)
    assert float(ratio) == pytest.approx(float(max(ratios)), rel=1e-6)
    assert float(shift) > 0.1


def test_local_gradient_norm_is_that_of_grad_and_changes_nothing() -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double()
    plain, watched = small_network(), small_network()
    plain(x).square().sum().backward()
    with health.local_gradient_norm(watched.parameters()) as norms:
        watched(x).square().sum().backward()
    by_grad = torch.cat([p.grad.flatten() for p in watched.parameters()]).norm()  # type: ignore[union-attr]
    assert float(health.norm_of(norms)) == pytest.approx(float(by_grad), rel=1e-6)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    assert not any(p._backward_hooks for p in watched.parameters())


def test_local_gradient_norm_of_micro_batches_is_that_of_their_sum() -> None:
    network = nn.Linear(5, 3)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    with health.local_gradient_norm(network.parameters()) as norms:
        for part in x.split(3):
            network(part).square().sum().backward()
    whole = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()  # type: ignore[union-attr]
    assert float(health.norm_of(norms)) == pytest.approx(float(whole), rel=1e-6)


def test_gradient_disagreement_is_the_spread_of_gradients() -> None:
    gradients = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).double() + 0.5
    mean = gradients.mean(0)
    expected = ((gradients - mean).pow(2).sum(1).mean() / mean.pow(2).sum()).item()
    found = health.gradient_disagreement(gradients.norm(dim=1), mean.norm())
    assert float(found) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Over ranks


def sample_of_rank(rank: int, world_size: int, num_images: int) -> Tensor:
    whole = torch.arange(2 * 24 * 3, dtype=torch.float32).view(2, 24, 3)
    B = 24 // world_size
    return own_sample(whole[:, rank * B : (rank + 1) * B], World(rank, world_size), num_images)


@pytest.mark.parametrize("num_images", [1, 5, 10, 24, 1000])
def test_sample_is_spread_over_the_batch(num_images: int) -> None:
    whole = torch.arange(2 * 24 * 3, dtype=torch.float32).view(2, 24, 3)
    wanted = [j * 24 // min(24, num_images) for j in range(min(24, num_images))]
    assert torch.equal(sample_of_rank(0, 1, num_images), whole[:, wanted])


@pytest.mark.parametrize("num_images", [1, 5, 10, 24])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_sample_is_the_same_for_any_number_of_ranks(num_images: int, world_size: int) -> None:
    """Without a process group the sum over ranks is ours to make."""
    parts = [sample_of_rank(rank, world_size, num_images) for rank in range(world_size)]
    assert torch.equal(torch.stack(parts).sum(0), sample_of_rank(0, 1, num_images))


def examined(rank: int, world_size: int, groups: Tensor | None = None, **options: Any) -> Findings:
    """A step of a small network with global BatchNorm on 32 images, looked at."""
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).double()
    generator = torch.Generator().manual_seed(3)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator).double()
    network = convert_to_global_batch_norm(network)  # type: ignore[assignment]
    views = torch.randn(2, 32, 5, generator=generator).double()
    B = 32 // world_size
    own = views[:, rank * B : (rank + 1) * B].flatten(0, 1)
    model: nn.Module = network if world_size == 1 else nn.parallel.DistributedDataParallel(network)
    check = HealthCheck(2, network, World(rank, world_size), **options)
    with check.record(2) as recording:
        z = model(own)
        z.square().mean().backward()
    assert recording is not None
    facts = RankFacts(data_wait_share=0.1 * rank, memory_peak_gib=float(rank))
    mine = None if groups is None else groups[rank * B : (rank + 1) * B]
    return check.examine(recording, own.sin(), z, facts, group_ids=mine)


def examined_in_groups(rank: int, world_size: int) -> Findings:
    """Beyond float32's integers, so that 2**40 and 2**40 + 1 are two groups."""
    return examined(rank, world_size, torch.arange(32) // 2 % 11 + 2**40, across=True)


def norms_of_rank(rank: int, world_size: int) -> tuple[float, float, float]:
    """The own gradient's norm as measured under DDP, without DDP, and the averaged one's."""
    torch.manual_seed(0)
    network = nn.Linear(5, 3)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank))
    model = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    with health.local_gradient_norm(network.parameters()) as norms:
        model(x).square().sum().backward()
    averaged = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()  # type: ignore[union-attr]
    alone = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    return float(health.norm_of(norms)), float(torch.cat([g.flatten() for g in alone]).norm()), float(averaged)


def ranks_apart(rank: int, world_size: int) -> Findings:
    """Two ranks whose averages differ, as after a broken all-reduce: each has a model of its own, without DDP."""
    torch.manual_seed(rank)
    network = nn.Linear(5, 3)
    check = HealthCheck(1, network, World(rank, world_size))
    with check.record(1) as recording:
        z = network(torch.randn(8, 5))
        z.square().sum().backward()
    assert recording is not None
    return check.examine(recording, z, z, RankFacts(0.0, 0.0))


def crafted(rank: int, world_size: int) -> Findings:
    """The loss of each rank is linear: its gradient is what it is multiplied with."""
    network = nn.Linear(2, 1, bias=False)
    model = nn.parallel.DistributedDataParallel(network)
    check = HealthCheck(1, network, World(rank, world_size))
    with check.record(1) as recording:
        model(torch.tensor([[[3.0, 0.0], [1.0, 2.0]][rank]])).sum().backward()
    well = torch.randn(32, 16, generator=torch.Generator().manual_seed(rank))
    assert recording is not None
    return check.examine(recording, well, well, RankFacts(0.0, 0.0))


def everything_of_rank(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "examined": examined(rank, world_size),
        "examined in groups": examined_in_groups(rank, world_size),
        "norms": norms_of_rank(rank, world_size),
        "apart": ranks_apart(rank, world_size),
        "crafted": crafted(rank, world_size),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    """Starting processes is dear: one pair for all tests."""
    return run_ranks(2, everything_of_rank)


@pytest.mark.distributed
def test_values_are_the_same_on_one_and_two_ranks(two_ranks: list[Any]) -> None:
    alone = examined(0, 1)
    first, second = (of_rank["examined"] for of_rank in two_ranks)
    assert second == Findings()  # the first rank speaks
    shared = {tag: value for tag, value in first.scalars.items() if not tag.startswith("ranks/")}
    assert shared == pytest.approx(alone.scalars, rel=1e-6)
    assert len(shared) == 14
    for tag, histogram in alone.histograms.items():
        assert first.histograms[tag].counts == histogram.counts
    assert first.warnings == alone.warnings == []
    assert first.scalars["ranks/data_wait_share_max"] == pytest.approx(0.1)
    assert first.scalars["ranks/memory_peak_gib_max"] == 1
    assert first.scalars["ranks/grad_norm_min"] < first.scalars["ranks/grad_norm_max"]
    assert first.scalars["ranks/grad_disagreement"] > 0


@pytest.mark.distributed
def test_groups_and_pairs_across_are_the_same_on_one_and_two_ranks_too(two_ranks: list[Any]) -> None:
    alone, of_all = examined_in_groups(0, 1), examined(0, 1)
    found = {tag: two_ranks[0]["examined in groups"].scalars[tag] for tag in alone.scalars}
    assert found == pytest.approx(alone.scalars, rel=1e-6)
    counted = {
        name: sum(f.histograms["health/similarity_of_negatives"].counts)
        for name, f in (("in groups", alone), ("of all", of_all))
    }
    together = sum((torch.arange(32) // 2 % 11 == group).sum().item() ** 2 for group in range(11))
    assert counted == {"in groups": 2 * (32 * 32 - together), "of all": 64 * 62}
    assert alone.scalars["health/contrastive_top1"] >= of_all.scalars["health/contrastive_top1"]
    one_group = examined(0, 1, torch.zeros(32, dtype=torch.int64))
    assert one_group.scalars["health/contrastive_top1"] == 1
    assert "health/similarity_of_negatives" not in one_group.histograms
    assert "health/similarity_negative" not in one_group.scalars


@pytest.mark.distributed
def test_local_gradient_norm_is_taken_before_ranks_average(two_ranks: list[Any]) -> None:
    for measured, alone, averaged in (of_rank["norms"] for of_rank in two_ranks):
        assert measured == pytest.approx(alone, rel=1e-6)
        assert measured != pytest.approx(averaged, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Alarms


class Patient:
    """A step with given h and z, examined again and again."""

    def __init__(self) -> None:
        self.network = nn.Linear(3, 3)
        self.check = HealthCheck(1, self.network, World())

    def examine(self, h: Tensor, z: Tensor, wait: float = 0.0) -> list[str]:
        with self.check.record(1) as recording:
            self.network.zero_grad()
            self.network(torch.ones(2, 3)).sum().backward()
        assert recording is not None
        return self.check.examine(recording, h, z, RankFacts(wait, 0.0)).warnings


def test_collapse_is_told_once_an_episode() -> None:
    generator = torch.Generator().manual_seed(0)
    well = torch.randn(64, 16, generator=generator)
    collapsed = torch.ones(64, 16) + 0.001 * well
    check = HealthCheck(100, nn.Linear(3, 3), World())
    course = [well, *[collapsed] * (WATCH_PATIENCE + 2), well, *[collapsed] * (WATCH_PATIENCE - 1)]
    told = [check.watch(well, z) for z in course]
    assert [i for i, warning in enumerate(told) if warning] == [WATCH_PATIENCE]
    assert "collapsed: z is nearly the same for different images, its spread is 0.00 of 1" in told[WATCH_PATIENCE]


def test_collapse_of_h_to_one_dimension_is_told() -> None:
    well = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    line = well[:, :1] * torch.ones(64, 16)
    check = HealthCheck(100, nn.Linear(3, 3), World())
    told = [check.watch(line, well) for _ in range(WATCH_PATIENCE)]
    assert [bool(warning) for warning in told] == [False] * (WATCH_PATIENCE - 1) + [True]
    assert "h lies in 1.0 of 16 dimensions" in told[-1]


def test_collapse_is_told_within_100_steps_whatever_the_interval_of_checks() -> None:
    for every in (1, 7, 100, 5000):
        check = HealthCheck(every, nn.Linear(3, 3), World())
        watched = [step for step in range(1, 1001) if check.is_watched(step)]
        gaps = [b - a for a, b in zip(watched, watched[WATCH_PATIENCE:], strict=False)]
        assert max(gaps) <= 100
    assert not HealthCheck(None, nn.Linear(3, 3), World()).is_watched(10)


def test_waiting_for_data_is_told() -> None:
    well = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    patient = Patient()
    told = [patient.examine(well, well, wait=0.8) for _ in range(4)]
    assert [len(w) for w in told] == [0, 0, 1, 0]
    assert "80%" in told[2][0]


@pytest.mark.distributed
def test_ranks_that_part_are_told_at_once(two_ranks: list[Any]) -> None:
    found = two_ranks[0]["apart"]
    assert len(found.warnings) == 1
    assert "no longer train the same model" in found.warnings[0]


def test_only_steps_that_are_due_are_watched() -> None:
    check = HealthCheck(10, nn.Linear(2, 2), World())
    assert [step for step in range(1, 31) if check.is_due(step)] == [10, 20, 30]
    assert not HealthCheck(None, nn.Linear(2, 2), World()).is_due(10)


@pytest.mark.distributed
def test_disagreement_of_ranks_is_that_of_their_gradients(two_ranks: list[Any]) -> None:
    """Gradients (3, 0) and (1, 2): their mean is (2, 1), each lies (1, -1) away from it: 2 / 5."""
    found = two_ranks[0]["crafted"]
    assert found.scalars["ranks/grad_disagreement"] == pytest.approx(2 / 5)
    assert found.scalars["ranks/grad_norm_min"] == pytest.approx(math.sqrt(5))
    assert found.scalars["ranks/grad_norm_max"] == pytest.approx(3)
    assert found.warnings == []  # to disagree is no fault, to have different averages is


def test_a_scaled_loss_does_not_show_in_gradient_norms() -> None:
    """fp16's scaler multiplies the loss; ranks/ shows what it would be without."""
    ranks = torch.tensor([[6.0, 4.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    found = Findings()
    check = HealthCheck(1, nn.Linear(3, 3), World(0, 2))
    check._check_ranks(ranks, 2.0, found)
    assert (found.scalars["ranks/grad_norm_min"], found.scalars["ranks/grad_norm_max"]) == (2, 3)
    assert found.scalars["ranks/grad_disagreement"] == pytest.approx(26 / 16 - 1)
    assert found.histograms["ranks/grad_norm"].high == 3
