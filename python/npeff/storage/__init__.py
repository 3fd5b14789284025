"""Files: one HDF5 container, written whole or not at all, and the checks of everything that is read.

``files`` writes atomically and locks; ``writing`` writes the format; ``hdf5`` reads the structure of a file and
``container`` its contents, and says what stands at a path. Everything that is read passes ``checks``: JSON, and arrays
against the table that a format states of itself. :mod:`npeff.fishers.file_format` states that of Fishers.
"""
