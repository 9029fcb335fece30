"""What a start must know of its network, found by a trial, and kept for the next start with the same network.

Without it, a start by the launcher would import torchvision once more, which takes longer than everything else that is
checked. Only what went well is kept, and only of encoders that come from libraries: one's own code may change.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import simclr_dist
from simclr_dist.atomic import replace_text
from simclr_dist.bounded_json import read_json
from simclr_dist.config import Config
from simclr_dist.kinds import kind_of
from simclr_dist.run.provenance import versions


@dataclass(frozen=True)
class NetworkFacts:
    unused: tuple[str, ...]
    """Trainable parameters that are in no path to the loss (network/trial.py)."""
    remark: str
    """A sentence about them; empty where there are none."""
    checkpoint_bytes: int


def network_facts(config: Config) -> NetworkFacts:
    """Raises ConfigError where the encoder is unknown, or cannot take the images of trainings or evaluations."""
    if (known := _recall(config)) is not None:
        return known
    from simclr_dist.network.encoders import is_from_library
    from simclr_dist.network.trial import check_evaluation_size, try_model
    from simclr_dist.plan.memory import checkpoint_bytes, shape_of_training

    kind = kind_of(config.data)
    tried, size = try_model(config.model, kind.inputs), config.evaluation_data.image_size
    kind.check_encoder(tried.network.encoder, config.model)
    check_evaluation_size(config.model, tried.network, size, trained_at=config.data.image_size)
    network = shape_of_training(config.model, config.loss) if config.loss.learn_temperature else tried.network
    num_bytes = checkpoint_bytes(network, config.optim, config.model_dump(mode="json"))
    found = NetworkFacts(tried.unused, tried.remark, num_bytes)
    if is_from_library(config.model.encoder):
        with suppress(OSError, RuntimeError):  # a home directory that cannot be written to, or none
            replace_text(_file(config), json.dumps(asdict(found)))
    return found


def _recall(config: Config) -> NetworkFacts | None:
    try:
        kept = read_json(_file(config))
        return NetworkFacts(tuple(map(str, kept["unused"])), str(kept["remark"]), int(kept["checkpoint_bytes"]))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _file(config: Config) -> Path:
    """Named by all that the facts depend on: settings, versions of libraries, and our own code."""
    package = Path(simclr_dist.__file__).parent
    code = [path for room in ("network", "optim") for path in sorted((package / room).glob("*.py"))]
    settings: list[object] = [config.model.model_dump(mode="json"), config.optim.model_dump(mode="json")]
    settings += [dict(kind_of(data).input_signature) for data in (config.data, config.evaluation_data)]
    settings += [config.loss.learn_temperature]
    digest = hashlib.sha256(json.dumps([settings, versions()]).encode())
    for path in code:
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "simclr_dist" / "networks" / f"{digest.hexdigest()}.json"
