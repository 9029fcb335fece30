"""The model card of an exported encoder: what it is, how well it does, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from simclr_dist import __version__
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.config import ModelConfig, render_config
from simclr_dist.export.preprocessing import Preprocessing
from simclr_dist.network.encoders import (
    NUM_CLASSES,
    TIMM,
    class_layer,
    first_convolution_of,
    torchvision_names,
    torchvision_network,
    torchvision_options,
)
from simclr_dist.safe_text import markdown_cell, mask, printable

_LIBRARIES = {
    "timm": ("timm", "timm"),
    "hf": ("transformers", "transformers"),
    "sentence-transformers": ("sentence-transformers", "sentence-transformers"),
    "onnx": ("onnx", "onnxruntime"),
}
# Those that model hubs know (huggingface.co/docs/hub/repositories-licenses) and that are used for weights.
_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0
wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0
gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl unknown other
"""


@dataclass(frozen=True)
class Loading:
    """How others use the export, in Python that runs as it stands.

    load: gives the encoder. features: `features(files)`, h [n, D] of picture files as the evaluations here see them;
    continues `load`. notes: what a user has to know.
    """

    load: str
    features: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """What a card says of that which the encoder eats."""

    noun: str
    plural: str
    """As the headings call them."""
    classifier: str
    """Of them, in Python."""
    size: str
    """Of a view."""
    task: str
    """The pipeline of model hubs."""
    encoder: str
    """More about it; a comma before."""
    rows: str
    """Of the table."""


def of_images(config: ModelConfig, seen: Preprocessing, view_px: int) -> Samples:
    pixels = "RGB" if seen.pixels.is_usual else seen.pixels
    rows = (
        f"| Input | {pixels}, {seen.image_size} px: {seen.sentence()} |\n"
        f"| Mean, std | {', '.join(map(str, seen.mean))}; {', '.join(map(str, seen.std))} |\n"
    )
    return Samples(
        *("image", "pictures", CLASSIFIER if seen.pixels.is_usual else CLASSIFIER_OF_ARRAYS),
        *(f"{view_px} px", "image-feature-extraction"),
        encoder=f", {config.stem} stem",
        rows=rows,
    )


def of_texts(noun: str, config: ModelConfig, max_tokens: int) -> Samples:
    h = "the mean over the tokens" if config.pooling == "mean" else "the first token"
    return Samples(
        *(noun, f"{noun}s", CLASSIFIER_OF_TEXTS, f"at most {max_tokens} tokens", "feature-extraction"),
        encoder=f", {h}",
        rows=f"| Input | {noun}s; more than {max_tokens} tokens are cut off |\n",
    )


CLASSIFIER = """from sklearn.linear_model import LogisticRegression

files, labels = ["a.png", "b.png"], [0, 1]  # your pictures and their classes
classifier = LogisticRegression(max_iter=1000).fit(features(files), labels)
print(classifier.predict(features(files)))"""

CLASSIFIER_OF_TEXTS = """from sklearn.linear_model import LogisticRegression

texts, labels = ["A text.", "Another."], [0, 1]  # yours, and their classes
classifier = LogisticRegression(max_iter=1000).fit(features(texts), labels)
print(classifier.predict(features(texts)))"""

CLASSIFIER_OF_ARRAYS = """from sklearn.linear_model import LogisticRegression

images, labels = [np.load("a.npy"), np.load("b.npy")], [0, 1]  # arrays [H, W, C] and their classes
classifier = LogisticRegression(max_iter=1000).fit(features(images), labels)
print(classifier.predict(features(images)))"""


def loading(
    config: ModelConfig, seen: Preprocessing, feature_dim: int, format: str, address: str, one_size: str = ""
) -> Loading:
    """For one format. address: the name of the file or folder, or of the repository on a model hub.

    one_size: why a graph takes images of one size only, if it does.
    """
    if format == "timm":
        return _timm_lines(seen, feature_dim, address)
    if format == "hf":
        return _transformers_lines(feature_dim, address)
    if format == "onnx":
        return _onnx_lines(seen, feature_dim, address, one_size)
    if format == "safetensors":
        lines = [
            "from simclr_dist.export import load_encoder",
            "",
            f"encoder, feature_dim = load_encoder({json.dumps(address)})",
        ]
        notes = []
        if config.encoder in torchvision_names():
            notes = ["The names are torchvision's, without the class layer."]
        elif config.encoder.startswith(TIMM):
            notes = ["The names are timm's, for num_classes=0."]
        return Loading("\n".join(lines), _torch_features(seen, "encoder"), tuple(notes))
    name = class_layer(torchvision_network(config))
    place = _place("model", name)
    options = ", ".join(f"{key}={value}" for key, value in torchvision_options(config).items())
    lines = ["import torch", "import torchvision", "", f"model = torchvision.models.{config.encoder}({options})"]
    notes = [
        f"{name} was not trained: it is all zeros ({NUM_CLASSES} classes), there so that strict=True holds. Replace it."
    ]
    if config.stem == "cifar":
        lines += [f"model.conv1 = torch.nn.Conv2d({config.channels}, 64, kernel_size=3, padding=1, bias=False)"]
        lines += ["model.maxpool = torch.nn.Identity()"]
        notes += [f"The stem is CIFAR's: a plain {config.encoder} takes the weights only after these two changes."]
    elif config.channels != 3:
        first, convolution = first_convolution_of(torchvision_network(config))
        lines += [f"{_place('model', first)} = torch.nn.{convolution}"]
        notes += [f"The first layer takes {config.channels} channels: a plain {config.encoder} takes three."]
    lines += [f"model.load_state_dict(torch.load({json.dumps(address)}, weights_only=True), strict=True)"]
    lines += [
        f"{place} = torch.nn.Identity()  # h [n, {feature_dim}]; or a torch.nn.Linear({feature_dim}, ...) to train"
    ]
    return Loading("\n".join(lines), _torch_features(seen, "model"), tuple(notes))


def _place(root: str, name: str) -> str:
    """`features.0.weight` as Python says it."""
    return root + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))


def _timm_lines(seen: Preprocessing, feature_dim: int, address: str) -> Loading:
    load = f"""import timm

model = timm.create_model({json.dumps(address)}, pretrained=True).eval()  # images to h [n, {feature_dim}]"""
    if not seen.pixels.is_usual:
        return Loading(load, _torch_features(seen, "model"), ())
    features = """import torch
from PIL import Image

transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))


@torch.no_grad()
def features(files):
    return model(torch.stack([transform(Image.open(file).convert("RGB")) for file in files])).numpy()"""
    notes = (
        "`num_classes=10` gives it a class layer to train, `features_only=True` the maps of its stages.",
        "Where timm is installed, AutoModel and AutoImageProcessor of transformers open the same folder or repository.",
    )
    return Loading(load, features, notes)


def _transformers_lines(feature_dim: int, address: str) -> Loading:
    load = f"""from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained({json.dumps(address)})
model = AutoModel.from_pretrained({json.dumps(address)}).eval()"""
    features = f"""import torch
from PIL import Image


@torch.no_grad()
def features(files):
    inputs = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    return model(**inputs).pooler_output.flatten(1).numpy()  # h [n, {feature_dim}]"""
    return Loading(load, features, ())


def text_loading(config: ModelConfig, feature_dim: int, format: str, address: str, max_tokens: int) -> Loading:
    """Of `hf` and `sentence-transformers`."""
    if format == "sentence-transformers":
        load = f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer({json.dumps(address)})"""
        return Loading(load, f"def features(texts):\n    return model.encode(texts)  # h [n, {feature_dim}]")
    load = f"""from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(address)})
model = AutoModel.from_pretrained({json.dumps(address)}).eval()"""
    h = "(states * mask).sum(1) / mask.sum(1)" if config.pooling == "mean" else "states[:, 0]"
    features = f"""import torch


@torch.no_grad()
def features(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length={max_tokens}, return_tensors="pt")
    states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return ({h}).numpy()  # h [n, {feature_dim}]"""
    return Loading(load, features, ("Its pooler, where the network has one, was not trained: h is made as below.",))


def _onnx_lines(seen: Preprocessing, feature_dim: int, address: str, one_size: str) -> Loading:
    S = seen.image_size
    load = f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({json.dumps(address)}, providers=["CPUExecutionProvider"])
images = np.zeros((1, {seen.pixels.channels}, {S}, {S}), np.float32)  # normalised as above
(h,) = session.run(["h"], {{"images": images}})  # [n, {feature_dim}]"""
    features = f"""{_transform(seen)}


def features(images):
    images = np.stack([transform(image).numpy() for image in images])
    return session.run(["h"], {{"images": images}})[0]"""
    if seen.pixels.is_usual:
        features = f"""{_transform(seen)}


def features(files):
    images = np.stack([transform(Image.open(file).convert("RGB")).numpy() for file in files])
    return session.run(["h"], {{"images": images}})[0]"""
    size = f"{S} x {S} pixels only: {printable(one_size)}" if one_size else "any height and width"
    return Loading(load, features, (f"The graph takes any number of images, of {size}.",))


def _torch_features(seen: Preprocessing, model: str) -> str:
    if not seen.pixels.is_usual:
        return f"""import torch
{_transform(seen)}


@torch.no_grad()
def features(images):
    return {model}.eval()(torch.stack([transform(image) for image in images])).numpy()"""
    return f"""import torch
{_transform(seen)}


@torch.no_grad()
def features(files):
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    return {model}.eval()(images).numpy()"""


def _transform(seen: Preprocessing) -> str:
    if not seen.pixels.is_usual:
        pixels, S = seen.pixels, seen.image_size
        return f"""import numpy as np
import torch
from torchvision.transforms import functional as F

mean, std = torch.tensor({list(pixels.mean)}), torch.tensor({list(pixels.std)})


def transform(image):  # a numpy array [H, W, {pixels.channels}] of uint{pixels.bits}
    x = torch.from_numpy(np.ascontiguousarray(image).astype("float32")).permute(2, 0, 1) / {pixels.largest}
    x = F.center_crop(F.resize(x, [{seen.resize_to}], antialias=True), [{S}])
    return (x - mean[:, None, None]) / std[:, None, None]"""
    return f"""from PIL import Image
from torchvision import transforms

transform = transforms.Compose(
    [
        transforms.Resize({seen.resize_to}),
        transforms.CenterCrop({seen.image_size}),
        transforms.ToTensor(),
        transforms.Normalize({seen.mean}, {seen.std}),
    ]
)"""


def render_card(
    checkpoint: Checkpoint,
    feature_dim: int,
    samples: Samples,
    format: str,
    lines: Loading,
    license: str,
    accuracy: Mapping[str, float],
) -> str:
    """The model card: Markdown with the front matter that model hubs read."""
    library, tag = _LIBRARIES.get(format, ("simclr_dist", format))
    config = checkpoint.config
    epochs = f"{config.train.epochs} epochs planned, {checkpoint.step} steps and {checkpoint.samples_seen} samples seen"
    trained = (
        f"| Trained on | {markdown_cell(config.data.train)} (fingerprint {markdown_cell(checkpoint.fingerprint)}) |\n"
        f"| Training | {epochs}; global batch {config.train.global_batch_size}, {config.data.num_views} views of "
        f"{samples.size}, temperature {_temperature(checkpoint)} |\n"
    )
    introduction = _METHOD[config.loss.kind].format(f"{'An' if samples.noun[0] in 'aeiou' else 'A'} {samples.noun}")
    if not checkpoint.of_run:
        introduction, trained = "An image encoder that others have trained; its weights as they came.", ""
    figures = "\n".join(f"| {markdown_cell(name)} | {100 * value:.2f} % |" for name, value in accuracy.items())
    table = f"| Evaluation | Result |\n|---|---|\n{figures}" if figures else "Not measured before the export."
    settings = mask(printable(render_config(config).rstrip(), keep="\n"))
    return f"""---
{_front_licence(license)}
library_name: {library}
pipeline_tag: {samples.task}
tags: [simclr, self-supervised, {samples.task}, {tag}]
---

# {markdown_cell(config.name)}

{introduction}

| | |
|---|---|
| Encoder | {markdown_cell(config.model.encoder)}{samples.encoder}, h of width {feature_dim} |
{trained}{_origin(checkpoint)}{samples.rows}| Licence | {markdown_cell(license)} |
| Written by | simclr_dist {__version__} from {checkpoint.path.name} |

## Accuracy

{table}

## Loading

{_fenced("python", lines.load)}

{"".join(f"{note}{chr(10)}" for note in lines.notes)}
## From {samples.plural} to features, and to classes

{_fenced("python", lines.features)}

A classifier for your own classes, by scikit-learn:

{_fenced("python", samples.classifier)}

## Configuration

{_fenced("yaml", settings)}
"""


_METHOD = {
    "nt_xent": "{} encoder trained without labels by SimCLR (Chen et al. 2020).",
    "dcl": "{} encoder trained without labels by SimCLR (Chen et al. 2020) with the decoupled loss (Yeh et al. 2022).",
    "supcon": "{} encoder trained with labels by supervised contrastive learning (Khosla et al. 2020).",
}


def _temperature(checkpoint: Checkpoint) -> str:
    learnt = checkpoint.model_state.get("loss.log_temperature")
    if learnt is None:
        return f"{checkpoint.config.loss.temperature:g}"
    return f"{float(learnt.exp()):.4g}, learnt from {checkpoint.config.loss.temperature:g}"


def _origin(checkpoint: Checkpoint) -> str:
    """The row about the weights that the training began with, or that these are."""
    origin = checkpoint.started_from
    if origin is None:
        return ""
    share = origin.get("share")
    how_much = f", {100 * share:.1f} % of the encoder" if isinstance(share, int | float) else ""
    known = f"{origin.get('weights')} (sha256 {origin.get('sha256')}{how_much})"
    return f"| {'Began with' if checkpoint.of_run else 'Weights'} | {markdown_cell(known)} |\n"


def _front_licence(license: str) -> str:
    """The lines by which model hubs know a licence; they refuse a card with an identifier that they do not know."""
    if license.lower() in _LICENCES.split():
        return f"license: {license.lower()}"
    if license == "unspecified":
        return "license: unknown"
    return f"license: other\nlicense_name: {_yaml_text(license)}"


def _yaml_text(text: str) -> str:
    """Text from outside as one YAML value; as it is where YAML takes it for text."""
    is_plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]*", text) and isinstance(yaml.safe_load(text), str)
    return text if is_plain else json.dumps(mask(printable(text)))


def _fenced(language: str, text: str) -> str:
    """A block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
