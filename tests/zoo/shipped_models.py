"""The models that torch tests its own quantization with, as the wheel ships them.

`MODELS[name]` is a function that builds the model and one that makes the positional arguments of a batch of n.
"""

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.testing._internal import common_quantization as shipped


def normal(*shape):
    return lambda n: (torch.randn(n, *shape),)


def sequence(n):
    """Recurrent layers there have the batch second."""
    return (torch.randn(6, n, 2),)


def ids(n):
    return (torch.randint(0, 10, (n, 7)),)


def bags(n):
    return torch.randint(0, 10, (3 * n,)), torch.arange(0, 3 * n, 3)


VECTOR, IMAGE, POINT = normal(5), normal(3, 10, 10), normal(3, 8, 8)

INPUTS = {
    "SingleLayerLinearModel": VECTOR,
    "AnnotatedSingleLayerLinearModel": VECTOR,
    "SingleLayerLinearDynamicModel": VECTOR,
    "LinearAddModel": VECTOR,
    "RNNDynamicModel(LSTM)": sequence,
    "RNNDynamicModel(GRU)": sequence,
    "RNNCellDynamicModel(LSTMCell)": normal(2),
    "RNNCellDynamicModel(GRUCell)": normal(2),
    "RNNCellDynamicModel(RNNReLU)": normal(2),
    "RNNCellDynamicModel(RNNTanh)": normal(2),
    "LSTMwithHiddenDynamicModel": lambda n: (*sequence(n), (torch.randn(1, n, 2), torch.randn(1, n, 2))),
    "ConvModel": IMAGE,
    "ConvTransposeModel": IMAGE,
    "AnnotatedConvModel(fbgemm)": IMAGE,
    "AnnotatedConvTransposeModel(qnnpack)": IMAGE,
    "ConvBnModel": IMAGE,
    "AnnotatedConvBnModel": IMAGE,
    "ConvBnReLUModel": IMAGE,
    "AnnotatedConvBnReLUModel": IMAGE,
    "TwoLayerConvModel": IMAGE,
    "TwoLayerLinearModel": VECTOR,
    "LinearModelWithSubmodule": VECTOR,
    "AnnotatedTwoLayerLinearModel": VECTOR,
    "ActivationsTestModel": VECTOR,
    "LinearReluModel": VECTOR,
    "LinearReluLinearModel": VECTOR,
    "LinearReluAddModel": VECTOR,
    "LinearBnLeakyReluModel": VECTOR,
    "LinearTanhModel": VECTOR,
    "ConvBnAddReluModel": lambda n: (torch.randn(n, 5, 3, 3), torch.randn(n, 5, 2, 2)),
    "ConvReluModel": IMAGE,
    "ConvReluConvModel": IMAGE,
    "ConvReluAddModel": IMAGE,
    "NormalizationTestModel": VECTOR,
    "NestedModel": VECTOR,
    "AnnotatedNestedModel(fbgemm)": VECTOR,
    "AnnotatedSubNestedModel": VECTOR,
    "AnnotatedCustomConfigNestedModel": VECTOR,
    "QuantSubModel": VECTOR,
    "InnerModule": VECTOR,
    "FunctionalLinear": VECTOR,
    "SingleLayerFunctionalLinearModel": VECTOR,
    "TwoLayerFunctionalLinearModel": VECTOR,
    "FunctionalLinearAddModel": VECTOR,
    "FunctionalLinearReluModel": VECTOR,
    "FunctionalLinearReluLinearModel": VECTOR,
    "FunctionalConv2d": IMAGE,
    "SingleLayerFunctionalConvModel": IMAGE,
    "TwoLayerFunctionalConvModel": IMAGE,
    "FunctionalConvReluModel": IMAGE,
    "FunctionalConvReluConvModel": IMAGE,
    "SkipQuantModel": VECTOR,
    "AnnotatedSkipQuantModel(fbgemm)": VECTOR,
    "QuantStubModel": VECTOR,
    "ManualLinearQATModel(fbgemm)": VECTOR,
    "ManualDropoutQATModel(fbgemm)": VECTOR,
    "ManualLinearDynamicQATModel": VECTOR,
    "ManualConvLinearQATModel": IMAGE,
    "ManualConvLinearSymmQATModel": IMAGE,
    "ManualEmbeddingBagLinear": ids,
    "DeFusedEmbeddingBagLinear": ids,
    "SubModelForFusion": normal(2, 6, 6),
    "SubModelWithoutFusion": normal(2, 6, 6),
    "ModelForFusion(None)": normal(3, 1, 19),
    "ConvBNReLU": IMAGE,
    "ModelWithSequentialFusion": IMAGE,
    "ModelForFusionWithBias": normal(3, 10, 10),
    "ModelForLinearBNFusion": normal(20),
    "ModelForConvTransposeBNFusion": normal(3, 6),
    "ModelWithFunctionals": lambda n: (torch.randn(n, 4),),
    "ResNetBase": IMAGE,
    "ModelMultipleOps": POINT,
    "ModelMultipleOpsNoAvgPool": POINT,
    "EmbeddingBagModule": lambda n: (
        torch.randint(0, 10, (3 * n,)),
        torch.arange(0, 3 * n + 1, 3),
        torch.rand(3 * n),
    ),
    "EmbeddingModule": ids,
    "EmbeddingWithStaticLinear": lambda n: (*bags(n), torch.randn(n, 4)),
    "SparseNNModel": lambda n: (*bags(n), torch.randn(n, 4)),
    "TestHelperModules.ControlFlow": lambda n: (
        torch.ones(2, 2),
        torch.tensor([False]),
        torch.tensor([False]),
        torch.ones(2, 2),
    ),
    "TestHelperModules.Conv2dPropAnnotaton": normal(3, 5, 5),
    "TestHelperModules.Conv2dWithObsSharingOps": normal(3, 5, 5),
    "TestHelperModules.Conv2dWithTwoLinearPermute": normal(3, 5, 5),
    "TestHelperModules.Conv2dWithTwoLinear": lambda n: (torch.randn(2, 3, 4, 4),),
    "TestHelperModules.Conv2dThenConv1d": lambda n: (torch.randn(1, 3, 5, 5),),
    "TestHelperModules.ConvLinearWPermute": normal(3, 5, 5),
    "TestHelperModules.TwoLinearModule": normal(8),
    "TestHelperModules.ConvMaxPool2d": normal(2, 5, 5),
    "TestHelperModules.ConvWithAdaptiveAvgPool2d": normal(3, 5, 5),
    "TestHelperModules.ConvWithBNRelu(True)": normal(3, 5, 5),
    "TestHelperModules.ConvTWithBNRelu(True)": normal(3, 5, 5),
    "TestHelperModules.Conv2dWithCat": lambda n: (torch.randn(n, 3, 5, 5), torch.randn(n, 3, 5, 5)),
    "TestHelperModules.Conv2dWithTwoCat": lambda n: (
        torch.randn(n, 3, 5, 5),
        torch.randn(n, 3, 5, 5),
        torch.randn(n, 6, 3, 3),
        torch.randn(n, 6, 3, 3),
    ),
    "TestHelperModules.Conv2dWithSplit": normal(3, 6, 6),
    "TestHelperModules.ThreeAdd": lambda n: tuple(torch.randn(4, n, 3)),
    "TestHelperModules.EmbeddingModule": ids,
    "TestHelperModules.EmbeddingConvLinearModule": ids,
    "TestHelperModules.AddInplaceAdd": lambda n: tuple(torch.randn(2, n, 3)),
    "TestHelperModules.MulInplaceMul": lambda n: tuple(torch.randn(2, n, 3)),
    "TestHelperModules.AddMulScalar": normal(3),
    "TestHelperModules.ConvBnReLU2dAndLinearReLU": normal(3, 5, 5),
    "TestHelperModules.GroupwiseConv2d": normal(4, 10, 10),
    "TestHelperModules.LinearReluModel": VECTOR,
}


def maker(name):
    """A function that builds `shipped.<name>`; what stands in parentheses is the argument."""
    path, _, argument = name.rstrip(")").partition("(")

    def make():
        cls = shipped
        for part in path.split("."):
            cls = getattr(cls, part)
        arguments = [{"True": True, "None": None}.get(argument, argument)] if argument else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(*arguments)

    return make


MODELS = {name: (maker(name), inputs) for name, inputs in INPUTS.items()}
