"""The U-Net of Lokwani et al. (arXiv:2006.13212): Xception encoder, one grey channel in, one lesion logit out.

Module names and shapes are those of segmentation_models_pytorch's ``Unet("xception")``, so that a checkpoint trained
with that library loads with ``strict=True``. The encoder is Chollet's Xception (arXiv:1610.02357) with the padding of
its first two convolutions changed from 0 to 1, which makes every stage half the size of the one before.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

ENCODER_CHANNELS = (64, 128, 256, 728, 2048)
"""Channels of the five feature maps that the decoder sees, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's size."""

DECODER_CHANNELS = (256, 128, 64, 32, 16)

STRIDE = 32
"""Rows and columns of an input must be multiples of this."""


class SeparableConv2d(nn.Module):
    """A 3x3 convolution per channel, then a 1x1 convolution across channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, in, h, w) -> (n, out, h, w)."""
        return self.pointwise(self.conv1(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Separable convolutions with a residual path; ``stride`` 2 halves the size and needs a 1x1 convolution to
    follow.
    """

    def __init__(self, channels: tuple[int, ...], stride: int = 1, relu_first: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layers += [nn.ReLU(), SeparableConv2d(inputs, outputs), nn.BatchNorm2d(outputs)]
        if not relu_first:
            layers = layers[1:]
        if stride != 1:
            layers.append(nn.MaxPool2d(3, stride, 1))
            self.skip = nn.Conv2d(channels[0], channels[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(channels[-1])
        self.halves = stride != 1
        self.rep = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, first, h, w) -> (n, last, h / stride, w / stride)."""
        residual = self.skipbn(self.skip(x)) if self.halves else x
        return self.rep(x) + residual  # type: ignore[no-any-return]


class XceptionEncoder(nn.Module):
    """Xception without its classifier."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.block1 = Block((64, 128, 128), stride=2, relu_first=False)
        self.block2 = Block((128, 256, 256), stride=2)
        self.block3 = Block((256, 728, 728), stride=2)
        for number in range(4, 12):
            self.add_module(f"block{number}", Block((728, 728, 728, 728)))
        self.block12 = Block((728, 728, 1024), stride=2)
        self.conv3 = SeparableConv2d(1024, 1536)
        self.bn3 = nn.BatchNorm2d(1536)
        self.conv4 = SeparableConv2d(1536, 2048)
        self.bn4 = nn.BatchNorm2d(2048)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (n, c, h, w) -> the feature maps of :data:`ENCODER_CHANNELS`, largest first."""
        x = functional.relu(self.bn1(self.conv1(x)))
        half = functional.relu(self.bn2(self.conv2(x)))
        quarter = self.block1(half)
        eighth = self.block2(quarter)
        x = self.block3(eighth)
        for number in range(4, 12):
            x = self.get_submodule(f"block{number}")(x)
        sixteenth = x
        x = self.block12(sixteenth)
        x = functional.relu(self.bn3(self.conv3(x)))
        return [half, quarter, eighth, sixteenth, self.bn4(self.conv4(x))]  # the last one without ReLU, as published


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class DecoderBlock(nn.Module):
    """Doubles the size by nearest neighbour, takes in the encoder's features of that size, convolves twice."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn_relu(in_channels + skip_channels, out_channels)
        self.conv2 = _conv_bn_relu(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Features (n, in, h, w) and (n, skip, 2h, 2w) or None -> (n, out, 2h, 2w)."""
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))  # type: ignore[no-any-return]


class UnetDecoder(nn.Module):
    """From the encoder's five feature maps back to the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (ENCODER_CHANNELS[-1], *DECODER_CHANNELS[:-1])
        skips = (*reversed(ENCODER_CHANNELS[:-1]), 0)
        self.blocks = nn.ModuleList(
            DecoderBlock(*channels) for channels in zip(inputs, skips, DECODER_CHANNELS, strict=True)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Feature maps, largest first -> (n, 16, h, w)."""
        x = features[-1]
        skips: list[Tensor | None] = [*reversed(features[:-1]), None]
        for block, skip in zip(self.blocks, skips, strict=True):
            x = block(x, skip)
        return x


class LesionUnet(nn.Module):
    """Image float32 (n, c, h, w) in 0..1, lung window -> lesion logits float32 (n, 1, h, w); h and w are multiples of
    32.

    ``in_channels`` is 1 for ours; 3 accepts the stem of a network trained on grey images in three equal channels.
    """

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.encoder = XceptionEncoder(in_channels)
        self.decoder = UnetDecoder()
        self.segmentation_head = nn.Sequential(nn.Conv2d(DECODER_CHANNELS[-1], 1, 3, padding=1))
        _initialise(self.decoder)
        nn.init.xavier_uniform_(self.segmentation_head[0].weight)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """Lesion logits: positive where the network finds a lesion more likely than not."""
        return self.segmentation_head(self.decoder(self.encoder(image)))  # type: ignore[no-any-return]


def _initialise(decoder: nn.Module) -> None:
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
