"""What is asked for: masks, layouts, the exact call key, and the Problem that names a kind of call.

`Problem` is what every decision below is about; `CallKey` is the one call it came from. No tensor values are read here.
"""
