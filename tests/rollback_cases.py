"""Factor models and their records, for tests of rollback."""

from __future__ import annotations

import numpy as np

from npeff.companions import rollback
from npeff.companions.rollback import ComplEx, DistMult, FactorModel, MatrixFactorization, Recipe, Record

N_ENTITIES, N_RELATIONS = 9, 3
MODELS = {
    "distmult": lambda: DistMult(N_ENTITIES, N_RELATIONS, 4).double(),
    "complex": lambda: ComplEx(N_ENTITIES, N_RELATIONS, 3).double(),
    "matrix": lambda: MatrixFactorization(7, N_ENTITIES, 4, scale=0.5).double(),
}


def examples_of(model: FactorModel, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(len(model.tables[table]), size=n) for table in model.columns], axis=1)


def fitted(kind: str, n: int = 30, **options) -> tuple[FactorModel, Record]:
    model = MODELS[kind]()
    record = rollback.fit(model, examples_of(model, n), Recipe(epochs=3, negatives=4), progress=False, **options)
    return model, record
