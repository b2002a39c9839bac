"""Which kernels can do a Problem, what must be done to the caller's tensors for each, and the Call that does it.

Others use `candidates.decisions`, `binding.bind` and `default_choice`; nothing is timed or stored here.
"""
