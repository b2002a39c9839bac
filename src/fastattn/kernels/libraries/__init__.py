"""The kernel libraries that may be installed: what they are called, whether they are here, whether they can be imported."""
