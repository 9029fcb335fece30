"""The tables that a run shows when it begins and when it ends: rows of a name and a text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from simclr_dist.checkpoint.lineage import list_checkpoints
from simclr_dist.config import Config, LossConfig, ModelConfig, TrainConfig
from simclr_dist.data.loading.fetch_ahead import sentence_of_store
from simclr_dist.data.mix import MixedOrder
from simclr_dist.kinds import Kind, kind_of
from simclr_dist.loss.build import choices, negatives
from simclr_dist.monitor.events import Summary
from simclr_dist.monitor.speed import SINCE_START, Speed
from simclr_dist.monitor.terminal import duration
from simclr_dist.optim.groups import describe_scales, parameter_groups
from simclr_dist.optim.schedule import peak_learning_rate
from simclr_dist.parallel.distributed import World
from simclr_dist.plan.memory import optimizer_state
from simclr_dist.run.state import TrainState
from simclr_dist.run.status import State
from simclr_dist.safe_text import printable
from simclr_dist.source_text import lines
from simclr_dist.training.parts import Parts


def show_start(config: Config, parts: Parts) -> None:
    """The table of the start, and warnings about what changes results."""
    if parts.world.is_main:
        start = f"resumes at step {parts.state.step}" if parts.state.step else "starts at step 0"
        rows = start_rows(config, parts)
        if parts.precision_reason:
            rows["device"] += f" ({parts.precision_reason})"
        rows["computed by"] = ", ".join(f"{part}: {name}" for part, name in parts.implementations.items())
        if random_layers := parts.random_layers.summary():
            rows["random layers"] = random_layers
        rows |= weight_rows(config, parts.state, parts.network)
        parts.monitor.show(Summary("start", f"{config.name}: {start} of {parts.last_step}", rows))
        if warning := parts.random_layers.warning():
            parts.monitor.warn(warning)
        if parts.loader.account is not None:
            for line in parts.loader.account.remarks():
                parts.monitor.warn(f"{config.data.train}: {line}")
    if parts.world.size > 1 and config.model.batch_norm == "per_device":
        parts.monitor.warn("model.batch_norm=per_device: statistics, and so results, depend on the number of devices")
    if config.checkpoint.keep_best and config.evaluation.knn_every_epochs is None:
        parts.monitor.warn("checkpoint.keep_best: no checkpoint is the best without evaluation.knn_every_epochs")
    if config.train.micro_batch_size is not None and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in parts.network.modules()
    ):
        parts.monitor.warn(
            "train.micro_batch_size with BatchNorm: statistics are those of each micro-batch, so the gradient is "
            "that of a different (still well-defined) network than without it"
        )


def show_end(config: Config, parts: Parts, state: State, speed: Speed) -> None:
    """speed: of this start of the run; its last figure is logged, so that every place has the same one."""
    images = parts.state.samples_seen - speed.first_sample
    if images:
        figure = {SINCE_START: speed.since_start(parts.state.samples_seen)}
        parts.monitor.log(figure, step=parts.state.step, samples_seen=parts.state.samples_seen)
    bank = None if parts.evaluation_images is None else len(parts.evaluation_images.bank)
    seconds = speed.trained_s() + speed.paused_s, speed.paused_s
    seen = kind_of(config.evaluation_data)
    rows = end_rows(config, parts.monitor.latest, seconds=seconds, images=images, bank=bank, seen=seen)
    title = f"{state} at step {parts.state.step} of {parts.last_step}"
    parts.monitor.show(Summary("end", title, rows))


def start_rows(config: Config, parts: Parts) -> dict[str, str]:
    world, loader, model, flops, kind = parts.world, parts.loader, parts.network, parts.forward_flops, parts.kind
    G, epoch = config.train.global_batch_size, loader.order.steps_per_epoch
    head = config.model.head_out_dim
    parameters = sum(p.numel() for p in model.parameters())
    evaluated = f" (evaluations: {config.evaluation.image_size} px)" if config.evaluation_data != config.data else ""
    left_out = loader.order.left_out
    warmup = f" after {config.optim.warmup_epochs:g} epochs" if config.optim.warmup_epochs else ""
    decay = "half a cosine to 0" if config.optim.schedule == "cosine" else "constant"
    return {
        "data": f"{config.data.train}: {loader.num_samples:,} {kind.noun}s, {config.data.num_views} views of "
        f"{kind.inputs.size}{evaluated}, {epoch:,} steps an epoch"
        + (f"; each epoch leaves out another {left_out:,}" if left_out else ""),
        **_mix_rows(config, parts),
        **({"store": printable(store)} if (store := sentence_of_store(config.data, loader.order)) else {}),
        **({"read as": printable(loader.account.layout)} if loader.account is not None else {}),
        **kind.start_rows(config.augment),
        "global batch": split_of_batch(G, world, config.train.micro_batch_size, kind.noun),
        **shards_in_words(config.train, kind.noun),
        "learning rate": f"{config.optim.optimizer}, peak {learning_rate_formula(config)}{warmup}, then {decay}",
        **learning_rates_of_parts(config, model),
        "loss": loss_in_words(config.loss, config.data.num_views, G),
        "model": f"{config.model.encoder}, {_head_in_words(config.model)} to {head} dimensions, "
        f"{parameters:,} parameters" + (f", {flops / 1e9:,.4f} GFLOP a view" if flops else ""),
        "device": f"{world.size} x {device_name(parts.device)}, {config.train.precision}"
        + (", compiled" if config.train.compile else ""),
        "memory": f"{_mib(kept_bytes(config, model))} a device for parameters, gradients and optimiser; `simclr-dist "
        "plan` estimates the rest",
        "run directory": str(config.run_dir),
    }


def _mix_rows(config: Config, parts: Parts) -> dict[str, str]:
    order = parts.loader.order
    if not isinstance(order, MixedOrder):
        return {}
    sentences = order.sentences(lines(config.data.train), parts.last_step)
    return {f"mix {i}": printable(sentence) for i, sentence in enumerate(sentences, 1)}


def weight_rows(config: Config, state: TrainState, network: nn.Module) -> dict[str, str]:
    """What the network began with, and what of it is not trained."""
    rows: dict[str, str] = {}
    origin = state.started_from
    if origin is not None and state.step == 0:
        rows["weights"] = printable("; ".join(map(str, origin.get("said", ()))))
    elif state.step and config.model.weights is not None:
        begun = f"; the run began with {origin.get('weights')}" if origin is not None else ""
        rows["weights"] = printable(f"those of the checkpoint: model.weights counts at step 0 only{begun}")
    if config.model.freeze:
        parameters = list(network.parameters())
        frozen, total = (
            sum(p.numel() for p in x) for x in ([p for p in parameters if not p.requires_grad], parameters)
        )
        norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.training for m in network.modules())
        kept = f"; {norms} frozen BatchNorms keep their statistics" if norms else ""
        rows["not trained"] = f"{frozen:,} of {total:,} parameters (model.freeze){kept}"
    return rows


def end_rows(
    config: Config,
    latest: Mapping[str, float],
    *,
    seconds: tuple[float, float],
    images: int,
    bank: int | None,
    seen: Kind,
) -> dict[str, str]:
    """seconds, images: of this start of the run, in all and for evaluations and saves; latest: the last figure of each
    tag; bank: samples of kNN's bank; seen: the data as evaluations see them.
    """
    rows = {}
    if images:
        in_all, paused = map(duration, seconds)
        rows["time"] = f"{in_all}, of which {paused} for evaluations and saves"
        rows["speed"] = (
            f"{images:,} {seen.noun}s, {latest[SINCE_START]:,.0f} {seen.noun}s/s without evaluations and saves"
        )
    evaluation = config.evaluation
    knn = f"k={evaluation.knn_k}, T={evaluation.knn_temperature:g}, {bank or 0:,} training {seen.noun}s"
    for name, tag, form in (
        ("loss", "train/loss", "{:.4f}"),
        ("kNN top-1", "eval/knn_top1", f"{{:.2%}} ({knn}, {seen.inputs.size})"),
        ("online probe top-1", "eval/probe_top1", "{:.2%}"),
        ("waited for data", "speed/data_wait_share", "{:.0%} of the last steps' time"),
        ("peak memory", "speed/memory_peak_gib", "{:.2f} GiB"),
    ):
        if tag in latest:
            rows[name] = form.format(latest[tag])
    for newest in list_checkpoints(config.run_dir)[-1:]:
        rows["checkpoint"] = str(newest)
    rows["curves"] = f"tensorboard --logdir {config.runs_dir}"
    return rows


def _head_in_words(model: ModelConfig) -> str:
    return "linearly projected" if model.head_layers == 1 else f"by a head of {model.head_layers} layers"


def split_of_batch(global_batch_size: int, world: World, micro_batch_size: int | None, noun: str = "image") -> str:
    """4,096 = 8 nodes x 8 devices x 64 images, in micro-batches of 32"""
    nodes, per_device = world.size // world.local_size, global_batch_size // world.size
    parts = [_count(nodes, "node")] if nodes > 1 else []
    parts += [_count(world.size // nodes, "device"), _count(per_device, noun)]
    micro = f", in micro-batches of {micro_batch_size}" if micro_batch_size and micro_batch_size < per_device else ""
    return f"{global_batch_size:,} = {' x '.join(parts)}{micro}"


def shards_in_words(train: TrainConfig, noun: str = "image") -> dict[str, str]:
    if train.virtual_shards is None:
        return {}
    text = f"{train.virtual_shards} of {_count(train.images_of_shard or 0, noun)}, each computed alone with one thread"
    return {"shards": f"{text}: the same bytes on any power of two of processes up to {train.virtual_shards}"}


def learning_rate_formula(config: Config) -> str:
    """0.3 x 4096/256 = 4.8"""
    base, G = config.optim.base_lr, config.train.global_batch_size
    formula = {"linear": f"{base:g} x {G}/256 = ", "sqrt": f"{base:g} x sqrt({G}) = ", "none": ""}
    return f"{formula[config.optim.lr_scaling]}{peak_learning_rate(config.optim, G):.4g}"


def loss_in_words(loss: LossConfig, num_views: int, global_batch_size: int) -> str:
    """temperature 0.1, 1,022 negatives a row; guessing gives ln(1,023) = 6.93"""
    rows = choices(loss, num_views, global_batch_size)
    kind = {"nt_xent": "", "dcl": "decoupled, ", "supcon": "supervised, "}[loss.kind]
    learnt = f", learnt between {loss.temperature_min:g} and {loss.temperature_max:g}" if loss.learn_temperature else ""
    against = f"{negatives(loss, num_views, global_batch_size):,} negatives a row"
    if loss.pairs == "across":
        against += ", all of the other view"
    if loss.kind == "supcon":
        against = f"each row against {rows:,} others, those of its class are positives"
    return (
        f"{kind}temperature {loss.temperature:g}{learnt}, {against}; guessing gives ln({rows:,}) = {math.log(rows):.2f}"
    )


def learning_rates_of_parts(config: Config, model: nn.Module) -> dict[str, str]:
    """What does not learn at the rate of the schedule."""
    rows, optim = {}, config.optim
    if optim.optimizer == "muon":
        groups = parameter_groups(model, optim)
        others = sum(p.numel() for g in groups if not g.rule.orthogonal for p in g.parameters.values())
        rows["AdamW for the rest"] = f"{optim.adamw_base_lr / optim.base_lr:g} x that rate, for {others:,} parameters"
    if scales := describe_scales(model, optim):
        shown = scales if len(scales) <= 4 else [*scales[:2], f"… {len(scales) - 4} more layers", *scales[-2:]]
        rows["rates by layer"] = "; ".join(shown)
    return rows


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def kept_bytes(config: Config, model: nn.Module) -> int:
    """What stays on a device from step to step."""
    gradients = sum(p.nbytes for p in model.parameters())
    numbers = sum(x.nbytes for x in model.state_dict().values())
    return numbers + gradients + sum(x.nbytes for x in optimizer_state(model, config.optim).values())


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")
