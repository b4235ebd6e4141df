"""Whether there is Triton, without which torch comes on most CPUs."""

try:
    import triton  # noqa: F401
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True
