"""Features: the encoder stays frozen, nothing is lost, ranks share the work. pytest tests/test_features.py"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.evaluation import own_memory
from simclr_dist.errors import DataError, UserError
from simclr_dist.evaluation import feature_file
from simclr_dist.evaluation.feature_file import extract_to_file
from simclr_dist.evaluation.features import (
    Features,
    digest,
    extract_features,
    extract_features_distributed,
    part_of_rank,
)
from simclr_dist.kinds.pixels import Pixels
from tests.distributed.spawn import run_ranks


def normalize(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255 - 0.5


def images_of(ids: np.ndarray) -> Tensor:
    """An image that is a function of its id alone."""
    return torch.stack(
        [torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(int(i))) for i in ids]
    ).byte()


def load(ids: np.ndarray, batch_size: int = 4) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        yield images_of(part), torch.from_numpy(part % 3), torch.from_numpy(part)


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder(torch.randn(16, 3, 8, 8))  # running statistics that are not 0 and 1
    return encoder


def test_features_equal_the_encoder_in_eval_mode() -> None:
    encoder = make_encoder()
    features = extract_features(encoder, load(np.arange(10)), device="cpu", normalize=normalize)
    with torch.no_grad():
        expected = make_encoder().eval()(normalize(images_of(np.arange(10))))
    torch.testing.assert_close(features.h, expected)
    assert features.sample_ids.tolist() == list(range(10))
    assert features.labels.tolist() == [i % 3 for i in range(10)]
    assert not features.h.requires_grad


def test_the_encoder_comes_back_as_it_was() -> None:
    encoder = make_encoder().train()
    encoder[1].eval()  # a layer that someone has frozen by hand
    before = digest(encoder)
    extract_features(encoder, load(np.arange(5)), device="cpu", normalize=normalize)
    assert [module.training for module in encoder] == [True, False, True, True, True]
    assert digest(encoder) == before
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_an_encoder_that_changes_itself_is_caught() -> None:
    class Drifting(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            self.running_mean.add_(1e-3)  # type: ignore[union-attr]
            return input

    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Drifting(3))
    with pytest.raises(RuntimeError, match="the encoder changed while it was evaluated"):
        extract_features(encoder, load(np.arange(5)), device="cpu", normalize=normalize)


def test_digest_sees_a_single_bit() -> None:
    encoder = make_encoder()
    before = digest(encoder)
    assert digest(make_encoder()) == before
    weight = encoder[0].weight.detach().view(torch.int32)
    weight.view(-1)[7] ^= 1
    assert digest(encoder) != before


def test_bfloat16_autocast_gives_float32_features_close_to_float32() -> None:
    encoder = make_encoder()
    exact = extract_features(encoder, load(np.arange(8)), device="cpu", normalize=normalize)
    quick = extract_features(encoder, load(np.arange(8)), device="cpu", precision="bf16", normalize=normalize)
    assert quick.h.dtype == torch.float32
    torch.testing.assert_close(quick.h, exact.h, atol=0.02, rtol=0.02)


def test_non_finite_features_name_the_sample() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    nn.init.constant_(encoder[1].weight, float("nan"))
    with pytest.raises(DataError, match=r"5 of 5 images \(first: sample 0\)"):
        extract_features(encoder, load(np.arange(5)), device="cpu", normalize=normalize)


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        extract_features(make_encoder(), iter(()), device="cpu", normalize=normalize)


@pytest.mark.parametrize(("n", "world_size"), [(10, 1), (10, 3), (3, 4), (12, 4)])
def test_parts_cover_every_sample_once_in_order(n: int, world_size: int) -> None:
    parts = [part_of_rank(n, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), np.arange(n))


def _extract(rank: int, world_size: int, n: int) -> tuple[np.ndarray, list[int], list[int]]:
    features = extract_features_distributed(make_encoder(), load, n, device="cpu", normalize=normalize)
    return features.h.numpy(), features.labels.tolist(), features.sample_ids.tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("n", [11, 4])  # 4 over 3 ranks: the last rank has nothing to do
def test_ranks_gather_what_one_process_computes(n: int) -> None:
    expected = extract_features(make_encoder(), load(np.arange(n)), device="cpu", normalize=normalize)
    for h, labels, sample_ids in run_ranks(3, _extract, n):
        np.testing.assert_allclose(h, expected.h.numpy(), rtol=1e-5, atol=1e-6)
        assert labels == expected.labels.tolist()
        assert sample_ids == list(range(n))


def _extract_some(rank: int, world_size: int, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    features = extract_features_distributed(make_encoder(), load, np.array(ids), device="cpu", normalize=normalize)
    return features.h.numpy(), features.sample_ids.tolist()


@pytest.mark.distributed
def test_ranks_gather_a_chosen_part_in_its_order() -> None:
    ids = [7, 2, 40, 3, 11]
    expected = extract_features(make_encoder(), load(np.array(ids)), device="cpu", normalize=normalize)
    for h, sample_ids in run_ranks(2, _extract_some, ids):
        np.testing.assert_allclose(h, expected.h.numpy(), rtol=1e-5, atol=1e-6)
        assert sample_ids == ids


def _extract_with_a_bad_file(rank: int, world_size: int) -> str:
    def load_or_fail(ids: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if 9 in ids:
            raise DataError("sample 9: not an image")
        yield from load(ids)

    with pytest.raises(UserError) as caught:
        extract_features_distributed(make_encoder(), load_or_fail, 10, device="cpu", normalize=normalize)
    return str(caught.value)


@pytest.mark.distributed
def test_a_failing_rank_stops_all_ranks_with_its_name() -> None:
    assert run_ranks(2, _extract_with_a_bad_file) == [
        "rank 1 has failed; see its own message",
        "sample 9: not an image",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# In a file


def to_file(ids: np.ndarray, places: list[Path], dtype: torch.dtype = torch.float32, **options: Any) -> Features:
    loader = options.pop("load", load)
    device = torch.device("cpu")
    return extract_to_file(
        make_encoder(), loader, ids, places=places, dtype=dtype, device=device, normalize=normalize, **options
    )


def without(missing: set[int]) -> Callable[[np.ndarray], Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """A loader that leaves out what it cannot read."""
    return lambda ids: load(np.array([i for i in ids.tolist() if i not in missing], np.int64))


FILE_CASES: dict[str, tuple[list[int], set[int]]] = {
    "even": (list(range(12)), set()),
    "uneven": (list(range(11)), set()),
    "fewer than ranks": ([5, 3], set()),
    "in another order": ([7, 2, 40, 3, 11], set()),
    "some cannot be read": (list(range(30)), {0, 9, 10, 11, 29}),
    "a rank has none": (list(range(9)), {3, 4, 5}),
    "the first rank has none": (list(range(9)), {0, 1, 2}),
}


def _extract_to_file(rank: int, world_size: int, place: Path, nodes: int) -> dict[str, tuple[Any, ...]]:
    local_size = world_size // nodes
    os.environ |= {"LOCAL_RANK": str(rank % local_size), "LOCAL_WORLD_SIZE": str(local_size)}
    feature_file.BLOCK_BYTES = 2 * 6 * 4  # two rows
    found = {}
    for name, (ids, missing) in FILE_CASES.items():
        features = to_file(np.array(ids), [place], load=without(missing))
        found[name] = (features.h.numpy().copy(), features.labels.tolist(), features.sample_ids.tolist())
    messages = []
    if nodes == 2:  # a disk without room on the second of them: both take the next place
        (place / "a file").touch()
        first = place / "a file" if rank == 2 else place / "first"
        assert len(to_file(np.arange(9), [first, place / "second"])) == 9
    for loader in (without(set(range(9))), lambda ids: load(ids[::-1].copy() if rank == 1 else ids)):
        try:
            to_file(np.arange(9), [place], load=loader)
        except UserError as error:
            messages.append(f"{type(error).__name__}: {error}"[:60])
    return found | {"messages": tuple(messages)}


@pytest.mark.distributed
def test_ranks_write_one_file_a_node(tmp_path: Path) -> None:
    """Four ranks on one node, and on two with a disk each: the same features, and nothing is left behind."""
    for nodes in (1, 2):
        place = tmp_path / str(nodes)
        ranks = run_ranks(4, _extract_to_file, place, nodes)
        for name, (ids, missing) in FILE_CASES.items():
            left = [i for i in ids if i not in missing]
            expected = extract_features(make_encoder(), load(np.array(left)), device="cpu", normalize=normalize)
            for found in ranks:
                h, labels, sample_ids = found[name]
                np.testing.assert_allclose(h, expected.h.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
                assert (labels, sample_ids) == (expected.labels.tolist(), left), name
        assert {found["messages"][0] for found in ranks} == {"DataError: none of 9 images can be read"}
        assert sum("the loader gave" in found["messages"][-1] for found in ranks) == 1
        assert [path for path in place.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_in_a_file_are_those_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "a file").write_text("")
    found = to_file(np.arange(10), [tmp_path / "a file" / "x", tmp_path / "second"], dtype)
    expected = extract_features(make_encoder(), load(np.arange(10)), device="cpu", normalize=normalize)
    assert torch.equal(found.h, expected.h.to(dtype))
    assert torch.equal(found.sample_ids, expected.sample_ids)
    assert list((tmp_path / "second").iterdir()) == []


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_no_room_for_features_is_said_at_the_start(tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=rf"no room for them: {tmp_path} \({os.strerror(kind)}\); name a folder"):
        to_file(np.arange(10), [tmp_path])
    assert list(tmp_path.iterdir()) == []


class Wide(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).repeat(1, 86)[:, :16_384]


def test_memory_does_not_hold_the_features(tmp_path: Path) -> None:
    """128 MiB of them."""
    give_back = ctypes.CDLL(None).malloc_trim  # what the allocator keeps of freed memory is not held
    give_back(0)
    before = own_memory()
    features = extract_to_file(
        Wide(),
        lambda ids: load(ids, 64),
        np.arange(2048),
        places=[tmp_path],
        device=torch.device("cpu"),
        normalize=normalize,
    )
    give_back(0)
    assert own_memory() - before < 48 * 2**20
    assert features.h.nbytes == 128 * 2**20
    assert torch.equal(features.h[2047], Wide()(normalize(images_of(np.array([2047]))))[0])


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    class Huge(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) * 1e6

    with pytest.raises(DataError, match=r"NaN or infinite features for 5 of 5 .*keep features in float32, or take"):
        extract_to_file(
            Huge(),
            load,
            np.arange(5),
            places=[tmp_path],
            dtype=torch.float16,
            device=torch.device("cpu"),
            normalize=normalize,
        )


def test_pixel_features_are_the_normalised_pixels() -> None:
    features = extract_features(Pixels(), load(np.arange(6)), device="cpu", normalize=normalize)
    torch.testing.assert_close(features.h, normalize(images_of(np.arange(6))).flatten(1))
    smaller = extract_features(Pixels(max_side=4), load(np.arange(6)), device="cpu", normalize=normalize)
    assert smaller.h.shape == (6, 48)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        Features(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), torch.arange(3))
