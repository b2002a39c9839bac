"""From a Problem to a Verdict: check every candidate's numbers (accuracy/), measure its memory, time it, choose.

Others use `tune_problem`. It writes no file, and the clock is an argument.
"""
