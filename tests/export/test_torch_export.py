"""Files of ``torch.export`` that run without this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export import export_pt2
from tests.quantization.networks import Encoder, Tied, mlp, quantized

RUN = """
import sys, torch
torch.set_num_threads(1)
for name in sys.argv[1:]:
    program = torch.export.load(name + ".pt2")
    inputs, expected = torch.load(name + ".pt")
    torch.testing.assert_close(program.module()(*inputs), expected, atol=1e-5, rtol=0.0)
assert not any(name.startswith("lightning") for name in sys.modules)
"""


def test_files_run_without_this_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    names = []
    net: nn.Module
    for name, net, inputs in (("encoder", Encoder(), x.view(16, 4, 16)), ("tied", Tied(), x.abs().long())):
        net = quantized(net, inputs)
        path = export_pt2(net, inputs[:1], tmp_path / f"{name}.pt2")
        torch.save(((inputs,), net(inputs).detach()), path.with_suffix(".pt"))
        names.append(str(path.with_suffix("")))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *names], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_weights_are_integers_and_words_are_kept(tmp_path: Path) -> None:
    path = export_pt2(quantized(mlp(), torch.randn(8, 64)), torch.randn(2, 64), tmp_path / "a.pt2", metadata={"a": "b"})
    words = {"metadata": ""}
    program = torch.export.load(path, extra_files=words)
    assert words == {"metadata": '{"a": "b"}'}
    large = {tensor.dtype for tensor in program.state_dict.values() if tensor.dim() > 1}
    assert large == {torch.int8}
    assert not any(tensor.any() for tensor in program.example_inputs[0])  # the file shows no data


def test_a_failure_says_why(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match=r"torch\.export cannot follow Odd"):
        export_pt2(Odd(), torch.randn(2, 3), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
