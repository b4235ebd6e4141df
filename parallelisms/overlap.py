"""How graphs that hold exchanges are compiled: what is sent is sent early, and awaited late."""

from typing import Any

OVERLAPPING: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits", "raise_comms"],
}
"""Options of torch.compile. By itself the compiler orders by memory: it launched the gradients' way back behind the
shared expert's backward pass, and awaited other gradients before it multiplied those of the weights."""
