"""The version of fastattn. A Verdict made by another one is looked at anew: it may know other kernels."""

__version__ = "0.1.0"
