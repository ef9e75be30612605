"""The paper's image classifier (appendix C.1): a ResNet-9 without normalisation, and images to try it on.

The paper trains on the cats and dogs of CIFAR-10. That data set is not part of this package; ``generated_images``
makes images of the same shape in two classes, so that sizes and times are those of the real task.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["ResNet9", "generated_images"]


def _block(channels_in: int, channels_out: int, kernel: int = 3, *, stride: int = 1, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel, stride, padding), nn.ReLU())


class Residual(nn.Module):
    """``x + block2(block1(x))``, each block a convolution and a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1, self.block2 = _block(channels, channels), _block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, h, w] -> [n, channels, h, w]``."""
        result: Tensor = x + self.block2(self.block1(x))
        return result


class ResNet9(nn.Module):
    """The paper's CNN: five layers and two residual blocks of two convolutions each; 2,272,512 parameters.

    Its shape is that of the ResNet-9 that data attribution is usually measured on, with ReLU and without
    normalisation: convolutions to w, 2w (5 x 5, stride 2), a residual block, 4w, max pooling, a residual block, 2w, the
    largest value of each channel, a linear layer without bias, times ``scale``. Without BatchNorm, samples of a
    batch are not coupled: a share of a gradient is one sample's own.

    Args:
        width: w, the channels of the first convolution.
        classes: how many.
        scale: of the logits.
        channels: of the images; 3 for coloured ones.

    Example:
        >>> model = ResNet9()
        >>> sum(p.numel() for p in model.parameters())
        2272512
        >>> ResNet9(width=4)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 2])
        >>> ResNet9(width=4, channels=1)(torch.zeros(5, 1, 16, 16)).shape
        torch.Size([5, 2])
    """

    def __init__(self, width: int = 64, classes: int = 2, scale: float = 0.2, channels: int = 3) -> None:
        super().__init__()
        self.scale = scale
        self.layer1 = _block(channels, width)
        self.layer2 = _block(width, 2 * width, 5, stride=2, padding=2)
        self.residual1 = Residual(2 * width)
        self.layer3 = _block(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.residual2 = Residual(4 * width)
        self.layer4 = _block(4 * width, 2 * width, padding=0)
        self.head = nn.Linear(2 * width, classes, bias=False)
        # Without normalisation, torch's default would shrink the signal sixfold in variance with every ReLU.
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    @classmethod
    def of_size(cls, parameters: float, classes: int = 2) -> Self:
        """The one whose number of parameters, ``554 w^2 + (48 + 2 classes) w``, is nearest to ``parameters``.

        Example:
            >>> sum(p.numel() for p in ResNet9.of_size(90_000).parameters())
            94302
        """
        linear = 48 + 2 * classes
        root = (math.sqrt(linear**2 + 4 * 554 * parameters) - linear) / (2 * 554)
        around = (max(1, math.floor(root)), max(1, math.ceil(root)))
        return cls(min(around, key=lambda w: abs(554 * w**2 + linear * w - parameters)), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities of the classes: ``[n, channels, h, w] -> [n, classes]``, h and w of 11 or more."""
        x = self.residual1(self.layer2(self.layer1(images)))
        x = self.layer4(self.residual2(self.pool(self.layer3(x))))
        return torch.log_softmax(self.head(x.amax((2, 3))) * self.scale, dim=-1)


def generated_images(n: int, seed: int = 0, *, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Images of two classes: gratings that rise to the right (0) or to the left (1), in noise.

    Colour, phase, frequency and angle (within 30 degrees of the diagonal) are drawn for each image, so that no linear
    function of the pixels tells the classes apart.

    Args:
        n: how many.
        seed: of all that is drawn; the global generator is left alone.
        noise: its standard deviation; the grating's is 0.7 or less in each colour.

    Returns:
        images ``[n, 3, 32, 32]`` float32, targets int64 ``[n]``.

    Example:
        >>> images, targets = generated_images(4)
        >>> images.shape, targets.unique()
        (torch.Size([4, 3, 32, 32]), tensor([0, 1]))
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    targets = torch.randint(2, (n,), generator=generator)
    angle = math.pi / 4 + (math.pi / 2) * targets + uniform(-math.pi / 6, math.pi / 6)
    frequency, phase = uniform(0.6, 1.2), uniform(0, 2 * math.pi)
    across = torch.arange(32.0)
    along = angle.cos()[:, None, None] * across + angle.sin()[:, None, None] * across[:, None]
    grating = torch.sin(frequency[:, None, None] * along + phase[:, None, None])
    colour = uniform(0.3, 1.0, 3)
    images = colour[:, :, None, None] * grating[:, None]
    return images + noise * torch.randn(images.shape, generator=generator), targets
