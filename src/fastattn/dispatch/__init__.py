"""What happens in a call: a guard that matches leads to its Call; a miss decides what serves, and publishes a guard.

The public functions live here: attention, sdpa and patch, plan, explain and report, tune, sync, stats, clear; and KVCache.
"""
