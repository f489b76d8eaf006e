"""What trains in parameter-efficient fine-tuning, in one call: adapters, LoRA, QLoRA, prefixes and prompts.

LoRA, prefixes and prompts are PEFT's. Adapters are a page of their own: a narrow two-layer network behind every
feed-forward layer. The base can be rounded to few bits first, with bitsandbytes where it is installed, or in place
for an honest look at what rounding does to activations.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.quantization import Quantizer
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, MissingDependencyError, UnknownNameError
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.models.feedforward_taps import has_packed_matrices

Kind = Literal["lora", "adapter", "prefix", "prompt"]
Task = Literal["SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


class Adapter(nn.Module):
    """A layer with a bottleneck behind it: ``h + up(relu(down(h)))`` of what the layer gives.

    Pfeiffer et al., 2021, "AdapterFusion", arXiv 2005.00247, figure 3: behind the feed-forward layer, inside its
    residual. The last matrix starts at zero, so that the model starts as it was.

    Parameters
    ----------
    base_layer
        The layer.
    width
        Of its output.
    reduction
        Width over bottleneck.
    """

    def __init__(self, base_layer: nn.Module, width: int, reduction: int = 16):
        super().__init__()
        if not 1 <= reduction <= width:
            raise ConfigurationError(f"reduction is {reduction}; it must lie between 1 and the width, {width}")
        self.base_layer = base_layer
        like = next(base_layer.parameters())
        device, dtype = like.device, like.dtype if like.is_floating_point() else torch.float32
        self.narrow = nn.Linear(width, width // reduction, device=device, dtype=dtype)
        self.wide = nn.Linear(width // reduction, width, device=device, dtype=dtype)
        nn.init.normal_(self.narrow.weight, std=0.01)
        nn.init.zeros_(self.narrow.bias)
        nn.init.zeros_(self.wide.weight)
        nn.init.zeros_(self.wide.bias)

    @property
    def weight(self) -> Tensor:
        """The layer's own matrix, for models that ask it for its dtype, as T5 does."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives, adapted."""
        h = self.base_layer(x, *args, **kwargs)
        return h + self.wide(self.narrow(h).relu())


def efficient(model: Any, kind: Kind, task: Task = "SEQ_CLS", **options: Any) -> Any:
    """Freeze a model but for a few parameters and the head of its task.

    Parameters
    ----------
    model
        Of Hugging Face; changed in place, and wrapped.
    kind
        ``lora`` (rank 8, α 16 unless told otherwise; on a base that was loaded in 4 bits this is QLoRA), ``adapter``
        (reduction 16), ``prefix`` or ``prompt`` (20 virtual tokens).
    task
        As PEFT calls it; its head trains too.
    **options
        Of PEFT's configuration, or of :class:`Adapter`.

    Raises
    ------
    UnknownNameError
        If there is no such kind.
    MissingDependencyError
        If PEFT is not installed.
    """
    if kind not in get_args(Kind):
        raise UnknownNameError("kind of fine-tuning", kind, get_args(Kind))
    if kind == "adapter":
        return add_adapters(model, **options)
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("peft", "recovery", f"fine-tuning by {kind}") from None
    if kind == "lora":
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        config: Any = peft.LoraConfig(task_type=task, **{"r": 8, "lora_alpha": 16, **options})
    elif kind == "prefix":
        config = peft.PrefixTuningConfig(task_type=task, **{"num_virtual_tokens": 20, **options})
    else:
        config = peft.PromptTuningConfig(task_type=task, **{"num_virtual_tokens": 20, **options})
    return peft.get_peft_model(model, config)


def add_adapters(model: Any, reduction: int = 16) -> Any:
    """Put an :class:`Adapter` behind every feed-forward layer, and freeze all else but the head.

    Parameters
    ----------
    model
        Changed in place; what is outside the body of a Hugging Face model counts as its head.
    reduction
        See :class:`Adapter`.

    Raises
    ------
    TargetError
        If there is no feed-forward layer.
    ConfigurationError
        If the matrices are packed in few bits, so that feed-forward layers cannot be told by what they compute.
    """
    if has_packed_matrices(model):
        raise ConfigurationError(
            f"{type(model).__name__} holds its matrices packed in few bits, among which adapters find no place; "
            f"fine-tune it by 'lora', or round a base in place with round_base_"
        )
    layers = find_feed_forwards(model)
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    body.requires_grad_(False)
    owners = {id(child): (owner, attribute) for owner in model.modules() for attribute, child in owner.named_children()}
    for layer in layers:
        owner, attribute = owners[id(layer.down.module)]
        owner._modules[attribute] = Adapter(layer.down.module, layer.down.shape[0], reduction)
    return model


def four_bit_loading() -> Any:
    """The configuration with which QLoRA loads its base: 4-bit NormalFloat, its constants quantised again.

    Dettmers et al., 2023, "QLoRA", arXiv 2305.14314. For ``from_pretrained(…, quantization_config=…)``; on a processor
    as on an accelerator, since bitsandbytes 0.46.

    Raises
    ------
    MissingDependencyError
        If bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise MissingDependencyError("bitsandbytes", "qlora", "a base in 4 bits for QLoRA")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@torch.no_grad()
def round_base_(model: nn.Module, bits: int = 8, group_size: int | None = None) -> int:
    """Round the matrices of a model to few bits in place; they keep their dtype, and compute as rounded ones do.

    Parameters
    ----------
    model
        Changed in place.
    bits
        2 to 8.
    group_size
        Inputs that share a scale; None for a whole row.

    Returns
    -------
    int
        How many matrices were rounded.

    Raises
    ------
    ConfigurationError
        If bits are out of range, or a group does not divide a row.
    """
    quantizer = Quantizer(bits=bits, group_size=group_size, symmetric=True)
    targets = find_targets(model)
    for target in targets:
        matrix = target.matrix()
        flat = matrix.flatten(1).float()
        width = group_size or flat.shape[1]
        if flat.shape[1] % width:
            raise ConfigurationError(
                f"group_size is {width}, which does not divide the {flat.shape[1]} inputs of {target.name}"
            )
        groups = flat.unflatten(1, (-1, width))
        matrix.copy_(quantizer.fit(groups).round(groups).flatten(1).view(matrix.shape))
    return len(targets)
