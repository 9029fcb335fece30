"""What a configuration builds: the parts of a training, in the order in which they are made."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.config import Config, render_config
from simclr_dist.config.explain import shards_over_processes
from simclr_dist.data import Batch, Loader
from simclr_dist.errors import ConfigError
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.evaluation.untrained import set_first_layer
from simclr_dist.health.check import HealthCheck
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.kinds.evaluation_labels import EvaluationImages, evaluation_images, num_probe_classes
from simclr_dist.kinds.labelled_images import check_loss_labels
from simclr_dist.loss import NTXentLoss, SupConLoss
from simclr_dist.loss.build import build_loss
from simclr_dist.monitor.monitor import Monitor, open_monitor
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.flops import forward_flops
from simclr_dist.network.freezing import freeze_matching
from simclr_dist.network.random_layers import RandomLayers, key_draws
from simclr_dist.network.simclr import build_model
from simclr_dist.network.trial import freeze
from simclr_dist.optim.build import build_optimizer
from simclr_dist.optim.schedule import LearningRate, build_schedule
from simclr_dist.optim.virtual_shards import VirtualShards
from simclr_dist.parallel import distributed, environment
from simclr_dist.parallel.accelerator import build_accelerator, join_training
from simclr_dist.parallel.distributed import World
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run import history, provenance
from simclr_dist.run.guard import RunGuard
from simclr_dist.run.layout import RunDir
from simclr_dist.run.state import TrainState
from simclr_dist.run.watchdog import BACKSTOP_S
from simclr_dist.safe_text import printable
from simclr_dist.training.non_finite import NonFinitePolicy
from simclr_dist.training.precision import decide_precision, with_precision
from simclr_dist.training.preflight import check_together, settled
from simclr_dist.training.resuming import (
    changed_settings,
    choose_checkpoint,
    leave_other_line,
    record_start,
    refuse_to_relabel,
    restore,
)
from simclr_dist.training.saving import Saver
from simclr_dist.training.starting import start_from_weights


@dataclass(frozen=True)
class Parts:
    """All that a training consists of. Every rank has its own."""

    config: Config
    """With what `auto` has come to."""
    precision_reason: str
    accelerator: Accelerator
    """The process group, the device, autocast, the fp16 loss scale."""
    world: World
    guard: RunGuard
    kind: Kind
    """What is trained on."""
    loader: Loader
    evaluation_images: EvaluationImages | None
    """None: no kNN is wanted."""
    steps_per_epoch: int
    last_step: int
    """The number of steps after which the training has finished."""
    implementations: Mapping[str, str]
    """What computes the parts of a step for which there are several programs, by part; the same on every rank."""
    augment: Callable[[Batch], Tensor]
    network: nn.Module
    """Encoder and projection head, on the device, with global BatchNorm and keyed dropout; and the loss, where it has
    a parameter."""
    random_layers: RandomLayers
    forward_flops: int | None
    """Of one view; None: not known, or not the main process."""
    optimizer: AcceleratedOptimizer
    schedule: LearningRate
    nt_xent: NTXentLoss | SupConLoss
    probe: OnlineProbe | None
    state: TrainState
    model: nn.Module
    """`network`, wrapped by DistributedDataParallel where there are several processes, under autocast."""
    shards: VirtualShards | None
    """What computes the gradient of `network` instead of `model`, with `train.virtual_shards`."""
    monitor: Monitor
    saver: Saver
    non_finite: NonFinitePolicy
    health: HealthCheck

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def encoder(self) -> nn.Module:
        return self.network.get_submodule("encoder")


def build(config: Config) -> Parts:
    """All ranks call it together.

    Raises ConfigError, DataError, CheckpointError or OwnershipError on the first failing rank and
    FailedElsewhereError on the others.
    """
    device, world = join_training(config.timeout.longest_s() + BACKSTOP_S), distributed.world()
    if about_environment := environment.sentence(os.environ):
        _warn_on(world)(about_environment)
    _check_world_size(config, world)
    if config.train.virtual_shards is not None:
        torch.set_num_threads(1)  # sums that several threads share depend on how many there are
    config = run_on_all_ranks(lambda: settled(config), device)
    unused = check_together(config, device, _warn_on(world))
    guard = RunGuard(config.run_dir, config.timeout, device)
    checkpoint = choose_checkpoint(config, device, _warn_on(world))
    decided = decide_precision(config, checkpoint, device)
    config = with_precision(config, decided.precision)
    accelerator = build_accelerator(
        {"fp32": "no"}.get(decided.precision, decided.precision),
        broadcast_buffers=config.model.batch_norm == "per_device",
    )
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    kind = kind_of(config.data)
    loader = run_on_all_ranks(
        lambda: kind.loader(
            config.augment,
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            world=world,
            device=device,
        ),
        device,
    )
    labelled, probe_classes = run_on_all_ranks(lambda: _check_labels(config, _warn_on(world)), device)
    steps_per_epoch = loader.order.steps_per_epoch
    num_steps = config.train.epochs * steps_per_epoch
    augment, implementations = kind.views(config.augment, config.seed, device, _warn_on(world))

    simclr = run_on_all_ranks(lambda: build_model(config.model), device)
    if checkpoint is None:  # the other ranks get the main process's values when the network is wrapped
        begin = partial(set_first_layer, simclr.encoder, config.model, config.data, config.seed)
        run_on_all_ranks(begin if world.is_main else lambda: None, device)
    flops = forward_flops(simclr, kind.inputs) if world.is_main else None
    shards = run_on_all_ranks(lambda: _build_shards(simclr, config), device)
    random_layers = key_draws(simclr, kind.inputs)
    nt_xent, implementations["loss"] = _build_loss(config, world, device)
    if nt_xent.learn_temperature:
        simclr.add_module("loss", nt_xent)  # DDP averages its gradient, checkpoints hold it, the optimiser moves it
    network = _place(simclr, config, device)
    freeze(network, unused)
    freeze_matching(network, config.model.freeze)
    optimizer = build_optimizer(network, config.optim)
    schedule = build_schedule(
        config.optim,
        config.train.global_batch_size,
        steps_per_epoch * config.train.global_batch_size,
        config.train.epochs,
    )
    probe = (
        None
        if probe_classes is None
        else OnlineProbe(simclr.feature_dim, probe_classes, device, config.train.images_of_shard)
    )
    state = run_on_all_ranks(lambda: restore(checkpoint, config, loader, network, optimizer, probe), device)
    if checkpoint is None:
        state.started_from = start_from_weights(simclr, config, device)
    guard.state = state
    model = _wrap(network, accelerator, compiled=config.train.compile)
    accelerated_optimizer = accelerator.prepare_optimizer(optimizer)
    if checkpoint is not None and accelerator.scaler is not None and checkpoint.grad_scaler:
        accelerator.scaler.load_state_dict(dict(checkpoint.grad_scaler))

    last_step = min(num_steps, config.train.max_steps or num_steps)
    monitor = run_on_all_ranks(
        lambda: _open_monitor(
            config, world, state, checkpoint, last_step, steps_per_epoch, random_layers, implementations
        ),
        device,
    )
    saver = Saver(
        config,
        device,
        monitor,
        model=network,
        optimizer=optimizer,
        scaler=accelerator.scaler,
        probe=probe,
        fingerprint=loader.content_fingerprint,
        guard=guard,
    )
    non_finite = NonFinitePolicy(config.train, config.run_dir, world.rank, network, device, monitor.warn)
    across = config.loss.pairs == "across"
    health = HealthCheck(
        config.monitor.health_every_steps, network, world, num_views=config.data.num_views, across=across
    )
    return Parts(
        config=config,
        precision_reason=decided.reason,
        accelerator=accelerator,
        world=world,
        guard=guard,
        kind=kind,
        loader=loader,
        evaluation_images=labelled,
        steps_per_epoch=steps_per_epoch,
        last_step=last_step,
        implementations=implementations,
        augment=augment,
        network=network,
        random_layers=random_layers,
        forward_flops=flops,
        optimizer=accelerated_optimizer,
        schedule=schedule,
        nt_xent=nt_xent,
        probe=probe,
        state=state,
        model=model,
        shards=shards,
        monitor=monitor,
        saver=saver,
        non_finite=non_finite,
        health=health,
    )


def _check_world_size(config: Config, world: World) -> None:
    expected = int(os.environ.get("SIMCLR_EXPECTED_WORLD_SIZE", world.size))
    if world.size != expected:
        raise ConfigError(
            [
                f"{expected} processes were asked for, but {world.size} run; on a machine without GPUs use "
                "`python -m launcher local CONFIG --nproc N` (plain `accelerate launch --cpu` starts a single one)"
            ]
        )
    if config.train.global_batch_size % world.size:
        raise ConfigError(
            [f"train.global_batch_size: {config.train.global_batch_size} does not divide over {world.size} processes"]
        )
    if (shards := config.train.virtual_shards) and shards % world.size:
        raise ConfigError([shards_over_processes(shards, world.size)])


def _warn_on(world: World) -> Callable[[str], None]:
    """Warnings before there is a monitor."""

    def warn(text: str) -> None:
        if world.is_main:
            print(printable(f"warning: {text}"), file=sys.stderr, flush=True)

    return warn


def _check_labels(config: Config, warn: Callable[[str], None]) -> tuple[EvaluationImages | None, int | None]:
    """What the evaluations look at, and the number of the online probe's classes."""
    if remark := check_loss_labels(config.data, config.loss):
        warn(remark)
    num_classes = num_probe_classes(config.data, config.evaluation)
    images = evaluation_images(config.data, config.evaluation, config.seed)
    for remark in images.remarks if images else ():
        warn(remark)
    return images, num_classes


def _build_loss(config: Config, world: World, device: torch.device) -> tuple[NTXentLoss | SupConLoss, str]:
    """The loss, and what computes it on all ranks."""
    loss = build_loss(config.loss, config.data.num_views)
    rows = config.data.num_views * config.train.global_batch_size // world.size
    choice = loss.settle(device, num_rows=rows, width=config.model.head_out_dim)
    if choice.reason:
        _warn_on(world)(f"loss.implementation: {choice}")
    return loss, choice.name


def _build_shards(network: nn.Module, config: Config) -> VirtualShards | None:
    if config.train.virtual_shards is None:
        return None
    for name, module in network.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                [
                    f"train.virtual_shards: {name} of {config.model.encoder} is a SyncBatchNorm, whose statistics are "
                    "those of all processes; build the encoder with BatchNorm"
                ]
            )
    return VirtualShards(network, config.train.virtual_shards)


def _place(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    network.to(device)
    if config.train.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return convert_to_global_batch_norm(network) if config.model.batch_norm == "global" else network


def _wrap(network: nn.Module, accelerator: Accelerator, *, compiled: bool) -> nn.Module:
    if compiled:
        network.compile()
    with warnings.catch_warnings():
        # torch 2.15 wants another name for broadcast_buffers, which torch 2.11 does not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model: nn.Module = accelerator.prepare_model(network)
    distributed.average_gradients_directly(model)
    return model


def _open_monitor(
    config: Config,
    world: World,
    state: TrainState,
    checkpoint: Checkpoint | None,
    last_step: int,
    steps_per_epoch: int,
    random_layers: RandomLayers,
    implementations: Mapping[str, str],
) -> Monitor:
    """Writes down how this start goes on, and opens the records of what follows."""
    if not world.is_main:
        return Monitor()
    changed = changed_settings(checkpoint, config)
    refuse_to_relabel(checkpoint, changed, last_step)
    superseded = leave_other_line(checkpoint, config)
    drew_from_generator = provenance.drew_from_generator(config.run_dir)
    provenance.record(config.run_dir, config.seed, implementations)
    if state.step < last_step:
        provenance.record_settings(config.run_dir, render_config(config))
        record_start(config, state, checkpoint, changed)
    monitor = open_monitor(
        config.run_dir,
        config.monitor,
        total_steps=last_step,
        first_step=state.step,
        samples_seen=state.samples_seen,
        steps_per_epoch=steps_per_epoch,
        settings_of_run=config.model_dump(mode="json"),
        noun=kind_of(config.data).noun,
    )
    if superseded:
        monitor.warn(
            f"going back to step {state.step}: set aside in {RunDir(config.run_dir).checkpoints}: "
            f"{', '.join(superseded)}; resume=… with one of them takes that way again"
        )
    if state.step and random_layers.keyed and drew_from_generator:
        monitor.warn(
            f"up to step {state.step} dropout and stochastic depth drew from torch's generator, as in release 0.1; "
            "from here on they draw by key, so the masks are not those that the run would have had"
        )
    for change in history.describe_changes(changed):
        monitor.warn(f"changed since step {state.step}: {change}")
    return monitor
