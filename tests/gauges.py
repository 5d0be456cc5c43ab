"""The layers of a model, and random elements of their exact gauge group, made block by block."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import block_diag
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import ModelTensors
from sharebasis.gauge.units import AttentionGauge, Freedom, Mlp, NeuronOrder, Rotations, Unit
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import meta_model

EXACT = 1e-12
"""A distance in float64 that is none."""


def layers_of(model: PreTrainedModel) -> Layers:
    """Those of a model in memory, which is as its config says."""
    return Layers(ModelTensors(model), classify_model(meta_model(model.config)), model.config)


def random_rotation(d: int, rotations: Rotations, planes: tuple[tuple[int, int], ...]) -> Tensor:
    """A random rotation of a group, built block by block."""
    if rotations == "none":
        return torch.eye(d, dtype=torch.float64)
    free = [x for x in range(d) if not any(x in plane for plane in planes)]
    order = [x for plane in planes for x in plane] + free
    blocks = []
    for _ in planes:
        angle = torch.rand(()).item() * 2 * np.pi
        angle = angle if rotations == "all" else round(angle / np.pi) * np.pi
        blocks.append([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if free and rotations == "all":
        blocks.append(torch.linalg.qr(torch.randn(len(free), len(free), dtype=torch.float64))[0])
    else:
        blocks += [[[float(torch.randint(2, ())) * 2 - 1]] for _ in free]
    rotation = torch.from_numpy(block_diag(*blocks))
    where = torch.tensor(order).argsort()
    return rotation[where][:, where]


def random_element(unit: Unit, freedom: Freedom) -> Unit:
    if isinstance(unit, Mlp):
        n = len(unit.up)
        scales = torch.ones(n, dtype=unit.up.dtype)
        if freedom.neuron_scales and unit.gate is not None:
            scales = (torch.randint(2, (n,)) * 2 - 1) * (3 * torch.rand(n) - 1).exp().to(unit.up)
        return NeuronOrder(torch.randperm(n), scales)(unit)
    n_kv, n_queries = len(unit.k), unit.n_queries
    kv_heads, orders = torch.arange(n_kv), torch.arange(n_queries).repeat(n_kv, 1)
    if freedom.heads:
        kv_heads = torch.randperm(n_kv)
        orders = torch.stack([torch.randperm(n_queries) for _ in range(n_kv)])
    d_head, d_value = unit.q.shape[1], unit.v.shape[1]
    qk = [random_rotation(d_head, freedom.query_key, freedom.planes) for _ in range(n_kv)]
    vo = [random_rotation(d_value, freedom.value_output, ()) for _ in range(n_kv)]
    return AttentionGauge(
        (kv_heads[:, None] * n_queries + orders).flatten(),
        kv_heads,
        torch.stack(qk).to(unit.q),
        torch.stack(vo).to(unit.q),
    )(unit)
