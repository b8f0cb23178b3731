"""Models that no library brings in this form, for the jobs of `zoo.py` whose source is `custom`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM, a linear layer for each token: `(N, T)` to `(N, tags, T)`."""

    def __init__(self, vocabulary: int = 20000, width: int = 512, layers: int = 2, tags: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, layers, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of every token."""
        states, _ = self.rnn(self.embed(tokens))
        logits: torch.Tensor = self.head(states)
        return logits.transpose(1, 2)


class Perceptron(nn.Module):
    """Linear layers and GELUs: `(N, width)` to `(N, 1000)`."""

    def __init__(self, width: int = 4096, depth: int = 8) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.head(self.body(x))
        return logits


class SmallUNet(nn.Module):
    """A U-Net as diffusion uses it, attention at the bottom: `(N, 3, H, W)` to the same."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inp = nn.Conv2d(3, width, 3, padding=1)
        self.d1, self.d2 = self._block(width, 2 * width), self._block(2 * width, 4 * width)
        self.mid = self._block(4 * width, 4 * width)
        self.attention = nn.MultiheadAttention(4 * width, 4, batch_first=True)
        self.u2, self.u1 = self._block(8 * width, 2 * width), self._block(4 * width, width)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    @staticmethod
    def _block(n_in: int, n_out: int) -> nn.Sequential:
        first = (nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.SiLU())
        second = (nn.Conv2d(n_out, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.SiLU())
        return nn.Sequential(*first, *second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the predicted noise."""
        x = self.inp(x)
        a = self.d1(x)
        b = self.d2(F.avg_pool2d(a, 2))
        m = self.mid(F.avg_pool2d(b, 2))
        n, c, h, w = m.shape
        t = m.flatten(2).transpose(1, 2)
        m = m + self.attention(t, t, t, need_weights=False)[0].transpose(1, 2).reshape(n, c, h, w)
        m = self.u2(torch.cat([F.interpolate(m, scale_factor=2), b], 1))
        m = self.u1(torch.cat([F.interpolate(m, scale_factor=2), a], 1))
        noise: torch.Tensor = self.out(m)
        return noise


class LanguageModel(nn.Module):
    """Embedding, a recurrent network of any kind, tied output weights: `(N, T)` to `(N, vocabulary, T)`."""

    def __init__(
        self, kind: str = "LSTM", vocabulary: int = 20000, width: int = 512, layers: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = getattr(nn, kind)(width, width, layers, batch_first=True, dropout=0.2)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of every next token."""
        states, _ = self.rnn(self.embed(tokens))
        logits: torch.Tensor = self.head(states)
        return logits.transpose(1, 2)


class Segmenter(nn.Module):
    """The U-Net of segmentation, in two or three dimensions: batch norms, transposed convolutions."""

    def __init__(self, dims: int = 2, width: int = 32, depth: int = 4, classes: int = 21) -> None:
        super().__init__()
        self.dims = dims
        widths = [width * 2**i for i in range(depth)]
        self.down = nn.ModuleList(
            self._block(n_in, n_out) for n_in, n_out in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
        transposed = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.up = nn.ModuleList(transposed(2 * n, n, 2, stride=2) for n in reversed(widths[:-1]))
        self.merge = nn.ModuleList(self._block(2 * n, n) for n in reversed(widths[:-1]))
        self.head = (nn.Conv2d if dims == 2 else nn.Conv3d)(width, classes, 1)

    def _block(self, n_in: int, n_out: int) -> nn.Sequential:
        convolution = nn.Conv2d if self.dims == 2 else nn.Conv3d
        norm = nn.BatchNorm2d if self.dims == 2 else nn.BatchNorm3d
        return nn.Sequential(
            convolution(n_in, n_out, 3, padding=1, bias=False),
            norm(n_out),
            nn.ReLU(inplace=True),
            convolution(n_out, n_out, 3, padding=1, bias=False),
            norm(n_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of every position."""
        kept = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), kept.pop()], 1))
        logits: torch.Tensor = self.head(x)
        return logits


class Translator(nn.Module):
    """`nn.Transformer`, encoder and decoder, on one sequence as source and target."""

    def __init__(self, vocabulary: int = 16000, width: int = 512, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Transformer(width, 8, layers, layers, 4 * width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of every next token."""
        words = self.embed(tokens)
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        logits: torch.Tensor = self.head(self.body(words, words, tgt_mask=causal, tgt_is_causal=True))
        return logits.transpose(1, 2)


class WaveNet(nn.Module):
    """Dilated convolutions over audio, gated, with residuals and skips: `(N, 1, T)` to `(N, classes, T)`."""

    def __init__(self, width: int = 64, layers: int = 10, classes: int = 256) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 3, dilation=2**i, padding=2**i) for i in range(layers)
        )
        self.outs = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(layers))
        self.head = nn.Conv1d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of every sample."""
        x = self.first(x)
        total = torch.zeros_like(x)
        for gate, out in zip(self.gates, self.outs, strict=True):
            signal, opening = gate(x).chunk(2, 1)
            residual, skip = out(torch.tanh(signal) * torch.sigmoid(opening)).chunk(2, 1)
            x, total = x + residual, total + skip
        logits: torch.Tensor = self.head(F.relu(total))
        return logits


class Expert(nn.Module):
    """One of several feed-forward parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states of the tokens that were sent here."""
        states: torch.Tensor = self.down(F.gelu(self.up(tokens)))
        return states


class Routed(nn.Module):
    """Attention, then two of eight experts for each token."""

    def __init__(self, width: int, n_experts: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, n_experts)
        self.experts = nn.ModuleList(Expert(width) for _ in range(n_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the states of all tokens."""
        x = x + self.attention(x, x, x, need_weights=False)[0]
        tokens = self.norm(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        mixed = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == i)
            states = expert(tokens[rows]) * weights[rows, places, None]
            mixed = mixed.index_add(0, rows, states.to(mixed.dtype))
        return x + mixed.view_as(x)


class Experts(nn.Sequential):
    """A mixture of experts: `(N, T, width)` to the same."""

    def __init__(self, width: int = 512, experts: int = 8, layers: int = 4) -> None:
        super().__init__(*(Routed(width, experts) for _ in range(layers)))


Part = tuple[nn.Module, torch.Tensor, torch.Tensor, bool]
"""A model, its inputs, its target, and whether the target is classes (else values)."""


def custom(name: str, n: int, size: int, config: dict[str, Any]) -> Part:  # noqa: PLR0911 - one for each
    """Build a model by name with noise for it; `size` is its length, width or height."""
    tokens = torch.randint(0, config.get("vocabulary", 16000), (n, size))
    if name == "lstm_tagger":
        return Tagger(**config), tokens, torch.randint(0, 50, (n, size)), True
    if name == "mlp":
        return Perceptron(width=size, **config), torch.randn(n, size), torch.randint(0, 1000, (n,)), True
    if name == "unet":
        return SmallUNet(**config), torch.randn(n, 3, size, size), torch.randn(n, 3, size, size), False
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        model = nn.TransformerEncoder(layer, config.get("layers", 6), enable_nested_tensor=False)
        return model, torch.randn(n, size, 512), torch.randn(n, size, 512), False
    if name == "language_model":
        return LanguageModel(**config), tokens, tokens.clone(), True
    if name == "segmenter":
        shape = (size,) * config.get("dims", 2)
        return Segmenter(**config), torch.randn(n, 3, *shape), torch.randint(0, 21, (n, *shape)), True
    if name == "translator":
        return Translator(**config), tokens, tokens.clone(), True
    if name == "wavenet":
        return WaveNet(**config), torch.randn(n, 1, size), torch.randint(0, 256, (n, size)), True
    if name == "experts":
        width = config.get("width", 512)
        return Experts(**config), torch.randn(n, size, width), torch.randn(n, size, width), False
    known = "lstm_tagger, mlp, unet, encoder, language_model, segmenter, translator, wavenet, experts"
    raise ValueError(f"model {name!r} of source 'custom' is none of {known}.")
