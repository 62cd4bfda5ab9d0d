"""Centred kernel alignment, and what the report says about layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import CompressionReport, GradualPruning
from lightning_compress.example_inputs import ExampleInputs
from lightning_compress.report.similarity import cka, gram, layer_grams, similarities
from tests.helpers import Crash, CrashAt, Net, StatefulLoader, held_out, same, seeded, trainer


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 3 with linear kernels, in the form on features: ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖), columns centred."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


@pytest.mark.parametrize("widths", [(5, 5), (3, 40), (100, 2)])
def test_is_the_papers_formula(widths: tuple[int, int]) -> None:
    x, y = (torch.randn(30, width, dtype=torch.float64) for width in widths)
    y[:, 0] += x[:, 0]
    assert cka(gram(x), gram(y)) == pytest.approx(reference(x.numpy(), y.numpy()), abs=1e-9)


def test_does_not_see_rotations_and_scale() -> None:
    x = torch.randn(20, 6, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert cka(gram(x), gram(7.0 * x @ q + 3.0)) == pytest.approx(1.0)
    assert np.isnan(cka(gram(x), gram(torch.ones(20, 4))))


def test_layers_of_another_width_can_be_compared() -> None:
    wide, narrow = (nn.Sequential(nn.Linear(4, w), nn.ReLU(), nn.Linear(w, 2)) for w in (8, 3))
    inputs = ExampleInputs((torch.randn(16, 4),))
    alike = similarities(layer_grams(wide, inputs), layer_grams(narrow, inputs))
    assert set(alike) == {"0", "2"}
    assert all(0.0 <= value <= 1.0 for value in alike.values())
    assert not wide[0]._forward_hooks


def test_the_report_says_how_alike_and_what_is_gone(tmp_path: Path) -> None:
    def run(folder: Path, extra: list = [], ckpt_path: Path | None = None) -> dict:  # noqa: B006
        module = seeded(Net)
        pruning = GradualPruning(0.5, granularity="channel", scope="layer", begin=0.3, end=0.7, every=2)
        report = CompressionReport(dir=str(folder), plots=False)
        fit = trainer(tmp_path, [pruning, report, *extra])
        fit.fit(module, StatefulLoader(), held_out(), ckpt_path=ckpt_path)
        figures = json.loads((folder / "report.json").read_text())
        return figures | {"weights": {name: p.detach() for name, p in module.named_parameters()}}

    figures = run(tmp_path / "whole")
    assert figures["similarity"]["step"] == 8  # the last validation before pruning began
    assert set(figures["similarity"]["layers"]) == {"net.0", "net.2", "net.4"}
    assert all(0.0 < value < 1.0 for value in figures["similarity"]["layers"].values())
    for row in figures["parameters"]:
        if row["name"] in ("net.0.weight", "net.2.weight"):
            gone = (figures["weights"][row["name"]] == 0).all(1).nonzero().flatten().tolist()
            assert row["zero_rows"] == gone
            assert len(gone) == 8
        else:
            assert row["zero_rows"] == []
    with pytest.raises(Crash):
        run(tmp_path / "broken", [CrashAt(17, tmp_path / "crash.ckpt")])
    torch.load(tmp_path / "crash.ckpt", weights_only=True)
    assert same(run(tmp_path / "on", ckpt_path=tmp_path / "crash.ckpt")["similarity"], figures["similarity"])


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    def fit(*callbacks: CompressionReport) -> Net:
        module = seeded(Net)
        module.net.insert(1, nn.BatchNorm1d(16))
        module.net.insert(2, nn.Dropout(0.5))
        run = trainer(tmp_path, [GradualPruning(0.5, begin=0.5, end=0.7), *callbacks])
        run.fit(module, StatefulLoader(), held_out())
        return module

    assert same(dict(fit().state_dict()), dict(fit(CompressionReport(dir=str(tmp_path), plots=False)).state_dict()))
