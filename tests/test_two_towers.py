"""Two encoders in one network: each sees its own half of the rows, and draws by its own keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.config import Config, ModelConfig
from simclr_dist.loss import NTXentLoss
from simclr_dist.network import encoders
from simclr_dist.network.flops import forward_flops
from simclr_dist.network.inputs import Inputs
from simclr_dist.network.keyed_dropout import draw_keys
from simclr_dist.network.random_layers import key_draws
from simclr_dist.network.simclr import TwoTowers, build_model, pack_pairs, unpack_pairs
from simclr_dist.network.trial import try_model

S, T = 8, 5


class Words(nn.Module):
    """Tokens [n, T] to the mean of their vectors, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != 0)[..., None]
        x = self.dropout(self.embedding(tokens)) * real
        return self.out(x.sum(1) / real.sum(1).clamp_min(1))


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders._REGISTERED, "words", lambda config: (Words(), 12))


def settings(**more: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "encoder": "resnet_small",
        "width": 4,
        "image_size": S,
        "head_out_dim": 6,
        "text": {"encoder": "words", "head_batch_norm": "none", "head_layers": 1},
    }
    return ModelConfig.model_validate({**values, **more})


def pairs(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(1, 50, (n, T), generator=generator)
    return torch.randn(n, 3, S, S, generator=generator), tokens


def inputs() -> Inputs:
    return Inputs("pairs", "8 px", lambda n: pack_pairs(*pairs(n // 2)).flatten(0, 1))


def test_packing_loses_nothing() -> None:
    images, tokens = pairs(3)
    tokens[0, 0] = 2**24 - 1
    found = unpack_pairs(pack_pairs(images, tokens).flatten(0, 1), (S, S, 3))
    assert torch.equal(found[0], images)
    assert torch.equal(found[1], tokens)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_each_tower_gives_what_it_gives_alone_and_the_gradient_is_that_of_both() -> None:
    torch.manual_seed(0)
    network = build_model(settings()).double().eval()
    assert isinstance(network, TwoTowers)
    images, tokens = pairs(4)
    images = images.double()
    h, z = network(pack_pairs(images, tokens).flatten(0, 1))
    assert h.shape == (8, 16)  # the wider of 16 and 12
    torch.testing.assert_close(h[:4], network.encoder(images))
    torch.testing.assert_close(h[4:, :12], network.text.encoder(tokens))
    assert not h[4:, 12:].any()
    torch.testing.assert_close(z[:4], network.projection_head(network.encoder(images)))
    torch.testing.assert_close(z[4:], network.text.projection_head(network.text.encoder(tokens)))

    # CLIP's loss, written down once more: cross-entropy in both directions.
    NTXentLoss(0.1, num_views=2, pairs="across")(z, torch.arange(4)).backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    a = F.normalize(network.projection_head(network.encoder(images)), dim=1)
    b = F.normalize(network.text.projection_head(network.text.encoder(tokens)), dim=1)
    logits, right = a @ b.T / 0.1, torch.arange(4)
    ((F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2).backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_names_of_the_images_parameters_are_those_of_a_network_of_images() -> None:
    alone = build_model(settings(text=None)).state_dict()
    both = build_model(settings()).state_dict()
    assert {name: x.shape for name, x in both.items() if not name.startswith("text.")} == {
        name: x.shape for name, x in alone.items()
    }


def test_dropout_of_the_texts_goes_by_the_keys_of_the_texts() -> None:
    """So it is the same on one process and on two, whose rows are halves of each view."""
    torch.manual_seed(0)
    network = build_model(settings())
    layers = key_draws(network, inputs())
    assert dict(layers.keyed) == {"text.encoder.dropout": "Dropout"}
    assert not layers.own
    for module in network.modules():
        module.train(isinstance(module, nn.Dropout))
    images, tokens = pairs(8)
    ids = torch.arange(8).numpy()
    keys = draw_keys(0, 0, 0, ids, torch.device("cpu"), num_views=2)
    whole = network(pack_pairs(images, tokens).flatten(0, 1), keys.flatten(0, 1))[1].unflatten(0, (2, -1))
    for part in (slice(0, 4), slice(4, 8)):
        rows = pack_pairs(images[part], tokens[part]).flatten(0, 1)
        own = network(rows, keys[:, part].flatten(0, 1))[1].unflatten(0, (2, -1))
        torch.testing.assert_close(own, whole[:, part])
    other = network(pack_pairs(images, tokens).flatten(0, 1), keys.flip(0).flatten(0, 1))[1].unflatten(0, (2, -1))
    assert not torch.allclose(other[1], whole[1])


def test_both_towers_are_tried_and_counted() -> None:
    assert not try_model(settings(), inputs()).unused
    network, alone = build_model(settings()), build_model(settings(text=None))
    of_image = forward_flops(alone, Inputs("images", "", lambda n: pairs(n)[0]))
    counted = forward_flops(network, inputs())  # of a view: half a pair
    assert of_image is not None
    assert counted is not None
    assert of_image / 2 < counted < of_image / 2 + 2 * 12 * 12 + 2 * 12 * 6


CONFIG = {
    "name": "x",
    "data": {"kind": "image_text", "train": "pairs", "image_size": 32},
    "model": {"encoder": "resnet_small", "text": {"encoder": "words"}},
    "loss": {"pairs": "across"},
    "train": {"global_batch_size": 8, "epochs": 20},
}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"text": None}, "needs model.text"),
        ("loss", {"pairs": "within"}, "set loss.pairs=across"),
        ("data", {"kind": "images"}, "only image_text has a second encoder"),
        ("model", {"text": {"encoder": "words", "weights": "x"}}, "text.weights: is not of the encoder of texts"),
        ("model", {"text": {"encoder": "words", "zero_init_residual": False}}, "text.zero_init_residual: is not of"),
        ("model", {"text": {"encoder": "words", "text": {"encoder": "words"}}}, "text.text: is not"),
        ("model", {"text": {"encoder": "hf/FOLDER"}}, "would not be read here"),
        ("model", {"text": {"encoder": "words", "head_out_dim": 5}}, "must be model.head_out_dim"),
        ("evaluation", {"online_probe": True}, "leave it out"),
        ("data", {"image_size": None}, "image_size"),
    ],
)
def test_settings_that_do_not_fit_two_towers_are_refused_by_name(section: str, values: dict, message: str) -> None:
    assert Config.model_validate(CONFIG).model.text is not None
    changed = {**CONFIG, section: {**CONFIG.get(section, {}), **values}}  # type: ignore[dict-item]
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(changed)


def test_the_heads_meet() -> None:
    assert (
        settings(head_out_dim=32).text
        == settings(
            head_out_dim=32, text={"encoder": "words", "head_batch_norm": "none", "head_layers": 1, "head_out_dim": 32}
        ).text
    )
