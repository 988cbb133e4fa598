"""The clinic's own small transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Attention(nn.Module):
    """Causal self-attention with two heads."""

    def __init__(self, width: int, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """A block of a transformer: pre-LN or post-LN, with LayerScale, ReZero, stochastic depth."""

    def __init__(
        self,
        width: int,
        post: bool = False,
        scale: float | None = None,
        drop: float = 0,
        causal: bool = True,
        feed: Callable[[int], nn.Module] = feed_forward,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed = Attention(width, causal), feed(width)
        self.post, self.drop, self.scaled = post, drop, scale is not None
        if scale is not None:
            self.scale1 = nn.Parameter(torch.full((width,), float(scale)))
            self.scale2 = nn.Parameter(torch.full((width,), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop and torch.rand(()) < self.drop:
            return x
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.feed(x))
        a = self.attention(self.norm1(x))
        x = x + (self.scale1 * a if self.scaled else a)
        f = self.feed(self.norm2(x))
        return x + (self.scale2 * f if self.scaled else f)


class Transformer(nn.Module):
    """A small language model; `positions`: "zero", "random" or "none"."""

    def __init__(
        self,
        depth: int = 3,
        width: int = 32,
        vocab: int = 32,
        positions: str = "random",
        tied: bool = False,
        padding_idx: int | None = None,
        checkpoint: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=padding_idx)
        nn.init.normal_(self.embed.weight, 0, 0.02 if tied else 1)
        if positions != "none":
            first = torch.zeros if positions == "zero" else torch.randn
            self.position = nn.Parameter(0.02 * first(1, 64, width))
        self.blocks = nn.ModuleList(Block(width, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpoint = checkpoint

    def forward(self, t: Tensor) -> Tensor:
        x = self.embed(t)
        if hasattr(self, "position"):
            x = x + self.position[:, : t.shape[1]]
        for block in self.blocks:
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x))


class VisionTransformer(nn.Module):
    """A small vision transformer; `kind`: "cls" (DeiT), "mean", or "cait" (class attention)."""

    def __init__(self, depth: int = 4, width: int = 32, kind: str = "cls", **block: Any) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, causal=False, **block) for _ in range(depth))
        late = 2 if kind == "cait" else 0
        self.class_blocks = nn.ModuleList(Block(width, causal=False, **block) for _ in range(late))
        self.norm, self.head, self.kind = nn.LayerNorm(width), nn.Linear(width, 10), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(2 * x.view(-1, 1, 8, 8) - 1).flatten(2).transpose(1, 2) + self.pos_embed
        token = self.cls_token.expand(len(x), -1, -1)
        if self.kind == "cls":
            x = torch.cat([token, x], 1)
        for block in self.blocks:
            x = block(x)
        if self.kind == "cait":
            x = torch.cat([token, x], 1)
            for block in self.class_blocks:
                x = torch.cat([block(x)[:, :1], x[:, 1:]], 1)
        x = self.norm(x)
        return self.head(x.mean(1) if self.kind == "mean" else x[:, 0])


class Experts(nn.Module):
    """Feed-forward experts stacked in two tensors; each token goes to the best one."""

    def __init__(self, width: int, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / (2 * width) ** 0.5)
        self.bias = torch.zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        best = F.one_hot((weights + self.bias).argmax(-1), len(self.up)) * weights
        y = torch.einsum("btd,edf->btef", x, self.up).relu()
        return torch.einsum("btef,efd,bte->btd", y, self.down, best)
