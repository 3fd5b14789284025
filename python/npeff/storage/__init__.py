"""Files: one HDF5 container, whole or not there at all, and what is checked of everything that is read.

``container`` and ``hdf5`` are the format; ``files`` writes atomically and locks; ``recognition`` says what stands at a
path. Everything that is read passes ``opening`` (what an HDF5 file stores), ``documents`` (JSON) or ``archives``
(``.npz``), and then ``fields``: the one check of arrays against the table that a format states of itself.
:mod:`npeff.fishers.file_format` states that of Fishers and Components.
"""
