"""Fast Sparse ConvNets: 1 × 1 convolutions with zeros anywhere, and a wider network instead of a dense one.

Mobile networks spend nearly all their time in 1 × 1 convolutions, and these are matrix products: with the positions of
an image side by side in registers, every weight that is left is one broadcast and a few multiplications, so that zeros
need no shape to pay. A sparse and wide network then beats a dense and narrow one of the same cost. Where an image has
become small, and registers are not filled by its positions, adjacent output channels share their zeros instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gossamer.core.gradual import GradualPruning
from gossamer.core.kernel_groups import KernelGroup
from gossamer.core.masks import MaskSet
from gossamer.core.registry import register
from gossamer.core.targets import Target, find_targets
from gossamer.errors import ConfigurationError, TargetError


@register(
    "fast-sparse-convnets",
    paper="fast-sparse-convnets",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="uniform",
    patterns=("unstructured", "blocks"),
    aims=("inference",),
)
@dataclass(kw_only=True)
class FastSparseConvnets(GradualPruning):
    """Prune the 1 × 1 convolutions of a mobile network gradually while it trains.

    Elsen, Dukhan, Gale & Simonyan, 2020, "Fast Sparse ConvNets", arXiv 1911.09723. The networks that they published:
    MobileNet v1 with 90 % zeros and blocks of four in its last block (``late_layers=1, late_block=4``), MobileNet v2
    with 85 % and blocks of two from its eleventh block on (``late_layers=13, late_block=2``), EfficientNet with 80 to
    85 %, blocks of one and a sparse classifier (``heads=True``). The first convolution and depthwise ones stay dense.

    Parameters
    ----------
    sparsity
        Share of the weights of every pruned layer that become zero.
    block
        Adjacent output channels that share their zeros: 1 (zeros anywhere), 2, 4, 8 or 16.
    late_layers, late_block
        How many of the last 1 × 1 convolutions use another block, and which; by default none.
    heads
        Whether the last linear layer is pruned too, with zeros anywhere.
    begin, end
        Steps at which pruning starts, and reaches the sparsity, along a cubic schedule.
    every
        Steps between two choices of what is zero.
    exclude
        Globs on the names of modules that stay dense, such as gates.

    Examples
    --------
    >>> run = FastSparseConvnets(end=10_000).attach(network, optimizer)  # doctest: +SKIP
    >>> for batch in batches:  # the loop of the user, as it was         # doctest: +SKIP
    ...     ...
    >>> masks = run.finalize()  # doctest: +SKIP
    """

    sparsity: float = 0.9
    block: int = 1
    late_layers: int = 0
    late_block: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        KernelGroup(self.block)
        KernelGroup(self.late_block)
        if self.late_layers < 0:
            raise ConfigurationError(f"late_layers is {self.late_layers}; it counts layers from the last, 0 for none")

    def targets(self, model: nn.Module) -> list[Target]:
        """The weights that are pruned: 1 × 1 convolutions over all channels, and the head if that is wanted.

        Raises
        ------
        TargetError
            If there are none.
        """
        found = find_targets(model, self.include, self.exclude, heads=self.heads)
        chosen = [each for each in found if _pointwise(each.module)]
        if not chosen:
            raise TargetError(f"the model has no 1 × 1 convolution to prune; its layers are {', '.join(_names(found))}")
        if self.heads and isinstance(found[-1].module, nn.Linear):
            chosen.append(found[-1])
        return chosen

    def patterns(self, model: nn.Module) -> dict[str, KernelGroup]:
        """The shape of the zeros of every weight that is pruned, by its name."""
        targets = self.targets(model)
        convolutions = [each.name for each in targets if not isinstance(each.module, nn.Linear)]
        late = set(convolutions[len(convolutions) - min(self.late_layers, len(convolutions)) :])
        blocks = {name: self.late_block if name in late else self.block for name in convolutions}
        return {each.name: KernelGroup(blocks.get(each.name, 1)) for each in targets}

    def masks(self, model: nn.Module, sparsity: float | None = None) -> MaskSet:
        """Masks of the present weights at a sparsity: in every layer the blocks of largest magnitude stay."""
        wanted = self.sparsity if sparsity is None else sparsity
        patterns = self.patterns(model)
        found = {}
        for target in self.targets(model):
            scores = target.matrix().detach().float().abs()
            found[target.name] = patterns[target.name].select(scores, wanted, target.name).view(target.parameter.shape)
        return MaskSet(found)


def _pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def _names(targets: list[Target]) -> list[str]:
    return [each.module_name for each in targets[:3]] or ["none"]
