"""What layers draw at random depends on the sample, not on its company: on any number of processes, in micro-batches,
recomputed, compiled, after a resume.
"""

from __future__ import annotations

import copy
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from simclr_dist.config import ModelConfig
from simclr_dist.doctor.network import examine_random_layers
from simclr_dist.loss import nt_xent
from simclr_dist.network import inputs
from simclr_dist.network.keyed_dropout import Call, Draws, KeyedLayer, draw_keys
from simclr_dist.network.random_layers import RandomLayers, key_draws
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from tests.random_layers_train import Mixed
from tests.training import Training

SIZE, WIDTH, IMAGES = 32, 12, 6
INPUTS = inputs.images(SIZE)


class Encoder(nn.Module):
    """Patches of an image as a map [n, 12, 8, 8], or as tokens [n, 64, 12], through `layer`."""

    def __init__(self, layer: nn.Module, tokens: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.layer = layer
        self.tokens = tokens

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        x = self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2) if self.tokens else self.layer(x)
        return x.flatten(2).mean(2)


class Own(nn.Module):
    """A user's module that draws as `function` does."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.training else x


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        if self.attention.batch_first:
            return self.attention(x, x, x, need_weights=self.need_weights)[0]
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=self.need_weights)[0].transpose(0, 1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(self.drop(x)))


class LayerDrop(nn.Module):
    """Skips itself for a whole batch: it reads what it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if torch.rand(1) < 0.5 else self.drop(x)


class TimeMajor(nn.Module):
    """Its first size is not that of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x.transpose(0, 1)).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def timm(name: str) -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    return {"DropPath": layers.DropPath, "PatchDropout": layers.PatchDropout}[name](0.4)


def network_with(layer: nn.Module, *, tokens: bool = False) -> tuple[SimCLR, RandomLayers]:
    torch.manual_seed(0)
    network = SimCLR(Encoder(layer, tokens), nn.Linear(WIDTH, 4), WIDTH)
    return network.train(), key_draws(network, INPUTS)


def images(n: int = 2 * IMAGES) -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def keys_of(epoch: int = 0, step: int = 0, ids: np.ndarray | None = None) -> Tensor:
    return draw_keys(0, epoch, step, np.arange(IMAGES) if ids is None else ids).flatten(0, 1)


# A module, and whether it takes tokens.
KEYED: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "dropout": (lambda: nn.Dropout(0.3), False),
    "dropout in place": (lambda: nn.Dropout(0.3, inplace=True), True),
    "channels": (lambda: nn.Dropout2d(0.3), False),
    "alpha": (lambda: nn.AlphaDropout(0.3), False),
    "alpha of channels": (lambda: nn.FeatureAlphaDropout(0.3), False),
    "random slopes": (lambda: nn.RReLU(), False),
    "stochastic depth": (lambda: StochasticDepth(0.4, "row"), False),
    "stochastic depth of the batch": (lambda: StochasticDepth(0.4, "batch"), False),
    "timm's drop path": (lambda: timm("DropPath"), False),
    "timm's patch dropout": (lambda: timm("PatchDropout"), True),
    "attention": (lambda: Attention(batch_first=True, need_weights=False), True),
    "attention with weights": (lambda: Attention(batch_first=True, need_weights=True), True),
    "attention over a first axis": (lambda: Attention(batch_first=False, need_weights=False), True),
    "transformer": (lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.3, batch_first=True), True),
    "one module twice": (Twice, True),
    "a branch on a draw": (LayerDrop, True),
    "functional": (lambda: Own(lambda x: F.dropout(x, 0.3)), True),
    "own drop path": (lambda: Own(lambda x: x * (torch.rand(len(x), 1, 1, device=x.device) > 0.4)), True),
    "own noise": (lambda: Own(lambda x: x + torch.randn_like(x)), True),
    "noise of the batch": (lambda: Own(lambda x: x * torch.rand(WIDTH, device=x.device)), True),
    "gumbel": (lambda: Own(lambda x: F.gumbel_softmax(x) * 9), True),
    "bernoulli": (lambda: Own(lambda x: x * torch.bernoulli(torch.full_like(x, 0.6))), True),
}
OWN: dict[str, Callable[[], nn.Module]] = {
    "encoder.layer.drop (Dropout)": TimeMajor,
    "encoder.layer.lstm (LSTM)": Recurrent,
    "encoder.layer (Own)": lambda: Own(lambda x: x * random.random()),
    "encoder.layer (Own) ": lambda: Own(lambda x: x * np.random.rand()),  # noqa: NPY002
    "encoder.layer (Own)  ": lambda: Own(lambda x: x[:, torch.multinomial(torch.ones(64), 64)]),
}


@pytest.mark.parametrize("name", KEYED)
def test_a_sample_draws_the_same_in_any_company(name: str) -> None:
    make, tokens = KEYED[name]
    network, found = network_with(make(), tokens=tokens)
    assert found.keyed
    assert not found.warning()
    x, row_keys = images(), keys_of()
    state = torch.get_rng_state()
    together = network(x, row_keys)[0]
    for part in (torch.tensor([4]), torch.tensor([7, 2, 11]), torch.arange(12).flip(0)):
        torch.testing.assert_close(network(x[part], row_keys[part])[0], together[part], rtol=1e-5, atol=1e-6)
    assert torch.equal(network(x, row_keys)[0], together)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw_keys(0, 0, 0, np.arange(IMAGES), num_views=4)[:2].flatten(0, 1), row_keys)
    others = [network(x, keys_of(epoch=epoch, step=epoch))[0] for epoch in range(1, 5)]
    assert any(not torch.allclose(other, together, rtol=1e-2) for other in others)


@pytest.mark.parametrize("name", OWN)
def test_what_cannot_draw_by_key_is_named(name: str) -> None:
    found = network_with(OWN[name](), tokens=True)[1]
    assert not found.keyed
    assert name.strip() in found.warning()


def test_a_module_that_draws_by_key_and_otherwise_is_named() -> None:
    found = network_with(Own(lambda x: F.dropout(x, 0.3) * random.random()), tokens=True)[1]
    assert "encoder.layer (Own) cannot draw by key" in found.warning()


@pytest.mark.parametrize("encoder", ["resnet18", "vit_b_16"])
def test_a_network_that_draws_nothing_is_left_alone(encoder: str) -> None:
    network = build_model(ModelConfig(encoder=encoder, image_size=SIZE))
    assert key_draws(network, INPUTS) == RandomLayers()
    assert network.draws is None


def test_looking_for_draws_draws_nothing() -> None:
    network = SimCLR(Encoder(nn.Sequential(LayerDrop(), OWN["encoder.layer (Own)"]()), True), nn.Identity(), WIDTH)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    assert key_draws(network, INPUTS).own
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[2]) == before[1:]  # noqa: NPY002


def test_masks_of_efficientnet_are_equal_element_by_element() -> None:
    network = build_model(ModelConfig(encoder="efficientnet_b0", image_size=SIZE)).train()
    found = key_draws(network, INPUTS)
    assert set(found.keyed.values()) == {"StochasticDepth"}
    assert "StochasticDepth: the same on any number of processes" in found.summary()
    masks: dict[str, list[Tensor]] = {}
    for name in found.keyed:
        layer = network.get_submodule(name)
        layer.register_forward_hook(lambda _, x, y, name=name: masks.setdefault(name, []).append(y != 0))
        layer.register_forward_pre_hook(lambda _, x: (torch.ones_like(x[0]),))
    x, row_keys = images(), keys_of()
    network(x, row_keys)
    network(x[:6], row_keys[:6])
    network(x[6:], row_keys[6:])
    for whole, first, second in masks.values():
        assert torch.equal(whole, torch.cat([first, second]))
    assert len({tuple(whole.flatten(1)[:, 0].tolist()) for whole, _, _ in masks.values()}) > 3


def test_names_evaluation_and_calls_without_keys_stay() -> None:
    torch.manual_seed(0)
    plain = SimCLR(Encoder(Twice(), True), nn.Linear(WIDTH, 4), WIDTH)
    keyed, _ = network_with(Twice(), tokens=True)
    assert list(keyed.state_dict()) == list(plain.state_dict())
    assert isinstance(keyed.encoder.get_submodule("layer.drop"), nn.Dropout)
    plain.load_state_dict(keyed.state_dict())
    x = images()
    assert torch.equal(keyed.eval()(x, keys_of())[0], plain.eval()(x)[0])
    found = []
    for network in (keyed, plain):
        torch.manual_seed(3)
        found.append(network.train()(x)[0])
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def draw(
    row_keys: Tensor, make: Callable[[Call, tuple[int, ...]], Tensor], layer: str = "a", per_row: int = 512
) -> Tensor:
    draws = Draws()
    keyed = KeyedLayer(layer, draws)
    draws.begin(row_keys, draws.hashes())
    return make(Call(keyed), (len(row_keys), per_row))


def test_masks_keep_their_share_and_do_not_follow_one_another() -> None:
    p, ids = 0.1, np.arange(4096) * 7

    def kept(epoch: int = 0, layer: str = "encoder.a") -> Tensor:
        row_keys = draw_keys(0, epoch, 0, ids).flatten(0, 1)
        return draw(row_keys, lambda call, shape: call.keep(shape, p), layer)

    mask = kept()  # [2 * 4096, 512]
    noise = 1 / math.sqrt(mask.numel())
    assert float(mask.float().mean()) == pytest.approx(1 - p, abs=5 * noise * math.sqrt(p * (1 - p)))
    assert float(mask.float().mean(1).std()) == pytest.approx(math.sqrt(p * (1 - p) / 512), rel=0.05)
    assert float(mask.float().mean(0).std()) == pytest.approx(math.sqrt(p * (1 - p) / 8192), rel=0.15)

    def correlation(a: Tensor, b: Tensor) -> float:
        return float(((a.double() - 1 + p) * (b.double() - 1 + p)).mean() / (p * (1 - p)))

    view0, view1 = mask.chunk(2)
    for a, b in (
        (view0, view1),
        (mask[1:], mask[:-1]),
        (mask[:, 1:], mask[:, :-1]),
        (mask[:, 64:], mask[:, :-64]),
        (mask, kept(epoch=1)),
        (mask, kept(layer="encoder.b")),
    ):
        assert abs(correlation(a, b)) < 6 / math.sqrt(a.numel())


def test_stochastic_depth_keeps_its_share_of_rows_in_each_layer() -> None:
    row_keys = draw_keys(0, 3, 0, np.arange(50_000)).flatten(0, 1)
    layers = [
        draw(row_keys, lambda call, shape: call.keep(shape, 0.2), f"block{i}.drop", per_row=1).double() - 0.8
        for i in range(6)
    ]
    for i, kept in enumerate(layers):
        assert abs(float(kept.mean())) < 5 * 0.4 / math.sqrt(len(row_keys))
        for other in layers[:i]:
            assert abs(float((kept * other).mean()) / 0.16) < 5 / math.sqrt(len(row_keys))


def test_noise_has_its_distribution() -> None:
    row_keys = keys_of(ids=np.arange(1000))
    uniform, normal, exponential = (draw(row_keys, make) for make in (Call.uniform, Call.normal, Call.exponential))
    assert 0 < float(uniform.min()) < 1e-4
    assert 1 - 1e-4 < float(uniform.max()) < 1
    for x, mean, std, below in (
        (uniform, 0.5, 12**-0.5, 0.5),
        (normal, 0, 1, 0.5),
        (exponential, 1, 1, 1 - 1 / math.e),
    ):
        noise = 5 / math.sqrt(x.numel())
        assert float(x.mean()) == pytest.approx(mean, abs=noise * std)
        assert float(x.std()) == pytest.approx(std, abs=3 * noise)
        assert float((x < mean).float().mean()) == pytest.approx(below, abs=noise)


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout_keeps_mean_and_variance_and_knows_torchs_values(kind: type[nn.Module]) -> None:
    x = torch.ones(4, 50, 20)
    torch.manual_seed(0)
    values = kind(0.25)(x).unique()
    network, _ = network_with(kind(0.25))
    keyed = network.encoder.get_submodule("layer")
    network(images(4), keys_of(ids=np.arange(2)))
    torch.testing.assert_close(keyed(x).unique(), values)


def test_attention_drops_weights_as_torch_does_and_keeps_the_rest() -> None:
    """Values that are the unit matrix make the output the weights."""
    q, k = torch.randn(2, 4, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    unit = torch.eye(16).expand_as(q)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.randn(16, 16)}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(q, k, unit, **options)  # type: ignore[arg-type]
        draws = Draws()
        KeyedLayer("a", draws)
        draws.begin(keys_of(ids=np.arange(2)), draws.hashes())
        with Call(draws.layers[0]):
            dropped = F.scaled_dot_product_attention(q, k, unit, dropout_p=0.25, **options)  # type: ignore[arg-type]
        kept = dropped != 0
        torch.testing.assert_close(dropped, torch.where(kept, expected / 0.75, 0.0))
        assert float(kept[expected > 0].float().mean()) == pytest.approx(0.75, abs=0.07)


# ---------------------------------------------------------------------------------------------------------------------
# Passes that are computed again, or otherwise


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def gradient(network: nn.Module, backward: Callable[[], object]) -> Tensor:
    network.zero_grad()
    backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["transformer", "one module twice", "functional"])
def test_activation_checkpointing_sees_the_same_masks(name: str, reentrant: bool) -> None:
    make, tokens = KEYED[name]
    plain, _ = network_with(make(), tokens=tokens)
    saving, found = network_with(Checkpointed(make(), reentrant), tokens=tokens)
    assert found.keyed
    saving.load_state_dict({key.replace("layer.", "layer.layer.", 1): x for key, x in plain.state_dict().items()})
    # The layer's name counts, and here it is another one.
    assert plain.draws is not None
    saving.get_buffer("layer_hashes").copy_(plain.draws.hashes())
    x, row_keys = images(), keys_of()
    expected = gradient(plain, lambda: plain(x, row_keys)[1].square().sum().backward())
    found_gradient = gradient(saving, lambda: saving(x, row_keys)[1].square().sum().backward())
    torch.testing.assert_close(found_gradient, expected, rtol=1e-5, atol=1e-6)


def test_a_recomputed_run_that_cannot_be_told_from_another_is_refused() -> None:
    class Closure(Twice):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(lambda y: self.drop(self.linear(y)), x, use_reentrant=False)
            return x

    network, found = network_with(Closure(), tokens=True)
    assert found.keyed
    with pytest.raises(RuntimeError, match=r"encoder\.layer\.drop runs 2 times"):
        network(images(), keys_of())[1].sum().backward()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_have_the_gradient_of_the_whole_batch(micro_batch_size: int) -> None:
    torch.manual_seed(0)
    network = SimCLR(Mixed(), nn.Linear(16, 4), 16).double().train()
    assert len(key_draws(network, INPUTS).keyed) >= 7
    views, row_keys = images().double().unflatten(0, (2, -1)), keys_of().unflatten(0, (2, -1))
    whole = gradient(network, lambda: nt_xent(network(views.flatten(0, 1), row_keys.flatten(0, 1))[1]).backward())
    cut = gradient(
        network,
        lambda: backward_in_micro_batches(
            network, views, nt_xent, micro_batch_size=micro_batch_size, row_keys=row_keys
        ),
    )
    assert float((cut - whole).norm() / whole.norm()) < 1e-12


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_and_is_compiled_once() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = SimCLR(Mixed(), nn.Linear(16, 4), 16).train()
    key_draws(network, INPUTS)
    x = images()
    eager = copy.deepcopy(network)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    network.compile(backend=backend)
    for epoch in range(3):
        torch.testing.assert_close(network(x, keys_of(epoch))[0], eager(x, keys_of(epoch))[0])
    assert len(graphs) == 1


def test_nothing_is_read_back_from_the_device() -> None:
    """On the device without values, whoever reads one fails."""
    network = SimCLR(Mixed(), nn.Linear(16, 4), 16).train()
    key_draws(network, INPUTS)
    h, _ = network.to("meta")(torch.empty(8, 3, SIZE, SIZE, device="meta"), keys_of(ids=np.arange(4)).to("meta"))
    assert h.is_meta


# ---------------------------------------------------------------------------------------------------------------------
# Whole trainings

FEW = ("model.encoder=mixed", "train.global_batch_size=16", "train.max_steps=6", "optim.base_lr=0.05")
FEW = (*FEW, "model.head_batch_norm=none")
MODULE = "tests.random_layers_train"


@pytest.mark.distributed
def test_one_two_and_four_processes_and_micro_batches_have_one_curve(images: Path, tmp_path: Path) -> None:
    alone = Training(images, tmp_path, "alone", *FEW, module=MODULE)
    assert alone.wait() == [0], alone.output
    assert "the same on any number of processes" in alone.output[0]
    for world_size, settings in ((2, ()), (4, ()), (2, ("train.micro_batch_size=4",))):
        several = Training(
            images, tmp_path, f"on{world_size}{len(settings)}", *FEW, *settings, module=MODULE, world_size=world_size
        )
        assert several.wait() == [0] * world_size, several.output
        assert several.losses() == pytest.approx(alone.losses(), rel=1e-4)


def test_a_resume_with_dropout_ends_with_the_same_bytes(images: Path, tmp_path: Path) -> None:
    whole = Training(images, tmp_path, "whole", *FEW, module=MODULE)
    assert whole.wait() == [0], whole.output
    cut = Training(images, tmp_path, "cut", *FEW, "checkpoint.every_steps=2", module=MODULE)
    cut.wait_until(lambda: cut.has_logged(3))
    cut.ranks[0].send_signal(signal.SIGKILL)
    cut.wait()
    again = Training(images, tmp_path, "cut", *FEW, module=MODULE)
    assert again.wait() == [0], again.output
    assert "resumes at step" in again.output[0]
    assert again.final_bytes() == whole.final_bytes()
    assert again.losses() == whole.losses()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("encoder", ["swin_t", "efficientnet_b0"])
def test_the_first_step_of_torchvisions_networks_does_not_depend_on_processes(
    images: Path, tmp_path: Path, encoder: str
) -> None:
    settings = (f"model.encoder={encoder}", "model.stem=imagenet", "train.global_batch_size=16", "train.max_steps=1")
    losses = []
    for world_size in (1, 2):
        training = Training(images, tmp_path, f"on{world_size}", *settings, world_size=world_size)
        assert training.wait() == [0] * world_size, training.output
        losses.append(training.losses()[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_run_of_release_0_1_says_that_its_masks_change(images: Path, tmp_path: Path) -> None:
    settings = (*FEW, "train.max_steps=1")
    assert Training(images, tmp_path, "old", *settings, module=MODULE).wait() == [0]
    record = tmp_path / "old" / "environment.jsonl"
    record.write_text(record.read_text().replace(', "dropout": "keyed"', ""))
    resumed = Training(images, tmp_path, "old", *FEW, "train.max_steps=2", module=MODULE)
    assert resumed.wait() == [0]
    assert "up to step 1 dropout and stochastic depth drew from torch's generator" in resumed.output[0]


def test_doctor_shows_what_draws() -> None:
    findings = list(examine_random_layers(ModelConfig(encoder="efficientnet_b0", image_size=SIZE), INPUTS))
    assert [finding.level for finding in findings] == ["ok"]
    assert "StochasticDepth: the same on any number of processes" in findings[0].found


@pytest.mark.slow
def test_torchvisions_networks_draw_by_key_alone() -> None:
    for encoder, kinds in (("swin_t", {"StochasticDepth"}), ("convnext_tiny", {"StochasticDepth"})):
        found = key_draws(build_model(ModelConfig(encoder=encoder, image_size=SIZE)), INPUTS)
        assert set(found.keyed.values()) == kinds
        assert not found.warning()
