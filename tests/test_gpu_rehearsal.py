"""What a training asks of a GPU, on tensors that only pretend to be there (benchmarks/rehearsal.py): no driver needed.

The host waits once a step, when everything up to the backward has been launched; nothing mixes devices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.rehearsal import DEVICE, Launch, Rehearsal, Wait, pretended_gpu, rehearsal, table
from benchmarks.step import ROWS
from simclr_dist.checkpoint.files import Checkpoint, Snapshot, load_state, take_snapshot
from simclr_dist.config import Config, ModelConfig, load_config
from simclr_dist.evaluation import features
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.encoders import build_encoder
from simclr_dist.network.precision import autocast
from simclr_dist.run.stop_requests import Request, Requests
from simclr_dist.views.augment import normalize
from tests.conftest import REPOSITORY

SMALL = (
    "data.train=synthetic",
    "data.test=null",
    "evaluation.knn_every_epochs=null",
    "monitor.image_pairs=0",
    "monitor.log_every_steps=100",
    "monitor.health_every_steps=null",
    "train.precision=bf16",
)


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(
        REPOSITORY / "configs" / "smoke.yaml", [*SMALL, "name=rehearsal", f"runs_dir={folder}", *overrides]
    )


def names(waits: list[Wait]) -> list[tuple[str, str]]:
    return [(wait.phase, wait.place.partition(":")[0]) for wait in waits]


# ---------------------------------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.optimizer=sgd",),
        ("optim.optimizer=adamw", "train.micro_batch_size=32"),
        ("optim.optimizer=lars", "train.channels_last=false", "train.precision=fp32"),
        ("loss.kind=supcon", "data.num_views=3", "train.micro_batch_size=16"),
        ("loss.kind=dcl", "data.num_views=4", "augment.preset=asymmetric"),
    ],
    ids=" ".join,
)
def test_a_step_waits_once_and_after_the_backward_was_launched(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """So the device has work while the host waits. A save waits once too; after a resume a step is as it was before."""
    with rehearsal(settings(tmp_path, *overrides)) as it:
        step = list(it.fit().records)
        it.trace.records.clear()
        snapshot = snapshot_of(it)
        save = list(it.trace.records)
        resume(it, snapshot)
        it.trace.records.clear()
        it.trainer.train_step(it.batch())
        resumed = it.trace.launches("optimizer")
    (at,) = [i for i, record in enumerate(step) if isinstance(record, Wait)]
    assert not {"loss", "backward"} & {record.phase for record in step[at:]}
    assert {"loss", "backward"} < {record.phase for record in step[:at]}
    assert "optimizer" not in {record.phase for record in step[:at]}
    launches = [record for record in step if isinstance(record, Launch)]
    assert [launch for launch in launches if launch.is_mixed] == []
    assert [type(record) for record in save if not isinstance(record, Launch)] == [Wait]
    before = [launch for launch in launches if launch.phase == "optimizer"]
    assert [launch.name for launch in resumed] == [launch.name for launch in before]
    assert not any("one by one" in launch.name for launch in [*launches, *resumed])
    assert sum(launch.kernels for launch in before) <= 40


def test_a_learnt_temperature_is_read_before_the_loss_and_limited_without_a_wait(tmp_path: Path) -> None:
    learnt = ("loss.learn_temperature=true", "data.num_views=3", "optim.optimizer=adamw")
    with rehearsal(settings(tmp_path, *learnt)) as it:
        assert names(it.fit().waits) == [("loss", "loss/agreement.py"), ("rest", "loss/agreement.py")]
        before = [launch.name for launch in it.trace.launches("optimizer")]
        snapshot = snapshot_of(it)
        resume(it, snapshot)
        it.trace.records.clear()
        it.trainer.train_step(it.batch())
        assert [launch.name for launch in it.trace.launches("optimizer")] == before


def snapshot_of(it: Rehearsal) -> Snapshot:
    parts = it.trainer.parts
    return take_snapshot(
        config=it.config,
        state=parts.state,
        fingerprint="",
        model=parts.network,
        optimizer=parts.optimizer.optimizer,
        grad_scaler={},
        versions={},
    )


def resume(it: Rehearsal, snapshot: Snapshot) -> None:
    """As from a file, where every tensor is contiguous."""
    on_disk = {
        file: {name: x.contiguous() for name, x in of_file.items()} for file, of_file in snapshot.tensors.items()
    }
    checkpoint = Checkpoint(
        path=it.config.run_dir,
        config=it.config,
        step=snapshot.step,
        samples_seen=0,
        fingerprint="",
        model_state=on_disk["model.safetensors"],
        optimizer_state=on_disk["optimizer.safetensors"],
        grad_scaler={},
    )
    load_state(checkpoint, it.trainer.parts.network, it.trainer.parts.optimizer.optimizer)


def test_the_norm_of_the_gradient_is_read_a_step_late(tmp_path: Path) -> None:
    """The stop policy knows of it when it has long arrived; the skip policy must know before the optimiser moves."""
    with rehearsal(settings(tmp_path, "train.on_non_finite=skip")) as it:
        places = names(it.fit().waits)
    assert places == [("rest", "loss/agreement.py"), ("rest", "training/non_finite.py")]


@pytest.mark.parametrize(
    "row", [name if name == "step-resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_the_page_predicts_from_what_is_counted_today(row: str) -> None:
    page, counted = (REPOSITORY / "docs" / "gpu.md").read_text(), table(row)
    assert counted in page, f"docs/gpu.md: `python -m benchmarks.rehearsal {row}` now counts\n{counted}"


# ---------------------------------------------------------------------------------------------------------------------
# Beside the step


def test_an_evaluation_computes_the_next_batch_while_features_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "digest", lambda encoder: "")
    with pretended_gpu() as trace:
        encoder = build_encoder(ModelConfig(encoder="resnet_small"))[0].to(DEVICE)
        ids = torch.arange(4)
        batches = ((torch.empty(4, 32, 32, 3, dtype=torch.uint8).pin_memory(), ids, ids) for _ in range(3))
        trace.records.clear()
        found = features._extract(encoder, batches, device=DEVICE, precision="bf16", normalize=normalize)
    assert found is not None
    assert found.h.shape == (12, 128)
    assert found.h.device.type == "cpu"
    assert not any(launch.is_mixed for launch in trace.launches())
    kinds = ["wait" if isinstance(r, Wait) else r.name for r in trace.records]
    kinds = [kind for kind in kinds if kind in ("wait", "convolution")]
    of_a_batch = kinds.index("wait") // 2
    assert kinds == [*["convolution"] * (2 * of_a_batch), "wait", *["convolution"] * of_a_batch, "wait", "wait"]


def fake_ranks(world_size: int) -> AbstractContextManager[None]:
    """A process group whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=world_size)
    stack = ExitStack()
    stack.callback(dist.destroy_process_group)
    return stack


def test_a_request_to_stop_travels_beside_the_work_of_the_device(tmp_path: Path) -> None:
    with fake_ranks(8), pretended_gpu() as trace, Requests(tmp_path, DEVICE) as requests:
        requests.ask(Request.STOP)
        requests.announce()
        assert [record for record in trace.records if isinstance(record, Wait)] == []
        requests.agreed()
    assert "allreduce_" in {launch.name for launch in trace.launches()}
    assert {record.stream for record in trace.records} & {"compute"} == set()


def test_global_batch_norm_never_waits() -> None:
    """torch's own reads from the host three times a layer, which also shows that a read would be seen."""
    with fake_ranks(8):
        assert waits_of("resnet50", convert_to_global_batch_norm) == 0
        assert waits_of("resnet18", nn.SyncBatchNorm.convert_sync_batchnorm) == 3 * 20


def waits_of(encoder_name: str, convert: Callable[[nn.Module], nn.Module]) -> int:
    """Forward and backward of this encoder."""
    with pretended_gpu() as trace:
        encoder = convert(build_encoder(ModelConfig(encoder=encoder_name, stem="imagenet"))[0].to(DEVICE))
        encoder.to(memory_format=torch.channels_last)
        images = torch.empty(4, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
        trace.records.clear()
        with autocast(DEVICE, "bf16"):
            h = encoder(images)
        h.float().sum().backward()
        assert len(trace.launches()) > 300
        return len(trace.waits)


# ---------------------------------------------------------------------------------------------------------------------
# The trace itself sees what it should


def _reads() -> dict[str, Callable[[], Any]]:
    x, ids = torch.empty(4, 4, device=DEVICE), torch.empty(4, dtype=torch.int64, device=DEVICE)
    ready = torch.cuda.Event()
    on_host = torch.empty(4, 4)
    return {
        "float": lambda: float(x.sum()),
        "bool": lambda: bool((x > 0).any()),
        "item": lambda: ids[0].item(),
        "tolist": lambda: ids.tolist(),
        "cpu": lambda: x.cpu(),
        "copy": lambda: on_host.copy_(x),
        "not page-locked": lambda: on_host.to(DEVICE, non_blocking=True),
        "blocking": lambda: on_host.pin_memory().to(DEVICE),
        "new on the device": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
        "mask": lambda: x[x > 0],
        "nonzero": lambda: x.nonzero(),
        "masked_select": lambda: x.masked_select(x > 0),
        "synchronize": torch.cuda.synchronize,
        "event": lambda: (x + 1, ready.record(), ready.synchronize()),
    }


def test_whatever_makes_the_host_wait_is_seen_and_nothing_else() -> None:
    with pretended_gpu() as trace:
        for name, read in _reads().items():
            trace.records.clear()
            read()
            assert len(trace.waits) == 1, name
        x, others = torch.empty(3, 4, device=DEVICE), [torch.empty(4, 3, device=DEVICE).t() for _ in range(3)]
        arrived = torch.cuda.Event()
        trace.records.clear()
        torch.empty(3).pin_memory().to(DEVICE, non_blocking=True)
        torch.full((3,), 2.0, device=DEVICE)
        torch.empty(3, pin_memory=True).copy_(x[:, 0], non_blocking=True)
        x * torch.tensor(2.0)
        assert trace.waits == []
        arrived.record()
        float(x.sum())
        arrived.synchronize()  # what it stands for was waited for with the sum
        assert [wait.name for wait in trace.waits] == ["read"]
        torch._foreach_add([x, x, x], [x, x, x])
        torch._foreach_add([x, x, x], others)
        assert [launch.kernels for launch in trace.launches() if "foreach" in launch.name] == [1, 3]
        assert not any(launch.is_mixed for launch in trace.launches())
        torch.ops.aten.index(x, [torch.arange(3)])
        assert trace.launches()[-1].is_mixed


def test_values_that_were_sent_there_can_be_read_back() -> None:
    with pretended_gpu() as trace:
        sent = torch.tensor([[3, 5], [8, 13]]).pin_memory().to(DEVICE, non_blocking=True)[None]
        assert sent.tolist() == [[[3, 5], [8, 13]]]
        assert len(trace.waits) == 1
        sent.add_(1)
        assert sent.tolist() == [[[0, 0], [0, 0]]]  # no longer known
