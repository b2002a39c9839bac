"""What fastattn runs in: settings, the device, torch's switches and private names, errors, words for people.

Imports the standard library and torch alone. Everyone may use all of it.
"""
