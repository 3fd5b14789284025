"""SAFR: train transformers whose important tokens share few units, while tokens that interact may share them.

::

    L = L_CE + λ_imp L_imp + λ_inter L_inter − β H(mask)

    embeddings ──VMask──▶ x = r·e ──▶ importance_loss ┐
    attention  ─────────▶ A, C, J ──▶ interaction_loss ┴─▶ SAFRRegularizer.penalty   (hooks on any transformer)

Chang, Deng & Chen 2025, arXiv 2501.16374. See ``docs/companions/safr.md``.
"""

from npeff.companions.safr.capacity import CapacityMap, capacity_map, superposition_score
from npeff.companions.safr.regularizer import SAFRRegularizer, VMask, importance_loss, interaction_loss

__all__ = [
    "CapacityMap",
    "SAFRRegularizer",
    "VMask",
    "capacity_map",
    "importance_loss",
    "interaction_loss",
    "superposition_score",
]
