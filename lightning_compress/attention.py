"""`nn.MultiheadAttention` in plain operations, for what torch's fused ones cannot do: fewer heads, rounded tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads need not fill the embedding, and which lets every tensor be changed.

    Parameters keep their names and the arguments of `forward` their meaning.
    """

    reads_products = False
    """Whether :meth:`_round` is to see the probabilities, which a fused attention does not show."""

    def _round(self, name: str, x: Tensor) -> Tensor:
        """Return a tensor as the next operation reads it.

        Args:
            name: ``query_input``, ``key_input``, ``value_input``, ``query``, ``key``, ``value``, ``probabilities`` or
                ``context``.
            x: The tensor.
        """
        return x

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights of the query's, the key's and the value's projection."""
        if self.in_proj_weight is not None:
            q, k, v = self.in_proj_weight.chunk(3)
            return q, k, v
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `nn.MultiheadAttention` does."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_batched = query.dim() == 3
        is_self, is_memory = key is query, value is key
        query = self._round("query_input", query)
        key = query if is_self else self._round("key_input", key)
        value = key if is_memory else self._round("value_input", value)
        if not is_batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        q, k, v = (
            self._round(name, F.linear(x, weight, bias))
            for name, x, weight, bias in zip(
                ("query", "key", "value"), (query, key, value), self.projections(), biases, strict=True
            )
        )
        batch = q.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(batch, 1, x.shape[2])], dim=1) for x in (k, v))
        extra = k.shape[1] - key.shape[1]
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = self._added(attn_mask, key_padding_mask, q, extra)
        dropout = self.dropout if self.training else 0.0
        probabilities = None
        if need_weights or self.reads_products:
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            probabilities = (scores if mask is None else scores + mask).softmax(-1)
            probabilities = F.dropout(probabilities, dropout)
            out = self._round("probabilities", probabilities) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(self._round("context", out.transpose(1, 2).flatten(2)))
        if not need_weights or probabilities is None:
            probabilities = None
        elif average_attn_weights:
            probabilities = probabilities.mean(1)
        if not is_batched:
            return out.squeeze(0), None if probabilities is None else probabilities.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), probabilities

    def _added(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, extra: int) -> Tensor | None:
        """Return both masks as one to add to the scores, of shape (batch or 1, heads or 1, queries or 1, keys)."""
        total = None
        if attn_mask is not None:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
        for mask in (attn_mask, None if padding is None else padding[:, None, None]):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -torch.inf)
                mask = F.pad(mask.to(q.dtype), (0, extra))
                total = mask if total is None else total + mask
        return total
