"""The parameterisation of the trainable prefix: directly as keys and values, or through the paper's MLP.

Owns the parameters and their initialisation per site; knows no data and no loop. ``forward`` returns keys and values
``(layers, prefix_len, kv_heads, head_dim)`` per site, computed once per step whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from prefixes.errors import InvalidParameter
from prefixes.spec import Site, SiteGeometry

PrefixKV = dict[Site, tuple[Tensor, Tensor]]

REGRESSION_STEPS, REGRESSION_RATE, REGRESSION_TOLERANCE = 2000, 1e-3, 1e-4


class DirectPrefix(nn.Module):
    """Keys and values are the parameters. ``frozen`` leading positions keep their initial values."""

    def __init__(self, sites: Mapping[Site, SiteGeometry], length: int, *, frozen: int = 0) -> None:
        super().__init__()
        if not 0 <= frozen < length:
            raise InvalidParameter(f"frozen positions: expected 0 to {length - 1}, got {frozen}", got=frozen)
        self.frozen = frozen
        self.trained = nn.ParameterDict()
        for site, geometry in sites.items():
            for part in ("key", "value"):
                shape = (geometry.layers, length, geometry.kv_heads, geometry.head_dim)
                initial = torch.randn(shape) * 0.02
                self.register_buffer(f"{site}_{part}_first", initial[:, :frozen].clone())
                self.trained[f"{site}_{part}"] = nn.Parameter(initial[:, frozen:].clone())

    def forward(self) -> PrefixKV:
        made: PrefixKV = {}
        for name in self.trained:
            site: Site = name.removesuffix("_key")  # type: ignore[assignment]
            if name.endswith("_key"):
                made[site] = (self._tensor(f"{site}_key"), self._tensor(f"{site}_value"))
        return made

    def _tensor(self, name: str) -> Tensor:
        return torch.cat([self.get_buffer(f"{name}_first"), self.trained[name]], dim=1)

    @torch.no_grad()
    def initialise(self, activations: PrefixKV, between: Callable[[], None] = lambda: None) -> float:
        """Copy ``activations``; return the remaining mean squared error, 0."""
        for site, pair in activations.items():
            for part, tensor in zip(("key", "value"), pair, strict=True):
                self.get_buffer(f"{site}_{part}_first").copy_(tensor[:, : self.frozen])
                self.trained[f"{site}_{part}"].copy_(tensor[:, self.frozen :])
        return 0.0


class MlpPrefix(nn.Module):
    """``Embedding(P, d) -> Linear(d, k) -> Tanh -> Linear(k, layers * 2 * d)`` per site, ``d = kv_heads * head_dim``.

    ``d`` is the width of a key, as in the published code and in PEFT: a wider one learns as at a higher rate.
    """

    def __init__(self, sites: Mapping[Site, SiteGeometry], length: int, *, middle: int = 512) -> None:
        super().__init__()
        self.sites = dict(sites)
        self.register_buffer("index", torch.arange(length), persistent=False)
        self.networks = nn.ModuleDict()
        for site, geometry in sites.items():
            width = geometry.kv_heads * geometry.head_dim
            self.networks[site] = nn.Sequential(
                nn.Embedding(length, width),
                nn.Linear(width, middle),
                nn.Tanh(),
                nn.Linear(middle, geometry.layers * 2 * width),
            )

    def forward(self) -> PrefixKV:
        made: PrefixKV = {}
        for site, geometry in self.sites.items():
            flat = self.networks[site](self.index)  # (P, layers * 2 * kv_heads * head_dim)
            shaped = flat.view(-1, geometry.layers, 2, geometry.kv_heads, geometry.head_dim).permute(2, 1, 0, 3, 4)
            made[site] = (shaped[0], shaped[1])
        return made

    def initialise(self, activations: PrefixKV, between: Callable[[], None] = lambda: None) -> float:
        """Fit the MLP to ``activations`` by regression, as the published code does.

        Return the remaining mean squared error. ``between`` is called before each step.
        """
        optimizer = torch.optim.Adam(self.parameters(), lr=REGRESSION_RATE)
        error = float("inf")
        for _ in range(REGRESSION_STEPS):
            between()
            made = self.forward()
            pairs = [pair for site in activations for pair in zip(made[site], activations[site], strict=True)]
            loss = sum((functional.mse_loss(got, wanted) for got, wanted in pairs), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            error = loss.item() / len(pairs)
            if error < REGRESSION_TOLERANCE:
                break
        optimizer.zero_grad()
        return error
