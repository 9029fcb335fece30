"""Triton's interpreter runs kernels on the CPU, in a process of its own: triton looks only once whether it should."""

from __future__ import annotations

import os
import sys
from typing import Any


def use_interpreter() -> None:
    """From here on this process interprets. To be called before the module with the kernels is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    assert "simclr_dist.loss.triton_kernels" not in sys.modules
    # torch has imported triton, and what triton itself has written in triton would still be for compiling.
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
        del sys.modules[name]
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 takes an array with one number for a number, which numpy 2.4 does not.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
