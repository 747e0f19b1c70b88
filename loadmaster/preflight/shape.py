"""The shape of a decoder model: every matrix of its layers, and the exact number of parameters.

Counts equal those of transformers' classes on the meta device exactly (tests/preflight/test_shape.py). config_json.py
finds the shape of a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

LAYERS = ("model.layers", "model.language_model.layers")
"""Where decoder layers are in transformers' models, of which the second kind is multimodal."""
FLASH_HEAD = 256
"""Numbers of the largest head that flash kernels take; beyond it, models/wide_heads.py."""


@dataclass(frozen=True)
class Matrix:
    """One nn.Linear of a layer: weight [outputs, inputs], bias [outputs] or none."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    shared: bool = False
    """Its input is that of a matrix before it as well."""

    @property
    def weight(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weight + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    name: str
    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary_size: int
    tied: bool
    norms: int = 2
    """Norms of hidden_size in a layer: 2, or 4 in Gemma 2 and 3."""
    gemma_norm: bool = False
    """The norm multiplies by (1 + weight) in fp32 before casting back."""
    power_norm: bool = False
    """The root in a norm is a power, for which what it is of is kept as well (Gemma 4)."""
    wide: bool = False
    """Norms multiply by their weight, and heads are turned, in fp32 before casting back (Olmo)."""
    norms_after: bool = False
    """The two norms of a layer are not before attention and MLP but after them (Olmo, Exaone)."""
    query_key_norm: bool = False
    whole_norm: bool = False
    """Those are over all heads together."""
    late_norm: bool = False
    """They come after all three products."""
    scaled_query: bool = False
    """Turned queries are multiplied with a number of their position (Ministral 3)."""
    scaled_residual: bool = False
    """What attention and MLP give is multiplied with a number (Granite)."""
    scaled_embedding: bool = False
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    """A feed-forward layer has a gate; without one its activation is squared ReLU or, where `gelu` says so, GELU."""
    fused: bool = False
    """q, k, v in one matrix and gate, up in one (Phi-3 and 4)."""
    rotary_fraction: float = 1.0
    gelu: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    dense_at: tuple[int, ...] = ()
    """Layers without experts, of a model that has experts in others."""
    normalised_routing: bool = False
    """The chosen experts' weights are divided by their sum."""
    windows: tuple[int | None, ...] = field(default=())
    """Attention window of each layer, tokens; None sees everything."""
    global_at: tuple[int, ...] = ()
    """Layers whose heads are of sizes of their own (those of Gemma 4 that see everything); `view` has these sizes."""
    global_head_dim: int = 0
    global_key_value_heads: int = 0
    keys_as_values: bool = False
    """In those there is no v_proj: values are what k_proj gives."""
    value_norm: bool = False
    """Values are normed as well, without a weight; heads are turned before they are put head by head."""
    layer_scalar: bool = False
    """What a layer gives is multiplied with a number that is stored beside its weights."""
    attention_softcap: bool = False
    """Scores are cap * tanh(score / cap), by a kernel of its own (models/capped.py)."""
    logit_softcap: bool = False
    max_position: int | None = None
    short_positions: int | None = None
    """Tokens up to which LongRoPE has factors of their own (config_json.short_positions); None: it has one rotation."""
    estimate: str | None = None
    """Why the figures for this model are an estimate; None when its family is known."""
    language_model_of: str | None = None
    """Model type of the multimodal checkpoint that this is the language model of."""

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.key_value_heads * self.head_dim

    @cached_property
    def attention_matrices(self) -> tuple[Matrix, ...]:
        """In the order in which the model has them, and an optimizer steps them."""
        h, q, k = self.hidden_size, self.query_size, self.key_value_size
        bias = self.query_key_value_bias
        output = Matrix("o_proj", q, h, self.output_bias)
        if self.fused:
            return output, Matrix("qkv_proj", h, q + 2 * k, bias)
        key, value = (Matrix(name, h, k, bias, True) for name in ("k_proj", "v_proj"))
        return Matrix("q_proj", h, q, bias), key, *((value,) * (not self.keys_as_values)), output

    @cached_property
    def mlp_matrices(self) -> tuple[Matrix, ...]:
        """Of a dense layer; a layer with experts has none (its expert weights are 3-D, see expert_parameters)."""
        h, f = self.hidden_size, self.intermediate_size
        down = Matrix("down_proj", f, h, self.mlp_bias)
        if self.fused:
            return Matrix("gate_up_proj", h, 2 * f, self.mlp_bias), down
        gate = (Matrix("gate_proj", h, f, self.mlp_bias),) * self.gated
        return *gate, Matrix("up_proj", h, f, self.mlp_bias, self.gated), down

    @property
    def dense_layers(self) -> int:
        return len(self.dense_at) if self.experts else self.layers

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this index is a mixture of experts."""
        return bool(self.experts) and layer not in self.dense_at

    @property
    def expert_layers(self) -> int:
        return self.layers - self.dense_layers

    def is_second(self, layer: int) -> bool:
        """Layers are of up to two kinds; the second has experts, or heads of sizes of its own (global_at)."""
        return layer in self.global_at or self.has_experts(layer)

    @cached_property
    def seconds(self) -> tuple[bool, ...]:
        """Of each layer, whether it is of the second kind."""
        return tuple(map(self.is_second, range(self.layers)))

    @cached_property
    def layer_kinds(self) -> tuple[tuple[bool, int], ...]:
        """(whether it is the second, how many layers) of each kind of layer that there is."""
        second = len(self.global_at) or self.expert_layers
        return tuple((kind, layers) for kind, layers in ((False, self.layers - second), (True, second)) if layers)

    def view(self, second: bool) -> ModelShape:
        """The shape with the sizes and windows of one kind of layer as if all were of it; itself where heads are of one
        size."""
        return _view(self, second) if self.global_at else self

    @property
    def views(self) -> tuple[tuple[ModelShape, int], ...]:
        """(view, how many layers) of each kind of layer that there is."""
        return tuple((self.view(second), layers) for second, layers in self.layer_kinds)

    @property
    def widest(self) -> ModelShape:
        """The view with most numbers of a token in attention."""
        return max((view for view, _ in self.views), key=lambda view: view.query_size)

    @property
    def expert_weights(self) -> int:
        """Of all layers, without their routers."""
        return self.expert_layers * 3 * self.experts * self.expert_size * self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Of one layer with experts: gate_up [E, 2e, h], down [E, h, e] and the router [E, h]."""
        return self.experts * self.hidden_size * (3 * self.expert_size + 1)

    @property
    def norm_places(self) -> tuple[bool, bool, bool, bool]:
        """Whether a layer has a norm before attention, after it, before the MLP, and after it."""
        before, after = not self.norms_after, self.norms == 4 or self.norms_after
        return before, after, before, after

    @property
    def query_key_norm_sizes(self) -> tuple[int, ...]:
        """Of one layer, in a view of its kind."""
        if not self.query_key_norm:
            return ()
        return (self.query_size, self.key_value_size) if self.whole_norm else (self.head_dim, self.head_dim)

    @property
    def norm_parameters(self) -> int:
        """Of one layer, in a view of its kind."""
        return self.norms * self.hidden_size + sum(self.query_key_norm_sizes)

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Of an untied output head."""
        return 0 if self.tied else self.embedding_parameters

    def matrices(self, second: bool = False) -> tuple[Matrix, ...]:
        """The linears of one layer of a kind."""
        return self.view(second).attention_matrices + (() if second and self.experts else self.mlp_matrices)

    @property
    def all_matrices(self) -> tuple[Matrix, ...]:
        """Those of a dense layer, and where heads are of several sizes of each kind; none twice."""
        return tuple(dict.fromkeys((*self.matrices(False), *self.matrices(bool(self.global_at)))))

    def layer_parameters(self, second: bool = False) -> int:
        linears = sum(m.parameters for m in self.matrices(second))
        experts = self.expert_parameters if second and self.experts else 0
        return linears + self.view(second).norm_parameters + experts

    @cached_property
    def linear_weights(self) -> int:
        """Weights of every nn.Linear but the head: what nf4 quantizes."""
        return sum(layers * sum(m.weight for m in self.matrices(second)) for second, layers in self.layer_kinds)

    @cached_property
    def parameters(self) -> int:
        inside = sum(layers * self.layer_parameters(second) for second, layers in self.layer_kinds)
        return self.embedding_parameters + self.head_parameters + self.hidden_size + inside

    @cached_property
    def active_matrix_parameters(self) -> int:
        """Matrix weights that one token is multiplied with, the head included and the embedding not."""
        expert = self.hidden_size * (3 * self.expert_size * self.experts_per_token + self.experts)
        return self.linear_weights + self.expert_layers * expert + self.embedding_parameters

    def attended(self, length: int) -> float:
        """Positions that a token of a row of `length` sees, on average over tokens and layers."""
        windows = [min(window or length, length) for window in self.windows or (None,)]
        return sum(w - w * w / (2 * length) for w in windows) / len(windows)

    def attention_width(self, length: int) -> float:
        """Positions that a token sees, times the numbers of a query, summed over layers."""
        return sum(layers * view.attended(length) * view.query_size for view, layers in self.views)

    def lora_parameters(self, rank: int, targets: str | Sequence[str], dora: bool = False) -> int:
        return sum(n * self.layer_lora_parameters(rank, targets, dora, second) for second, n in self.layer_kinds)

    def layer_lora_parameters(self, rank: int, targets: str | Sequence[str], dora: bool, second: bool) -> int:
        """Of one layer; dora: with a magnitude for each output."""
        return sum(rank * (m.inputs + m.outputs) + dora * m.outputs for m in self.adapted(targets, second))

    def adapted(self, targets: str | Sequence[str], second: bool = False) -> tuple[Matrix, ...]:
        """The linears that get an adapter in any layer, taken as those of each: too many where it is not all layers."""
        return tuple(m for m in self.matrices(second) if adapted_layers(m.name, targets, self.layers))


@lru_cache
def _view(shape: ModelShape, second: bool) -> ModelShape:
    windows = tuple(window for layer, window in enumerate(shape.windows) if shape.is_second(layer) == second)
    own = {"head_dim": shape.global_head_dim, "key_value_heads": shape.global_key_value_heads}
    sizes = own if second else {"keys_as_values": False}
    return replace(shape, global_at=(), windows=windows, **sizes)


def adapted_layers(name: str, targets: str | Sequence[str], layers: int) -> int:
    """In how many layers the linear of this name gets an adapter."""
    if targets in ("all-linear", name):
        return layers
    if isinstance(targets, str):
        return _matched_layers(name, targets, layers)
    return layers if name in targets else _named_layers(name, tuple(targets), layers)


def full_name(matrix: str, layer: int, above: str = LAYERS[0]) -> str:
    """Of a linear in transformers' model."""
    part = "self_attn" if matrix in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj") else "mlp"
    return f"{above}.{layer}.{part}.{matrix}"


@lru_cache
def _named_layers(name: str, targets: tuple[str, ...], layers: int) -> int:
    return sum(any(full_name(name, layer, above) in targets for above in LAYERS) for layer in range(layers))


@lru_cache
def _matched_layers(name: str, expression: str, layers: int) -> int:
    return sum(
        any(re.fullmatch(expression, full_name(name, layer, above)) for above in LAYERS) for layer in range(layers)
    )
