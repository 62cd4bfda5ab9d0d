"""The language model of the examples: the held-out text, the model, and the whole script on a tiny setting."""

from __future__ import annotations

import functools
import math
import sysconfig
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from examples import language_model
from examples.language_model import CONTEXT, GROUP, NO_LABEL, Decoder, LanguageModel, StandardLibrary
from lightning_compress.export import load_compressed


def text_of(dataset: torch.utils.data.TensorDataset) -> Tensor:
    """The bytes that are to be predicted."""
    _, labels = dataset.tensors
    return labels[labels != NO_LABEL]


def test_whole_files_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):  # each file of a byte of its own
        (tmp_path / f"{number:02}.py").write_bytes(bytes([65 + number]) * (100 + 10 * number))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "deep.py").write_text("?" * 500)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    data = StandardLibrary()
    data.setup("fit")
    assert set(text_of(data.validation).tolist()) == {65, 75}
    assert set(text_of(data.training).tolist()) == set(range(65, 85)) - {65, 75}
    assert len(text_of(data.validation)) == 99 + 199  # nothing comes before a file's first byte
    tokens, labels = data.validation.tensors
    assert tokens.shape == labels.shape == (3, CONTEXT)


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    with pytest.raises(FileNotFoundError, match="0 Python sources"):
        StandardLibrary().setup("fit")


def test_the_label_is_the_byte_that_comes_next(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(bytes(range(200)))
    tokens, labels = language_model.windows([tmp_path / "a.py"]).tensors
    counted = labels != NO_LABEL
    assert torch.equal(labels[counted], tokens[counted] + 1)
    assert counted.sum() == 199


@pytest.mark.parametrize("width", ["48", "0"])
def test_a_width_without_whole_groups_is_refused(width: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        language_model.main(["--width", width])
    assert f"multiple of {GROUP}, got {width}" in capsys.readouterr().err


def test_nothing_to_the_right_is_seen() -> None:
    torch.manual_seed(0)
    net, tokens = Decoder(32, 1).eval(), torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = 0
    difference = (net(tokens) - net(changed)).abs().amax(2)[0]
    assert difference[:12].max() == 0.0
    assert difference[12:].min() > 0.0


def test_the_script_on_a_tiny_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language_model, "speeds", functools.partial(language_model.speeds, seconds=0.05))
    tiny = ["--steps", "12", "--width", "32", "--layers", "1", "--held-out", "32", "--start", "random"]
    results = language_model.main([*tiny, "--output", str(tmp_path)])
    assert "perplexity in PyTorch" in capsys.readouterr().out

    data = StandardLibrary(held_out=32)
    data.setup("validate")
    for folder, group, values, kind in (
        ("4_bits", GROUP, 15, onnx.TensorProto.INT4),
        ("8_bits", None, 255, onnx.TensorProto.INT8),
    ):
        loaded = load_compressed(tmp_path / folder / "model.safetensors", LanguageModel(32, 1)).eval()
        assert loaded.net.head.weight is loaded.net.embedding.weight
        for layer in loaded.modules():
            if isinstance(layer, nn.Linear):
                assert int((layer.weight.view(-1, 4) != 0).sum(1).max()) == 2
                scales = layer.weight if group is None else layer.weight.reshape(-1, group)
                assert max(len(row.unique()) for row in scales) <= values
        stored = onnx.load(tmp_path / folder / "model.onnx").graph.initializer
        assert {tensor.data_type for tensor in stored if math.prod(tensor.dims) >= 1024} == {kind}

    # the 4-bit model has float activations: the plain model with its weights is the model that was trained
    loaded = load_compressed(tmp_path / "4_bits" / "model.safetensors", LanguageModel(32, 1)).eval()
    tokens, labels = data.validation.tensors
    with torch.no_grad():
        expected = math.exp(F.cross_entropy(loaded(tokens)[labels != NO_LABEL], labels[labels != NO_LABEL]))
    four_bits = results["2:4, 4-bit groups"]
    assert four_bits.perplexity == pytest.approx(expected, rel=1e-4)
    assert four_bits.onnx_perplexity == pytest.approx(expected, rel=5e-3)  # onnxruntime rounds activations there
    assert four_bits.perplexity < 256

    assert language_model.complaints("", four_bits) == []
    with torch.no_grad():
        four_bits.module.net.blocks[0].mlp[0].weight[0, :GROUP] = torch.arange(1.0, GROUP + 1)
    four_bits.onnx_perplexity *= 1.02
    assert [line.split()[0] for line in language_model.complaints("x:", four_bits)] == ["x::"] * 3
