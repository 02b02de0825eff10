"""Makes checkpoints in the key layout of the paper's published code, and computes their keys and values as it does.

It is the importer's oracle: modules of the published shapes, whose output is taken apart as the code's `get_prompt_p5`
does it. That is a view over layers and heads, with the layers moved to the front, cut into pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefixes.spec import BackboneSpec, Site

ENDINGS: dict[Site, str] = {"decoder": "", "encoder": "_enc", "cross": "2"}


class PublishedPrefix(nn.Module):
    """`wte…` and `control_trans…` for every site, random; ``deep`` has two hidden layers."""

    def __init__(
        self, spec: BackboneSpec, *, length: int = 5, middle: int = 12, deep: bool = False, sites: tuple[Site, ...] = ()
    ) -> None:
        super().__init__()
        decoder, width = spec.sites["decoder"], spec.hidden_size
        self.layers, self.heads, self.head_dim = decoder.layers, decoder.kv_heads, decoder.head_dim
        self.length = length
        self.sites = sites or tuple(spec.sites)
        generator = torch.Generator().manual_seed(0)
        for site in self.sites:
            hidden: list[nn.Module] = [nn.Linear(width, middle), nn.Tanh()]
            if deep:
                hidden += [nn.Linear(middle, middle), nn.Tanh()]
            mlp = nn.Sequential(*hidden, nn.Linear(middle, self.layers * 2 * width))
            setattr(self, f"wte{ENDINGS[site]}", nn.Embedding(length, width))
            setattr(self, f"control_trans{ENDINGS[site]}", mlp)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    @torch.inference_mode()
    def prompt(self, site: Site, rows: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer of the decoder key and value, ``(rows, heads, length, head_dim)``."""
        wte, mlp = (getattr(self, f"{name}{ENDINGS[site]}") for name in ("wte", "control_trans"))
        out = mlp(wte(torch.arange(self.length).expand(rows, -1)))  # (rows, length, layers * 2 * width)
        return cut(out.view(rows, self.length, self.layers * 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4))


def cut(stacked: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``(layers * 2, rows, heads, length, head_dim)`` in pairs."""
    return [(pair[0], pair[1]) for pair in stacked.split(2)]


def lightning(prefix: nn.Module, hyper_parameters: Any) -> dict[str, Any]:
    """A Lightning checkpoint of the published module: the prefix model, and the frozen one beside it."""
    state = {f"model.{name}": tensor for name, tensor in prefix.state_dict().items()}
    frozen = {"seq2seq_model.model.shared.weight": torch.zeros(3, 2), "seq2seq_model.lm_head.weight": torch.zeros(3, 2)}
    return {"epoch": 3, "state_dict": {**state, **frozen}, "hyper_parameters": hyper_parameters}


class Payload:
    """Creates a file when it is unpickled: the smallest proof of code that ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))
