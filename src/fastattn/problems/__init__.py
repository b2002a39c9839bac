"""What is asked for: masks, layouts, the exact call key, and the Problem that names a kind of call.

`Problem` is what every decision below is about; `CallKey` is the one call it came from. Of
tensors only masks and lengths are read, in each call anew.
"""
