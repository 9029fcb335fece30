"""Encoders of texts and proteins from a local folder of transformers, as `hf/FOLDER`: tokens in, h out.

Nothing in the folder is run and nothing is fetched: its config.json is read within bounds, the network is one that the
installed transformers knows by name, its weights are safetensors (`model.weights: pretrained`, the default here; null:
its architecture alone). Of proteins are folders whose vocabulary is single letters (ESM, ProtBert).

Letters: n texts, T tokens of the longest, D the width of h.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_dist.bounded_json import read_json
from simclr_dist.config import HUGGING_FACE, ModelConfig
from simclr_dist.data.proteins import AMINO_ACIDS, LETTERS
from simclr_dist.errors import ConfigError
from simclr_dist.network.transformer import pool
from simclr_dist.safe_text import printable

MOST = 2**21
"""No number in a config.json of a text encoder is larger: vocabularies have up to a million tokens."""
MOST_LAYERS = 256
MOST_PARAMETERS = 8_000_000_000
_SPECIAL = {
    "the beginning": ("<cls>", "[CLS]"),
    "the end": ("<eos>", "[SEP]"),
    "what is hidden": ("<mask>", "[MASK]"),
}
_FORGOTTEN = ("id2label", "label2id", "num_labels", "architectures", "dtype", "torch_dtype", "_name_or_path")
"""What a config.json says of other things than the encoder's architecture."""


@dataclass(frozen=True)
class ProteinLetters:
    """A vocabulary of single letters."""

    ids: tuple[int, ...]
    """Of LETTERS."""
    begin: int
    """The token before each sequence."""
    end: int


class HuggingFaceEncoder(nn.Module):
    """Tokens int64 [n, T], 0 where a text has ended, to h [n, D]: the mean over a text's tokens, or its first token.

    Tokens are the ids of the folder's tokenizer plus one, special tokens among them. letters: of a network of proteins;
    tokens are then those of LETTERS plus one, and the mean is that over residues.
    """

    def __init__(self, network: nn.Module, pooling: str, folder: Path, letters: ProteinLetters | None = None) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.folder = folder
        self.letters = letters
        self.padding_id = int(getattr(network.config, "pad_token_id", None) or 0)
        self.longest = _positions(network)
        if letters is not None:
            # From token + 1; the last stands for the end of a sequence.
            table = torch.tensor([self.padding_id, *letters.ids, letters.end])
            self.register_buffer("table", table, persistent=False)

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(self.network.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr]

    @property
    def has_dropout(self) -> bool:
        """Whether a text is not twice the same in training."""
        settings = self.network.config.to_dict()  # type: ignore[operator, union-attr]
        return any(
            isinstance(value, float) and value > 0
            for key, value in settings.items()
            if "drop" in key and "classif" not in key
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"takes tokens int64 [n, T], not {tokens.dtype} {list(tokens.shape)}")
        mask = pooled = tokens != 0
        if self.letters is None:
            ids = torch.where(mask, tokens - 1, self.padding_id)
        else:
            ids, mask = self._of_proteins(tokens)
            pooled = mask if self.pooling == "first" else F.pad(pooled, (1, 1))
        if self.longest is not None and ids.shape[1] > self.longest:
            raise ValueError(
                f"{self.folder} has {self.longest} positions, fewer than the {ids.shape[1]} tokens; lower "
                "data.tokens.max_tokens"
            )
        # transformers asks whether a mask hides anything; without values there is no answer, and no need of one.
        seen = None if tokens.is_meta else mask.long()
        states = self.network(input_ids=ids, attention_mask=seen, return_dict=True).last_hidden_state
        return pool(states, pooled, self.pooling)

    def _of_proteins(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [n, T + 2] with the tokens that begin and end a sequence, and which of them are no padding."""
        assert self.letters is not None
        before, after = F.pad(tokens, (0, 1)), F.pad(tokens, (1, 0), value=1)
        ended = torch.where((before == 0) & (after != 0), len(LETTERS) + 1, before)
        ids = F.pad(self.get_buffer("table")[ended], (1, 0), value=self.letters.begin)
        return ids, F.pad(ended != 0, (1, 0), value=True)


def hugging_face_encoder(config: ModelConfig) -> tuple[nn.Module, int]:
    """The encoder that `config.encoder`, hf/FOLDER, names, freshly initialised, and D. Raises ConfigError."""
    folder = folder_of(config.encoder)
    settings = _architecture(folder)
    transformers = _import_transformers()
    with _explained(folder):
        described = transformers.AutoConfig.for_model(**settings)
        if described.is_encoder_decoder:
            raise ValueError(f"{described.model_type} is an encoder with a decoder; take one that only encodes")
        described = described.get_text_config()  # of CLIP and its like, the part for texts
        layers = getattr(described, "num_hidden_layers", 1)
        if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
            raise ValueError(f"{layers} layers, and between 1 and {MOST_LAYERS} are built")
        with torch.device("meta"):
            without_values = _build(transformers, described)
        size = sum(x.numel() for x in (*without_values.parameters(), *without_values.buffers()))
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size:,} parameters, and more than {MOST_PARAMETERS:,} are not built")
        network = _build(transformers, described)
    for part in ("pooler", "contact_head"):  # they come after what is pooled here, and would get no gradient
        if getattr(network, part, None) is not None:
            setattr(network, part, None)
    return HuggingFaceEncoder(network, config.pooling, folder, _letters(folder)), int(described.hidden_size)


def folder_of(encoder: str) -> Path:
    """FOLDER of hf/FOLDER. Raises ConfigError where it is none."""
    folder = Path(encoder.removeprefix(HUGGING_FACE)).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            [
                f"model.encoder: {encoder}: {folder} is no folder with a config.json. Nothing is downloaded: name a "
                "local copy of the model, e.g. what `hf download OWNER/NAME --local-dir FOLDER` has fetched"
            ]
        )
    return folder


def _architecture(folder: Path) -> dict[str, Any]:
    """What config.json says of it, within bounds. Raises ConfigError."""

    file = folder / "config.json"

    def refused(why: str) -> ConfigError:
        return ConfigError([printable(f"model.encoder: {file}: {why}")])

    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise refused(f"cannot be read: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise refused("names no model_type of transformers")
    if "auto_map" in found:
        raise refused("its network is code of its own (auto_map), which would have to be run: refused")
    if found.get("quantization_config") is not None:
        raise refused("its weights are quantised, which cannot be trained; take the original model")
    for key, number in _numbers(found):
        if not abs(number) <= MOST:
            raise refused(f"{key[:60]} is {number:.3g}; the largest number in such a file is {MOST:,}")
    return {key: value for key, value in found.items() if key not in _FORGOTTEN and "attn_impl" not in key}


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _build(transformers: Any, described: Any) -> nn.Module:
    """In float32. Attention by torch's fused kernels, where the network can."""
    try:
        return transformers.AutoModel.from_config(described, dtype=torch.float32, attn_implementation="sdpa")
    except ValueError as error:
        if "attention" not in str(error):
            raise
        return transformers.AutoModel.from_config(described, dtype=torch.float32, attn_implementation="eager")


def _positions(network: nn.Module) -> int | None:
    """How many tokens a text may have; None: positions are no table."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "position_embedding", "wpe")):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _letters(folder: Path) -> ProteinLetters | None:
    """Raises ConfigError where a vocabulary of letters lacks one that is needed; None: it is none of letters."""
    file = folder / "vocab.txt"
    if not file.is_file() or file.stat().st_size > 1024:
        return None
    ids = {line: i for i, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines())}
    if not set(AMINO_ACIDS) <= ids.keys():
        return None
    found = [next((ids[name] for name in names if name in ids), None) for names in _SPECIAL.values()]
    if None in found or "X" not in ids:
        missing = [what for what, id in zip(_SPECIAL, found, strict=True) if id is None] or ["X"]
        raise ConfigError([f"model.encoder: {file} has no token for {', '.join(missing)}"])
    begin, end, mask = (int(id) for id in found if id is not None)
    return ProteinLetters((*(ids[letter] for letter in (*AMINO_ACIDS, "X")), mask), begin, end)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """A library's error about what a config.json says becomes a sentence."""
    try:
        yield
    except Exception as error:  # its values reach every constructor there is
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(
            [printable(f"model.encoder: {folder} cannot be built ({type(error).__name__}: {line})")]
        ) from None


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            [f"model.encoder: {HUGGING_FACE}FOLDER needs transformers: pip install 'simclr-dist[hf]'"]
        ) from None
    return transformers
