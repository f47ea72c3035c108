"""The operators of attention and feed-forward layers on one rank.

`Layers` writes the operators of a stage's layers from the widths of its `Slice`; each
operator stands once and repeats over the layers it belongs to. It prices nothing.
Symbols: T new tokens of the step, D hidden, N experts a token runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tongyun.model.config import Experts, ModelConfig
from tongyun.model.graph import Attends, Kind, Operator, Precision, Routed, Sequences, StepShape
from tongyun.model.latent import LatentAttention
from tongyun.model.products import Storage, elementwise, matmul, together
from tongyun.model.shard import Shard, Slice
from tongyun.units import DType, Number


def touched_experts(experts: Experts, tokens: Number) -> Number:
    """Expected share of the experts that at least one of `tokens` runs, routing balanced.

    Each token picks N of E without repetition: 1 − (1 − N/E)^tokens.
    """
    return 1 - (1 - experts.per_token / experts.count) ** tokens


def crowding(experts: Experts, shard: Shard) -> float:
    """Tokens that the busiest rank computes over those of the mean one; 1 where experts are alike."""
    return sum(shard.expert_picks) * shard.ep / experts.per_token if shard.expert_picks else 1.0


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Writes the operators of the layers of one rank for one step."""

    config: ModelConfig
    part: Slice
    shape: StepShape
    precision: Precision

    @property
    def act(self) -> float:
        return self.precision.activations.bytes

    @property
    def projection(self) -> Storage:
        p = self.precision
        return Storage(
            weights=p.weights, compute=p.compute, activations=p.activations, block_scales=p.block_scales
        )

    @property
    def exact(self) -> Storage:
        """For what quantisation leaves alone: router, embedding, head."""
        act = self.precision.activations
        stored = self.precision.exact or act
        return Storage(weights=stored, compute=stored, activations=act)

    def norm(
        self, name: str, rows: Number, width: int, repeat: int, *, into: Storage | None = None
    ) -> Operator:
        """RMS norm fused with the residual add before it: two tensors in, two out.

        `into` is how the products are stored and taken that alone read it, and can take it in.
        """
        weight_bytes = width * self.act
        return Operator(
            name=name,
            kind=Kind.NORM,
            repeat=repeat,
            m=rows,
            n=width,
            is_normed=into is not None,
            compute=DType.BF16 if into is None else into.compute,
            stored=DType.BF16 if into is None else into.weights,
            read_bytes=2 * rows * width * self.act,
            weight_bytes=weight_bytes,
            write_bytes=2 * rows * width * self.act,
            resident_bytes=weight_bytes * repeat,
        )

    def collective(self, name: str, kind: Kind, axis: str, payload: Number, repeat: int) -> list[Operator]:
        """A collective over `axis`, or nothing where the axis has one rank."""
        shard = self.part.shard
        # A hand-over between stages may leave the node, which the replica's size decides.
        ranks = {"tp": shard.tp, "ep": shard.ep, "pp": shard.ranks if shard.pp > 1 else 1}[axis]
        if ranks == 1 or repeat == 0:
            return []
        is_summed = kind is Kind.ALL_REDUCE and name != "embed_sum"
        given = {"axis": axis, "ranks": ranks, "payload_bytes": payload, "is_summed": is_summed}
        return [Operator(name=name, kind=kind, repeat=repeat, **given)]  # type: ignore[arg-type]

    # ── attention ────────────────────────────────────────────────────────────────────

    def attention(self) -> list[Operator]:
        """Norm, projections, attention and output of every layer of the stage."""
        config, part, tokens = self.config, self.part, self.shape.tokens
        repeat = part.layers
        values = config.latent.value_dim if config.latent else config.head_dim
        inside = (
            LatentAttention(layers=self, latent=config.latent).operators()
            if config.latent
            else self._grouped_query()
        )
        output = matmul(
            "attention_out",
            (tokens, part.heads * values, config.hidden),
            self.projection,
            repeat=repeat,
            bias=config.attention_bias,
        )
        output = replace(output, is_summed=part.shard.tp == 1)
        into = None if config.latent else self.projection
        payload = tokens * config.hidden * self.act
        return [
            self.norm("attention_norm", tokens, config.hidden, repeat, into=into),
            *inside,
            output,
            *self.collective("attention_sum", Kind.ALL_REDUCE, "tp", payload, repeat),
        ]

    def attending(self) -> list[Operator]:
        """What of `attention` looks at keys and values; latent attention has no such part."""
        if self.config.latent is not None:
            raise ValueError("latent attention looks at keys and values in forms of its own")
        return self._attend_all(self.part.full_layers, self.part.window_layers)

    def _grouped_query(self) -> list[Operator]:
        config, part, tokens = self.config, self.part, self.shape.tokens
        width = (part.heads + 2 * part.kv_heads) * config.head_dim
        qkv = matmul(
            "qkv",
            (tokens, config.hidden, width),
            self.projection,
            repeat=part.layers,
            bias=config.attention_bias,
        )
        joins = (part.heads * config.head_dim, *(2 * (part.kv_heads * config.head_dim,)))
        qkv = replace(qkv, joins=joins, is_normed=True)
        scales = 2 * config.head_dim * self.act if config.qk_norm else 0
        rotate = Operator(
            name="rotate",
            kind=Kind.ELEMENTWISE,
            repeat=part.layers,
            m=tokens,
            n=width,
            k=config.head_dim,
            joins=joins,
            read_bytes=tokens * width * self.act,
            weight_bytes=scales,
            write_bytes=tokens * part.heads * config.head_dim * self.act
            + tokens * 2 * part.kv_heads * config.head_dim * self.precision.kv.bytes,
            resident_bytes=scales * part.layers,
        )
        return [qkv, rotate, *self.attending()]

    def _attend_all(self, full: int, windowed: int) -> list[Operator]:
        """Attention of decode and prefill sequences, in full and in sliding-window layers."""
        operators: list[Operator] = []
        for layers, window, suffix in ((full, None, ""), (windowed, self.config.window, "_window")):
            if not layers:
                continue
            for phase, group in (("decode", self.shape.decode), ("prefill", self.shape.prefill)):
                if group is not None:
                    operators.append(self._attend(f"attention_{phase}{suffix}", group, window, layers))
        if self.config.sinks and operators:
            operators.append(self._sinks(full + windowed))
        return operators

    def _sinks(self, layers: int) -> Operator:
        weight_bytes = self.part.heads * self.act
        return Operator(
            name="sinks",
            kind=Kind.ELEMENTWISE,
            repeat=layers,
            is_fused=True,
            weight_bytes=weight_bytes,
            resident_bytes=weight_bytes * layers,
        )

    def _attend(self, name: str, group: Sequences, window: int | None, layers: int) -> Operator:
        """4·d FLOPs for each head and query-key pair; keys and values read once."""
        heads, width = self.part.heads, self.config.head_dim
        tokens, kv = group.tokens, self.precision.kv.bytes
        rows, seen = together(group) if group is self.shape.decode else (1, group)
        return Operator(
            name=name,
            kind=Kind.ATTENTION,
            repeat=layers,
            m=tokens * heads,
            n=rows * heads,
            k=width,
            groups=group.sequences,
            compute=self.precision.activations,
            attends=Attends(
                group=seen,
                key_heads=self.part.kv_heads,
                width=width,
                value_width=width,
                cached_width=2 * width,
                cache=self.precision.kv,
                window=window,
            ),
            flops=4 * heads * width * group.pairs(window),
            read_bytes=tokens * heads * width * self.act
            + 2 * self.part.kv_heads * width * kv * group.keys(window),
            write_bytes=tokens * heads * width * self.act,
        )

    # ── feed-forward ─────────────────────────────────────────────────────────────────

    def feed_forward(self) -> list[Operator]:
        """Norm and feed-forward of every layer of the stage, dense ones first."""
        operators = []
        if self.part.dense_layers:
            operators += self._dense()
        if self.part.sparse_layers and self.config.experts is not None:
            operators += self._sparse(self.config.experts)
        return operators

    def _swiglu(self, names: str, rows: Number, width: int, repeat: int) -> list[Operator]:
        """Gate and up, the activation between, and down."""
        hidden, is_dense = self.config.hidden, names == "dense"
        up = matmul(f"{names}_up", (rows, hidden, 2 * width), self.projection, repeat=repeat, bias=False)
        down = matmul(f"{names}_down", (rows, width, hidden), self.projection, repeat=repeat, bias=False)
        up = replace(up, is_gated=True, is_normed=is_dense)
        down = replace(down, is_summed=is_dense and self.part.shard.tp == 1)
        between = self._activation(names, rows, width, repeat)
        return [up, replace(between, compute=up.compute, stored=up.stored), down]

    def _activation(self, names: str, rows: Number, width: int, repeat: int) -> Operator:
        read, write = 2 * rows * width * self.act, rows * width * self.act
        passed = elementwise(f"{names}_activation", Kind.ELEMENTWISE, read, write, repeat=repeat)
        return replace(passed, m=rows, n=width)

    def _dense(self) -> list[Operator]:
        part, tokens, hidden = self.part, self.shape.tokens, self.config.hidden
        return [
            self.norm("dense_norm", tokens, hidden, part.dense_layers, into=self.projection),
            *self._swiglu("dense", tokens, part.dense_width, part.dense_layers),
            *self.collective(
                "dense_sum", Kind.ALL_REDUCE, "tp", tokens * hidden * self.act, part.dense_layers
            ),
        ]

    def _sparse(self, experts: Experts) -> list[Operator]:
        """Router, exchange, experts, exchange; tokens are cut over tp first where dp > 1."""
        part, config, shard = self.part, self.config, self.part.shard
        repeat = part.sparse_layers
        spread = shard.dp > 1
        mine = self.shape.tokens / shard.tp if spread else self.shape.tokens
        router = matmul(
            "router",
            (mine, config.hidden, experts.count),
            self.exact,
            repeat=repeat,
            bias=config.experts_bias,
        )
        operators = [self.norm("sparse_norm", mine, config.hidden, repeat), router]
        if part.shared_width:
            operators += self._swiglu("shared", mine, part.shared_width, repeat)
        before, after = self._exchange(experts, mine, repeat) if spread else ([], [])
        operators += [*before, *self._experts(experts, repeat), *after]
        payload = self.shape.tokens * config.hidden * self.act
        name, kind = ("sparse_gather", Kind.ALL_GATHER) if spread else ("sparse_sum", Kind.ALL_REDUCE)
        return operators + self.collective(name, kind, "tp", payload, repeat)

    def _exchange(
        self, experts: Experts, tokens: Number, repeat: int
    ) -> tuple[list[Operator], list[Operator]]:
        """All-to-all to the experts' ranks in the experts' arithmetic type, and back in the activations'.

        A token goes once to each rank that holds one of its experts; how often over the network is the
        links' matter. What the busiest rank takes in decides: the others have sent before.
        """
        sent = tokens * experts.reached(self.part.shard.ep) * self.config.hidden
        sent = sent * crowding(experts, self.part.shard)
        narrow = min(self.precision.expert_compute.bytes, self.act)
        there = self.collective("dispatch", Kind.ALL_TO_ALL, "ep", sent * narrow, repeat)
        back = self.collective("combine", Kind.ALL_TO_ALL, "ep", sent * self.act, repeat)
        return [replace(op, experts=experts) for op in there], [replace(op, experts=experts) for op in back]

    def _experts(self, experts: Experts, repeat: int) -> list[Operator]:
        part, hidden = self.part, self.config.hidden
        tokens = self.shape.tokens * part.shard.dp
        rows = tokens * experts.per_token / part.shard.ep * crowding(experts, part.shard)
        picks = part.shard.expert_picks
        groups = part.experts * touched_experts(experts, tokens)
        if picks:
            groups = sum(1 - (1 - pick) ** tokens for pick in picks)
        routed = Routed(
            tokens=tokens,
            mine=self.shape.tokens / part.shard.tp if part.shard.dp > 1 else self.shape.tokens,
            per_token=experts.per_token,
            count=experts.count,
            local=part.experts,
            picks=picks,
            hidden=hidden,
            inner=part.expert_width,
            compute=self.precision.expert_compute,
        )
        up = self._grouped("experts_up", rows, groups, (hidden, 2 * part.expert_width))
        activation = self._activation("experts", rows, part.expert_width, repeat)
        down = self._grouped("experts_down", rows, groups, (part.expert_width, hidden))
        activation = replace(activation, compute=up.compute, stored=up.stored)
        down = replace(down, is_summed=part.shard.tp == 1)
        return [replace(op, routed=routed) for op in (up, activation, down)]

    def _grouped(self, name: str, rows: Number, groups: Number, size: tuple[int, int]) -> Operator:
        """A matmul for each expert that has rows; only those experts' weights are read."""
        k, n = size
        bias = n * self.act if self.config.experts_bias else 0
        each = k * n * self.precision.experts.bytes + bias
        return Operator(
            name=name,
            kind=Kind.GROUPED_MATMUL,
            repeat=self.part.sparse_layers,
            m=rows,
            n=n,
            k=k,
            groups=groups,
            compute=self.precision.expert_compute,
            stored=self.precision.experts,
            block_scales=self.precision.block_scales,
            flops=2 * rows * k * n,
            read_bytes=rows * k * self.act,
            weight_bytes=groups * each,
            write_bytes=rows * n * self.act,
            resident_bytes=self.part.experts * each * self.part.sparse_layers,
        )
