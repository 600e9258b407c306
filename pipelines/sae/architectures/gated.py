"""Gated: one path decides which features are active, another how strongly (Rajamanoharan et al. 2024, "Improving Dictionary
Learning with Gated Sparse Autoencoders")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.sae.base import Codes, Losses, Objective, decoded
from pipelines.sae.l1_penalised import PenalisedSae


class GatedSae(PenalisedSae):
    """A feature is active where the gate (x − b_dec) · W_enc + b_gate is positive; its code is then
    relu((x − b_dec) · W_enc · exp(r_mag) + b_enc).

    The L1 term is `Objective.l1` times the mean of the gate's relu over all elements; it does not shrink the codes. An
    auxiliary term trains the gate: the squared error of the rows that the gate's relu reconstructs, the decoder held fixed.
    """

    architecture = "gated"
    in_units_of_x = (*PenalisedSae.in_units_of_x, "b_gate")
    feature_biases = ("b_enc", "b_gate")
    needs_scaled_rows = True
    l1_share = 1.0
    """Measured (d = 192, F = 1024, 400 steps): L0 7 for k = 8, between 22 and 46 for 32."""

    def __init__(self, d_model: int, n_features: int, k: int, *, seed: int = 0):
        super().__init__(d_model, n_features, k, seed=seed)
        self.b_gate = nn.Parameter(torch.zeros(n_features))
        self.r_mag = nn.Parameter(torch.zeros(n_features))

    @property
    def gate_bias(self) -> Tensor:
        return self.b_gate

    @torch.no_grad()
    def start(self, sample: Tensor) -> None:
        self.b_gate.copy_(self.starting_bias(sample))

    def training_codes(self, x: Tensor, kernel: str) -> Codes:
        return self.paths(x, kernel)[0]

    def paths(self, x: Tensor, kernel: str) -> tuple[Codes, Codes]:
        """The codes of rows (n, d_model), and the gate's relu at the same places."""
        gate, active = self.preactivations_above(x, self.b_gate, torch.zeros_like(self.b_gate), kernel)
        # `index_select`, not an index: threads add up the gradient of the latter in an order of their own each time.
        b_gate, stretch, b_enc = (
            of_features.index_select(0, active.features) for of_features in (self.b_gate, self.r_mag.exp(), self.b_enc)
        )
        magnitude = (gate - b_gate) * stretch + b_enc
        return Codes(magnitude.relu(), active), Codes(gate.relu(), active)

    def losses(self, x: Tensor, objective: Objective, dead: Tensor | None = None) -> Losses:
        codes, gate = self.paths(x, objective.kernel)
        reconstruction = self.reconstruct(codes, objective.kernel)
        of_gate = decoded(gate, self.W_dec.detach(), objective.kernel) + self.b_dec.detach()
        terms = {
            "mse": (reconstruction - x).square().mean(),
            "l1": objective.l1 * gate.values.sum() / (len(x) * self.n_features),
            "gate": (of_gate - x).square().mean(),
        }
        return self.completed(terms, x, reconstruction, codes, objective, dead)
