"""The gated delta rule token by token, as its definition says: the oracle of every faster form."""

from collections.abc import Sequence

import torch


def recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """q, k [T, Nk, K]; v [T, Nv, Kv]; g, beta [T, Nv] -> [T, Nv, Kv], in the inputs' dtype (meant: float64).

    With q and k of length one, q scaled by K^-0.5, and S [K, Kv] zero where a document begins, for each token and head:
    S = exp(g) S;  S = S + k (beta (v - k^T S))^T;  o = q^T S.
    """
    group = v.shape[1] // k.shape[1]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(group, dim=1).unsqueeze(-1) for x in (q * q.shape[-1] ** -0.5, k))  # [T, Nv, K, 1]
    decay, beta = g.exp()[..., None, None], beta[..., None, None]
    outs = []
    for document in zip(*(x.split(list(lengths)) for x in (q, k, v.unsqueeze(-2), decay, beta))):
        state = v.new_zeros(v.shape[1], q.shape[2], v.shape[2])
        for q_t, k_t, v_t, decay_t, beta_t in zip(*(x.unbind() for x in document)):
            state = decay_t * state
            state = state + k_t * (beta_t * (v_t - k_t.mT @ state))
            outs.append((q_t.mT @ state).squeeze(-2))
    return torch.stack(outs)
