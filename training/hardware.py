"""What GPUs and links reach: the one table of ceilings, each with its source.

Rates are those of whole steps of this repository's benchmark, not of single operations, where there are such: a kind's
operations, or bytes, over the milliseconds that the profiler gives the kind (docs/performance.md; torch 2.11). Single
operations are of 35B-A3B's shapes at 16,384 tokens.
"""

from typing import NamedTuple

from training.flops import PEAK_FLOPS

GIB = 2**30


class Gpu(NamedTuple):
    """FLOP/s and bytes/s."""

    capacity: float
    """Bytes that the process can allocate."""
    peak: float
    """Dense bfloat16, of the vendor: what MFU is against."""
    dense: float
    """Matrix products."""
    experts: float
    """Grouped matrix products, beside the time in which their weights are read."""
    attention_forward: float
    attention_backward: float
    """Causal, heads of 256, cuDNN, counted as half of the square; the backward pass has 2.5 times the operations."""
    memory: float
    """Bytes a second of elementwise passes, copies and gathers together."""
    optimizer: float
    """Bytes a second of fused AdamW and the gradients' norm."""
    source: str


# Where a second source says the same, it is another card of the kind and another run.
GPUS = {
    "h100": Gpu(
        capacity=79.1 * GIB,
        peak=PEAK_FLOPS["H100"],
        dense=733e12,
        experts=660e12,
        attention_forward=588e12,
        attention_backward=337e12,
        memory=3.35e12,
        optimizer=3.1e12,  # H200's by the memories' rates, not measured
        source="H100 80GB HBM3, 12 layers, 4 x 4096 tokens, 2026-11-26; attention alone, 2026-11-25",
    ),
    "h200": Gpu(
        capacity=139.8 * GIB,
        peak=PEAK_FLOPS["H200"],
        dense=710e12,
        experts=650e12,
        attention_forward=588e12,  # not measured alone; in steps of 4096 and 32,768 tokens 8 % faster
        attention_backward=337e12,
        memory=4.3e12,
        optimizer=4.4e12,
        source="H200, 12 layers of 32,768 tokens and 40 layers of 2 x 4096, 2026-11-28",
    ),
}

# Of the tower, heads of 72 and no causality, forward and backward (benchmarks/attention.py --vision, H100, 2026-11-28):
# operations a second, the backward pass with 2.5 times as many.
VISION_ATTENTION = (302e12, 288e12)

# The delta rule and the convolution, seconds a token: flash-qla, 32 value heads of 128; Triton, 8192 channels, the
# forward pass and the backward pass (H100, 2026-11-25; in steps on H200 the same within 5 %).
DELTA_RULE = (0.46e-3 / 16384, 1.60e-3 / 16384)
CONVOLUTION = (0.21e-3 / 16384, 0.39e-3 / 16384)

# Passes over the activations that mode "none" keeps: norms, gates, SwiGLU, permutation, sorting, sums and copies, of
# the forward and the backward pass of a block that is one graph; at ep > 1, where it is several. "full" makes the
# forward pass' again. (H100, one and two GPUs, 2026-11-26, the second from ep 2 alone; the third: H200, 40 layers in
# both modes, 2026-11-28.)
PASSES, PASSES_IN_PARTS, RECOMPUTED = 6.6, 8.0, 1.3
# A chunk's softmax reads all logits twice and writes them once, at this share of the memory's rate.
SOFTMAX_SHARE = 0.58

# What FSDP copies of sharded weights and gradients, at this share of the memory's rate, as in many small pieces; and
# the rows of products with adapters of rank 8 (two H200s at ep 1, and one, 2026-11-28: profiles of steps).
LAID_OUT_SHARE, THIN_SHARE = 0.48, 0.35
# Of attention's kernels: whole tiles; FlashAttention 2's rate over documents of several lengths, forward and backward,
# as a share of cuDNN's (H100, 2026-11-25: 1.86 and 0.90 ms, 5.9 and 4.0 ms).
ATTENTION_TILE, RAGGED = 128, (0.48, 0.68)

# Seconds in which the host launches a block, forward and backward, on the machines measured: without units of FSDP
# (adapters on one GPU, one row, H200, 2026-11-28: 5.7 ms, and with "full" 7.9, so that the forward pass is the share
# below); with them (11.2 ms on 40 layers that day, less what laying out gradients took until plain copies did: 126 of
# 555 ms under a profiler); and at ep > 1, where buffers have room (40 layers on two H200s, 2026-11-29: the host was
# ahead, so less than the step of 477 ms less `STEP`, which is 11.8 ms a block; by how much is not known) and where the
# host asks for sizes (the same of the day before: 667 ms, while NCCL's recorders still ran, without which it is less).
HOST = {"no units": 5.7e-3, "units": 8.7e-3, "ep": 11.0e-3, "ep, asks": 16.5e-3}
HOST_FORWARD = 0.37
# What lies between the kernels of a block, and at a step's end beside it, where the host is not late: steps of 8, 12
# and 40 layers less the sums of their kernels (H200, 2026-11-28: 6, 10 and 18 ms).
GAPS = 0.31e-3
# At ep > 1 the GPU has nothing to do in each block while the host hears how many copies come: in 12 blocks two H100s
# were idle for 20 ms under the profiler, beside the step's own (2026-11-26).
WAIT_AT_EP = 1.7e-3
STEP = 6e-3  # the host's turn at the end of the backward pass, when the GPU has nothing to do


class Links(NamedTuple):
    """Bytes a second of one GPU, each way, as a ring or an all-to-all gets them; and the share that is hidden behind
    computation."""

    ring: float
    all_to_all: float
    network: float
    """Of one GPU's own network card, for either."""


# NVLink between two H100s at ep 2 (docs/performance.md, 2026-11-26): bytes by docs/communication.md over milliseconds.
# The network is a card of 400 Gbit/s: its vendor's figure less a tenth, not measured.
LINKS = Links(ring=205e9, all_to_all=166e9, network=45e9)
# In the same run: 9.0 of 19.3 ms, 3.0 of 9.0 and 6.2 of 13.9.
HIDDEN = {"all-to-all": 0.47, "all-gather": 0.33, "reduce-scatter": 0.45, "all-reduce": 0.0}
