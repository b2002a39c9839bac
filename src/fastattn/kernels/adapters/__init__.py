"""One file for each library: rows of data, and a `load()` each that returns the library's entry point.

An adapter imports `fastattn.kernels` alone, and its library only inside `load()`. Nobody imports an adapter: `registry` lists
their rows.
"""
