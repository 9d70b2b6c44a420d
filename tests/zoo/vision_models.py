"""Architectures as torchvision, timm and papers define them, in small sizes; batch norms have seen a few batches.

`MODELS[name]` is a function that builds the model and one that makes the positional arguments of a batch of n.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormActivation(nn.Sequential):
    """torchvision.ops.misc.Conv2dNormActivation."""

    def __init__(self, inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU, dilation=1):
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2 * dilation, dilation, groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([activation(inplace=True)] if activation else []))


class SqueezeExcitation(nn.Module):
    """torchvision.ops.misc.SqueezeExcitation."""

    def __init__(self, channels, squeezed, activation=nn.ReLU, scale_activation=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = activation(), scale_activation()

    def _scale(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self._scale(x) * x


class Classifier(nn.Module):
    """Features, global average, `torch.flatten`, a classifier: how torchvision's models end."""

    def __init__(self, features, classifier):
        super().__init__()
        self.features, self.avgpool, self.classifier = features, nn.AdaptiveAvgPool2d((1, 1)), classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


def alexnet():
    features = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
    )
    head = [nn.Dropout(), nn.Linear(32, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True)]
    return Classifier(features, nn.Sequential(*head, nn.Linear(64, 10)))


def vgg_bn():
    layers, inputs = [], 3
    for v in [8, "M", 16, "M", 32, 32, "M"]:
        if v == "M":
            layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
        else:
            layers += [nn.Conv2d(inputs, v, kernel_size=3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
            inputs = v
    head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(True), nn.Dropout(p=0.5), nn.Linear(64, 10))
    return Classifier(nn.Sequential(*layers), head)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
        self.relu, self.downsample = nn.ReLU(inplace=True), downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block, layers, groups=1):
        super().__init__()
        self.inplanes, self.groups = 8, groups
        self.conv1 = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 8, layers[0])
        self.layer2 = self._make_layer(block, 16, layers[1], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16 * block.expansion, 10)

    def _make_layer(self, block, planes, blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, 1, stride, bias=False),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample, self.groups)]
        self.inplanes = planes * block.expansion
        return nn.Sequential(*layers, *(block(self.inplanes, planes, groups=self.groups) for _ in range(1, blocks)))

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class InvertedResidual(nn.Module):
    """MobileNetV2's block, MobileNetV3's and EfficientNet's with squeeze-and-excitation, MNASNet's with kernel 5."""

    def __init__(self, inputs, outputs, stride, expand, kernel=3, activation=nn.ReLU6, excite=None):
        super().__init__()
        hidden = round(inputs * expand)
        self.use_res_connect = stride == 1 and inputs == outputs
        layers = [ConvNormActivation(inputs, hidden, 1, activation=activation)] if expand != 1 else []
        layers += [ConvNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation=activation)]
        layers += [excite(hidden)] if excite else []
        layers += [ConvNormActivation(hidden, outputs, 1, activation=None)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


def mobile(activation, head, kernel=3, excite=None):
    block = partial(InvertedResidual, kernel=kernel, activation=activation, excite=excite)
    features = [ConvNormActivation(3, 8, stride=2, activation=activation), block(8, 8, 1, 1), block(8, 16, 2, 3)]
    features += [block(16, 16, 1, 3), ConvNormActivation(16, 32, 1, activation=activation)]
    return Classifier(nn.Sequential(*features), head)


def mobilenet_v2():
    return mobile(nn.ReLU6, nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10)))


def mobilenet_v3():
    head = nn.Sequential(
        nn.Linear(32, 64), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(64, 10)
    )
    return mobile(nn.Hardswish, head, 5, lambda c: SqueezeExcitation(c, 8, scale_activation=nn.Hardsigmoid))


def efficientnet():
    head = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(32, 10))
    return mobile(nn.SiLU, head, 3, lambda c: SqueezeExcitation(c, 4, activation=partial(nn.SiLU, inplace=True)))


class MNASNet(nn.Module):
    def __init__(self):
        super().__init__()
        block = partial(InvertedResidual, kernel=5, activation=nn.ReLU)
        self.layers = nn.Sequential(ConvNormActivation(3, 8, stride=2), block(8, 16, 2, 3), block(16, 16, 1, 3))
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        x = x.mean([2, 3])  # as torchvision has it, where other models pool
        return self.classifier(x)


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)
        self.relu1, self.relu2, self.drop_rate = nn.ReLU(inplace=True), nn.ReLU(inplace=True), 0.1

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        prev_features = [input] if isinstance(input, Tensor) else input
        bottleneck_output = self.conv1(self.relu1(self.norm1(torch.cat(prev_features, 1))))
        new_features = self.conv2(self.relu2(self.norm2(bottleneck_output)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers, inputs, growth):
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, 8, 7, 2, 3, bias=False),
                norm0=nn.BatchNorm2d(8),
                relu0=nn.ReLU(inplace=True),
                denseblock1=DenseBlock(3, 8, 4),
                transition=nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(True), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2, 2)),
                norm5=nn.BatchNorm2d(10),
            )
        )
        self.classifier = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


class Fire(nn.Module):
    def __init__(self, inputs, squeezed, expanded):
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(inputs, squeezed, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeezed, expanded, 1), nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


def squeezenet():
    """A model without any linear."""
    stem = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True)]
    head = [nn.Dropout(p=0.5), nn.Conv2d(16, 10, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]
    return nn.Sequential(*stem, Fire(8, 4, 8), Fire(16, 4, 8), *head)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleUnit(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch2 = nn.Sequential(
            ConvNormActivation(half, half, 1),
            ConvNormActivation(half, half, 3, groups=half, activation=None),
            ConvNormActivation(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        out = torch.cat((x1, self.branch2(x2)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.maxpool = ConvNormActivation(3, 16, stride=2), nn.MaxPool2d(3, 2, 1)
        self.stage2, self.conv5 = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16)), ConvNormActivation(16, 32, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage2(self.maxpool(self.conv1(x))))
        x = x.mean([2, 3])  # globalpool
        return self.fc(x)


class Inception(nn.Module):
    def __init__(self, inputs, each):
        super().__init__()
        conv = ConvNormActivation
        self.branch1 = conv(inputs, each, 1)
        self.branch2 = nn.Sequential(conv(inputs, each, 1), conv(each, each, 3))
        self.branch3 = nn.Sequential(conv(inputs, each, 1), conv(each, each, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(inputs, each, 1))

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class GoogLeNet(nn.Module):
    """With the transformed input and the auxiliary classifier that only training uses."""

    def __init__(self):
        super().__init__()
        self.transform_input = True
        self.conv1, self.inception3a, self.inception3b = ConvNormActivation(3, 8), Inception(8, 4), Inception(16, 4)
        self.aux1: nn.Module | None = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2), nn.Linear(16, 10)

    def _transform_input(self, x: Tensor) -> Tensor:
        if self.transform_input:
            x_ch0 = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
            x_ch1 = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
            x_ch2 = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
            x = torch.cat((x_ch0, x_ch1, x_ch2), 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.inception3a(self.conv1(self._transform_input(x)))
        aux: Tensor | None = None
        if self.aux1 is not None and self.training:
            aux = self.aux1(x)
        x = torch.flatten(self.avgpool(self.inception3b(x)), 1)
        x = self.fc(self.dropout(x))
        if aux is not None:
            return x, aux
        return x


class RegNetBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.proj = None
        if inputs != outputs or stride != 1:
            self.proj = ConvNormActivation(inputs, outputs, 1, stride, activation=None)
        self.f = nn.Sequential(
            ConvNormActivation(inputs, outputs, 1),
            ConvNormActivation(outputs, outputs, 3, stride, groups=outputs // 8),
            SqueezeExcitation(outputs, 4),
            ConvNormActivation(outputs, outputs, 1, activation=None),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


def regnet():
    features = nn.Sequential(ConvNormActivation(3, 8, stride=2), RegNetBlock(8, 16, 2), RegNetBlock(16, 16, 1))
    return Classifier(features, nn.Linear(16, 10))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class CNBlock(nn.Module):
    """torchvision's ConvNeXt block; its stochastic depth is the identity in eval mode."""

    def __init__(self, dim):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, bias=True),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), 0.5))

    def forward(self, input: Tensor) -> Tensor:
        result = self.layer_scale * self.block(input)
        result += input
        return result


def convnext():
    features = nn.Sequential(nn.Conv2d(3, 16, 4, 4), LayerNorm2d(16), CNBlock(16), CNBlock(16))
    return Classifier(features, nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 10)))


class EncoderBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention, self.dropout = nn.MultiheadAttention(dim, 4, batch_first=True), nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim))

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x)
        x = x + input
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """torchvision's, on nn.MultiheadAttention."""

    def __init__(self, image_size=16, patch_size=4, dim=32):
        super().__init__()
        self.image_size, self.patch_size, self.hidden_dim = image_size, patch_size, dim
        self.conv_proj, self.class_token = (
            nn.Conv2d(3, dim, patch_size, patch_size),
            nn.Parameter(torch.randn(1, 1, dim)),
        )
        self.pos_embedding = nn.Parameter(torch.empty(1, (image_size // patch_size) ** 2 + 1, dim).normal_(std=0.2))
        self.encoder, self.ln = nn.Sequential(EncoderBlock(dim), EncoderBlock(dim)), nn.LayerNorm(dim)
        self.heads = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        p = self.patch_size
        torch._assert(h == self.image_size, f"Wrong image height! Expected {self.image_size} but got {h}!")
        x = self.conv_proj(x).reshape(n, self.hidden_dim, (h // p) * (w // p)).permute(0, 2, 1)
        batch_class_token = self.class_token.expand(n, -1, -1)
        x = torch.cat([batch_class_token, x], dim=1) + self.pos_embedding
        return self.heads(self.ln(self.encoder(x))[:, 0])


class MixerBlock(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.mlp_channels = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class ResMlpBlock(nn.Module):
    """timm's ResMLP: an affine instead of a norm, a linear across tokens, layer scale."""

    def __init__(self, dim, tokens):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.rand(1, 1, dim) + 0.5), nn.Parameter(torch.zeros(1, 1, dim))
        self.linear_tokens = nn.Linear(tokens, tokens)
        self.mlp_channels = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.ls1 = nn.Parameter(0.5 * torch.ones(dim))

    def affine(self, x):
        return torch.addcmul(self.beta, self.alpha, x)

    def forward(self, x):
        x = x + self.ls1 * self.linear_tokens(self.affine(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.affine(x))


class SpatialGatingUnit(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(dim // 2), nn.Linear(tokens, tokens)
        nn.init.ones_(self.proj.bias)

    def forward(self, x):
        u, v = x.chunk(2, dim=-1)
        v = self.proj(self.norm(v).transpose(-1, -2))
        return u * v.transpose(-1, -2)


class GmlpBlock(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)
        self.act, self.gate = nn.GELU(), SpatialGatingUnit(4 * dim, tokens)

    def forward(self, x):
        return x + self.fc2(self.gate(self.act(self.fc1(self.norm(x)))))


class Patches(nn.Module):
    """Patches of an image through blocks: a MLP-Mixer and its relatives."""

    def __init__(self, block, dim=32, patch=4, tokens=16):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, patch, patch)
        self.blocks, self.norm = nn.Sequential(*(block(dim, tokens) for _ in range(2))), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class Residual(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


def convmixer():
    """As in the paper: a model that fits a tweet."""
    dim = 16
    block = [
        Residual(nn.Conv2d(dim, dim, 5, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim)),
        nn.Conv2d(dim, dim, 1),
        nn.GELU(),
        nn.BatchNorm2d(dim),
    ]
    stem = [nn.Conv2d(3, dim, 4, 4), nn.GELU(), nn.BatchNorm2d(dim)]
    return nn.Sequential(*stem, nn.Sequential(*block), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, 10))


class DoubleConv(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(ConvNormActivation(inputs, outputs), ConvNormActivation(outputs, outputs))


class UNet(nn.Module):
    """milesial's Pytorch-UNet: transposed convolutions up, padding by the difference in size, cat."""

    def __init__(self):
        super().__init__()
        self.inc, self.down1 = DoubleConv(3, 8), nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16))
        self.down2, self.up1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(16, 32)), nn.ConvTranspose2d(32, 16, 2, 2)
        self.conv1, self.up2, self.conv2 = DoubleConv(32, 16), nn.ConvTranspose2d(16, 8, 2, 2), DoubleConv(16, 8)
        self.outc = nn.Conv2d(8, 2, 1)

    def up(self, up, conv, x1, x2):
        x1 = up(x1)
        diff_y, diff_x = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return conv(torch.cat([x2, x1], dim=1))

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.up(self.up1, self.conv1, self.down2(x2), x2)
        return self.outc(self.up(self.up2, self.conv2, x, x1))


class ASPPPooling(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DeepLab(nn.Module):
    """torchvision's segmentation model: a dict as output, atrous convolutions, interpolation to the input's size."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(ConvNormActivation(3, 8, stride=2), ConvNormActivation(8, 16, stride=2))
        pooling = ASPPPooling(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.convs = nn.ModuleList([*(ConvNormActivation(16, 8, 3, dilation=d) for d in (1, 2, 3)), pooling])
        self.project = nn.Sequential(ConvNormActivation(32, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        features = self.backbone(x)
        res = [conv(features) for conv in self.convs]
        result = OrderedDict()
        x = self.project(torch.cat(res, dim=1))
        result["out"] = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
        return result


class TemporalBlock(nn.Module):
    """locuslab's TCN: causal dilated convolutions under weight norm, chomped."""

    def __init__(self, inputs, outputs, dilation):
        super().__init__()
        self.padding = 2 * dilation
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(inputs, outputs, 3, 1, self.padding, dilation))
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        out = F.relu(self.conv(x)[:, :, : -self.padding].contiguous())
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.tcn = nn.Sequential(TemporalBlock(4, 16, 1), TemporalBlock(16, 16, 2))
        self.linear = nn.Linear(16, 10)

    def forward(self, inputs):
        return F.log_softmax(self.linear(self.tcn(inputs)[:, :, -1]), dim=1)


class WaveNet(nn.Module):
    """Gated dilated convolutions with residual and skip connections."""

    def __init__(self, channels=16):
        super().__init__()
        self.start = nn.Conv1d(1, channels, 1)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(3))
        self.mixes = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, 16, 1), nn.ReLU(), nn.Conv1d(16, 8, 1))

    def forward(self, x):
        x, skips = self.start(x), 0
        for i, (gate, mix) in enumerate(zip(self.gates, self.mixes, strict=True)):
            filtered, gated = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            residual, skip = mix(torch.tanh(filtered) * torch.sigmoid(gated)).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.end(skips)


class TNet(nn.Module):
    """PointNet's alignment network, which predicts a matrix and adds the identity."""

    def __init__(self, k):
        super().__init__()
        self.k = k
        self.conv1, self.bn1 = nn.Conv1d(k, 32, 1), nn.BatchNorm1d(32)
        self.fc1, self.bn2, self.fc2 = nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, k * k)

    def forward(self, x):
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 32)
        x = self.fc2(F.relu(self.bn2(self.fc1(x))))
        iden = torch.eye(self.k).flatten().view(1, self.k * self.k).repeat(batchsize, 1)
        return (x + iden).view(-1, self.k, self.k)


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stn, self.conv1, self.bn1 = TNet(3), nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32)
        self.fc1, self.bn2, self.fc2 = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)
        self.dropout = nn.Dropout(p=0.3)

    def forward(self, x):
        trans = self.stn(x)
        x = torch.bmm(x.transpose(2, 1), trans).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.max(x, 2)[0]
        x = F.relu(self.bn2(self.dropout(self.fc1(x))))
        return F.log_softmax(self.fc2(x), dim=1), trans


class Crepe(nn.Module):
    """torchcrepe: explicit padding, batch norm behind relu, a linear on the flattened rest."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv1_BN = nn.Conv2d(1, 16, (32, 1), (4, 1)), nn.BatchNorm2d(16)
        self.conv2, self.conv2_BN = nn.Conv2d(16, 8, (16, 1), (1, 1)), nn.BatchNorm2d(8)
        self.in_features, self.classifier = 8 * 16, nn.Linear(8 * 16, 36)

    def layer(self, x, conv, batch_norm, padding):
        x = F.pad(x, padding)
        x = conv(x)
        x = F.relu(x)
        x = batch_norm(x)
        return F.max_pool2d(x, (2, 1), (2, 1))

    def forward(self, x):
        x = x[:, None, :, None]
        x = self.layer(x, self.conv1, self.conv1_BN, (0, 0, 14, 14))
        x = self.layer(x, self.conv2, self.conv2_BN, (0, 0, 7, 8))
        x = x.permute(0, 2, 1, 3).reshape(-1, self.in_features)
        return torch.sigmoid(self.classifier(x))


class DLRM(nn.Module):
    """facebookresearch/dlrm: embedding bags, two MLPs, pairwise dot products."""

    def __init__(self):
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="sum") for _ in range(3))
        self.bot_l = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.top_l = nn.Sequential(nn.Linear(8 + 6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())

    def forward(self, dense, sparse):
        x = self.bot_l(dense)
        ly = [bag(sparse[:, k]) for k, bag in enumerate(self.emb_l)]
        (batch_size, d) = x.shape
        t = torch.cat([x, *ly], dim=1).view((batch_size, -1, d))
        z = torch.bmm(t, torch.transpose(t, 1, 2))
        _, ni, nj = z.shape
        li = torch.tensor([i for i in range(ni) for j in range(i)])
        lj = torch.tensor([j for i in range(nj) for j in range(i)])
        return self.top_l(torch.cat([x, z[:, li, lj]], dim=1))


class VAE(nn.Module):
    """pytorch/examples, with the mean instead of a sample."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.fc3, self.fc4 = nn.Linear(8, 32), nn.Linear(32, 64)

    def reparameterize(self, mu, logvar):
        return mu + torch.randn_like(logvar) * torch.exp(0.5 * logvar) if self.training else mu

    def forward(self, x):
        h1 = F.relu(self.fc1(x.view(-1, 64)))
        mu, logvar = self.fc21(h1), self.fc22(h1)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(self.reparameterize(mu, logvar))))), mu, logvar


class Tagger(nn.Module):
    """pytorch/tutorials: a two-layer bidirectional LSTM over embeddings."""

    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.hidden2tag = nn.Linear(32, 7)

    def forward(self, sentence):
        lstm_out, _ = self.lstm(self.word_embeddings(sentence))
        return F.log_softmax(self.hidden2tag(lstm_out), dim=-1)


def encoder_stack():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)


def prepared(make, inputs):
    """`make` and `inputs`, with batch norms that have seen a few batches."""

    def seasoned():
        model = make().train()
        with torch.no_grad():
            for _ in range(4):
                model(*inputs(8))
        return model.eval()

    return seasoned, inputs


def images(n):
    return (torch.randn(n, 3, 32, 32),)


def small_images(n):
    return (torch.randn(n, 3, 16, 16),)


def of_shape(*shape):
    return lambda n: (torch.randn(n, *shape),)


MODELS = {
    name: prepared(make, inputs)
    for name, (make, inputs) in {
        "AlexNet": (alexnet, images),
        "VGG": (vgg_bn, images),
        "ResNet-18": (lambda: ResNet(BasicBlock, [2, 2]), images),
        "ResNet-50": (lambda: ResNet(Bottleneck, [2, 2]), images),
        "ResNeXt": (lambda: ResNet(Bottleneck, [1, 1], groups=4), images),
        "MobileNetV2": (mobilenet_v2, images),
        "MobileNetV3": (mobilenet_v3, images),
        "EfficientNet": (efficientnet, images),
        "MNASNet": (MNASNet, images),
        "DenseNet": (DenseNet, images),
        "SqueezeNet": (squeezenet, images),
        "ShuffleNetV2": (ShuffleNetV2, images),
        "GoogLeNet": (GoogLeNet, small_images),
        "RegNet": (regnet, images),
        "ConvNeXt": (convnext, images),
        "VisionTransformer": (VisionTransformer, small_images),
        "MLP-Mixer": (lambda: Patches(MixerBlock), small_images),
        "ResMLP": (lambda: Patches(ResMlpBlock), small_images),
        "gMLP": (lambda: Patches(GmlpBlock), small_images),
        "ConvMixer": (convmixer, images),
        "U-Net": (UNet, small_images),
        "DeepLab": (DeepLab, small_images),
        "TCN": (TCN, of_shape(4, 20)),
        "WaveNet": (WaveNet, of_shape(1, 32)),
        "PointNet": (PointNet, of_shape(3, 32)),
        "CREPE": (Crepe, of_shape(256)),
        "DLRM": (DLRM, lambda n: (torch.randn(n, 6), torch.randint(0, 20, (n, 3, 2)))),
        "VAE": (VAE, lambda n: (torch.rand(n, 8, 8),)),
        "LSTM tagger": (Tagger, lambda n: (torch.randint(0, 50, (n, 9)),)),
        "TransformerEncoder": (encoder_stack, of_shape(10, 32)),
    }.items()
}
