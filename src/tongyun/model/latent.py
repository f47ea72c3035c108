"""The operators of multi-head latent attention (MLA) on one rank, in the forms engines use.

A prompt's keys and values are expanded from the latent cache; when decoding, queries move into
it. What layers share (types, widths, norms) is asked of the `Layers` it stands in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tongyun.model.config import Latent
from tongyun.model.graph import Attends, Kind, Operator, Sequences
from tongyun.model.products import elementwise, matmul, together
from tongyun.units import Number

if TYPE_CHECKING:
    from tongyun.model.layers import Layers


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Writes what stands between the norm and the output of every attention layer of a stage."""

    layers: Layers
    latent: Latent

    def operators(self) -> list[Operator]:
        """Down-projections, latent norms, then each phase in the form engines use."""
        latent, tokens = self.latent, self.layers.shape.tokens
        part, repeat = self.layers.part, self.layers.part.layers
        down = latent.q_rank + latent.kv_rank + latent.rope_dim
        operators = [
            matmul(
                "qkv_down",
                (tokens, self.layers.config.hidden, down),
                self.layers.projection,
                repeat=repeat,
                bias=self.layers.config.attention_bias,
            ),
            self.layers.norm("latent_norm", tokens, latent.q_rank + latent.kv_rank, repeat),
            matmul(
                "q_up",
                (tokens, latent.q_rank, part.heads * (latent.nope_dim + latent.rope_dim)),
                self.layers.projection,
                repeat=repeat,
                bias=False,
            ),
            elementwise(
                "rotate",
                Kind.ELEMENTWISE,
                tokens * (part.heads + 1) * latent.rope_dim * self.layers.act,
                tokens * part.heads * latent.rope_dim * self.layers.act
                + tokens * (latent.kv_rank + latent.rope_dim) * self.layers.precision.kv.bytes,
                repeat=repeat,
            ),
        ]
        prefill, decode = self.layers.shape.prefill, self.layers.shape.decode
        if prefill is not None:
            operators += self._expanded(prefill)
        if decode is not None:
            operators += self._absorbed(decode, resident=prefill is None)
        return operators

    def _expanded(self, group: Sequences) -> list[Operator]:
        """Prefill: keys and values of context and chunk are expanded from the latent, then multi-head."""
        latent, keys = self.latent, group.keys()
        heads, layers = self.layers.part.heads, self.layers.part.layers
        qk, v = latent.nope_dim + latent.rope_dim, latent.value_dim
        expand = matmul(
            "kv_up",
            (keys, latent.kv_rank, heads * (latent.nope_dim + v)),
            self.layers.projection,
            repeat=layers,
            bias=False,
        )
        attend = Operator(
            name="attention_prefill",
            kind=Kind.ATTENTION,
            repeat=layers,
            m=group.tokens * heads,
            n=heads,
            k=qk,
            groups=group.sequences,
            compute=self.layers.precision.activations,
            attends=Attends(
                group=group,
                key_heads=heads,
                width=qk,
                value_width=v,
                cached_width=qk + v,
                cache=self.layers.precision.activations,
                is_latent=True,
            ),
            flops=2 * heads * (qk + v) * group.pairs(),
            read_bytes=(group.tokens * heads * qk + keys * heads * (qk + v)) * self.layers.act,
            write_bytes=group.tokens * heads * v * self.layers.act,
        )
        return [expand, attend]

    def _absorbed(self, group: Sequences, *, resident: bool) -> list[Operator]:
        """Decode: queries move into the latent space, so that all heads read the cache as it is, once."""
        latent, rank = self.latent, self.latent.kv_rank
        heads, layers = self.layers.part.heads, self.layers.part.layers
        wide = rank + latent.rope_dim
        rows, seen = together(group)
        attend = Operator(
            name="attention_decode",
            kind=Kind.ATTENTION,
            repeat=layers,
            m=group.tokens * heads,
            n=rows * heads,
            k=wide,
            groups=group.sequences,
            compute=self.layers.precision.activations,
            attends=Attends(
                group=seen,
                key_heads=1,
                width=wide,
                value_width=rank,
                cached_width=wide,
                cache=self.layers.precision.kv,
                is_latent=True,
            ),
            flops=2 * heads * (wide + rank) * group.pairs(),
            read_bytes=group.tokens * heads * wide * self.layers.act
            + group.keys() * wide * self.layers.precision.kv.bytes,
            write_bytes=group.tokens * heads * rank * self.layers.act,
        )
        into = self._per_head("absorb_q", group.tokens, (latent.nope_dim, rank), resident=resident)
        back = self._per_head("absorb_v", group.tokens, (rank, latent.value_dim), resident=resident)
        return [into, attend, back]

    def _per_head(self, name: str, tokens: Number, size: tuple[int, int], *, resident: bool) -> Operator:
        heads, (k, n) = self.layers.part.heads, size
        weight_bytes = heads * k * n * self.layers.precision.weights.bytes
        return Operator(
            name=name,
            kind=Kind.GROUPED_MATMUL,
            repeat=self.layers.part.layers,
            m=tokens * heads,
            n=n,
            k=k,
            groups=heads,
            compute=self.layers.precision.activations,
            stored=self.layers.precision.weights,
            flops=2 * tokens * heads * k * n,
            read_bytes=tokens * heads * k * self.layers.act,
            weight_bytes=weight_bytes,
            write_bytes=tokens * heads * n * self.layers.act,
            resident_bytes=weight_bytes * self.layers.part.layers if resident else 0,
        )
