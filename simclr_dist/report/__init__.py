"""`simclr-dist report`: runs side by side on one HTML page that needs nothing else.

record.py    the records of a run: settings, curves, scores, environment
insight.py   what its encoder does with images: pairs, neighbours, map, confusion, similarities
figures.py   charts and images as data URIs
html.py      HTML elements; every text is escaped
page.py      the page
write.py     all of it, for the command and for Run.report
"""

import importlib.util

from simclr_dist.errors import ConfigError


def check_requirements() -> None:
    """Raises ConfigError for packages that the page needs and training does not."""
    missing = [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        what = " and ".join({"sklearn": "scikit-learn"}.get(name, name) for name in missing)
        raise ConfigError([f"`simclr-dist report` needs {what}: pip install 'simclr_dist[eval]'"])
