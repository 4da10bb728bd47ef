"""What a model says of its parameters: which embed, put out or choose experts, and which are no matrices at all.

Embeddings and output heads take the aux rule by the source of the matrix rules. The rest is ours, where that source
says no more than "two dimensions": routers of experts go with the heads, whose softmax they share; biases, gains,
tables of positions and diagonals have two dimensions only because several vectors are stored as one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from ds_optim.sharding.binding import full_shape

EMBEDDING, HEAD, ROUTER = "embedding", "output head", "router"
BIAS, GAIN, TABLE, DIAGONAL, DEPTHWISE = "bias", "gain", "table", "diagonal", "depthwise convolution"
STACK, NO_VIEW = "stack without a view", "no view"
"""Of three dimensions and no view that says what they are; the first is likely a stack of matrices."""

#: Searched in whole names; embeddings and heads are found by the model's modules too.
BY_NAME = ((EMBEDDING, re.compile(r"embed|\bwte\b|\bwpe\b")), (HEAD, re.compile("lm_head")))
#: Searched in the last part of a name: what is stored as a parameter of its own and multiplies nothing as a matrix.
_BY_LAST_PART = (
    (GAIN, re.compile(r"^(.*_)?(scale|gain|gamma)$")),
    (TABLE, re.compile(r"rel_pos|position|pos_emb|pos_enc|_table$|(^|_)latents?(_\dd|_query)?$")),
    (BIAS, re.compile(r"bias")),
    (DIAGONAL, re.compile(r"^(A_log|D)$")),
)
#: Searched in the names of classes that hold a weight themselves.
_ROUTERS = re.compile(r"Router$|Mo[eE]Gate$|TopKGate$|TopKGating$")
# Children of the model itself: attention and MLPs have an "output", a "head" or a "fc_out" of their own further down.
_HEADS = re.compile(r"heads?|cls|score|(?!pre_).*classifier|classification_head")
_LINEAR_HEADS = re.compile(
    r".*_head|qa_outputs|output|out|outputs|fc|fc_out|decoder|proj_out|embed_out|output_projection|output_layer"
    r"|final_(linear|layer|proj)|logits.*|to_logits|readout|lm_loss|unembed(ding)?|vocab_projector|objective"
)


class Kinds:
    """The parameters of a model by what its modules and names make of them.

    Attributes:
        transposed: identities of weights that are stored fan-in x fan-out (of each matrix in a stack).
        convolutions: identities of the weights of convolutions.
        transposed_convolutions: the same of transposed ones, (in, out, ...), which no view describes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.transposed: set[int] = set()
        self.convolutions: set[int] = set()
        self.transposed_convolutions: set[int] = set()
        self._excluded: dict[int, str] = {}
        self._vectors: dict[int, str] = {}
        self._beside_experts = {
            path for name, _ in model.named_parameters(remove_duplicate=False) for path in _beside_experts(name)
        }
        for weight in _heads(model):
            self._excluded[id(weight)] = HEAD
        for module in model.modules():
            self._add(module)

    def excluded(self, names: Sequence[str], parameter: nn.Parameter) -> str | None:
        """Why a parameter takes the aux rule unless it is asked otherwise; None where nothing speaks for that."""
        found = self._excluded.get(id(parameter))
        found = found or next((kind for kind, pattern in BY_NAME if any(map(pattern.search, names))), None)
        return found or (ROUTER if any(map(self._routes, names)) else None)

    def no_matrix(self, names: Sequence[str], parameter: nn.Parameter) -> str | None:
        """What a parameter of two or more dimensions is that is no matrix; None where it may be one."""
        if id(parameter) in self._vectors:
            return self._vectors[id(parameter)]
        *_, owner, last = ["", *names[0].split(".")]
        found = next((kind for kind, pattern in _BY_LAST_PART if pattern.search(last)), None)
        return found or (GAIN if "norm" in owner.lower() and last == "weight" else None)

    def without_view(self, parameter: nn.Parameter) -> str:
        """What a parameter of three and more dimensions is that has no view."""
        is_stack = len(full_shape(parameter)) == 3 and min(full_shape(parameter)) > 1
        return STACK if is_stack and id(parameter) not in self.transposed_convolutions else NO_VIEW

    def _routes(self, name: str) -> bool:
        """Whether a parameter's name is that of a router: by this word, or of a gate beside experts."""
        parts = name.split(".")
        return any(
            part == "router" or (part == "gate" and ".".join(parts[:depth]) in self._beside_experts)
            for depth, part in enumerate(parts)
        )

    def _add(self, module: nn.Module) -> None:
        kind = type(module).__name__
        weight = self._weight_of(module)
        up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
        if isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter):
            # (E, h, 2 i) and (E, i, h) share h here only where they are multiplied from the right.
            first, second = full_shape(up), full_shape(down)
            if len(first) == len(second) == 3 and first[1] == second[2]:
                self.transposed |= {id(up), id(down)}
        if getattr(module, "is_transposed", None) is True:  # of experts, in transformers 5
            own = module.named_parameters(recurse=False)
            self.transposed |= {id(p) for name, p in own if len(full_shape(p)) == 3 and "bias" not in name}
        if "Norm" in kind and "Linear" not in kind:
            self._vectors.update((id(gain), GAIN) for gain in module.parameters(recurse=False))
        if weight is None:
            return
        if _ROUTERS.search(kind):
            self._excluded.setdefault(id(weight), ROUTER)
        if kind == "Conv1D":  # transformers' GPT-2 layer, fan-in x fan-out
            self.transposed.add(id(weight))
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            self._excluded[id(weight)] = EMBEDDING
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            self.convolutions.add(id(weight))
            if module.groups > 1 and full_shape(weight)[1] == 1:
                self._vectors[id(weight)] = DEPTHWISE
        elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            self.transposed_convolutions.add(id(weight))

    def _weight_of(self, module: nn.Module) -> nn.Parameter | None:
        """A module's weight, also where weight norm stores its direction and its norms (by both of torch's ways)."""
        own, norms = module._parameters.get("weight"), module._parameters.get("weight_g")
        if own is None:
            own = module._parameters.get("weight_v")
        stored = getattr(module, "parametrizations", None)
        if isinstance(stored, nn.ModuleDict) and "weight" in stored:
            parts = stored["weight"]._parameters
            own, norms = parts.get("original1", parts.get("original")), parts.get("original0")
        if norms is not None:
            self._vectors[id(norms)] = GAIN
        return own


def _beside_experts(name: str) -> Iterator[str]:
    """The path of the module that holds experts, where a name leads through some."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth, part in enumerate(parts) if "expert" in part)


def _heads(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that put out, by what models of ``transformers`` say of themselves and by their place and name."""
    models = [module for module in model.modules() if hasattr(type(module), "get_output_embeddings")]
    # A pretrained model of vision or text may end in a "head" that another model goes on from; one for a task does not.
    for_tasks = [module for module in models if "For" in type(module).__name__]
    for module in models:
        try:
            head = module.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module):
            yield from head.parameters()
    for top in (*_outermost(model), *for_tasks):
        for name, child in top.named_children():
            is_linear = isinstance(child._parameters.get("weight"), nn.Parameter)
            if _HEADS.fullmatch(name) or (is_linear and _LINEAR_HEADS.fullmatch(name)):
                yield from _last_weights(child)


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what it alone wraps."""
    yield model
    children = [child for child in model.children() if next(child.parameters(), None) is not None]
    alone = len(children) == 1 and not model._parameters
    if alone and not isinstance(children[0], (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        yield from _outermost(children[0])


def _last_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weight that a head ends in; of each of several heads."""
    weight = module._parameters.get("weight")
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    if weight is not None:
        yield weight
    elif isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in children:
            yield from _last_weights(child)
    elif children:
        yield from _last_weights(children[-1])
