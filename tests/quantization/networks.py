"""Networks, and a way to quantize them without a Trainer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.models import ResidualCNN
from lightning_compress.quantization.insertion import Settings, insert


def quantized(net: nn.Module, *inputs: Tensor, **settings: Any) -> nn.Module:
    """Insert quantizers, show them data, and return the network in eval mode."""
    insertion = insert(net, Settings(**settings))
    insertion.switch(True)
    insertion.observe(True)
    net.train()
    with torch.no_grad():
        for _ in range(3):
            insertion.start_pass()
            net(*inputs)
    insertion.observe(False)
    insertion.start_pass()
    return net.eval()


def with_uneven_norms(net: nn.Module) -> nn.Module:
    """Give batch norms factors of both signs, and one of 0."""
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.weight.data[1] = 0.0
    return net


def blobs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images of noise with a bright spot, and which of ten places it is in."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = torch.randn(count, 1, 28, 28, generator=generator)
    for place in range(10):
        row, column = 5 * (place // 5) * 2 + 4, 5 * (place % 5) + 1
        images[labels == place, :, row : row + 5, column : column + 5] += 2.0
    return images, labels


def trained_cnn(**settings: Any) -> nn.Module:
    """Return a residual network that tells the blobs' places, quantized in the second half of its training."""
    torch.manual_seed(0)
    net = ResidualCNN((8, 16, 32))
    insertion = insert(net, Settings(**settings))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    images, labels = blobs(2048)
    for step, rows in enumerate(torch.arange(2048).split(64)):
        insertion.switch(step >= 16)
        insertion.observe(16 <= step < 24)
        insertion.start_pass()
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    insertion.start_pass()
    return net.eval()


class Encoder(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Attending(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)
        self.bias = nn.Linear(16, 6 * 6) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = None if self.bias is None else self.bias(x.mean(1)).view(-1, 1, 6, 6)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(ids)).relu())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(32, 3)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x).relu(), self.right(extra).relu()], 1))


class Moving(nn.Module):
    """Between its layers numbers are pooled, padded, cut off and reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.a(x), 2))
        x = F.pad(self.b(x), (1, 1, 1, 1))
        return self.head(F.max_pool2d(self.c(x), 2).flatten(1))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
    )


def transposed() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 3)
    )
