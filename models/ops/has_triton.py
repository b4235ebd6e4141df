"""Whether there is Triton, without which torch comes on most CPUs."""

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
