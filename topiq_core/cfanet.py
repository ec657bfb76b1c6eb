"""CFANet, the network of TOPIQ (arXiv 2308.03060, section III), in the order of the paper.

What the picture shows (the coarse features) decides where to look for distortions (the fine ones):

    image -> feature pyramid -> gated local pooling -> self-attention per scale
          -> cross-scale attention, coarse to fine -> score

Parameter names are those of the published checkpoints, which load strictly. Shapes: N images,
level l = 0..4 from fine to coarse with C_l channels, D = `inter_dim`, T_l tokens at level l.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topiq_core import backbones
from topiq_core.cards import Architecture

LEVELS = 5
POSITION_GRID = 32


class Pointwise(nn.Conv2d):
    """A 1x1 convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,K,h,w]."""
        if self.training:
            return backbones.pointwise(x, self.weight, self.bias)
        return super().forward(x)


class GatedPoolingNR(nn.Module):
    """No-reference gate (section III-B): one half of the features decides what counts."""

    def __init__(self, channels: int, gate_dim: int) -> None:
        super().__init__()
        self.splitconv = Pointwise(channels, 2 * channels)
        self.weight_blk = nn.Sequential(*_gate(channels, gate_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,C,h,w]."""
        content, evidence = self.splitconv(x).chunk(2, dim=1)
        gate: Tensor = self.weight_blk(evidence)
        return F.gelu(content) * gate


class GatedPoolingFR(nn.Sequential):
    """Full-reference gate (section III-B): the difference of the features decides what counts."""

    def __init__(self, channels: int, gate_dim: int) -> None:
        super().__init__(*_gate(channels, gate_dim))

    def forward(self, distorted: Tensor, reference: Tensor) -> Tensor:  # type: ignore[override]
        """Two maps [N,C,h,w] -> [N,3C,h,w]."""
        error = torch.sqrt((distorted - reference) ** 2 + 1e-12)
        gate: Tensor = super().forward(error)  # type: ignore[no-untyped-call]
        return torch.cat((distorted, reference, error), dim=1) * gate


def _gate(channels: int, gate_dim: int) -> tuple[nn.Module, ...]:
    return (
        Pointwise(channels, gate_dim),
        nn.GELU(),
        nn.Conv2d(gate_dim, gate_dim, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(gate_dim, 1, 3, padding=1),
        nn.Sigmoid(),
    )


class Attention(nn.MultiheadAttention):
    """Multi-head attention that never holds an attention map.

    Parameters are PyTorch's own. Its inference path, though, builds every map: 9 GB for a
    24-megapixel photo.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout=dropout, batch_first=True)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """Query [N,Tq,D], keys and values from memory [N,Tm,D] -> [N,Tq,D]."""
        dim, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        q = self._by_head(F.linear(query, weight[:dim], bias[:dim]))
        k, v = F.linear(memory, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q, self._by_head(k), self._by_head(v), dropout_p=dropout
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _by_head(self, x: Tensor) -> Tensor:
        """[N,T,D] -> [N,heads,T,D/heads]."""
        n, t, dim = x.shape
        return x.view(n, t, self.num_heads, dim // self.num_heads).transpose(1, 2)


class SelfAttentionLayer(nn.Module):
    """Pre-norm transformer encoder layer."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        hidden = min(4 * dim, 2048)
        self.self_attn = Attention(dim, heads, dropout)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, t: Tensor) -> Tensor:
        """[N,T,D] -> [N,T,D]."""
        x = self.norm1(t)
        t = t + self.dropout(self.self_attn(x, x))
        return t + self._feed_forward(self.norm2(t))

    def _feed_forward(self, t: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(self.linear1(t)))
        out: Tensor = self.dropout(self.linear2(hidden))
        return out


class CrossAttentionLayer(nn.Module):
    """Coarser tokens query a finer level (section III-C)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        hidden = min(4 * dim, 2048)
        # Published checkpoints hold this block; the method never runs it. It stays so that they
        # load strictly.
        self.self_attn = Attention(dim, heads, dropout)
        self.self_attn.requires_grad_(False)
        self.multihead_attn = Attention(dim, heads, dropout)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Query [N,Tq,D] and memory [N,Tm,D] -> [N,Tq,D]."""
        x = self.multihead_attn(self.norm1(query), self.norm2(memory))
        query = query + self.dropout(x)
        return query + self._feed_forward(self.norm3(query))

    def _feed_forward(self, t: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(self.linear1(t)))
        out: Tensor = self.dropout(self.linear2(hidden))
        return out


class _Stack(nn.Module):
    """One layer under the name `layers.0`, as the checkpoints have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, *tokens: Tensor) -> Tensor:
        out: Tensor = self.layers[0](*tokens)
        return out


class CFANet(nn.Module):
    """The whole network. `architecture` fixes every shape; weights start untrained."""

    def __init__(self, architecture: Architecture, dropout: float = 0.1) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.semantic_model = backbones.build(a.backbone)
        channels = self.semantic_model.channels
        pooling = GatedPoolingNR if a.mode == "nr" else GatedPoolingFR
        pooled = [c if a.mode == "nr" else 3 * c for c in channels]
        dim = a.inter_dim

        self.weight_pool = nn.ModuleList(pooling(c, a.gate_dim) for c in channels)
        self.dim_reduce = nn.ModuleList(nn.Sequential(Pointwise(c, dim), nn.GELU()) for c in pooled)
        self.h_emb = nn.Parameter(torch.randn(1, dim // 2, POSITION_GRID, 1) * 0.02)
        self.w_emb = nn.Parameter(torch.randn(1, dim // 2, 1, POSITION_GRID) * 0.02)
        self.sa_attn_blks = nn.ModuleList(
            _Stack(SelfAttentionLayer(dim, a.heads, dropout)) for _ in range(LEVELS)
        )
        self.attn_blks = nn.ModuleList(
            _Stack(CrossAttentionLayer(dim, a.heads, dropout)) for _ in range(LEVELS - 1)
        )
        self.attn_pool = SelfAttentionLayer(dim, a.heads, dropout)
        self.score_linear = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.Linear(dim, a.outputs),
        )
        self.mean: Tensor
        self.std: Tensor
        mean, std = backbones.IMAGENET_MEAN, backbones.IMAGENET_STD
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor, reference: Tensor | None = None) -> Tensor:
        """Score images.

        image: [N,3,H,W] float RGB in 0..1; reference: the same shape, for a full-reference
        network only, or [N/k,3,H,W], each for k images in turn. Returns [N] float: one score each,
        higher is better.
        """
        return expected_score(self.distribution(image, reference))

    def distribution(self, image: Tensor, reference: Tensor | None = None) -> Tensor:
        """The output before it is reduced to a score: [N,1], or [N,10] probabilities of 1..10."""
        pooled = self._pool(image, reference)
        where = [self.positions(*map(int, x.shape[2:])) for x in pooled]
        return self.judge([self.tokens(i, pooled[i], where[i]) for i in range(LEVELS)])

    def judge(self, tokens: list[Tensor]) -> Tensor:
        """Each level's tokens [N,T_l,D] -> the output, as of `distribution`."""
        query = tokens[-1]
        for step, memory in enumerate(reversed(tokens[:-1])):
            query = self.attn_blks[step](query, memory)
        score: Tensor = self.score_linear(self.attn_pool(query).mean(dim=1))
        return score if self.architecture.outputs == 1 else score.softmax(dim=1)

    def _pool(self, image: Tensor, reference: Tensor | None) -> list[Tensor]:
        """Gated local pooling: every level's map, gated and brought to one grid."""
        maps = self._features(image)
        if reference is None:
            gated = (pool(x) for pool, x in zip(self.weight_pool, maps, strict=True))
        else:
            pairs = zip(self.weight_pool, maps, self._features(reference), strict=True)
            each = len(image) // len(reference)
            gated = (
                pool(d, r if each == 1 else r.repeat_interleave(each, 0)) for pool, d, r in pairs
            )
        h, w = map(int, maps[-1].shape[2:])
        th, tw = token_grid(h, w, self.architecture.grid)
        return [self.dim_reduce[level](_shrink(x, th, tw)) for level, x in enumerate(gated)]

    def _features(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.semantic_model((image - self.mean) / self.std)
        return maps

    def tokens(self, level: int, x: Tensor, positions: Tensor) -> Tensor:
        """A level's pooled map [N,D,h,w], and where its tokens lie -> self-attended [N,h*w,D]."""
        tokens: Tensor = self.sa_attn_blks[level]((x + positions).flatten(2).transpose(1, 2))
        return tokens

    def positions(self, h: int, w: int) -> Tensor:
        """The position embedding of a grid, [1,D,h,w]."""
        dim = self.architecture.inter_dim
        grid = torch.cat(
            (
                self.h_emb.expand(1, dim // 2, POSITION_GRID, POSITION_GRID),
                self.w_emb.expand(1, dim // 2, POSITION_GRID, POSITION_GRID),
            ),
            dim=1,
        )
        return F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)


def token_grid(h: int, w: int, most: int) -> tuple[int, int]:
    """Rows and columns of tokens, for a coarsest level of h x w positions.

    most: along the shorter side, 0 for no limit; the longer one keeps the proportions.
    """
    shorter = min(h, w)
    if not 0 < most < shorter:
        return h, w
    return round(h * most / shorter), round(w * most / shorter)


def _shrink(x: Tensor, th: int, tw: int) -> Tensor:
    """Average to (th, tw) if both sides are larger; thin or tiny maps keep their own grid."""
    h, w = x.shape[2:]
    return F.adaptive_avg_pool2d(x, (th, tw)) if h > th and w > tw else x


def expected_score(output: Tensor) -> Tensor:
    """Reduce [N,1] scores or [N,K] probabilities of 1..K to [N] scores (the mean opinion)."""
    if output.shape[1] == 1:
        return output[:, 0]
    levels = torch.arange(1, output.shape[1] + 1, dtype=output.dtype, device=output.device)
    return (output * levels).sum(dim=1)


def initialise_head(net: CFANet) -> None:
    """Starting weights of everything but the backbone, for training from ImageNet features."""
    for name, module in net.named_modules():
        if name.startswith("semantic_model"):
            continue
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=math.sqrt(1.0 / module.in_features))
            nn.init.zeros_(module.bias)
