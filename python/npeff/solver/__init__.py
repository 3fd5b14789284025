"""The solver: ``W ≥ 0`` and vectors that minimise ``Σ_i ‖F_i − Σ_j W_ij C_j‖²``, for both kinds of Fishers.

``scaling`` prepares the rows, ``spaces`` multiplies by them, ``low_rank`` and ``diagonal`` are the two objectives and
their steps, ``subspace`` and ``search`` find good optima, ``problem`` ties them together with ``checkpoint``;
``published_algorithm`` is the yardstick.
"""
