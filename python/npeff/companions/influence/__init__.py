"""Cross-loss influence functions: which training examples made a model what another loss, or a component, sees in it.

::

    train, train_loss ──▶ H ──solver──▶ H⁻¹∇L_test ──▶ scores (n_train, n_test) ──▶ top · group · removal
    test,  test_loss  ──▶ ∇L_test ───────┘                                    └──▶ unlearn, leave_out

``I(z, z_test) = −∇L_test(z_test)ᵀ H⁻¹ ∇L_train(z)`` (Silva, Chopra & Gombolay, AISTATS 2022, arXiv 2012.01685).
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npeff.companions.influence.association import Weat, weat, weat_effect
    from npeff.companions.influence.clustering import DeepEmbeddedClustering
    from npeff.companions.influence.coefficient import Coefficient, ComponentInfluence, component_influence
    from npeff.companions.influence.estimator import CrossLossInfluence
    from npeff.companions.influence.losses import cross_entropy, squared_error
    from npeff.companions.influence.minimising import Minimum, minimise
    from npeff.companions.influence.retraining import Retrained, leave_out
    from npeff.companions.influence.scores import Scores
    from npeff.companions.influence.skip_gram import SkipGram
    from npeff.companions.influence.solvers import (
        EKFAC,
        ConjugateGradients,
        EmpiricalFisher,
        Exact,
        GaussNewton,
        Identity,
        LiSSA,
    )
    from npeff.companions.influence.unlearning import Unlearned, unlearn

__all__ = [
    "EKFAC",
    "Coefficient",
    "ComponentInfluence",
    "ConjugateGradients",
    "CrossLossInfluence",
    "DeepEmbeddedClustering",
    "EmpiricalFisher",
    "Exact",
    "GaussNewton",
    "Identity",
    "LiSSA",
    "Minimum",
    "Retrained",
    "Scores",
    "SkipGram",
    "Unlearned",
    "Weat",
    "component_influence",
    "cross_entropy",
    "leave_out",
    "minimise",
    "squared_error",
    "unlearn",
    "weat",
    "weat_effect",
]

_MODULES = {
    "clustering": ("DeepEmbeddedClustering",),
    "coefficient": ("Coefficient", "ComponentInfluence", "component_influence"),
    "estimator": ("CrossLossInfluence",),
    "losses": ("cross_entropy", "squared_error"),
    "minimising": ("Minimum", "minimise"),
    "retraining": ("Retrained", "leave_out"),
    "scores": ("Scores",),
    "skip_gram": ("SkipGram",),
    "solvers": (
        "EKFAC",
        "ConjugateGradients",
        "EmpiricalFisher",
        "Exact",
        "GaussNewton",
        "Identity",
        "LiSSA",
    ),
    "unlearning": ("Unlearned", "unlearn"),
    "association": ("Weat", "weat", "weat_effect"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the home of a public name.

    Raises:
        AttributeError: There is no such name.
    """
    if name in _HOMES:
        home = _import_module(f"{__name__}.{_HOMES[name]}")
        for public in _MODULES[_HOMES[name]]:
            globals()[public] = getattr(home, public)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names."""
    return sorted(__all__)
