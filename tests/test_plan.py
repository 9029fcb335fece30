"""The planner against what it predicts: real models, steps, files and collectives."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loss import PeakMemory, in_own_process
from benchmarks.traffic import CountTraffic
from simclr_dist import cli
from simclr_dist.checkpoint.files import take_snapshot, write_checkpoint
from simclr_dist.config import Config, LossConfig, ModelConfig, load_config
from simclr_dist.kinds import kind_of
from simclr_dist.loss import NTXentLoss
from simclr_dist.loss.build import build_loss
from simclr_dist.loss.enumeration import Pairs
from simclr_dist.loss.memory import workspace_bytes
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.inputs import images as images_of
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from simclr_dist.optim.virtual_shards import VirtualShards
from simclr_dist.plan.forecast import LINK_BYTES_PER_S, Forecast, Speed, forecast
from simclr_dist.plan.measure import MeasuredStep, measure_step
from simclr_dist.plan.memory import (
    DeviceMemory,
    LiveBytes,
    checkpoint_bytes,
    device_memory,
    loader_bytes,
    safetensors_bytes,
    shape_of_training,
    step_activations,
)
from simclr_dist.plan.traffic import Collective, collectives
from simclr_dist.run.state import TrainState
from simclr_dist.run.stop_requests import Requests
from tests.conftest import REPOSITORY
from tests.distributed.spawn import run_ranks

SMOKE = REPOSITORY / "configs" / "smoke.yaml"


def smoke(*overrides: str, world_size: int = 1) -> Config:
    return load_config(SMOKE, overrides, world_size=world_size)


def memory_on_cpu(config: Config) -> DeviceMemory:
    return device_memory(
        data=config.data,
        model=config.model,
        loss=config.loss,
        optim=config.optim,
        train=config.train,
        world_size=1,
        device_type="cpu",
    )


def collectives_of(config: Config, world_size: int) -> list[Collective]:
    return collectives(
        model=config.model,
        loss=config.loss,
        train=config.train,
        world_size=world_size,
        num_views=config.data.num_views,
    )


def real_step(config: Config, images: int) -> float:
    """MiB of a real forward and backward, as the operating system counts them. In a process of its own."""
    torch.set_num_threads(1)
    model = build_model(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    views = torch.randn(2 * images, 3, config.data.image_size, config.data.image_size)

    def step(views: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            _, z = model(views)
        z.backward(torch.ones_like(z))

    step(views[:4])  # loads what is loaded once
    with PeakMemory(views.device) as peak:
        step(views)
    return peak.mib


needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU computes bf16 in float32 copies, which need more"
)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_activations_are_within_a_factor_of_what_a_real_step_holds(precision: str) -> None:
    config = smoke("model.width=32", f"train.precision={precision}")
    precision_used = config.train.precision
    predicted = step_activations(config.model, inputs=images_of(32), images=256, precision=precision_used) / 2**20
    assert predicted > 64  # so that what the process needs besides counts little
    assert predicted / 1.4 < in_own_process(real_step, config, 256) < 1.4 * predicted


FAMILIES = {  # with a size of images, and how many of them
    "resnet18": (64, 32),
    "regnet_y_400mf": (64, 16),
    "convnext_tiny": (64, 8),
    "timm/vit_tiny_patch16_224": (64, 32),
    "swin_t": (64, 4),
    "efficientnet_b0": (64, 12),
    "timm/maxvit_rmlp_pico_rw_256": (256, 1),
}
ELSEWHERE = ("timm/resnet18", "timm/regnety_002", "timm/efficientnet_b0", "timm/swin_tiny_patch4_window7_224")
M_MMAP_THRESHOLD = -3  # of glibc
MEASURED = tuple(FAMILIES)[:6]  # a MaxViT takes a minute


def step_config(encoder: str) -> tuple[Config, int]:
    image_size, images = FAMILIES[encoder]
    return smoke(
        f"model.encoder={encoder}", f"data.image_size={image_size}", f"train.global_batch_size={images}"
    ), images


@pytest.mark.parametrize(
    "encoder",
    ["timm/convnext_atto", *(pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *ELSEWHERE))],
)
def test_every_family_of_encoders_has_a_plan(encoder: str) -> None:
    size = 224 if "224" in encoder and "swin" in encoder else FAMILIES.get(encoder, (64, 0))[0]
    model = ModelConfig(encoder=encoder, image_size=size)
    one, two = (step_activations(model, inputs=images_of(size), images=n, precision="fp32") for n in (1, 2))
    assert one < two < 2.2 * one


def one_step(config: Config, images: int) -> MeasuredStep:
    return measure_step(
        augment=config.augment,
        model=config.model,
        loss=config.loss,
        optim=config.optim,
        train=config.train,
        kind=kind_of(config.data),
        images=images,
        device=torch.device("cpu"),
        repetitions=1,
    )


def real_steps(encoders: Sequence[str]) -> list[float]:
    """MiB of real steps from the network's building on, as the operating system counts them."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once, and leaves no holes
    found = []
    for encoder in (encoders[0], *encoders):  # the first one loads what is loaded once
        config, images = step_config(encoder)

        libc.malloc_trim(0)  # what earlier networks have left must not be there for this one
        with PeakMemory(torch.device("cpu")) as peak:
            one_step(config, images)
        found.append(peak.mib)
    return found[1:]


def test_a_cpu_tries_all_images_of_a_step_unless_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an update costs, for all images alike, would count twice for half of them."""
    config = smoke("train.global_batch_size=96")

    monkeypatch.setattr("simclr_dist.plan.measure.LONG_STEP_S", 1e9)
    assert one_step(config, 96).images == 96
    monkeypatch.setattr("simclr_dist.plan.measure.LONG_STEP_S", 0.0)
    assert one_step(config, 96).images == 64


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_within_a_factor_of_what_real_steps_hold() -> None:
    measured = in_own_process(real_steps, MEASURED)
    for encoder, mib in zip(MEASURED, measured, strict=True):
        predicted = memory_on_cpu(step_config(encoder)[0]).total / 2**20
        assert predicted / 1.4 < mib < 1.4 * predicted, f"{encoder}: {predicted:.0f} MiB predicted, {mib:.0f} measured"


def test_activations_grow_with_the_images_at_once_and_not_with_the_batch() -> None:
    whole, double = (memory_on_cpu(smoke(f"train.global_batch_size={G}")) for G in (64, 128))
    assert double.activations == pytest.approx(2 * whole.activations, rel=0.05)
    parts = memory_on_cpu(smoke("train.global_batch_size=128", "train.micro_batch_size=64"))
    assert parts.activations == whole.activations
    assert parts.views == double.views


@pytest.mark.parametrize("implementation", ["tiled", "plain"])
@pytest.mark.parametrize(("G", "K"), [(128, 128), (1024, 64)])
def test_loss_workspace_is_within_a_factor_of_what_the_loss_holds(implementation: str, G: int, K: int) -> None:
    z = torch.randn(2 * G, K, requires_grad=True)
    z.grad = torch.zeros_like(z)
    loss = NTXentLoss(0.1, implementation)  # type: ignore[arg-type]
    with LiveBytes() as live:
        loss(z, torch.arange(G)).backward()
    predicted = workspace_bytes(2 * G, K, world_size=1, device_type="cpu", implementation=implementation)
    assert live.peak < predicted < 1.4 * live.peak


@pytest.mark.parametrize(
    ("kind", "num_views", "pairs"),
    [("supcon", 2, "within"), ("supcon", 4, "within"), ("dcl", 4, "within"), ("nt_xent", 2, "across")],
)
def test_loss_workspace_of_the_variants_is_within_a_factor_too(kind: str, num_views: int, pairs: Pairs) -> None:
    z = torch.randn(num_views * 512, 128, requires_grad=True)
    z.grad = torch.zeros_like(z)
    loss = build_loss(LossConfig(kind=kind, pairs=pairs), num_views)  # type: ignore[arg-type]
    with LiveBytes() as live:
        loss(z, torch.arange(512)).backward()
    found = workspace_bytes(
        len(z), 128, world_size=1, device_type="cpu", num_views=num_views, supervised=kind == "supcon", pairs=pairs
    )
    assert live.peak < found < 1.4 * live.peak


def test_more_views_cost_as_many_more_images() -> None:
    two, eight = (memory_on_cpu(smoke(f"data.num_views={V}", "train.global_batch_size=32")) for V in (2, 8))
    assert eight.views == 4 * two.views
    assert eight.activations == pytest.approx(4 * two.activations, rel=0.05)
    assert loader_bytes(smoke("data.num_views=8").data, 32) == 4 * loader_bytes(smoke().data, 32)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adam", "adamw", "muon"])
def test_parameters_optimiser_and_checkpoint_are_as_predicted(tmp_path: Path, optimizer: str) -> None:
    config = smoke(f"optim.optimizer={optimizer}", "loss.learn_temperature=true")
    model = build_model(config.model)
    model.add_module("loss", build_loss(config.loss, num_views=2))
    update = build_optimizer(model, config.optim)
    _, z = model(torch.randn(4, 3, 32, 32))
    model.get_submodule("loss")(z).backward()
    update.step()

    memory = memory_on_cpu(config)
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert memory.parameters == memory.gradients + sum(b.nbytes for b in model.buffers())
    state = [value for entry in update.state.values() for value in entry.values() if torch.is_tensor(value)]
    assert memory.optimizer == sum(value.nbytes for value in state)

    snapshot = take_snapshot(
        config=config,
        state=TrainState(1, 64),
        fingerprint="0" * 64,
        model=model,
        optimizer=update,
        grad_scaler={},
        versions=dict.fromkeys(("python", "torch", "torchvision", "accelerate", "numpy", "ffcv"), "1.23.4"),
    )
    path = write_checkpoint(tmp_path, snapshot, attempt="a")
    assert safetensors_bytes(model.state_dict()) == (path / "model.safetensors").stat().st_size
    size = sum(file.stat().st_size for file in path.iterdir())
    settings = config.model_dump(mode="json")
    assert checkpoint_bytes(shape_of_training(config.model, config.loss), config.optim, settings) == pytest.approx(
        size, rel=0.01
    )


def step_traffic(rank: int, world_size: int, config: Config) -> list[tuple[str, float]]:
    """What this rank sends in one step made of the parts that the trainer uses."""
    cpu = torch.device("cpu")
    model: Any = build_model(config.model)
    if config.model.batch_norm == "global":
        model = convert_to_global_batch_norm(model)
    buffers = config.model.batch_norm == "per_device"
    B = config.train.global_batch_size // world_size
    views, ids = torch.randn(config.data.num_views, B, 3, 32, 32), torch.arange(B) + rank * B
    nt_xent = build_loss(config.loss, config.data.num_views)
    if config.loss.learn_temperature:
        model.add_module("loss", nt_xent)
    model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=buffers, gradient_as_bucket_view=True)
    requests = Requests(Path("nowhere"), cpu)
    shards = VirtualShards(model.module, config.train.virtual_shards or 1)
    with CountTraffic(world_size) as traffic:
        requests.announce()
        if config.train.virtual_shards:
            shards.backward(views, ids, nt_xent, begin_shard=torch.manual_seed, loss_parameters=nt_xent.parameters())
        elif config.train.micro_batch_size:
            backward_in_micro_batches(
                model,
                views,
                lambda z: nt_xent(z, ids),
                micro_batch_size=config.train.micro_batch_size,
                loss_parameters=nt_xent.parameters(),
            )
        else:
            nt_xent(model(views.flatten(0, 1))[1], ids).backward()
        requests.agreed()
    return traffic.collectives


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, []),
        (2, ["train.micro_batch_size=16", "loss.gather_dtype=bfloat16"]),
        (2, ["train.micro_batch_size=16", "loss.kind=supcon", "data.num_views=3", "loss.learn_temperature=true"]),
        (2, ["train.virtual_shards=4", "model.batch_norm=per_shard", "loss.learn_temperature=true"]),
        pytest.param(4, [], marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "micro-batches", "supcon of three views", "virtual shards", "4 ranks"],
)
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
def test_a_step_sends_what_the_plan_says(world_size: int, overrides: list[str]) -> None:
    config = smoke(*overrides, world_size=world_size)
    planned = collectives_of(config, world_size)
    for found in run_ranks(world_size, step_traffic, config):
        assert sum(sent for _, sent in found) == pytest.approx(sum(c.sent(world_size) for c in planned))
        gathers = [sent for name, sent in found if name == "_allgather_base_"]
        assert len(gathers) == sum(c.count for c in planned if c.operation == "all_gather")


def test_one_process_sends_nothing() -> None:
    assert collectives_of(smoke(), 1) == []


def plan(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(SMOKE), *arguments, "--json"])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_steps_and_hours_follow_from_images_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan("train.epochs=10", "--gpus", "4", "--images", "1000", "--images-per-s", "16", capsys=capsys)
    assert (found["steps_per_epoch"], found["num_steps"]) == (15, 150)  # 64 of 1,000 images a step
    sending_s = 150 * found["sent_bytes_per_step"] / LINK_BYTES_PER_S
    assert found["hours"] == pytest.approx((150 * 16 / 16 + sending_s) / 3600)
    assert found["bottleneck"].startswith("the devices")


@pytest.mark.parametrize("encoder", ["regnet_x_400mf", "regnet_y_400mf", "swin_t"])
def test_networks_that_read_values_while_they_are_built_can_be_planned(
    encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(f"model.encoder={encoder}", "train.global_batch_size=2", "--images", "100", capsys=capsys)
    network = build_model(smoke(f"model.encoder={encoder}").model)
    assert found["num_parameters"] == sum(p.numel() for p in network.parameters())
    assert found["memory"]["activations"] > 2**20


def test_speed_is_measured_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan("train.global_batch_size=16", "--measure", capsys=capsys)
    assert found["measured_step"]["images"] == 16
    assert found["speed"]["device"] > 0 < found["speed"]["loader"]
    assert set(found["seconds_per_step"]) == {"device", "loader"}


def bottleneck_of(config: Config, speed: Speed, **limits: int) -> str:
    found: Forecast = forecast(
        data=config.data,
        model=config.model,
        loss=config.loss,
        optim=config.optim,
        train=config.train,
        settings={},
        num_images=10**6,
        world_size=8,
        device_type="cuda",
        speed=speed,
    )
    return found.bottleneck(**limits)


def test_a_person_who_waits_is_told_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(SMOKE), "data.train=synthetic"]
    for words, told in ((command, True), ([*command, "--json"], False)):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 0
        assert ("importing torch …" in capsys.readouterr().err) is told


def test_the_bottleneck_is_what_is_slowest() -> None:
    config = smoke(world_size=8)
    assert bottleneck_of(config, Speed(100.0, 1000.0)).startswith("the devices")
    assert bottleneck_of(config, Speed(1000.0, 100.0)).startswith("the loader")
    assert bottleneck_of(config, Speed(1e9, 1e9)).startswith("the network")
    assert bottleneck_of(config, Speed(100.0), device_bytes=2**20).startswith("memory")
    assert "not known" in bottleneck_of(config, Speed())


def test_missing_images_are_asked_for_and_bad_batches_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["data.train=nowhere.beton"], "say how many images it holds with --images"),
        (["--gpus", "3"], "64 does not divide over 3 processes"),
        (["--images", "10"], "64 is more than the 10 images"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", str(SMOKE), *arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
