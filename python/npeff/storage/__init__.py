"""Fishers and components on disk: one HDF5 container, written in shards that survive a kill, and the published layouts.

``store`` opens and saves; ``shards`` and ``parts`` write while Fishers are computed; ``container`` and ``hdf5`` are the
format itself; ``published_*`` read and write the layouts of Matena & Raffel. Everything that is read passes ``opening``
(what an HDF5 file stores), ``documents`` (JSON) or ``archives`` (``.npz``), and then ``fields``: the one check of
arrays against the table that a format states of itself (``contents`` those of Fishers and Components).
"""

from npeff.storage.store import (
    check_components_target,
    describe,
    load,
    refuse_npeff_file,
    save_components,
    save_fishers,
)

__all__ = [
    "check_components_target",
    "describe",
    "load",
    "refuse_npeff_file",
    "save_components",
    "save_fishers",
]
