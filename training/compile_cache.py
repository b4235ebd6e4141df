"""Where compilers keep what they have compiled, so that it can be carried to the next machine."""

import os
from pathlib import Path

from torch_private import default_cache_dir

# Of torch.compile, Triton (flash-linear-attention) and TileLang (flash-qla).
_VARIABLES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
}


def keep_compiled_in(folder: str) -> None:
    """Has all compilers of this process, and of those that it starts, keep what they make in parts of `folder`; where
    the environment names another place, there. Call it before anything is compiled; "" leaves all as it is."""
    if not folder:
        return
    # The import of torch's compiler names its default place there, as if someone had asked for it.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    for variable, part in _VARIABLES.items():
        os.environ.setdefault(variable, str(Path(folder).resolve() / part))
