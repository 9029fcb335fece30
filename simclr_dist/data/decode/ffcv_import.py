"""The one module that imports ffcv or loads its library.

Training uses two things of ffcv: its file format, which `beton` reads with numpy alone, and its compiled JPEG codec,
whose shared library is loaded here without importing the package, as the import takes seconds. `import_ffcv` imports
the package, for its own Loader or DatasetWriter.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

from simclr_dist.errors import DataError

_HOW_TO_INSTALL = "install it with `pip install --no-deps ffcv==1.0.2` (see docs/data.md for the headers it needs)"


@cache
def codec() -> ctypes.CDLL:
    """ffcv's compiled library (TurboJPEG's decoder). Raises DataError when it is missing or does not load."""
    spec = importlib.util.find_spec("ffcv")
    folders = list(spec.submodule_search_locations or []) if spec else []
    libraries = [path for folder in folders for path in sorted(Path(folder).glob("_libffcv*.so"))]
    if not libraries:
        raise DataError(f"ffcv is not installed: {_HOW_TO_INSTALL}")
    try:
        return ctypes.CDLL(str(libraries[0]))
    except OSError as error:
        raise DataError(f"ffcv's library does not load: {error}; {_HOW_TO_INSTALL}") from None


def unavailable() -> str | None:
    """Why .beton files cannot be decoded here, or None when they can."""
    try:
        codec()
    except DataError as error:
        return str(error)
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: install it with `pip install numba`"
    return None


@cache
def import_ffcv() -> ModuleType:
    """The package ffcv, with its import made ten times shorter.

    ffcv 1.0.2 builds a numba.typed.Dict at import, which compiles for four seconds in every process. Its values are
    only read while code is generated, so a plain dict is enough.
    """
    import numba.typed

    typed_dict = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        return importlib.import_module("ffcv")
    except ImportError as error:
        raise DataError(f"ffcv cannot be imported: {error}; {_HOW_TO_INSTALL}") from None
    finally:
        numba.typed.Dict = typed_dict
