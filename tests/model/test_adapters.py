"""The examples of docs/models.md that need other libraries; no warnings for healthy models."""

import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def library(name, attribute):
    """A library that can be imported and is no folder of the same name; else skip."""
    try:
        found = importlib.import_module(name)
        if hasattr(found, attribute):
            return found
    except Exception as error:  # one that does not fit its own dependencies
        pytest.skip(f"{name}: {error}")
    pytest.skip(f"{name} is another module")


def example(title):
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```py\n(.*?)^```", section, re.S | re.M)


def names():
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 10)
    return {"af": af, "torch": torch, "data": data}


def run(title, **others):
    namespace = names() | others
    for block in example(title):
        exec(compile(block, title, "exec"), namespace)
    return namespace


def test_timm():
    library("timm", "create_model")
    data = TensorDataset(torch.rand(4, 3, 32, 32), torch.arange(4))
    run("timm", data=data)


def test_transformers():
    library("transformers", "ViTForImageClassification")
    found = run("Hugging Face transformers")
    assert found["text"].total == 12


def to_onnx(model, path):
    """Write an MLP as an exporter would, with a fixed batch of 12."""
    onnx = library("onnx", "load")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = {name.replace(".", "_"): value for name, value in model.state_dict().items()}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("Gemm", ["flat", "1_weight", "1_bias"], ["first"], transB=1),
            helper.make_node("Relu", ["first"], ["active"]),
            helper.make_node("Gemm", ["active", "3_weight", "3_bias"], ["z"], transB=1),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", kind, [12, 3, 8, 8])],
        [helper.make_tensor_value_info("z", kind, [12, 10])],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def test_onnx(tmp_path, monkeypatch):
    library("onnx2torch", "convert")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
    to_onnx(model, "model.onnx")
    found = run("ONNX")
    data, converted = found["data"], found["classifier"]
    assert torch.equal(af.accuracy(model, data).correct, af.accuracy(converted, data).correct)
    ball = {"eps": 4 / 255, "norm": "linf", "steps": 2}
    own, other = (af.robust_accuracy(m, data, **ball) for m in (model, converted))
    assert torch.equal(own.correct, other.correct)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def vision(name, size, **settings):
    timm = library("timm", "create_model")
    model = timm.create_model(name, pretrained=False, num_classes=10, **settings)
    return model, torch.rand(6, 3, size, size)


def language(kind):
    transformers = library("transformers", "ViTForImageClassification")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 64, "num_labels": 4}
    if kind == "ViT":
        config = transformers.ViTConfig(image_size=16, patch_size=8, **small)
        return transformers.ViTForImageClassification(config), torch.rand(6, 3, 16, 16)
    config = transformers.BertConfig(vocab_size=20, **small)
    return transformers.BertForSequenceClassification(config), torch.rand(6, 5, 32)


def from_robustbench(name):
    """A network of RobustBench as `load_model` makes it, before it downloads the weights.

    Run by hand: to import the package takes `autoattack` from its repository and setuptools<81.
    """
    zoo = library("robustbench.model_zoo", "model_dicts")
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    entries = zoo.model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]
    return entries[name]["model"](), torch.rand(6, 3, 32, 32)


MODELS = {
    "LSTM": lambda: (Recurrent(), torch.rand(6, 5, 4)),
    "timm ViT": lambda: vision("vit_tiny_patch16_224", 32, img_size=32, patch_size=8),
    "timm ConvNeXt": lambda: vision("convnext_atto", 64),
    "timm ResNet": lambda: vision("resnet18", 32),
    "timm MobileNet": lambda: vision("mobilenetv3_small_050", 32),
    "robustbench": lambda: from_robustbench("Rebuffi2021Fixing_R18_ddpm"),
    "transformers ViT": lambda: language("ViT"),
    "transformers BERT": lambda: language("BERT"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_no_warning_for_healthy_models(name, dtype):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model = model.to(dtype).eval()
    with torch.no_grad():
        out = model(inputs_embeds=x.to(dtype)) if "BERT" in name else model(x.to(dtype))
    y = getattr(out, "logits", out).argmax(1)
    data = TensorDataset(x, y)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", af.checks.ResultWarning)
        assert af.accuracy(model, data) == 1.0
        af.pgd(model, x, y, eps=0.01, norm="linf", steps=2)
        af.robust_accuracy(model, data, eps=0.01, norm="linf", steps=2)
        af.construct_det_dataset(model, data, eps=0.1, steps=2)
